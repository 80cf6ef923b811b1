/* Requests to the host (Arm's semihosting, breakpoint 0xAB): files, text, the command line, the end of the run. */
#include "semihosting.h"

#include "board.h"

enum { SYS_OPEN = 0x01, SYS_CLOSE = 0x02, SYS_WRITE = 0x05, SYS_READ = 0x06, SYS_FLEN = 0x0c };

uint32_t ns_semihosting(uint32_t operation, const void *block) {
  register uint32_t r0 __asm__("r0") = operation;
  register const void *r1 __asm__("r1") = block;
  __asm__ volatile("bkpt 0xab" : "+r"(r0) : "r"(r1) : "memory");
  return r0;
}

static size_t length(const char *text) {
  size_t n = 0;
  while (text[n]) n++;
  return n;
}

int ns_open(const char *name, const char *mode) {
  uint32_t code = mode[0] == 'w' ? 4 : mode[0] == 'a' ? 8 : 0;
  for (const char *m = mode + 1; mode[0] && *m; m++) code += *m == 'b' ? 1 : *m == '+' ? 2 : 0;
  const uint32_t block[3] = {(uint32_t)name, code, (uint32_t)length(name)};
  return (int)ns_semihosting(SYS_OPEN, block);
}

/* Both calls answer with the bytes that were NOT moved. */
static size_t moved(uint32_t operation, int file, uint32_t memory, size_t bytes) {
  const uint32_t block[3] = {(uint32_t)file, memory, (uint32_t)bytes};
  uint32_t left = ns_semihosting(operation, block);
  return left <= bytes ? bytes - left : 0;
}

size_t ns_read(int file, void *to, size_t bytes) { return moved(SYS_READ, file, (uint32_t)to, bytes); }

size_t ns_write(int file, const void *from, size_t bytes) { return moved(SYS_WRITE, file, (uint32_t)from, bytes); }

void ns_close(int file) {
  const uint32_t block[1] = {(uint32_t)file};
  ns_semihosting(SYS_CLOSE, block);
}

long ns_length(int file) {
  const uint32_t block[1] = {(uint32_t)file};
  return (long)(int32_t)ns_semihosting(SYS_FLEN, block);
}

int ns_console(void) {
  static int console = -1;
  if (console < 0) console = ns_open(":tt", "w"); /* the name that stands for the host's standard output */
  return console;
}

void ns_print(const char *text) { ns_write(ns_console(), text, length(text)); }

void ns_print_count(const char *label, uint64_t value) {
  char digits[24];
  int at = sizeof digits;
  digits[--at] = 0;
  digits[--at] = '\n';
  do digits[--at] = (char)('0' + value % 10);
  while (value /= 10);
  digits[--at] = ' ';
  ns_print(label);
  ns_print(digits + at);
}
