/* The inner loops for Cortex-M4 and M7: two products an instruction (SMLAD) on pairs of 16-bit numbers.
 *
 * A word of four codes gives the pairs (0, 2) and (1, 3) in one instruction each: SXTB16 for weights, SXTAB16 for
 * activations, which subtracts the zero point on the way. Four rows of activations lie interleaved, so that one LDM brings the
 * same pair of all of them: 13 instructions for 16 products. int4 weights are used times 16, which leaves their sign where it
 * is; the sum is divided again. Written as assembly because the compiler does not keep 13 values in registers by itself. */
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

/* Rescaling by SMMLA, ASR, SSAT: with shift >= 33 the low word of the product takes no part, and rounding and zero point are
 * one addend. Other shifts, and narrower clips, go the long way. */
typedef struct {
  int32_t addend, shift, quick;
} ns_scale;

NS_INLINE ns_scale ns_scale_of(int32_t shift, int32_t zero, int32_t low, int32_t high) {
  ns_scale s = {0, 0, 0};
  if (shift >= 33 && shift <= 54 && low <= -128 && high >= 127) {
    s.shift = shift - 32;
    s.addend = (int32_t)(1u << (shift - 33)) + zero * (int32_t)(1u << (shift - 32));
    s.quick = 1;
  }
  return s;
}

NS_INLINE int8_t ns_requant_quick(int32_t total, int32_t m, int32_t addend, int32_t shift) {
  int32_t r;
  __asm__("smmla %0, %1, %2, %3" : "=r"(r) : "r"(total), "r"(m), "r"(addend));
  r >>= shift;
  __asm__("ssat %0, #8, %0" : "+r"(r));
  return (int8_t)r;
}

#define NS_MAC4(pair)                           \
  "smlad %[a], " pair ", r3, %[a]\n"            \
  "smlad %[b], " pair ", r4, %[b]\n"            \
  "smlad %[c], " pair ", r5, %[c]\n"            \
  "smlad %[d], " pair ", r6, %[d]\n"
#define NS_GROUP4                               \
  "ldr %[v], [%[w]], #4\n"                      \
  "ldmia %[x]!, {r3-r6}\n"                      \
  "sxtb16 %[t], %[v]\n" NS_MAC4("%[t]")         \
  "ldmia %[x]!, {r3-r6}\n"                      \
  "sxtb16 %[t], %[v], ror #8\n" NS_MAC4("%[t]")
#define NS_NIBBLES4(turn)                       \
  "ldmia %[x]!, {r3-r6}\n"                      \
  "sxtb16 %[t], %[v]" turn "\n" NS_MAC4("%[t]")

/* acc[r] += the products of `groups` words of weights with row r of the interleaved block. */
NS_INLINE void ns_mac4(int32_t acc[4], const int8_t *w, const uint32_t *x, int32_t groups) {
  int32_t a = acc[0], b = acc[1], c = acc[2], d = acc[3], t;
  int32_t v = groups & 3; /* where the first turn of the loop begins */
  __asm__ volatile(
      "tbb [pc, %[v]]\n"
      "0: .byte (1f-0b)/2, (4f-0b)/2, (3f-0b)/2, (2f-0b)/2\n"
      "1:\n" NS_GROUP4 "2:\n" NS_GROUP4 "3:\n" NS_GROUP4 "4:\n" NS_GROUP4
      "cmp %[w], %[end]\n"
      "bne 1b\n"
      : [a] "+r"(a), [b] "+r"(b), [c] "+r"(c), [d] "+r"(d), [w] "+r"(w), [x] "+r"(x), [v] "+r"(v), [t] "=&r"(t)
      : [end] "r"(w + 4 * groups)
      : "r3", "r4", "r5", "r6", "cc", "memory");
  acc[0] = a, acc[1] = b, acc[2] = c, acc[3] = d;
}

/* The same with int4 weights, eight a word; acc gains 16 times the products. */
NS_INLINE void ns_mac4_w4(int32_t acc[4], const uint8_t *w, const uint32_t *x, int32_t groups) {
  int32_t a = acc[0], b = acc[1], c = acc[2], d = acc[3], t, v, s;
  __asm__ volatile(
      "1:\n"
      "ldr %[s], [%[w]], #4\n"
      "and %[v], %[s], #0xf0f0f0f0\n" NS_NIBBLES4("") NS_NIBBLES4(", ror #8")
      "lsl %[s], %[s], #4\n"
      "and %[v], %[s], #0xf0f0f0f0\n" NS_NIBBLES4("") NS_NIBBLES4(", ror #8")
      "cmp %[w], %[end]\n"
      "bne 1b\n"
      : [a] "+r"(a), [b] "+r"(b), [c] "+r"(c), [d] "+r"(d), [w] "+r"(w), [x] "+r"(x), [v] "=&r"(v), [t] "=&r"(t),
        [s] "=&r"(s)
      : [end] "r"(w + 4 * groups)
      : "r3", "r4", "r5", "r6", "cc", "memory");
  acc[0] = a, acc[1] = b, acc[2] = c, acc[3] = d;
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
