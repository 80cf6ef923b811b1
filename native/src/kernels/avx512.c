/* AVX-512 with VNNI and VBMI. Float kernels come from float.inc.h; here is what the compiler cannot find by itself: products of
 * packed codes with int8 activations.
 *
 * Few tokens: sixteen rows go through one block of inputs at a time. Codes are unpacked into registers, multiplied by every
 * token, and sixteen partial sums per row are folded by a tree into one register that holds one integer per row.
 * Many tokens: codes are unpacked once into a tile whose registers hold four inputs of sixteen rows, and a token's four inputs
 * are broadcast against it.
 */
#ifdef __x86_64__
#define NS_AVX512
#include "float.inc.h"
#include "int.inc.h"


/* acc += four products of unsigned and signed bytes per lane. Not the intrinsic: GCC 12 copies every accumulator of a loop. */
INLINE __m512i dot4(__m512i acc, __m512i u, __m512i s) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(u), "v"(s));
  return acc;
}

static inline __attribute__((always_inline)) void transpose16(__m512i r[16]) {
  __m512i t[16];
  UNROLL(8) for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  UNROLL(4) for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  UNROLL(4) for (int i = 0; i < 4; i++) {
    __m512i a = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88), b = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
    __m512i c = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd), d = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
    t[i] = _mm512_shuffle_i32x4(a, b, 0x88);
    t[8 + i] = _mm512_shuffle_i32x4(a, b, 0xdd);
    t[4 + i] = _mm512_shuffle_i32x4(c, d, 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(c, d, 0xdd);
  }
  UNROLL(16) for (int i = 0; i < 16; i++) r[i] = t[i];
}

/* Sums within groups of four lanes: lane 4 i + j of the result is the sum of lanes 4 i … 4 i + 3 of p[j]. */
INLINE __m512i fold4(const __m512i p[4]) {
  __m512i a = _mm512_add_epi32(_mm512_unpacklo_epi32(p[0], p[1]), _mm512_unpackhi_epi32(p[0], p[1]));
  __m512i b = _mm512_add_epi32(_mm512_unpacklo_epi32(p[2], p[3]), _mm512_unpackhi_epi32(p[2], p[3]));
  return _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
}
INLINE __m512i fold2(__m512i a, __m512i b) { /* adds neighbouring groups of four lanes */
  return _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
}

/* 64 codes in order, one byte each, from `bits` * 8 bytes. */
INLINE __m512i codes64(const uint8_t *p, int bits) {
  if (bits == 8) return _mm512_loadu_si512(p);
  if (bits == 4) {
    __m512i v = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)p));
    return _mm512_and_si512(_mm512_or_si512(v, _mm512_slli_epi16(v, 4)), _mm512_set1_epi8(15));
  }
  if (bits == 2) {
    __m512i v = _mm512_cvtepu16_epi64(_mm_loadu_si128((const __m128i *)p));
    return _mm512_and_si512(_mm512_multishift_epi64_epi8(_mm512_set1_epi64(0x0e0c0a0806040200), v), _mm512_set1_epi8(3));
  }
  const __m512i spread = _mm512_set_epi64(0x0000000000171615, 0x0000000000141312, 0x000000000011100f,
                                          0x00000000000e0d0c, 0x00000000000b0a09, 0x0000000000080706, 0x0000000000050403,
                                          0x0000000000020100);
  __m512i v = _mm512_castsi256_si512(_mm256_maskz_loadu_epi8(0xffffff, p));
  v = _mm512_permutexvar_epi8(spread, v);
  return _mm512_and_si512(_mm512_multishift_epi64_epi8(_mm512_set1_epi64(0x15120f0c09060300), v), _mm512_set1_epi8(7));
}

/* Scales (floats) and zero points (integers) of 16 rows, transposed to (group, 16). */
static void transpose_scales(const ns_linear *l, int row, int rows, float *scales, int32_t *zeros) {
  for (int g = 0; g < l->groups; g += 16) {
    __mmask16 mask = l->groups - g < 16 ? (__mmask16)((1u << (l->groups - g)) - 1) : 0xffff;
    __m512i s[16], z[16];
    UNROLL(16) for (int r = 0; r < 16; r++) {
      size_t at = (size_t)(row + (r < rows ? r : rows - 1)) * (size_t)l->groups + (size_t)g;
      s[r] = _mm512_castps_si512(_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, l->scales + at)));
    }
    transpose16(s);
    UNROLL(16) for (int i = 0; i < 16; i++) _mm512_storeu_si512(scales + (g + i) * 16, s[i]);
    UNROLL(16) for (int r = 0; r < 16; r++) {
      size_t at = (size_t)(row + (r < rows ? r : rows - 1)) * (size_t)l->groups + (size_t)g;
      z[r] = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, l->zeros + at));
    }
    transpose16(z);
    UNROLL(16) for (int i = 0; i < 16; i++) _mm512_storeu_si512(zeros + (g + i) * 16, z[i]);
  }
}

/* One block of inputs for 16 rows and M tokens: dots[m] holds the integer sums, one lane per row.
 * p: the rows' codes of this block; at: byte offset of the block in the activations. */
INLINE void block_dots(const uint8_t *const *p, size_t skip, int bits, int block, const ns_act *x, size_t at, int M, __m512i *dots) {
  size_t stride = (size_t)x->stride;
  const __m512i zero = _mm512_setzero_si512(), low = _mm512_set1_epi8(bits == 4 ? 15 : 3);
  if (bits == 4 && block == 64) {
    __m512i lo[8], hi[8], s[8];
    UNROLL(8) for (int j = 0; j < 8; j++) {
      int a = j < 4 ? j : j + 4; /* this order lets the folds end in row order */
      __m512i v = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)(p[a] + skip))),
                                     _mm256_loadu_si256((const __m256i *)(p[a + 4] + skip)), 1);
      lo[j] = _mm512_and_si512(v, low);
      hi[j] = _mm512_and_si512(_mm512_srli_epi16(v, 4), low);
    }
    UNROLL(4) for (int m = 0; m < M; m++) {
      const int8_t *q = x->split + (size_t)m * stride + at / 128 * 128 + at % 128 / 2;
      __m512i even = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)q));
      __m512i odd = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)(q + 64)));
      UNROLL(8) for (int j = 0; j < 8; j++) s[j] = dot4(dot4(zero, lo[j], even), hi[j], odd);
      dots[m] = fold2(fold4(s), fold4(s + 4));
    }
  } else if (bits == 8 && block == 32) {
    __m512i w[8], s[8];
    UNROLL(8) for (int j = 0; j < 8; j++) {
      int a = j < 4 ? j : j + 4;
      w[j] = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)(p[a] + skip))),
                                _mm256_loadu_si256((const __m256i *)(p[a + 4] + skip)), 1);
    }
    UNROLL(4) for (int m = 0; m < M; m++) {
      __m512i q = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)(x->natural + (size_t)m * stride + at)));
      UNROLL(8) for (int j = 0; j < 8; j++) s[j] = dot4(zero, w[j], q);
      dots[m] = fold2(fold4(s), fold4(s + 4));
    }
  } else if (bits == 4 || bits == 2) { /* 16 bytes a row: 4 bits and blocks of 32, 2 bits and blocks of 64 */
    __m512i w[4], s[4];
    UNROLL(4) for (int j = 0; j < 4; j++) {
      __m512i v = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)(p[j] + skip)));
      v = _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i *)(p[4 + j] + skip)), 1);
      v = _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i *)(p[8 + j] + skip)), 2);
      w[j] = _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i *)(p[12 + j] + skip)), 3);
    }
    const int8_t *base = bits == 4 ? x->split : x->split2;
    UNROLL(4) for (int m = 0; m < M; m++) {
      const int8_t *q = base + (size_t)m * stride + at;
      UNROLL(4) for (int j = 0; j < 4; j++) s[j] = zero;
      UNROLL(4) for (int phase = 0; phase < 8 / bits; phase++) {
        __m512i v = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)(q + 16 * phase)));
        UNROLL(4) for (int j = 0; j < 4; j++) s[j] =
            dot4(s[j], _mm512_and_si512(_mm512_srli_epi16(w[j], (unsigned)(phase * bits)), low), v);
      }
      dots[m] = fold4(s);
    }
  } else { /* 8 or 3 bits, 64 inputs: a register per row */
    __m512i w[16], s[16];
    UNROLL(16) for (int j = 0; j < 16; j++) w[j] = codes64(p[j] + skip, bits);
    UNROLL(4) for (int m = 0; m < M; m++) {
      __m512i q = _mm512_loadu_si512(x->natural + (size_t)m * stride + at);
      UNROLL(16) for (int j = 0; j < 16; j++) s[j] = dot4(zero, w[j], q);
      dots[m] = fold2(fold2(fold4(s), fold4(s + 4)), fold2(fold4(s + 8), fold4(s + 12)));
    }
  }
}

INLINE void few_panel(const ns_linear *l, int row, int rows, const ns_act *x, int bits, int block, int M, float *out, void *scratch) {
  const uint8_t *p[16], *t[16];
  uint8_t tail[16][64];
  float *scales = scratch;
  int32_t *zeros = (int32_t *)(scales + (size_t)(l->groups + 15) / 16 * 256);
  size_t step = (size_t)(bits * block / 8);
  for (int r = 0; r < 16; r++) p[r] = l->codes + (size_t)(row + (r < rows ? r : rows - 1)) * l->row_bytes;
  transpose_scales(l, row, rows, scales, zeros);
  __m512 acc[4];
  UNROLL(4) for (int m = 0; m < M; m++) acc[m] = _mm512_setzero_ps();
  int whole = l->ins / block, per = l->group / block, left = per, g = 0;
  if (per < 1) per = left = 1;
  /* The next panel follows this one in memory, as do its scales and zero points: ask for them, in order, while this one is at
   * work. Measured: the same lines asked for row by row, or further ahead, or into the second-level cache, arrive later. */
  const char *ahead = (const char *)p[0] + l->row_bytes * 16;
  const char *next_scales = (const char *)(l->scales + (size_t)(row + 16) * (size_t)l->groups);
  const char *next_zeros = (const char *)(l->zeros + (size_t)(row + 16) * (size_t)l->groups);
  for (int i = 0; i < l->groups * 32; i += 64) _mm_prefetch(next_scales + i, _MM_HINT_T0);
  for (int i = 0; i < l->groups * 16; i += 64) _mm_prefetch(next_zeros + i, _MM_HINT_T0);
  for (int b = 0; b < x->blocks; b++) {
    __m512i dots[4];
    for (size_t i = 0; i < step * 16; i += 64) _mm_prefetch(ahead + i, _MM_HINT_T0);
    ahead += step * 16;
    if (b < whole) {
      block_dots(p, (size_t)b * step, bits, block, x, (size_t)b * (size_t)block, M, dots);
    } else { /* what the rows hold of the last block, filled up with zeros */
      memset(tail, 0, sizeof tail);
      for (int r = 0; r < 16; r++) {
        memcpy(tail[r], p[r] + (size_t)b * step, l->row_bytes - (size_t)b * step);
        t[r] = tail[r];
      }
      block_dots(t, 0, bits, block, x, (size_t)b * (size_t)block, M, dots);
    }
    __m512 scale = _mm512_loadu_ps(scales + g * 16);
    __m512i zero = _mm512_loadu_si512(zeros + g * 16);
    UNROLL(4) for (int m = 0; m < M; m++) {
      size_t at = (size_t)m * (size_t)x->blocks + (size_t)b;
      __m512i d = _mm512_sub_epi32(dots[m], _mm512_mullo_epi32(zero, _mm512_set1_epi32(x->sum[at])));
      acc[m] = _mm512_add_ps(acc[m], _mm512_mul_ps(_mm512_cvtepi32_ps(d), _mm512_mul_ps(scale, _mm512_set1_ps(x->scale[at]))));
    }
    if (!--left) left = per, g++;
  }
  UNROLL(4) for (int m = 0; m < M; m++) _mm512_storeu_ps(out + 16 * m, acc[m]);
}

enum { AHEAD = 4096 }; /* bytes; measured on two cores: 1024, 2048, 4096, 8192, 16384 gave 14.1, 13.8, 12.7, 12.8, 13.8 ms a token */

/* Wide maps in groups of 64: row after row, so that memory is read strictly in order, sixteen blocks of a row at a time. Folded,
 * their sums lie in one register, block by block, as do the scales of the row; when sixteen rows are through, a transposition
 * brings the rows side by side and the blocks are added in order. The same sums in the same order as few_panel's. */
INLINE void wide_panel(const ns_linear *l, int row, int rows, const ns_act *x, int bits, int M, float *out, void *scratch) {
  size_t stride = (size_t)x->stride, blocks = (size_t)x->blocks, sets = (size_t)l->ins / 1024;
  float(*part)[4][16][16] = scratch; /* (set, token, row, block) */
  const __m512i zero = _mm512_setzero_si512(), low = _mm512_set1_epi8(15);
  const __m512i ordered = _mm512_set_epi32(15, 11, 14, 10, 13, 9, 12, 8, 7, 3, 6, 2, 5, 1, 4, 0);
  for (int r = 0; r < rows; r++) {
    const uint8_t *codes = l->codes + (size_t)(row + r) * l->row_bytes;
    const uint16_t *scales = l->scales + (size_t)(row + r) * (size_t)l->groups;
    const uint8_t *zeros = l->zeros + (size_t)(row + r) * (size_t)l->groups;
    for (size_t set = 0; set < sets; set++, codes += bits * 128) {
      __m512i w[16], s[16];
      for (int i = 0; i < bits * 128; i += 64) _mm_prefetch((const char *)codes + AHEAD + i, _MM_HINT_T0);
      if (bits == 4)
        UNROLL(8) for (int j = 0; j < 8; j++) {
          __m512i v = _mm512_loadu_si512(codes + 64 * j);
          w[j] = _mm512_and_si512(v, low), w[8 + j] = _mm512_and_si512(_mm512_srli_epi16(v, 4), low);
        }
      else
        UNROLL(16) for (int j = 0; j < 16; j++) w[j] = codes64(codes + 8 * bits * j, bits);
      __m512 scale = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(scales + 16 * set)));
      __m512i point = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(zeros + 16 * set)));
      UNROLL(4) for (int m = 0; m < M; m++) {
        const int8_t *q = (bits == 4 ? x->split : x->natural) + (size_t)m * stride + 1024 * set;
        __m512i d;
        if (bits == 4) {
          UNROLL(8) for (int j = 0; j < 8; j++) s[j] =
              dot4(dot4(zero, w[j], _mm512_loadu_si512(q + 128 * j)), w[8 + j], _mm512_loadu_si512(q + 128 * j + 64));
          d = _mm512_permutexvar_epi32(ordered, fold2(fold4(s), fold4(s + 4)));
        } else {
          UNROLL(16) for (int j = 0; j < 16; j++) s[j] = dot4(zero, w[j], _mm512_loadu_si512(q + 64 * j));
          d = fold2(fold2(fold4(s), fold4(s + 4)), fold2(fold4(s + 8), fold4(s + 12)));
        }
        size_t at = (size_t)m * blocks + 16 * set;
        d = _mm512_sub_epi32(d, _mm512_mullo_epi32(point, _mm512_loadu_si512(x->sum + at)));
        __m512 f = _mm512_mul_ps(_mm512_cvtepi32_ps(d), _mm512_mul_ps(scale, _mm512_loadu_ps(x->scale + at)));
        _mm512_storeu_ps(part[set][m][r], f);
      }
    }
  }
  __m512 acc[4];
  UNROLL(4) for (int m = 0; m < M; m++) {
    acc[m] = _mm512_setzero_ps();
    for (size_t set = 0; set < sets; set++) {
      __m512i t[16];
      UNROLL(16) for (int r = 0; r < 16; r++) t[r] = _mm512_loadu_si512(part[set][m][r]);
      transpose16(t);
      UNROLL(16) for (int b = 0; b < 16; b++) acc[m] = _mm512_add_ps(acc[m], _mm512_castsi512_ps(t[b]));
    }
  }
  /* the blocks beyond whole sets, which the rows left in the first-level cache */
  const uint8_t *p[16], *t[16];
  uint8_t tail[16][64];
  size_t at[16];
  for (int r = 0; r < 16; r++) {
    size_t from = (size_t)(row + (r < rows ? r : rows - 1));
    p[r] = l->codes + from * l->row_bytes, t[r] = tail[r], at[r] = from * (size_t)l->groups;
  }
  for (size_t b = sets * 16; b < blocks; b++) {
    __m512i dots[4];
    float scale[16];
    int32_t point[16];
    for (int r = 0; r < 16; r++) scale[r] = _cvtsh_ss(l->scales[at[r] + b]), point[r] = l->zeros[at[r] + b];
    size_t skip = b * (size_t)bits * 8, valid = l->row_bytes - skip;
    if (valid >= (size_t)bits * 8) {
      block_dots(p, skip, bits, 64, x, b * 64, M, dots);
    } else {
      memset(tail, 0, sizeof tail);
      for (int r = 0; r < 16; r++) memcpy(tail[r], p[r] + skip, valid);
      block_dots(t, 0, bits, 64, x, b * 64, M, dots);
    }
    UNROLL(4) for (int m = 0; m < M; m++) {
      size_t fact = (size_t)m * blocks + b;
      __m512i d = _mm512_sub_epi32(dots[m], _mm512_mullo_epi32(_mm512_loadu_si512(point), _mm512_set1_epi32(x->sum[fact])));
      acc[m] = _mm512_add_ps(acc[m], _mm512_mul_ps(_mm512_cvtepi32_ps(d), _mm512_mul_ps(_mm512_loadu_ps(scale), _mm512_set1_ps(x->scale[fact]))));
    }
  }
  UNROLL(4) for (int m = 0; m < M; m++) _mm512_storeu_ps(out + 16 * m, acc[m]);
}

/* Four, two or one token at a time: a panel read again comes from the first-level cache. */
#define FEW(name, bits, block)                                                                                 \
  static void name(const ns_linear *l, int row, int rows, const ns_act *x, int M, float *out, void *scratch) { \
    ns_act part = *x;                                                                                          \
    for (int m = 0, n; m < M; m += n) {                                                                        \
      n = M - m >= 4 ? 4 : M - m >= 2 ? 2 : 1;                                                                 \
      if (bits > 2 && block == 64 && l->group == 64 && l->ins >= 1024) {                                       \
        if (n == 4) wide_panel(l, row, rows, &part, bits, 4, out + 16 * m, scratch);                           \
        else if (n == 2) wide_panel(l, row, rows, &part, bits, 2, out + 16 * m, scratch);                      \
        else wide_panel(l, row, rows, &part, bits, 1, out + 16 * m, scratch);                                  \
      } else if (n == 4) few_panel(l, row, rows, &part, bits, block, 4, out + 16 * m, scratch);                \
      else if (n == 2) few_panel(l, row, rows, &part, bits, block, 2, out + 16 * m, scratch);                  \
      else few_panel(l, row, rows, &part, bits, block, 1, out + 16 * m, scratch);                              \
      part.natural += (size_t)n * (size_t)x->stride;                                                           \
      part.split += part.split ? (size_t)n * (size_t)x->stride : 0;                                            \
      part.split2 += part.split2 ? (size_t)n * (size_t)x->stride : 0;                                          \
      part.scale += (size_t)n * (size_t)x->blocks;                                                             \
      part.sum += (size_t)n * (size_t)x->blocks;                                                               \
    }                                                                                                          \
  }
FEW(few_8_64, 8, 64)
FEW(few_4_64, 4, 64)
FEW(few_3_64, 3, 64)
FEW(few_2_64, 2, 64)
FEW(few_8_32, 8, 32)
FEW(few_4_32, 4, 32)
#undef FEW

static void few(const ns_linear *l, int row, int rows, const ns_act *x, int M, float *out, void *scratch) {
  if (l->block == 64) {
    if (l->bits == 8) few_8_64(l, row, rows, x, M, out, scratch);
    else if (l->bits == 4) few_4_64(l, row, rows, x, M, out, scratch);
    else if (l->bits == 3) few_3_64(l, row, rows, x, M, out, scratch);
    else few_2_64(l, row, rows, x, M, out, scratch);
  } else if (l->block == 32 && l->bits == 8) {
    few_8_32(l, row, rows, x, M, out, scratch);
  } else if (l->block == 32 && l->bits == 4) {
    few_4_32(l, row, rows, x, M, out, scratch);
  } else {
    quant_few(l, row, rows, x, M, out);
  }
}

/* Many tokens. A tile holds for each block of 64 or 32 inputs: 2 panels of (code - zero) as (inputs / 4, 16 rows, 4), then
 * -128 times their sums (2, 16), scales (2, 16) and, for 8 bits, 128 - zero (2, 16): activations are taken as q + 128, unsigned.
 * With 8 bits code - zero needs nine bits, so code - 128 is packed and the rest is added back with the sum of the activations. */
INLINE size_t tile_step(int block) { return (size_t)block * 32 + 3 * 128; }

INLINE void pack_block(const ns_linear *l, const uint8_t *const *p, size_t skip, size_t bytes, int valid, int block, const int32_t *zeros,
                       uint8_t *to, int panel) {
  __m512i w[16], sum = _mm512_setzero_si512();
  __mmask64 inside = valid >= 64 ? ~0ull : (1ull << valid) - 1;
  UNROLL(16) for (int r = 0; r < 16; r++) {
    uint8_t copy[64] = {0};
    const uint8_t *from = p[r] + skip;
    if (bytes < (size_t)l->bits * 8) memcpy(copy, from, bytes), from = copy;
    __m512i zero = _mm512_set1_epi8(l->bits == 8 ? (char)-128 : (char)zeros[r]);
    w[r] = _mm512_maskz_sub_epi8(inside, codes64(from, l->bits), zero);
  }
  transpose16(w);
  uint8_t *tile = to + (size_t)panel * (size_t)block * 16;
  UNROLL(16) for (int j = 0; j < 16; j++) {
    if (4 * j >= block) break;
    sum = dot4(sum, _mm512_set1_epi8(1), w[j]);
    _mm512_storeu_si512(tile + 64 * j, w[j]);
  }
  _mm512_storeu_si512(to + (size_t)block * 32 + 64 * panel, _mm512_slli_epi32(_mm512_sub_epi32(_mm512_setzero_si512(), sum), 7));
}

static void pack(const ns_linear *l, int row, int rows, void *to) {
  if (l->kind == NS_SPARSE || (l->block != 64 && l->block != 32)) {
    quant_pack(l, row, rows, to);
    return;
  }
  int block = l->block, blocks = (l->ins + block - 1) / block, per = l->group < block ? 1 : l->group / block;
  size_t step = (size_t)(l->bits * block / 8);
  for (int panel = 0; panel < 2; panel++) {
    const uint8_t *p[16];
    size_t at[16];
    for (int r = 0; r < 16; r++) {
      int from = 16 * panel + r < rows ? row + 16 * panel + r : row + rows - 1;
      p[r] = l->codes + (size_t)from * l->row_bytes;
      at[r] = (size_t)from * (size_t)l->groups;
    }
    /* scales and zero points of sixteen groups at a time, transposed */
    for (int g0 = 0; g0 < l->groups; g0 += 16) {
      int groups = l->groups - g0 < 16 ? l->groups - g0 : 16;
      __mmask16 mask = (__mmask16)((1u << groups) - 1);
      __m512i s[16], z[16];
      int32_t zeros[16][16];
      float scales[16][16];
      UNROLL(16) for (int r = 0; r < 16; r++) {
        s[r] = _mm512_castps_si512(_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, l->scales + at[r] + g0)));
        z[r] = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, l->zeros + at[r] + g0));
      }
      transpose16(s);
      transpose16(z);
      UNROLL(16) for (int i = 0; i < 16; i++) _mm512_storeu_si512(scales[i], s[i]), _mm512_storeu_si512(zeros[i], z[i]);
      for (int b = g0 * per; b < (g0 + groups) * per && b < blocks; b++) {
        uint8_t *tile = (uint8_t *)to + (size_t)b * tile_step(block);
        int g = b / per - g0, valid = l->ins - b * block < block ? l->ins - b * block : block;
        pack_block(l, p, (size_t)b * step, l->row_bytes - (size_t)b * step, valid, block, zeros[g], tile, panel);
        memcpy(tile + (size_t)block * 32 + 128 + 64 * panel, scales[g], 64);
        __m512i rest = _mm512_sub_epi32(_mm512_set1_epi32(128), _mm512_loadu_si512(zeros[g]));
        _mm512_storeu_si512(tile + (size_t)block * 32 + 256 + 64 * panel, rest);
      }
    }
  }
}

INLINE void many_tokens(const uint8_t *tile, const ns_act *x, int block, int wide, int m, int N, float *out) {
  __m512 acc[2][6];
  const int8_t *q[6];
  UNROLL(6) for (int n = 0; n < N; n++) {
    acc[0][n] = acc[1][n] = _mm512_setzero_ps();
    q[n] = x->natural + (size_t)(m + n) * (size_t)x->stride;
  }
  for (int b = 0; b < x->blocks; b++, tile += tile_step(block)) {
    const uint8_t *facts = tile + (size_t)block * 32;
    __m512i sum[2][6];
    __m512i start0 = _mm512_loadu_si512(facts), start1 = _mm512_loadu_si512(facts + 64);
    UNROLL(6) for (int n = 0; n < N; n++) sum[0][n] = start0, sum[1][n] = start1;
    for (int j = 0; j < block / 4; j++) {
      __m512i w0 = _mm512_loadu_si512(tile + 64 * j), w1 = _mm512_loadu_si512(tile + block * 16 + 64 * j);
      UNROLL(6) for (int n = 0; n < N; n++) {
        int32_t four;
        memcpy(&four, q[n] + b * block + 4 * j, 4);
        __m512i v = _mm512_set1_epi32(four);
        sum[0][n] = dot4(sum[0][n], v, w0);
        sum[1][n] = dot4(sum[1][n], v, w1);
      }
    }
    __m512 s0 = _mm512_loadu_ps((const float *)(facts + 128)), s1 = _mm512_loadu_ps((const float *)(facts + 192));
    UNROLL(6) for (int n = 0; n < N; n++) {
      size_t at = (size_t)(m + n) * (size_t)x->blocks + (size_t)b;
      __m512 xs = _mm512_set1_ps(x->scale[at]);
      if (wide) {
        __m512i total = _mm512_set1_epi32(x->sum[at]);
        sum[0][n] = _mm512_add_epi32(sum[0][n], _mm512_mullo_epi32(total, _mm512_loadu_si512(facts + 256)));
        sum[1][n] = _mm512_add_epi32(sum[1][n], _mm512_mullo_epi32(total, _mm512_loadu_si512(facts + 320)));
      }
      acc[0][n] = _mm512_add_ps(acc[0][n], _mm512_mul_ps(_mm512_cvtepi32_ps(sum[0][n]), _mm512_mul_ps(s0, xs)));
      acc[1][n] = _mm512_add_ps(acc[1][n], _mm512_mul_ps(_mm512_cvtepi32_ps(sum[1][n]), _mm512_mul_ps(s1, xs)));
    }
  }
  UNROLL(6) for (int n = 0; n < N; n++) {
    _mm512_storeu_ps(out + (m + n) * 32, acc[0][n]);
    _mm512_storeu_ps(out + (m + n) * 32 + 16, acc[1][n]);
  }
}

#define MANY(name, block, wide)                                                        \
  static void name(const uint8_t *tile, const ns_act *x, int M, float *out) {          \
    int m = 0;                                                                         \
    for (; m + 6 <= M; m += 6) many_tokens(tile, x, block, wide, m, 6, out);           \
    switch (M - m) {                                                                   \
      case 5: many_tokens(tile, x, block, wide, m, 5, out); break;                     \
      case 4: many_tokens(tile, x, block, wide, m, 4, out); break;                     \
      case 3: many_tokens(tile, x, block, wide, m, 3, out); break;                     \
      case 2: many_tokens(tile, x, block, wide, m, 2, out); break;                     \
      case 1: many_tokens(tile, x, block, wide, m, 1, out); break;                     \
    }                                                                                  \
  }
MANY(many_64, 64, 0)
MANY(many_64_wide, 64, 1)
MANY(many_32, 32, 0)
MANY(many_32_wide, 32, 1)
#undef MANY

static void many(const ns_linear *l, const void *tile, const ns_act *x, int M, float *out) {
  int wide = l->bits == 8;
  if (l->kind == NS_SPARSE || (l->block != 64 && l->block != 32)) quant_many(l, tile, x, M, out);
  else if (l->block == 64) (wide ? many_64_wide : many_64)(tile, x, M, out);
  else (wide ? many_32_wide : many_32)(tile, x, M, out);
}

/* Transposed weights: chosen channels four at a time, interleaved so that a lane holds four channels of one output. The sums of a
 * block live in an order of their own: of 64 outputs, register 0 to 3 hold
 *   4 bits: the even ones of the first 32, the odd ones, and the same of the second 32
 *   else:   in lane 4 i + j of register r output 16 i + 4 r + j */
INLINE void interleave(const uint8_t *const *w, size_t skip, int bits, __m512i v[4]) {
  if (bits == 4) {
    const __m512i low = _mm512_set1_epi8(15);
    static const uint8_t order[128] = {
        0, 32, 64, 96,  1, 33, 65, 97,  2, 34, 66, 98,  3, 35, 67, 99,  4, 36, 68, 100, 5, 37, 69, 101, 6, 38, 70, 102, 7, 39, 71, 103,
        8, 40, 72, 104, 9, 41, 73, 105, 10, 42, 74, 106, 11, 43, 75, 107, 12, 44, 76, 108, 13, 45, 77, 109, 14, 46, 78, 110, 15, 47, 79, 111,
        16, 48, 80, 112, 17, 49, 81, 113, 18, 50, 82, 114, 19, 51, 83, 115, 20, 52, 84, 116, 21, 53, 85, 117, 22, 54, 86, 118, 23, 55, 87, 119,
        24, 56, 88, 120, 25, 57, 89, 121, 26, 58, 90, 122, 27, 59, 91, 123, 28, 60, 92, 124, 29, 61, 93, 125, 30, 62, 94, 126, 31, 63, 95, 127};
    __m512i ab = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)(w[0] + skip))),
                                    _mm256_loadu_si256((const __m256i *)(w[1] + skip)), 1);
    __m512i cd = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)(w[2] + skip))),
                                    _mm256_loadu_si256((const __m256i *)(w[3] + skip)), 1);
    __m512i x = _mm512_permutex2var_epi8(ab, _mm512_loadu_si512(order), cd), y = _mm512_permutex2var_epi8(ab, _mm512_loadu_si512(order + 64), cd);
    v[0] = _mm512_and_si512(x, low), v[1] = _mm512_and_si512(_mm512_srli_epi16(x, 4), low);
    v[2] = _mm512_and_si512(y, low), v[3] = _mm512_and_si512(_mm512_srli_epi16(y, 4), low);
    return;
  }
  __m512i a = codes64(w[0] + skip, bits), b = codes64(w[1] + skip, bits);
  __m512i c = codes64(w[2] + skip, bits), d = codes64(w[3] + skip, bits);
  __m512i ab0 = _mm512_unpacklo_epi8(a, b), ab1 = _mm512_unpackhi_epi8(a, b);
  __m512i cd0 = _mm512_unpacklo_epi8(c, d), cd1 = _mm512_unpackhi_epi8(c, d);
  v[0] = _mm512_unpacklo_epi16(ab0, cd0), v[1] = _mm512_unpackhi_epi16(ab0, cd0);
  v[2] = _mm512_unpacklo_epi16(ab1, cd1), v[3] = _mm512_unpackhi_epi16(ab1, cd1);
}

/* The four registers of sums in the order of the outputs. */
INLINE void in_order(const int32_t *s, int bits, __m512i n[4]) {
  __m512i v0 = _mm512_loadu_si512(s), v1 = _mm512_loadu_si512(s + 16), v2 = _mm512_loadu_si512(s + 32), v3 = _mm512_loadu_si512(s + 48);
  if (bits == 4) {
    const __m512i front = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i back = _mm512_add_epi32(front, _mm512_set1_epi32(8));
    n[0] = _mm512_permutex2var_epi32(v0, front, v1), n[1] = _mm512_permutex2var_epi32(v0, back, v1);
    n[2] = _mm512_permutex2var_epi32(v2, front, v3), n[3] = _mm512_permutex2var_epi32(v2, back, v3);
    return;
  }
  __m512i e0 = _mm512_shuffle_i32x4(v0, v1, 0x44), e1 = _mm512_shuffle_i32x4(v2, v3, 0x44);
  __m512i f0 = _mm512_shuffle_i32x4(v0, v1, 0xee), f1 = _mm512_shuffle_i32x4(v2, v3, 0xee);
  n[0] = _mm512_shuffle_i32x4(e0, e1, 0x88), n[1] = _mm512_shuffle_i32x4(e0, e1, 0xdd);
  n[2] = _mm512_shuffle_i32x4(f0, f1, 0x88), n[3] = _mm512_shuffle_i32x4(f0, f1, 0xdd);
}

/* Eight channels into the sums of `tiles` times 64 outputs; `next`: the eight after them, asked for meanwhile. */
INLINE void add_channels(const uint8_t *const *w, const uint8_t *const *next, int bits, int tiles, const int32_t (*eight)[2], int M,
                         int32_t *sums, size_t stride) {
  __m512i q[4][2];
  UNROLL(4) for (int m = 0; m < M; m++) q[m][0] = _mm512_set1_epi32(eight[m][0]), q[m][1] = _mm512_set1_epi32(eight[m][1]);
  for (int t = 0; t < tiles; t++) {
    size_t skip = (size_t)t * (size_t)bits * 8;
    __m512i v[4], u[4];
    UNROLL(8) for (int i = 0; i < 8; i++) _mm_prefetch((const char *)(next[i] + skip), _MM_HINT_T0);
    interleave(w, skip, bits, v);
    interleave(w + 4, skip, bits, u);
    UNROLL(4) for (int m = 0; m < M; m++) {
      int32_t *s = sums + (size_t)m * stride + 64 * t;
      UNROLL(4) for (int i = 0; i < 4; i++)
          _mm512_storeu_si512(s + 16 * i, dot4(dot4(_mm512_loadu_si512(s + 16 * i), v[i], q[m][0]), u[i], q[m][1]));
    }
  }
}

INLINE void sparse_some(const ns_linear *l, int row, int width, const ns_picked *x, int bits, int M, float *out, size_t ostride,
                        int32_t *sums) {
  int tiles = width / 64;
  size_t stride = (size_t)tiles * 64;
  for (int m = 0; m < M; m++) memset(out + (size_t)m * ostride, 0, stride * sizeof(float));
  for (int b = 0; b < x->blocks; b++) {
    if (x->start[b] == x->start[b + 1]) continue;
    memset(sums, 0, (size_t)M * stride * sizeof(int32_t));
    for (int c = x->start[b]; c < x->start[b + 1]; c += 8) {
      const uint8_t *w[8], *next[8];
      int32_t eight[4][2] = {{0}};
      int n = x->start[b + 1] - c < 8 ? x->start[b + 1] - c : 8;
      for (int i = 0; i < 8; i++) {
        int then = c + n + i < x->count ? c + n + i : x->count - 1;
        w[i] = l->codes + (size_t)x->channels[c + (i < n ? i : 0)] * l->row_bytes + (size_t)row * (size_t)bits / 8;
        next[i] = l->codes + (size_t)x->channels[then] * l->row_bytes + (size_t)row * (size_t)bits / 8;
      }
      for (int m = 0; m < M; m++) memcpy(eight[m], x->q + (size_t)m * (size_t)x->stride + c, (size_t)n);
      add_channels(w, next, bits, tiles, (const int32_t(*)[2])eight, M, sums, stride);
    }
    size_t at = (size_t)(b * x->block / l->group) * (size_t)l->outs + (size_t)row;
    for (int t = 0; t < tiles; t++)
      for (int m = 0; m < M; m++) {
        __m512i n[4];
        in_order(sums + (size_t)m * stride + 64 * t, bits, n);
        size_t fact = (size_t)m * (size_t)x->blocks + (size_t)b;
        __m512 xs = _mm512_set1_ps(x->scale[fact]);
        __m512i total = _mm512_set1_epi32(x->sum[fact]);
        UNROLL(4) for (int i = 0; i < 4; i++) {
          size_t o = at + (size_t)(64 * t + 16 * i);
          __m512 scale = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(l->scales + o)));
          __m512i zero = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(l->zeros + o)));
          __m512 r = _mm512_cvtepi32_ps(_mm512_sub_epi32(n[i], _mm512_mullo_epi32(zero, total)));
          float *y = out + (size_t)m * ostride + 64 * t + 16 * i;
          _mm512_storeu_ps(y, _mm512_add_ps(_mm512_loadu_ps(y), _mm512_mul_ps(r, _mm512_mul_ps(scale, xs))));
        }
      }
  }
}

#define SPARSE(name, bits)                                                                                                 \
  static void name(const ns_linear *l, int row, int width, const ns_picked *x, int M, float *out, int32_t *sums) {         \
    ns_picked part = *x;                                                                                                   \
    for (int m = 0, n; m < M; m += n) {                                                                                    \
      n = M - m >= 4 ? 4 : M - m >= 2 ? 2 : 1;                                                                             \
      float *to = out + (size_t)m * (size_t)width;                                                                         \
      if (n == 4) sparse_some(l, row, width, &part, bits, 4, to, (size_t)width, sums);                                     \
      else if (n == 2) sparse_some(l, row, width, &part, bits, 2, to, (size_t)width, sums);                                \
      else sparse_some(l, row, width, &part, bits, 1, to, (size_t)width, sums);                                            \
      part.q += (size_t)n * (size_t)x->stride;                                                                             \
      part.scale += (size_t)n * (size_t)x->blocks;                                                                         \
      part.sum += (size_t)n * (size_t)x->blocks;                                                                           \
    }                                                                                                                      \
  }
SPARSE(sparse_8, 8)
SPARSE(sparse_4, 4)
SPARSE(sparse_3, 3)
SPARSE(sparse_2, 2)
#undef SPARSE

static void sparse_fast(const ns_linear *l, int row, int width, const ns_picked *x, int M, float *out, int32_t *sums) {
  int whole = width & ~63;
  if (whole != width) { /* the ragged end first: it is as wide as a tile at most, and moves to its place */
    float end[NS_FEW * 64];
    sparse_quant(l, row + whole, width - whole, x, M, end, sums);
    if (!whole) {
      memcpy(out, end, (size_t)M * (size_t)width * sizeof(float));
      return;
    }
    float *wide = out;
    sparse_fast(l, row, whole, x, M, wide, sums);
    for (int m = M - 1; m >= 0; m--) {
      memmove(out + (size_t)m * (size_t)width, wide + (size_t)m * (size_t)whole, (size_t)whole * sizeof(float));
      memcpy(out + (size_t)m * (size_t)width + whole, end + m * (width - whole), (size_t)(width - whole) * sizeof(float));
    }
    return;
  }
  if (l->bits == 8) sparse_8(l, row, width, x, M, out, sums);
  else if (l->bits == 4) sparse_4(l, row, width, x, M, out, sums);
  else if (l->bits == 3) sparse_3(l, row, width, x, M, out, sums);
  else sparse_2(l, row, width, x, M, out, sums);
}

/* As quantize in int.inc.h, for blocks of 64 and 32: the same bits. */
static void quantize_fast(const float *x, int ins, const ns_act *to, int m, int first, int last) {
  int block = to->block;
  if (block != 64 && block != 32) {
    quantize(x, ins, to, m, first, last);
    return;
  }
  const __m512 magic = _mm512_set1_ps(12582912.0f);
  const __m128i flip = _mm_set1_epi8((char)to->flip);
  __m512i by2 = _mm512_setzero_si512(), by4 = by2;
  if (to->split || to->split2) { /* bytes of a register: even then odd ones (4 bits), every fourth (2 bits), within the block */
    uint8_t order[64], order2[64];
    for (int i = 0; i < 64; i++) {
      int base = i / block * block, j = i % block;
      order[i] = (uint8_t)(base + 2 * (j % (block / 2)) + j / (block / 2));
      order2[i] = (uint8_t)(base + 4 * (j % (block / 4)) + j / (block / 4));
    }
    by2 = _mm512_loadu_si512(order), by4 = _mm512_loadu_si512(order2);
  }
  for (int b = first; b < last; b++) {
    size_t base = (size_t)m * (size_t)to->stride + (size_t)(b * block), at = (size_t)m * (size_t)to->blocks + (size_t)b;
    int valid = ins - b * block < block ? ins - b * block : block, parts = block / 16;
    __m512 v[4], most = _mm512_setzero_ps();
    for (int i = 0; i < parts; i++) {
      int left = valid - 16 * i;
      __mmask16 mask = left >= 16 ? 0xffff : left <= 0 ? 0 : (__mmask16)((1u << left) - 1);
      v[i] = _mm512_maskz_loadu_ps(mask, x + b * block + 16 * i);
      most = _mm512_max_ps(most, _mm512_abs_ps(v[i]));
    }
    float top = _mm512_reduce_max_ps(most);
    __m512 inverse = _mm512_set1_ps(top > 0 ? 127 / top : 0);
    __m512i sum = _mm512_setzero_si512();
    __m128i piece[4] = {_mm_setzero_si128(), _mm_setzero_si128(), _mm_setzero_si128(), _mm_setzero_si128()};
    for (int i = 0; i < parts; i++) {
      __m512i n = _mm512_castps_si512(_mm512_add_ps(_mm512_mul_ps(v[i], inverse), magic));
      n = _mm512_srai_epi32(_mm512_slli_epi32(n, 24), 24);
      sum = _mm512_add_epi32(sum, n);
      piece[i] = _mm_xor_si128(_mm512_cvtepi32_epi8(n), flip);
    }
    to->scale[at] = top / 127;
    to->sum[at] = _mm512_reduce_add_epi32(sum);
    __mmask64 all = block == 64 ? ~0ull : 0xffffffffull;
    __m256i front = _mm256_set_m128i(piece[1], piece[0]), back = _mm256_set_m128i(piece[3], piece[2]);
    __m512i q = _mm512_inserti64x4(_mm512_castsi256_si512(front), back, 1);
    _mm512_mask_storeu_epi8(to->natural + base, all, q);
    if (to->split) {
      __m512i sorted = _mm512_permutexvar_epi8(by2, q);
      if (block == 64) { /* a pair of blocks: the even ones of both, then the odd ones */
        int8_t *pair = to->split + (size_t)m * (size_t)to->stride + ns_split_at(64, b * 64);
        _mm256_storeu_si256((__m256i *)pair, _mm512_castsi512_si256(sorted));
        _mm256_storeu_si256((__m256i *)(pair + 64), _mm512_extracti64x4_epi64(sorted, 1));
      } else {
        _mm512_mask_storeu_epi8(to->split + base, all, sorted);
      }
    }
    if (to->split2) _mm512_mask_storeu_epi8(to->split2 + base, all, _mm512_permutexvar_epi8(by4, q));
  }
}

static double int8_burst(long steps) {
  __m512i acc[12], a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(5);
  for (int i = 0; i < 12; i++) acc[i] = _mm512_set1_epi32(i);
  for (long s = 0; s < steps; s++) {
    UNROLL(12) for (int i = 0; i < 12; i++) acc[i] = dot4(acc[i], a, b);
    __asm__ volatile("" : "+v"(a), "+v"(b)); /* keeps the loop from being folded */
  }
  for (int i = 1; i < 12; i++) acc[0] = _mm512_add_epi32(acc[0], acc[i]);
  return (double)steps * 12 * 64 + (_mm512_reduce_add_epi32(acc[0]) == 12345 ? 1e-9 : 0);
}

const ns_kernels ns_avx512 = {"avx512", few,     pack,   many,   dense, sparse_dense, sparse_fast, quantize_fast,
                              rmsnorm,  silu_mul, rotate, kv_store, attend, row,      sweep, int8_burst};
#endif
