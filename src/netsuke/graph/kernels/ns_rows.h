/* Dot products of a few rows of activations (pixels), expanded to 16 bits without their zero point, with rows of weights.
 * Dense layers, pointwise and general convolutions are this, and differ in how they gather the rows. */
#ifndef NS_ROWS_H
#define NS_ROWS_H

#include "ns_int.h"

#define NS_BLOCK 4   /* rows at once */
#define NS_TILE 16   /* output channels whose sums wait for one loop of rescaling */
#define NS_PIECE 64  /* int4 codes that are unpacked at once */

typedef struct {
  int32_t k, kp, o, ys;          /* numbers in a row, rounded up to 4; output channels; elements between rows of y */
  int32_t zx, zy, shift, low, high;
  int32_t w4;
} ns_rows;

/* Appends n codes less `zero` to a row of the block. */
NS_INLINE void ns_expand(int16_t *out, const int8_t *x, int32_t n, int32_t zero) {
  for (int32_t i = 0; i < n; i++) out[i] = (int16_t)(x[i] - zero);
}

NS_INLINE void ns_zero(int16_t *out, int32_t n) {
  for (int32_t i = 0; i < n; i++) out[i] = 0;
}

NS_INLINE void ns_dot4(const int16_t *c, int32_t kp, const int8_t *w, int32_t n, int32_t acc[NS_BLOCK]) {
  const int16_t *c1 = c + kp, *c2 = c1 + kp, *c3 = c2 + kp;
  int32_t s0 = 0, s1 = 0, s2 = 0, s3 = 0;
  for (int32_t i = 0; i < n; i++) {
    const int16_t v = w[i];
    s0 += c[i] * v;
    s1 += c1[i] * v;
    s2 += c2[i] * v;
    s3 += c3[i] * v;
  }
  acc[0] += s0;
  acc[1] += s1;
  acc[2] += s2;
  acc[3] += s3;
}

NS_INLINE void ns_dot1(const int16_t *c, const int8_t *w, int32_t n, int32_t acc[NS_BLOCK]) {
  int32_t s = 0;
  for (int32_t i = 0; i < n; i++) s += c[i] * (int16_t)w[i];
  acc[0] += s;
}

/* y[row * ys + o] for `rows` (1 to 4) rows of the block, whose row r begins at block + r * kp. */
NS_INLINE void ns_block(const ns_rows *g, const int16_t *block, int32_t rows, const void *weights, const int32_t *bias,
                        const int32_t *m, int8_t *y, const int32_t w4) {
  int32_t tile[NS_BLOCK][NS_TILE];
  const int32_t stride = w4 ? (g->k + 1) / 2 : g->k;
  for (int32_t o0 = 0; o0 < g->o; o0 += NS_TILE) {
    const int32_t n = ns_min(NS_TILE, g->o - o0);
    for (int32_t j = 0; j < n; j++) {
      const int32_t first = bias ? bias[o0 + j] : 0;
      int32_t acc[NS_BLOCK] = {first, first, first, first};
      const int8_t *w = (const int8_t *)weights + (ptrdiff_t)(o0 + j) * stride;
      if (w4) {
        int8_t piece[NS_PIECE];
        for (int32_t k0 = 0; k0 < g->k; k0 += NS_PIECE) {
          const int32_t nk = ns_min(NS_PIECE, g->k - k0);
          const uint8_t *packed = (const uint8_t *)w + k0 / 2;
          for (int32_t i = 0; i < (nk + 1) / 2; i++) {
            piece[2 * i] = (int8_t)(((packed[i] & 15) ^ 8) - 8);
            piece[2 * i + 1] = (int8_t)(((packed[i] >> 4) ^ 8) - 8);
          }
          if (rows > 1) ns_dot4(block + k0, g->kp, piece, nk, acc);
          else ns_dot1(block + k0, piece, nk, acc);
        }
      } else if (rows > 1) {
        ns_dot4(block, g->kp, w, g->k, acc);
      } else {
        ns_dot1(block, w, g->k, acc);
      }
      for (int32_t r = 0; r < rows; r++) tile[r][j] = acc[r];
    }
    for (int32_t r = 0; r < rows; r++) {
      for (int32_t j = 0; j < n; j++) {
        y[(ptrdiff_t)r * g->ys + o0 + j] = ns_requant(tile[r][j], m[o0 + j], g->shift, g->zy, g->low, g->high);
      }
    }
  }
}

#endif
