/* The inner loops for Cortex-M4 and M7: two products an instruction (SMLAD) on pairs of 16-bit numbers.
 *
 * A word of four codes gives the pairs (0, 2) and (1, 3) in one instruction each: SXTB16 for weights, SXTAB16 for
 * activations, which subtracts the zero point on the way. Four rows of activations lie interleaved, so that one LDM brings the
 * same pair of all of them: 13 instructions for 16 products. int4 weights are used times 16, which leaves their sign where it
 * is; the rescaling takes the 4 bits back. Written as assembly because a loop like this needs all 14 registers. */
#ifndef NS_DSP_H
#define NS_DSP_H

#include "ns_int.h"

#if NS_DSP

NS_INLINE uint32_t ns_load4(const void *p) {
  uint32_t v;
  memcpy(&v, p, sizeof v);
  return v;
}

/* Pairs of codes 0 and 2, and 1 and 3, of a word, each plus the pair `to`. */
NS_INLINE uint32_t ns_even(uint32_t to, uint32_t word) {
  uint32_t r;
  __asm__("sxtab16 %0, %1, %2" : "=r"(r) : "r"(to), "r"(word));
  return r;
}
NS_INLINE uint32_t ns_odd(uint32_t to, uint32_t word) {
  uint32_t r;
  __asm__("sxtab16 %0, %1, %2, ror #8" : "=r"(r) : "r"(to), "r"(word));
  return r;
}
NS_INLINE uint32_t ns_bottoms(uint32_t low, uint32_t high) {
  uint32_t r;
  __asm__("pkhbt %0, %1, %2, lsl #16" : "=r"(r) : "r"(low), "r"(high));
  return r;
}
NS_INLINE uint32_t ns_tops(uint32_t low, uint32_t high) {
  uint32_t r;
  __asm__("pkhtb %0, %1, %2, asr #16" : "=r"(r) : "r"(high), "r"(low));
  return r;
}

/* SMMLA, ASR, SSAT. */
NS_INLINE int8_t ns_requant_quick(int32_t total, int32_t m, int32_t addend, int32_t shift) {
  int32_t r;
  __asm__("smmla %0, %1, %2, %3" : "=r"(r) : "r"(total), "r"(m), "r"(addend));
  r >>= shift;
  __asm__("ssat %0, #8, %0" : "+r"(r));
  return (int8_t)r;
}

/* What the loop over output channels reads, in this order: five words before its products, six after them. */
typedef struct {
  const void *x;           /* four interleaved rows */
  int32_t bias;            /* bytes from m to the bias */
  int32_t advance, bytes;  /* from the end of a channel's last word of weights to the next channel; bytes of whole words */
  int32_t entry;           /* groups of weights & 3: where the first turn of the inner loop begins */
  const int32_t *end, *m;  /* m of the channel after the last, of this one */
  int8_t *y;
  int32_t addend, shift, step; /* step: from row to row of y */
  const void *w;
  int32_t up; /* bits that sums are shifted left by before they are rescaled */
} ns_channels;

#define NS_NAKED static __attribute__((naked, noinline, unused))

/* r0 the structure, r1 weights, r2 activations, r3-r6 a pair of each row, r7 end of the weights, r8-r11 sums */
#define NS_MAC4                                 \
  "smlad r8, lr, r3, r8\n"                      \
  "smlad r9, lr, r4, r9\n"                      \
  "smlad r10, lr, r5, r10\n"                    \
  "smlad r11, lr, r6, r11\n"
#define NS_PAIR4(turn) "ldmia r2!, {r3-r6}\n" "sxtb16 lr, r12" turn "\n" NS_MAC4
#define NS_GROUP4 "ldr r12, [r1], #4\n" NS_PAIR4("") NS_PAIR4(", ror #8")
#define NS_CHANNELS_BEGIN                       \
  "push {r4-r11, lr}\n"                         \
  "ldr r1, [r0, #44]\n"                         \
  "ldr r3, [r0, #24]\n"                         \
  "9:\n"                                        \
  "ldmia r0!, {r2, r4, r5, r6, r12}\n"          \
  "add r1, r1, r5\n"                            \
  "add r7, r1, r6\n"
#define NS_OUT4(sum)                            \
  "smmla " sum ", " sum ", lr, r5\n"            \
  "asr " sum ", r6\n"                           \
  "ssat " sum ", #8, " sum "\n"
#define NS_UP4                                  \
  "ldr r7, [r0, #28]\n"                         \
  "cbz r7, 8f\n"                                \
  "lsl r8, r8, r7\n"                            \
  "lsl r9, r9, r7\n"                            \
  "lsl r10, r10, r7\n"                          \
  "lsl r11, r11, r7\n"                          \
  "8:\n"
#define NS_CHANNELS_END                         \
  "ldm r0, {r2-r6, r12}\n"                      \
  "ldr lr, [r3], #4\n"                          \
  NS_OUT4("r8") NS_OUT4("r9") NS_OUT4("r10") NS_OUT4("r11") \
  "strb r9, [r4, r12]\n"                        \
  "strb r10, [r4, r12, lsl #1]\n"               \
  "add r12, r12, r12, lsl #1\n"                 \
  "strb r11, [r4, r12]\n"                       \
  "strb r8, [r4], #1\n"                         \
  "strd r3, r4, [r0, #4]\n"                     \
  "sub r0, r0, #20\n"                           \
  "cmp r3, r2\n"                                \
  "bne 9b\n"                                    \
  "pop {r4-r11, pc}\n"

/* All output channels of four rows. */
NS_NAKED void ns_channels_w8(ns_channels *c) {
  __asm__(NS_CHANNELS_BEGIN
          "ldr r8, [r3, r4]\n"
          "mov r9, r8\n"
          "mov r10, r8\n"
          "mov r11, r8\n"
          "tbb [pc, r12]\n"
          "0: .byte (1f-0b)/2, (4f-0b)/2, (3f-0b)/2, (2f-0b)/2\n"
          "1:\n" NS_GROUP4 "2:\n" NS_GROUP4 "3:\n" NS_GROUP4 "4:\n" NS_GROUP4
          "cmp r1, r7\n"
          "bne 1b\n" NS_UP4 NS_CHANNELS_END);
  (void)c;
}

/* With int4 weights the sums are 4 bits up, and so is the bias. */
NS_NAKED void ns_channels_w4(ns_channels *c) {
  __asm__(NS_CHANNELS_BEGIN
          "ldr r8, [r3, r4]\n"
          "lsl r8, r8, #4\n"
          "mov r9, r8\n"
          "mov r10, r8\n"
          "mov r11, r8\n"
          "1:\n"
          "ldr r12, [r1]\n"
          "and r12, r12, #0xf0f0f0f0\n" NS_PAIR4("") NS_PAIR4(", ror #8")
          "ldr r12, [r1], #4\n"
          "lsl r12, r12, #4\n"
          "and r12, r12, #0xf0f0f0f0\n" NS_PAIR4("") NS_PAIR4(", ror #8")
          "cmp r1, r7\n"
          "bne 1b\n" NS_CHANNELS_END);
  (void)c;
}

/* The same for one row, two channels at a time; `count` channels, an even number, from m to end. */
typedef struct {
  const void *x;
  int32_t bias, advance, stride, bytes, entry; /* stride: from channel to channel of the weights */
  int32_t addend, shift;
  const int32_t *end, *m;
  int8_t *y;
  const void *w;
  int32_t up;
} ns_row;

/* r0 the structure, r1 and r2 weights, r3 activations, r8 and r9 sums, r11 end of the weights, r12 m */
#define NS_GROUP1                               \
  "ldmia r3!, {r4, r5}\n"                       \
  "ldr r6, [r1], #4\n"                          \
  "ldr r7, [r2], #4\n"                          \
  "sxtb16 r10, r6\n"                            \
  "smlad r8, r10, r4, r8\n"                     \
  "sxtb16 r10, r6, ror #8\n"                    \
  "smlad r8, r10, r5, r8\n"                     \
  "sxtb16 r10, r7\n"                            \
  "smlad r9, r10, r4, r9\n"                     \
  "sxtb16 r10, r7, ror #8\n"                    \
  "smlad r9, r10, r5, r9\n"

NS_NAKED void ns_row_w8(ns_row *row) {
  __asm__("push {r4-r11, lr}\n"
          "ldr r1, [r0, #44]\n"
          "ldr r12, [r0, #36]\n"
          "9:\n"
          "ldm r0, {r3-r7, r10}\n"
          "add r1, r1, r5\n"
          "add r2, r1, r6\n"
          "add r11, r1, r7\n"
          "add r4, r4, r12\n"
          "ldrd r8, r9, [r4]\n"
          "tbb [pc, r10]\n"
          "0: .byte (1f-0b)/2, (4f-0b)/2, (3f-0b)/2, (2f-0b)/2\n"
          "1:\n" NS_GROUP1 "2:\n" NS_GROUP1 "3:\n" NS_GROUP1 "4:\n" NS_GROUP1
          "cmp r1, r11\n"
          "bne 1b\n"
          "ldr r11, [r0, #48]\n"
          "lsl r8, r8, r11\n"
          "lsl r9, r9, r11\n"
          "ldrd r4, r5, [r12], #8\n"
          "ldrd r6, r7, [r0, #24]\n"
          "ldr r10, [r0, #40]\n"
          "smmla r8, r8, r4, r6\n"
          "smmla r9, r9, r5, r6\n"
          "asr r8, r8, r7\n"
          "asr r9, r9, r7\n"
          "ssat r8, #8, r8\n"
          "ssat r9, #8, r9\n"
          "strb r8, [r10], #1\n"
          "strb r9, [r10], #1\n"
          "ldr r4, [r0, #32]\n"
          "str r10, [r0, #40]\n"
          "cmp r12, r4\n"
          "bne 9b\n"
          "pop {r4-r11, pc}\n");
  (void)row;
}

/* The sum of the products of one row of a block, whose words lie `lanes` apart. */
NS_INLINE int32_t ns_mac(const int8_t *w, const uint32_t *x, int32_t lanes, int32_t groups, const int32_t w4) {
  int32_t sum = 0;
  for (int32_t i = 0; i < groups; i++, w += 4) {
    const uint32_t v = ns_load4(w), top = 0xf0f0f0f0u;
    const int32_t pairs[4] = {(int32_t)ns_even(0, w4 ? v & top : v), (int32_t)ns_odd(0, w4 ? v & top : v),
                              (int32_t)ns_even(0, v << 4 & top), (int32_t)ns_odd(0, v << 4 & top)};
    for (int32_t j = 0; j < (w4 ? 4 : 2); j++, x += lanes) sum = __smlad(pairs[j], (int32_t)*x, sum);
  }
  return w4 ? sum >> 4 : sum;
}

#endif
#endif
