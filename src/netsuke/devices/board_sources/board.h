/* What firmware on the emulated board may call: files and text of the host through semihosting, and a clock that counts
 * instructions. Nothing here allocates; strings end with 0; names of files are relative to the folder of the run. */
#ifndef NS_BOARD_H
#define NS_BOARD_H

#include <stddef.h>
#include <stdint.h>

/* Instructions since main() began, in steps of 40: the timer runs at 25 MHz, and one instruction takes 1 ns. */
uint64_t ns_instructions(void);

/* A handle, or -1; mode as for fopen: "rb", "wb", "ab". */
int ns_open(const char *name, const char *mode);
/* Bytes read or written: fewer than asked for at the end of a file or when the host refuses. */
size_t ns_read(int file, void *to, size_t bytes);
size_t ns_write(int file, const void *from, size_t bytes);
void ns_close(int file);
/* Bytes in an open file, or -1. */
long ns_length(int file);

void ns_print(const char *text);
/* "label value\n", decimal */
void ns_print_count(const char *label, uint64_t value);

/* Ends the run: reports instructions and the stack's high-water mark, then stops the machine with this code. */
void ns_exit(int code) __attribute__((noreturn));

#endif
