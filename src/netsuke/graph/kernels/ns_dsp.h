/* The inner loops for Cortex-M4 and M7: two products an instruction (SMLAD) on pairs of 16-bit numbers.
 *
 * A word of four codes gives the pairs (0, 2) and (1, 3) in one instruction each: SXTB16 for weights, SXTAB16 for
 * activations, which subtracts the zero point on the way. Four rows of activations lie interleaved, so that one LDM brings the
 * same pair of all of them: 13 instructions for 16 products. int4 weights are used times 16, which leaves their sign where it
 * is; the sum is divided again. Written as assembly because a loop like this needs all 14 registers. */
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
          "bne 1b\n" NS_CHANNELS_END);
  (void)c;
}

/* With int4 weights the sums are 16 times as large until the bias is added. */
NS_NAKED void ns_channels_w4(ns_channels *c) {
  __asm__(NS_CHANNELS_BEGIN
          "mov r8, #0\n"
          "mov r9, #0\n"
          "mov r10, #0\n"
          "mov r11, #0\n"
          "1:\n"
          "ldr r12, [r1]\n"
          "and r12, r12, #0xf0f0f0f0\n" NS_PAIR4("") NS_PAIR4(", ror #8")
          "ldr r12, [r1], #4\n"
          "lsl r12, r12, #4\n"
          "and r12, r12, #0xf0f0f0f0\n" NS_PAIR4("") NS_PAIR4(", ror #8")
          "cmp r1, r7\n"
          "bne 1b\n"
          "ldr r3, [r0, #4]\n"
          "ldr r4, [r0, #-16]\n"
          "ldr r4, [r3, r4]\n"
          "add r8, r4, r8, asr #4\n"
          "add r9, r4, r9, asr #4\n"
          "add r10, r4, r10, asr #4\n"
          "add r11, r4, r11, asr #4\n" NS_CHANNELS_END);
  (void)c;
}

/* The sum of the products of one of four interleaved rows. */
NS_INLINE int32_t ns_mac(const int8_t *w, const uint32_t *x, int32_t groups, const int32_t w4) {
  int32_t sum = 0;
  for (int32_t i = 0; i < groups; i++, w += 4) {
    const uint32_t v = ns_load4(w), top = 0xf0f0f0f0u;
    if (w4) {
      sum = __smlad((int32_t)ns_even(0, v & top), (int32_t)x[0], sum);
      sum = __smlad((int32_t)ns_odd(0, v & top), (int32_t)x[4], sum);
      sum = __smlad((int32_t)ns_even(0, v << 4 & top), (int32_t)x[8], sum);
      sum = __smlad((int32_t)ns_odd(0, v << 4 & top), (int32_t)x[12], sum);
      x += 16;
    } else {
      sum = __smlad((int32_t)ns_even(0, v), (int32_t)x[0], sum);
      sum = __smlad((int32_t)ns_odd(0, v), (int32_t)x[4], sum);
      x += 8;
    }
  }
  return w4 ? sum >> 4 : sum;
}

#define NS_GROUP1                               \
  "ldmia %[x]!, {r3-r4}\n"                      \
  "ldr %[v], [%[w]], #4\n"                      \
  "ldr %[s], [%[u]], #4\n"                      \
  "sxtb16 %[t], %[v]\n"                         \
  "smlad %[a], %[t], r3, %[a]\n"                \
  "sxtb16 %[t], %[v], ror #8\n"                 \
  "smlad %[a], %[t], r4, %[a]\n"                \
  "sxtb16 %[t], %[s]\n"                         \
  "smlad %[b], %[t], r3, %[b]\n"                \
  "sxtb16 %[t], %[s], ror #8\n"                 \
  "smlad %[b], %[t], r4, %[b]\n"

/* One row of activations with two rows of weights, w and u. */
NS_INLINE void ns_mac1(int32_t acc[2], const int8_t *w, const int8_t *u, const uint32_t *x, int32_t groups) {
  int32_t a = acc[0], b = acc[1], t, s, v = groups & 3;
  __asm__ volatile(
      "tbb [pc, %[v]]\n"
      "0: .byte (1f-0b)/2, (4f-0b)/2, (3f-0b)/2, (2f-0b)/2\n"
      "1:\n" NS_GROUP1 "2:\n" NS_GROUP1 "3:\n" NS_GROUP1 "4:\n" NS_GROUP1
      "cmp %[w], %[end]\n"
      "bne 1b\n"
      : [a] "+r"(a), [b] "+r"(b), [w] "+r"(w), [u] "+r"(u), [x] "+r"(x), [v] "+r"(v), [t] "=&r"(t), [s] "=&r"(s)
      : [end] "r"(w + 4 * groups)
      : "r3", "r4", "cc", "memory");
  acc[0] = a, acc[1] = b;
}

NS_INLINE void ns_mac1_w4(int32_t acc[2], const uint8_t *w, const uint8_t *u, const uint32_t *x, int32_t groups) {
  for (int32_t i = 0; i < groups; i++, x += 4) {
    const uint32_t v = ns_load4(w + 4 * i), s = ns_load4(u + 4 * i), top = 0xf0f0f0f0u;
    acc[0] = (int32_t)__smlad((int32_t)ns_even(0, v & top), (int32_t)x[0], acc[0]);
    acc[1] = (int32_t)__smlad((int32_t)ns_even(0, s & top), (int32_t)x[0], acc[1]);
    acc[0] = (int32_t)__smlad((int32_t)ns_odd(0, v & top), (int32_t)x[1], acc[0]);
    acc[1] = (int32_t)__smlad((int32_t)ns_odd(0, s & top), (int32_t)x[1], acc[1]);
    acc[0] = (int32_t)__smlad((int32_t)ns_even(0, v << 4 & top), (int32_t)x[2], acc[0]);
    acc[1] = (int32_t)__smlad((int32_t)ns_even(0, s << 4 & top), (int32_t)x[2], acc[1]);
    acc[0] = (int32_t)__smlad((int32_t)ns_odd(0, v << 4 & top), (int32_t)x[3], acc[0]);
    acc[1] = (int32_t)__smlad((int32_t)ns_odd(0, s << 4 & top), (int32_t)x[3], acc[1]);
  }
}

#endif
#endif
