/* What the integer kernels share: the one rescaling, loads, and which instructions may be used. */
#ifndef NS_INT_H
#define NS_INT_H

#include <stddef.h>
#include <string.h>

#include "ns.h"

#if defined(__ARM_FEATURE_DSP) && !defined(NS_NO_DSP)
#define NS_DSP 1
#include <arm_acle.h>
#else
#define NS_DSP 0
#endif

#if defined(__GNUC__)
#define NS_INLINE static inline __attribute__((always_inline))
#else
#define NS_INLINE static inline
#endif

/* A small core gains from fewer branches; a compiler with vectors knows better by itself. */
#if NS_DSP
#define NS_UNROLL _Pragma("GCC unroll 4")
#else
#define NS_UNROLL
#endif

NS_INLINE int32_t ns_min(int32_t a, int32_t b) { return a < b ? a : b; }
NS_INLINE int32_t ns_max(int32_t a, int32_t b) { return a > b ? a : b; }
NS_INLINE int32_t ns_clip(int32_t v, int32_t low, int32_t high) { return v < low ? low : v > high ? high : v; }

/* To the range of int8. */
NS_INLINE int8_t ns_saturate(int32_t v) {
#if NS_DSP
  return (int8_t)__ssat(v, 8);
#else
  return (int8_t)ns_clip(v, -128, 127);
#endif
}

/* Sums may wrap on the way as long as the end fits: unsigned arithmetic has no overflow. */
NS_INLINE int32_t ns_wrap_add(int32_t a, int32_t b) { return (int32_t)((uint32_t)a + (uint32_t)b); }
NS_INLINE int32_t ns_wrap_mul(int32_t a, int32_t b) { return (int32_t)((uint32_t)a * (uint32_t)b); }

/* ((total * m + 2^(shift-1)) >> shift) + zero, clipped. */
NS_INLINE int8_t ns_requant(int32_t total, int32_t m, int32_t shift, int32_t zero, int32_t low, int32_t high) {
  const int64_t q = (((int64_t)total * m + ((int64_t)1 << (shift - 1))) >> shift) + zero;
  return (int8_t)(q < low ? low : q > high ? high : q);
}

/* The same on words: with 33 <= shift the low word of the product takes no part, and rounding and zero point are one addend:
 * ((total * m >> 32) + addend) >> (shift - 32). Where the shift is smaller, total is shifted left by `up` first, if there is
 * room for it; `quick` is 0 where there is none. */
typedef struct {
  int32_t up, addend, shift, quick;
} ns_scale;

/* At least `up` bits up. */
NS_INLINE ns_scale ns_scale_of(int32_t shift, int32_t zero, int32_t room, int32_t up) {
  ns_scale s = {ns_max(up, 33 - shift), 0, 0, 0};
  const int32_t whole = shift + s.up;
  if (s.up <= room && whole <= 54) {
    s.shift = whole - 32;
    s.addend = (int32_t)(1u << (whole - 33)) + zero * (int32_t)(1u << (whole - 32));
    s.quick = 1;
  }
  return s;
}

/* Code k of a row of int4 codes. */
NS_INLINE int32_t ns_nibble(const uint8_t *row, int32_t k) {
  const int32_t v = (row[k >> 1] >> ((k & 1) * 4)) & 15;
  return (v ^ 8) - 8;
}

#endif
