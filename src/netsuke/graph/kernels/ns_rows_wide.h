/* Blocks of rows on a processor with vectors: output channels are lanes, weights are repacked for as many of them as one
 * pass takes. Only worth it for several blocks, and only where outputs do not overwrite inputs: every pass reads them all. */
#ifndef NS_ROWS_WIDE_H
#define NS_ROWS_WIDE_H

#include "ns_wide.h"

#if NS_WIDE

#define NS_PASS (2 * NS_WIDE) /* output channels in one pass */
#define NS_PASS_K 1024        /* numbers in the longest row that is repacked: 64 KB of weights */
#define NS_PASS_ROWS 8        /* fewer rows are not worth the repacking */

/* Pairs of neighbouring weights, one pair per lane. */
typedef struct {
  int32_t pairs[NS_PASS_K / 2][NS_PASS];
  ns_wide first[2], m[2];
} ns_pass;

NS_INLINE int32_t ns_pair(int32_t low, int32_t high) { return (int32_t)((uint32_t)low & 0xffff) | (int32_t)((uint32_t)high << 16); }

/* n rows of k weights, `stride` bytes apart. */
NS_INLINE void ns_pass_of(ns_pass *pass, const void *weights, int32_t stride, int32_t k, const int32_t *bias, const int32_t *m,
                          int32_t n, const int32_t w4) {
  const int8_t *w = (const int8_t *)weights;
  for (int32_t j = 0; j < NS_PASS; j++) {
    const int8_t *row = w + (ptrdiff_t)ns_min(j, n - 1) * stride; /* lanes without a channel repeat the last */
    if (w4) {
      for (int32_t i = 0; i < k / 2; i++) {
        pass->pairs[i][j] = ns_pair((int8_t)(row[i] << 4) >> 4, row[i] >> 4);
      }
    } else {
      for (int32_t i = 0; i < k / 2; i++) pass->pairs[i][j] = ns_pair(row[2 * i], row[2 * i + 1]);
    }
    if (k & 1) pass->pairs[k / 2][j] = ns_pair(w4 ? (int8_t)(row[k / 2] << 4) >> 4 : row[k - 1], 0);
  }
  for (int32_t v = 0; v < 2; v++) {
    const int32_t lanes = ns_clip(n - v * NS_WIDE, 0, NS_WIDE);
    pass->first[v] = bias ? ns_wide_load_n(bias + v * NS_WIDE, lanes) : ns_wide_all(0);
    pass->m[v] = ns_wide_load_n(m + v * NS_WIDE, lanes);
  }
}

/* y[r * ys + j] for `rows` rows of the block, kp numbers apart, and the n channels of the pass in `vectors` vectors. */
NS_INLINE void ns_pass_block(const ns_pass *pass, const int16_t *block, int32_t kp, int32_t k, const int32_t rows,
                             const int32_t vectors, const ns_scale *s, int32_t low, int32_t high, int8_t *y, int32_t ys,
                             int32_t n) {
  ns_wide sum[4][2];
  for (int32_t r = 0; r < rows; r++) {
    for (int32_t v = 0; v < vectors; v++) sum[r][v] = pass->first[v];
  }
  for (int32_t i = 0; i < (k + 1) / 2; i++) {
    ns_wide w[2];
    for (int32_t v = 0; v < vectors; v++) w[v] = ns_wide_load(pass->pairs[i] + v * NS_WIDE);
    for (int32_t r = 0; r < rows; r++) {
      int32_t pair;
      memcpy(&pair, block + r * kp + 2 * i, sizeof pair);
      const ns_wide x = ns_wide_all(pair);
      for (int32_t v = 0; v < vectors; v++) sum[r][v] = ns_wide_pairs(sum[r][v], x, w[v]);
    }
  }
  for (int32_t r = 0; r < rows; r++) {
    for (int32_t v = 0; v < vectors; v++) {
      const int32_t lanes = ns_min(n - v * NS_WIDE, NS_WIDE);
      ns_wide_finish(sum[r][v], pass->m[v], s, low, high, y + (ptrdiff_t)r * ys + v * NS_WIDE, lanes);
    }
  }
}

#endif
#endif
