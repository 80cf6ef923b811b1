/* What newlib asks of an operating system, for firmware that uses printf, fopen or malloc; linked only where the C library
 * needs it. The heap is what variables leave of RAM, and how much of it was taken is reported. */
#include <errno.h>
#include <sys/stat.h>

#include "board.h"
#include "semihosting.h"

#undef errno
extern int errno;

extern char ns_heap_start[], ns_heap_end[]; /* set by the linker script */

enum { STREAMS = 3 }; /* descriptors 0 to 2; a file's is its handle + 3 */

int _write(int file, const char *from, int bytes) {
  return (int)ns_write(file < STREAMS ? ns_console() : file - STREAMS, from, (size_t)bytes);
}

int _read(int file, char *to, int bytes) { return file < STREAMS ? 0 : (int)ns_read(file - STREAMS, to, (size_t)bytes); }

int _open(const char *name, int flags, int mode) {
  (void)mode;
  int handle = ns_open(name, (flags & 3) == 0 ? "rb" : flags & 8 ? "ab" : "wb");
  return handle < 0 ? -1 : handle + STREAMS;
}

int _close(int file) {
  if (file >= STREAMS) ns_close(file - STREAMS);
  return 0;
}

int _fstat(int file, struct stat *about) {
  about->st_mode = file < STREAMS ? S_IFCHR : S_IFREG;
  about->st_blksize = 0;
  return 0;
}

int _isatty(int file) { return file < STREAMS; }

int _lseek(int file, int offset, int from) {
  enum { SYS_SEEK = 0x0a };
  if (file < STREAMS) return 0;
  const uint32_t block[2] = {(uint32_t)(file - STREAMS), (uint32_t)offset};
  if (from != 0 || ns_semihosting(SYS_SEEK, block) != 0) { /* the host knows absolute positions only */
    errno = EINVAL;
    return -1;
  }
  return offset;
}

void *_sbrk(int bytes) {
  char *end = ns_heap_start + ns_heap_used;
  if (bytes < 0 || (size_t)bytes > (size_t)(ns_heap_end - end)) {
    errno = ENOMEM;
    return (void *)-1;
  }
  ns_heap_used += (uint32_t)bytes;
  return end;
}

void _exit(int code) { ns_exit(code); }

int _getpid(void) { return 1; }

int _kill(int process, int signal) {
  (void)process;
  (void)signal;
  ns_exit(134); /* abort() comes here */
}
