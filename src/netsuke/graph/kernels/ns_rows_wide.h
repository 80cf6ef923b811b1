/* Blocks of rows on a processor with vectors: output channels are lanes, and weights are repacked, a pair of neighbouring ones
 * per lane. Only worth it for several blocks. */
#ifndef NS_ROWS_WIDE_H
#define NS_ROWS_WIDE_H

#include "ns_wide.h"

#if NS_WIDE

#define NS_PASS (2 * NS_WIDE) /* output channels in one pass over a block */
#define NS_PACKED 16384       /* pairs of weights that are repacked at once: 64 KB of stack */
#define NS_PASS_ROWS 8        /* fewer rows are not worth it */

NS_INLINE int32_t ns_pair(int32_t low, int32_t high) { return (int32_t)((uint32_t)low & 0xffff) | (int32_t)((uint32_t)high << 16); }

/* Channels of k weights that are repacked at once, 0 when not even one pass fits. */
NS_INLINE int32_t ns_packed_channels(int32_t k) { return NS_PACKED / ((k + 1) / 2) / NS_PASS * NS_PASS; }

/* n rows of k weights, `stride` bytes apart: pass by pass, pair by pair, lane by lane. */
NS_INLINE void ns_pack(int32_t *pairs, const int8_t *w, int32_t stride, int32_t k, int32_t n, const int32_t w4) {
  for (int32_t first = 0; first < n; first += NS_PASS, pairs += (k + 1) / 2 * NS_PASS) {
    for (int32_t j = 0; j < NS_PASS; j++) {
      const int8_t *row = w + (ptrdiff_t)ns_min(first + j, n - 1) * stride; /* lanes without a channel repeat the last */
      int32_t *out = pairs + j;
      if (w4) {
        for (int32_t i = 0; i < k / 2; i++, out += NS_PASS) *out = ns_pair((int8_t)(row[i] << 4) >> 4, row[i] >> 4);
        if (k & 1) *out = ns_pair((int8_t)(row[k / 2] << 4) >> 4, 0);
      } else {
        for (int32_t i = 0; i < k / 2; i++, out += NS_PASS) *out = ns_pair(row[2 * i], row[2 * i + 1]);
        if (k & 1) *out = ns_pair(row[k - 1], 0);
      }
    }
  }
}

/* What does not change from block to block. */
typedef struct {
  const int32_t *bias, *m;
  ns_scale scale;
  int32_t k, kp, low, high, ys;
} ns_pass;

/* y[r * ys + j] for `rows` rows of the block and the n channels of one pass, which fill `vectors` vectors. */
NS_INLINE void ns_pass_block(const ns_pass *p, const int32_t *pairs, const int16_t *block, const int32_t rows,
                             const int32_t vectors, int32_t o, int32_t n, int8_t *y) {
  ns_wide sum[4][2];
  for (int32_t v = 0; v < vectors; v++) {
    const int32_t lanes = ns_min(n - v * NS_WIDE, NS_WIDE);
    const ns_wide first = p->bias ? ns_wide_load_n(p->bias + o + v * NS_WIDE, lanes) : ns_wide_all(0);
    for (int32_t r = 0; r < rows; r++) sum[r][v] = first;
  }
  for (int32_t i = 0; i < (p->k + 1) / 2; i++, pairs += NS_PASS) {
    ns_wide w[2];
    for (int32_t v = 0; v < vectors; v++) w[v] = ns_wide_load(pairs + v * NS_WIDE);
    for (int32_t r = 0; r < rows; r++) {
      int32_t pair;
      memcpy(&pair, block + r * p->kp + 2 * i, sizeof pair);
      const ns_wide x = ns_wide_all(pair);
      for (int32_t v = 0; v < vectors; v++) sum[r][v] = ns_wide_pairs(sum[r][v], x, w[v]);
    }
  }
  for (int32_t v = 0; v < vectors; v++) {
    const int32_t lanes = ns_min(n - v * NS_WIDE, NS_WIDE);
    const ns_wide m = ns_wide_load_n(p->m + o + v * NS_WIDE, lanes);
    for (int32_t r = 0; r < rows; r++) {
      ns_wide_finish(sum[r][v], m, &p->scale, p->low, p->high, y + (ptrdiff_t)r * p->ys + o + v * NS_WIDE, lanes);
    }
  }
}

/* All n channels of repacked weights for a block of 1, 3 or 4 rows. */
NS_INLINE void ns_passes(const ns_pass *p, const int32_t *pairs, const int16_t *block, int32_t rows, int32_t n, int8_t *y) {
  for (int32_t o = 0; o < n; o += NS_PASS, pairs += (p->k + 1) / 2 * NS_PASS) {
    const int32_t left = ns_min(n - o, NS_PASS);
    if (left > NS_WIDE) {
      if (rows == 4) ns_pass_block(p, pairs, block, 4, 2, o, left, y);
      else if (rows == 3) ns_pass_block(p, pairs, block, 3, 2, o, left, y);
      else ns_pass_block(p, pairs, block, 1, 2, o, left, y);
    } else {
      if (rows == 4) ns_pass_block(p, pairs, block, 4, 1, o, left, y);
      else if (rows == 3) ns_pass_block(p, pairs, block, 3, 1, o, left, y);
      else ns_pass_block(p, pairs, block, 1, 1, o, left, y);
    }
  }
}

#endif
#endif
