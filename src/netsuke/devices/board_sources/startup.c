/* From reset to main() and back: FPU on, memory protected, stack painted, variables set, instructions counted.
 *
 * Memory as the linker script lays it out: the stack lies at the bottom of RAM, so that an overflow leaves RAM instead of
 * running into variables; it is the process stack, and faults are handled on a small stack of their own. The memory
 * protection unit allows the flash to be read, RAM up to the device's limit, and the timers; everything else faults.
 * The machine has 4 MB of each: a device's limits exist only through this and the linker.
 *
 * Two 32-bit timers at 25 MHz. Timer 0 counts; under -icount shift=0 an instruction takes 1 ns, a tick is 40
 * instructions, and the timer runs for 1.7e11 of them. Timer 1 ends a run at a limit, if one is given. */
#include <stdint.h>

#include "board.h"
#include "semihosting.h"

typedef struct {
  volatile uint32_t control, value, reload, interrupt;
} timer;

#define TIMER0 ((timer *)0x40000000u)
#define TIMER1 ((timer *)0x40001000u)
#define REGISTER(address) (*(volatile uint32_t *)(address))
#define CPACR REGISTER(0xe000ed88u)
#define SHCSR REGISTER(0xe000ed24u)
#define CFSR REGISTER(0xe000ed28u)
#define MMFAR REGISTER(0xe000ed34u)
#define BFAR REGISTER(0xe000ed38u)
#define MPU_CTRL REGISTER(0xe000ed94u)
#define MPU_RNR REGISTER(0xe000ed98u)
#define MPU_RBAR REGISTER(0xe000ed9cu)
#define MPU_RASR REGISTER(0xe000eda0u)
#define NVIC_ISER REGISTER(0xe000e100u)

enum { PAINT = 0x5a5aa5a5, TICK = 40, SYS_GET_CMDLINE = 0x15, SYS_EXIT_EXTENDED = 0x20, EXITED = 0x20026 };
enum { ENDED = 0, FAULT = 1, LIMIT = 2 };              /* Report.how, read by board.py */
enum { CODE_FAULT = 97, CODE_LIMIT = 98 };             /* exit codes of runs that did not end by themselves */
enum { ARGUMENTS = 16, LINE = 256 };

typedef struct {
  uint32_t how, code, stack_peak, heap_peak, status, address, pc;
  uint64_t instructions;
} Report;

extern uint32_t ns_stack_bottom[], ns_stack_top[], ns_data_start[], ns_data_end[], ns_bss_start[], ns_bss_end[];
extern const uint32_t ns_data_stored[];
extern char ns_ram_bytes[]; /* its address is the value that the linker script sets */

int main(int argc, char **argv);
void ns_start(void);
void ns_fault(const uint32_t *frame);
static void ns_limit(void);

uint32_t ns_heap_used;
static uint32_t fault_stack[160]; /* room for the report and the semihosting calls */

uint64_t ns_instructions(void) { return (uint64_t)(0xffffffffu - TIMER0->value) * TICK; }

static void __attribute__((noreturn)) end(Report *report) {
  const uint32_t *p = ns_stack_bottom;
  while (p < ns_stack_top && *p == PAINT) p++;
  report->stack_peak = (uint32_t)((const char *)ns_stack_top - (const char *)p);
  report->heap_peak = ns_heap_used;
  int file = ns_open("netsuke.report", "wb");
  ns_write(file, report, sizeof *report);
  ns_close(file);
  const uint32_t block[2] = {EXITED, report->code};
  for (;;) ns_semihosting(SYS_EXIT_EXTENDED, block);
}

void ns_exit(int code) {
  Report report = {.how = ENDED, .code = (uint32_t)code, .instructions = ns_instructions()};
  end(&report);
}

void ns_fault(const uint32_t *frame) {
  uint32_t status = CFSR, unstacked = status & 0x1010; /* MSTKERR, STKERR: the frame was not written */
  uint32_t address = status & 0x80 ? MMFAR : status & 0x8000 ? BFAR : (uint32_t)frame;
  Report report = {.how = FAULT, .code = CODE_FAULT, .status = status, .address = address,
                   .pc = unstacked ? 0 : frame[6], .instructions = ns_instructions()};
  end(&report);
}

static void ns_limit(void) {
  Report report = {.how = LIMIT, .code = CODE_LIMIT, .instructions = ns_instructions()};
  end(&report);
}

static void __attribute__((naked)) fault(void) {
  __asm__ volatile("tst lr, #4\n ite eq\n mrseq r0, msp\n mrsne r0, psp\n b ns_fault\n");
}

static void __attribute__((naked)) reset(void) {
  __asm__ volatile(
      "ldr r0, =ns_stack_top\n msr psp, r0\n movs r0, #2\n msr control, r0\n isb\n" /* thread mode on the process stack */
      "b ns_start\n");
}

/* 16 of the core, then interrupts, of which timer 1's is number 9 and the only one. */
__attribute__((section(".vectors"), used)) static const struct {
  uint32_t *stack;
  void (*handler[15 + 10])(void); /* handler[n] is exception n + 1 */
} vectors = {fault_stack + sizeof fault_stack / sizeof *fault_stack,
             {[0] = reset, [1] = fault, [2] = fault, [3] = fault, [4] = fault, [5] = fault, [15 + 9] = ns_limit}};

static void region(uint32_t number, uint32_t base, uint32_t log2_size, uint32_t off, uint32_t access) {
  MPU_RNR = number;
  MPU_RBAR = base;
  MPU_RASR = access | off << 8 | (log2_size - 1) << 1 | 1;
}

/* Allows `bytes` from `base` on (aligned to 4 MB, a multiple of 128): regions of 4 MB, 512 KB, 64 KB, 8 KB and 1 KB, of
 * which the first eighths are on. Returns the next free region. */
static uint32_t allow(uint32_t number, uint32_t base, uint32_t bytes, uint32_t access) {
  for (uint32_t log2_size = 22; log2_size >= 10 && bytes; log2_size -= 3) {
    uint32_t eighths = bytes >> (log2_size - 3);
    if (!eighths) continue;
    region(number++, base, log2_size, eighths >= 8 ? 0 : 0xffu << eighths & 0xff, access);
    base += eighths << (log2_size - 3);
    bytes -= eighths << (log2_size - 3);
  }
  return number;
}

static void protect(void) {
  const uint32_t read_only = 6u << 24, read_write = 3u << 24 | 1u << 28 /* never executed */;
  region(0, 0, 22, 0, read_only);
  uint32_t next = allow(1, 0x20000000u, (uint32_t)ns_ram_bytes, read_write);
  region(next, (uint32_t)TIMER0, 13, 0, read_write);
  SHCSR |= 7u << 16; /* memory, bus and usage faults have handlers of their own */
  MPU_CTRL = 1;      /* no default map: what no region allows is forbidden */
  __asm__ volatile("dsb\n isb");
}

static uint32_t hexadecimal(const char *text) {
  uint32_t value = 0;
  for (; *text; text++) value = value << 4 | (uint32_t)(*text >= 'a' ? *text - 'a' + 10 : *text - '0');
  return value;
}

/* The command line is "LIMIT argument…": ticks until the run is ended, hexadecimal, 0 for none. */
static int arguments(char *line, char **argv) {
  struct {
    char *text;
    uint32_t bytes;
  } block = {line, LINE};
  int n = 0;
  line[0] = 0;
  ns_semihosting(SYS_GET_CMDLINE, &block);
  for (char *p = line; *p && n < ARGUMENTS;) {
    argv[n++] = p;
    while (*p && *p != ' ') p++;
    if (*p) *p++ = 0;
  }
  return n;
}

void ns_start(void) {
  static char line[LINE];
  static char *argv[ARGUMENTS + 1];
  CPACR |= 0xfu << 20; /* the floating-point unit */
  __asm__ volatile("dsb\n isb");
  volatile uint32_t *here;
  __asm__ volatile("mov %0, sp" : "=r"(here));
  for (volatile uint32_t *p = ns_stack_bottom; p < here; p++) *p = PAINT;
  const uint32_t *from = ns_data_stored;
  for (uint32_t *to = ns_data_start; to < ns_data_end; to++) *to = *from++;
  for (uint32_t *to = ns_bss_start; to < ns_bss_end; to++) *to = 0;
  protect();
  int argc = arguments(line, argv);
  uint32_t limit = argc ? hexadecimal(argv[0]) : 0;
  if (limit) {
    TIMER1->value = TIMER1->reload = limit;
    NVIC_ISER = 1u << 9;
    TIMER1->control = 9;
  }
  TIMER0->value = TIMER0->reload = 0xffffffffu;
  TIMER0->control = 1;
  ns_exit(main(argc > 0 ? argc - 1 : 0, argv + 1));
}
