/* Vectors of x86-64, when the compiler may use AVX-512 or AVX2: NS_WIDE numbers of 32 bits, else NS_WIDE is 0.
 *
 * Lanes are output channels. A product step takes a pair of neighbouring inputs, the same for all lanes, and a pair of
 * weights per lane (VPDPWSSD, or VPMADDWD and an addition). The first n lanes of memory are read and written, no more. */
#ifndef NS_WIDE_H
#define NS_WIDE_H

#include "ns_int.h"

#if defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#include <immintrin.h>
#define NS_WIDE 16
typedef __m512i ns_wide;

NS_INLINE ns_wide ns_wide_all(int32_t v) { return _mm512_set1_epi32(v); }
NS_INLINE ns_wide ns_wide_load(const int32_t *p) { return _mm512_loadu_si512(p); }
NS_INLINE ns_wide ns_wide_load_n(const int32_t *p, int32_t n) {
  return _mm512_maskz_loadu_epi32((__mmask16)((1u << n) - 1), p);
}
NS_INLINE ns_wide ns_wide_codes(const int8_t *p, int32_t n) {
  return _mm512_cvtepi8_epi32(n == 16 ? _mm_loadu_si128((const __m128i *)p)
                                      : _mm_maskz_loadu_epi8((__mmask16)((1u << n) - 1), p));
}
NS_INLINE ns_wide ns_wide_add(ns_wide a, ns_wide b) { return _mm512_add_epi32(a, b); }
NS_INLINE ns_wide ns_wide_mul(ns_wide a, ns_wide b) { return _mm512_mullo_epi32(a, b); }
NS_INLINE ns_wide ns_wide_pairs(ns_wide sum, ns_wide a, ns_wide b) {
#if defined(__AVX512VNNI__)
  return _mm512_dpwssd_epi32(sum, a, b);
#else
  return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b));
#endif
}
/* The upper halves of the products. */
NS_INLINE ns_wide ns_wide_high(ns_wide a, ns_wide b) {
  const ns_wide even = _mm512_srli_epi64(_mm512_mul_epi32(a, b), 32);
  const ns_wide odd = _mm512_mul_epi32(_mm512_srli_epi64(a, 32), _mm512_srli_epi64(b, 32));
  return _mm512_mask_blend_epi32(0xaaaa, even, odd);
}
NS_INLINE ns_wide ns_wide_up(ns_wide a, int32_t shift) { return _mm512_sll_epi32(a, _mm_cvtsi32_si128(shift)); }
NS_INLINE ns_wide ns_wide_shift(ns_wide a, int32_t shift) { return _mm512_sra_epi32(a, _mm_cvtsi32_si128(shift)); }
NS_INLINE ns_wide ns_wide_clip(ns_wide a, int32_t low, int32_t high) {
  return _mm512_min_epi32(_mm512_max_epi32(a, _mm512_set1_epi32(low)), _mm512_set1_epi32(high));
}
NS_INLINE void ns_wide_put(int8_t *p, ns_wide a, int32_t n) {
  const __m128i v = _mm512_cvtepi32_epi8(a);
  if (n == 16) _mm_storeu_si128((__m128i *)p, v);
  else _mm_mask_storeu_epi8(p, (__mmask16)((1u << n) - 1), v);
}

#elif defined(__AVX2__)
#include <immintrin.h>
#define NS_WIDE 8
typedef __m256i ns_wide;

NS_INLINE ns_wide ns_wide_all(int32_t v) { return _mm256_set1_epi32(v); }
NS_INLINE ns_wide ns_wide_load(const int32_t *p) { return _mm256_loadu_si256((const __m256i *)p); }
NS_INLINE ns_wide ns_wide_load_n(const int32_t *p, int32_t n) {
  return _mm256_maskload_epi32(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)));
}
NS_INLINE ns_wide ns_wide_codes(const int8_t *p, int32_t n) {
  int64_t v = 0;
  if (n == 8) memcpy(&v, p, 8);
  else memcpy(&v, p, (size_t)n);
  return _mm256_cvtepi8_epi32(_mm_cvtsi64_si128(v));
}
NS_INLINE ns_wide ns_wide_add(ns_wide a, ns_wide b) { return _mm256_add_epi32(a, b); }
NS_INLINE ns_wide ns_wide_mul(ns_wide a, ns_wide b) { return _mm256_mullo_epi32(a, b); }
NS_INLINE ns_wide ns_wide_pairs(ns_wide sum, ns_wide a, ns_wide b) {
  return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
}
NS_INLINE ns_wide ns_wide_high(ns_wide a, ns_wide b) {
  const ns_wide even = _mm256_srli_epi64(_mm256_mul_epi32(a, b), 32);
  const ns_wide odd = _mm256_mul_epi32(_mm256_srli_epi64(a, 32), _mm256_srli_epi64(b, 32));
  return _mm256_blend_epi32(even, odd, 0xaa);
}
NS_INLINE ns_wide ns_wide_up(ns_wide a, int32_t shift) { return _mm256_sll_epi32(a, _mm_cvtsi32_si128(shift)); }
NS_INLINE ns_wide ns_wide_shift(ns_wide a, int32_t shift) { return _mm256_sra_epi32(a, _mm_cvtsi32_si128(shift)); }
NS_INLINE ns_wide ns_wide_clip(ns_wide a, int32_t low, int32_t high) {
  return _mm256_min_epi32(_mm256_max_epi32(a, _mm256_set1_epi32(low)), _mm256_set1_epi32(high));
}
NS_INLINE void ns_wide_put(int8_t *p, ns_wide a, int32_t n) {
  const __m128i v = _mm_packs_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  const int64_t eight = _mm_cvtsi128_si64(_mm_packs_epi16(v, v));
  if (n == 8) memcpy(p, &eight, 8);
  else memcpy(p, &eight, (size_t)n);
}

#else
#define NS_WIDE 0
#endif

#if NS_WIDE
/* Rescales the first n lanes and writes their codes. */
NS_INLINE void ns_wide_finish(ns_wide total, ns_wide m, const ns_scale *s, int32_t low, int32_t high, int8_t *y, int32_t n) {
  const ns_wide high_word = ns_wide_high(ns_wide_up(total, s->up), m);
  const ns_wide q = ns_wide_shift(ns_wide_add(high_word, ns_wide_all(s->addend)), s->shift);
  ns_wide_put(y, ns_wide_clip(q, low, high), n);
}
#endif
#endif
