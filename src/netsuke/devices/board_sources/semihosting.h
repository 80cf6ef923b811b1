/* Shared by the board's own sources only. */
#ifndef NS_SEMIHOSTING_H
#define NS_SEMIHOSTING_H

#include <stdint.h>

uint32_t ns_semihosting(uint32_t operation, const void *block);
/* The handle of the host's standard output. */
int ns_console(void);
/* Bytes of the heap that malloc has taken. */
extern uint32_t ns_heap_used;

#endif
