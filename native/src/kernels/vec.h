/* Sixteen floats at once, on every instruction set: one __m512, two __m256, four float32x4_t, or an array.
 * A file defines NS_AVX512, NS_AVX2, NS_NEON or nothing before it includes this. */
#ifndef NS_VEC_H
#define NS_VEC_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "kernels.h"

/* Loops over registers are unrolled where there are vector registers; portable code stays small. */
#define NS_PRAGMA(x) _Pragma(#x)
#if defined(NS_AVX512) || defined(NS_AVX2) || defined(NS_NEON)
#define UNROLL(n) NS_PRAGMA(GCC unroll n)
#else
#define UNROLL(n)
#endif
#define INLINE static inline __attribute__((always_inline, unused))

#if defined(NS_AVX512)
#include <immintrin.h>
typedef __m512 v16;
INLINE v16 v_set(float x) { return _mm512_set1_ps(x); }
INLINE v16 v_load(const float *p) { return _mm512_loadu_ps(p); }
INLINE void v_store(float *p, v16 a) { _mm512_storeu_ps(p, a); }
INLINE v16 v_add(v16 a, v16 b) { return _mm512_add_ps(a, b); }
INLINE v16 v_sub(v16 a, v16 b) { return _mm512_sub_ps(a, b); }
INLINE v16 v_mul(v16 a, v16 b) { return _mm512_mul_ps(a, b); }
INLINE v16 v_div(v16 a, v16 b) { return _mm512_div_ps(a, b); }
INLINE v16 v_fma(v16 a, v16 b, v16 c) { return _mm512_fmadd_ps(a, b, c); } /* a * b + c */
INLINE v16 v_max(v16 a, v16 b) { return _mm512_max_ps(a, b); }
INLINE v16 v_min(v16 a, v16 b) { return _mm512_min_ps(a, b); }
INLINE v16 v_abs(v16 a) { return _mm512_abs_ps(a); }
INLINE v16 v_half(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
INLINE v16 v_bfloat(const uint16_t *p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}
INLINE v16 v_int8(const int8_t *p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p))); }
INLINE void v_store_half(uint16_t *p, v16 a) { _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(a, 0)); }
INLINE v16 v_exponent(v16 a, v16 n) { /* adds the integer in the low bits of n to the exponent of a */
  return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a), _mm512_slli_epi32(_mm512_castps_si512(n), 23)));
}
INLINE v16 v_where(v16 a, int from, int to, float other) { /* lanes from <= i < to of a, else other */
  uint32_t above = to >= 16 ? 0xffff : to <= 0 ? 0 : (1u << to) - 1, below = from <= 0 ? 0 : from >= 16 ? 0xffff : (1u << from) - 1;
  return _mm512_mask_mov_ps(_mm512_set1_ps(other), (__mmask16)(above & ~below), a);
}
#elif defined(NS_AVX2)
#include <immintrin.h>
typedef struct { __m256 a, b; } v16;
INLINE v16 v_set(float x) { return (v16){_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
INLINE v16 v_load(const float *p) { return (v16){_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
INLINE void v_store(float *p, v16 x) { _mm256_storeu_ps(p, x.a), _mm256_storeu_ps(p + 8, x.b); }
INLINE v16 v_add(v16 x, v16 y) { return (v16){_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
INLINE v16 v_sub(v16 x, v16 y) { return (v16){_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
INLINE v16 v_mul(v16 x, v16 y) { return (v16){_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
INLINE v16 v_div(v16 x, v16 y) { return (v16){_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
INLINE v16 v_fma(v16 x, v16 y, v16 z) { return (v16){_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
INLINE v16 v_max(v16 x, v16 y) { return (v16){_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
INLINE v16 v_min(v16 x, v16 y) { return (v16){_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
INLINE v16 v_abs(v16 x) {
  __m256 sign = _mm256_set1_ps(-0.0f);
  return (v16){_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
INLINE v16 v_half(const uint16_t *p) {
  return (v16){_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p + 8)))};
}
INLINE __m256 widen8(const uint16_t *p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16));
}
INLINE v16 v_bfloat(const uint16_t *p) { return (v16){widen8(p), widen8(p + 8)}; }
INLINE v16 v_int8(const int8_t *p) {
  return (v16){_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p))),
               _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(p + 8))))};
}
INLINE void v_store_half(uint16_t *p, v16 x) {
  _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(x.a, 0));
  _mm_storeu_si128((__m128i *)(p + 8), _mm256_cvtps_ph(x.b, 0));
}
INLINE __m256 exponent8(__m256 a, __m256 n) {
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), _mm256_slli_epi32(_mm256_castps_si256(n), 23)));
}
INLINE v16 v_exponent(v16 x, v16 n) { return (v16){exponent8(x.a, n.a), exponent8(x.b, n.b)}; }
#elif defined(NS_NEON)
#include <arm_neon.h>
typedef struct { float32x4_t p[4]; } v16;
#define EACH(expression) ({ v16 r_; _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++) r_.p[i] = (expression); r_; })
INLINE v16 v_set(float x) { return EACH(vdupq_n_f32(x)); }
INLINE v16 v_load(const float *p) { return EACH(vld1q_f32(p + 4 * i)); }
INLINE void v_store(float *p, v16 x) { for (int i = 0; i < 4; i++) vst1q_f32(p + 4 * i, x.p[i]); }
INLINE v16 v_add(v16 x, v16 y) { return EACH(vaddq_f32(x.p[i], y.p[i])); }
INLINE v16 v_sub(v16 x, v16 y) { return EACH(vsubq_f32(x.p[i], y.p[i])); }
INLINE v16 v_mul(v16 x, v16 y) { return EACH(vmulq_f32(x.p[i], y.p[i])); }
INLINE v16 v_div(v16 x, v16 y) { return EACH(vdivq_f32(x.p[i], y.p[i])); }
INLINE v16 v_fma(v16 x, v16 y, v16 z) { return EACH(vfmaq_f32(z.p[i], x.p[i], y.p[i])); }
INLINE v16 v_max(v16 x, v16 y) { return EACH(vmaxq_f32(x.p[i], y.p[i])); }
INLINE v16 v_min(v16 x, v16 y) { return EACH(vminq_f32(x.p[i], y.p[i])); }
INLINE v16 v_abs(v16 x) { return EACH(vabsq_f32(x.p[i])); }
INLINE v16 v_half(const uint16_t *p) { return EACH(vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i)))); }
INLINE v16 v_bfloat(const uint16_t *p) { return EACH(vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16))); }
INLINE v16 v_int8(const int8_t *p) {
  int8x16_t b = vld1q_s8(p);
  int16x8_t lo = vmovl_s8(vget_low_s8(b)), hi = vmovl_s8(vget_high_s8(b));
  return (v16){{vcvtq_f32_s32(vmovl_s16(vget_low_s16(lo))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(lo))),
                vcvtq_f32_s32(vmovl_s16(vget_low_s16(hi))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(hi)))}};
}
INLINE void v_store_half(uint16_t *p, v16 x) {
  for (int i = 0; i < 4; i++) vst1_u16(p + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(x.p[i])));
}
INLINE v16 v_exponent(v16 x, v16 n) {
  return EACH(vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(x.p[i]), vshlq_n_s32(vreinterpretq_s32_f32(n.p[i]), 23))));
}
#else
typedef struct { float p[16]; } v16;
#define EACH(expression) ({ v16 r_; for (int i = 0; i < 16; i++) r_.p[i] = (expression); r_; })
INLINE v16 v_set(float x) { return EACH(x); }
INLINE v16 v_load(const float *p) { return EACH(p[i]); }
INLINE void v_store(float *p, v16 x) { for (int i = 0; i < 16; i++) p[i] = x.p[i]; }
INLINE v16 v_add(v16 x, v16 y) { return EACH(x.p[i] + y.p[i]); }
INLINE v16 v_sub(v16 x, v16 y) { return EACH(x.p[i] - y.p[i]); }
INLINE v16 v_mul(v16 x, v16 y) { return EACH(x.p[i] * y.p[i]); }
INLINE v16 v_div(v16 x, v16 y) { return EACH(x.p[i] / y.p[i]); }
INLINE v16 v_fma(v16 x, v16 y, v16 z) { return EACH(x.p[i] * y.p[i] + z.p[i]); }
INLINE v16 v_max(v16 x, v16 y) { return EACH(x.p[i] > y.p[i] ? x.p[i] : y.p[i]); }
INLINE v16 v_min(v16 x, v16 y) { return EACH(x.p[i] < y.p[i] ? x.p[i] : y.p[i]); }
INLINE v16 v_abs(v16 x) { return EACH(fabsf(x.p[i])); }
INLINE v16 v_half(const uint16_t *p) { return EACH(ns_half_to_float(p[i])); }
INLINE v16 v_bfloat(const uint16_t *p) { return EACH(ns_bfloat_to_float(p[i])); }
INLINE v16 v_int8(const int8_t *p) { return EACH((float)p[i]); }
INLINE void v_store_half(uint16_t *p, v16 x) { for (int i = 0; i < 16; i++) p[i] = ns_float_to_half(x.p[i]); }
INLINE v16 v_exponent(v16 x, v16 n) {
  uint32_t a[16], b[16];
  memcpy(a, &x, 64), memcpy(b, &n, 64);
  for (int i = 0; i < 16; i++) a[i] += b[i] << 23;
  memcpy(&x, a, 64);
  return x;
}
#endif

#ifndef NS_AVX512
INLINE v16 v_where(v16 x, int from, int to, float other) {
  float a[16];
  v_store(a, x);
  for (int i = 0; i < 16; i++) a[i] = i >= from && i < to ? a[i] : other;
  return v_load(a);
}
#endif

/* The same tree everywhere: lanes 8 apart, then 4, 2, 1. */
#if defined(NS_AVX512) || defined(NS_AVX2)
INLINE float v_sum(v16 x) {
#ifdef NS_AVX512
  __m256 h = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
#else
  __m256 h = _mm256_add_ps(x.a, x.b);
#endif
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}
#else
INLINE float v_sum(v16 x) {
  float a[16];
  v_store(a, x);
  for (int n = 8; n; n /= 2)
    for (int i = 0; i < n; i++) a[i] += a[i + n];
  return a[0];
}
#endif
INLINE float v_most(v16 x) {
  float a[16];
  v_store(a, x);
  for (int n = 8; n; n /= 2)
    for (int i = 0; i < n; i++) a[i] = a[i + n] > a[i] ? a[i + n] : a[i];
  return a[0];
}

/* e^x within 2 units in the last place for -87 <= x <= 88, clamped beyond; exactly 1 at 0. */
INLINE v16 v_exp(v16 x) {
  const v16 magic = v_set(12582912.0f);
  x = v_min(v_max(x, v_set(-87.0f)), v_set(88.0f));
  v16 t = v_fma(x, v_set(1.44269504f), magic), n = v_sub(t, magic);
  v16 r = v_fma(n, v_set(-0.693359375f), x);
  r = v_fma(n, v_set(2.12194440e-4f), r);
  v16 p = v_set(1.9875691500e-4f);
  p = v_fma(p, r, v_set(1.3981999507e-3f));
  p = v_fma(p, r, v_set(8.3334519073e-3f));
  p = v_fma(p, r, v_set(4.1665795894e-2f));
  p = v_fma(p, r, v_set(1.6666665459e-1f));
  p = v_fma(p, r, v_set(5.0000001201e-1f));
  p = v_add(v_fma(v_mul(p, r), r, r), v_set(1.0f));
  return v_exponent(p, t);
}

#endif
