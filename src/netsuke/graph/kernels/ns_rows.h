/* Dot products of a few rows of activations (pixels), expanded to 16 bits without their zero point, with rows of weights.
 * Dense layers, pointwise and general convolutions are this, and differ in how they gather the rows.
 *
 * For each run of output channels (ns_run_of; often all of them are one run), blocks of rows are filled by ns_put and
 * ns_put_zero, and ns_block gives the run's outputs of a block. */
#ifndef NS_ROWS_H
#define NS_ROWS_H

#include "ns_dsp.h"
#include "ns_rows_wide.h"

#define NS_BLOCK 4  /* rows at once */
#define NS_TILE 16  /* output channels whose sums wait for one loop of rescaling */
#define NS_PIECE 64 /* int4 codes that are unpacked at once */
#define NS_W4_UP 4  /* how far up sums of int4 weights are anyhow */

typedef struct {
  int32_t k, kp, o, ys; /* numbers in a row, rounded up to whole words of codes; output channels; from row to row of y */
  int32_t zx, zy, shift, low, high;
  ns_scale scale;
} ns_rows;

/* Codes in a word of weights. */
NS_INLINE int32_t ns_whole(const int32_t w4) { return w4 ? 8 : 4; }

/* zx to high: those of the operator. */
NS_INLINE ns_rows ns_rows_of(int32_t k, int32_t o, int32_t ys, int32_t zx, int32_t zy, int32_t shift, int32_t room, int32_t low,
                             int32_t high, const int32_t w4) {
  const ns_rows g = {k, (k + ns_whole(w4) - 1) & -ns_whole(w4), o, ys, zx, zy, shift, low, high,
                     ns_scale_of(shift, zy, room, NS_DSP && w4 ? NS_W4_UP : 0)};
  return g;
}

/* Output channels that are worked on together: n of them, with their weights. */
typedef struct {
  const void *w;
  const int32_t *bias, *m;
  int32_t n;
#if NS_WIDE
  int32_t packed, pairs[NS_PACKED];
#endif
} ns_run;

/* Output channels in a run, and whether their weights are repacked. apart: outputs do not overwrite inputs; rows: of all. */
NS_INLINE int32_t ns_run_length(const ns_rows *g, int32_t rows, int32_t apart, int32_t *packed) {
  *packed = 0;
#if NS_WIDE
  const int32_t channels = ns_packed_channels(g->k), all = channels >= g->o;
  if (rows >= NS_PASS_ROWS && (all || (apart && channels)) && g->scale.quick) {
    *packed = 1;
    return all ? g->o : channels;
  }
#endif
  (void)rows;
  (void)apart;
  return g->o;
}

/* The run of channels o to o + length - 1, as far as there are so many. */
NS_INLINE void ns_run_of(ns_run *run, const ns_rows *g, const void *w, const int32_t *bias, const int32_t *m, int32_t o,
                         int32_t length, int32_t packed, const int32_t w4) {
  const int32_t stride = w4 ? (g->k + 1) / 2 : g->k;
  run->w = (const int8_t *)w + (ptrdiff_t)o * stride;
  run->bias = bias ? bias + o : NULL;
  run->m = m + o;
  run->n = ns_min(length, g->o - o);
#if NS_WIDE
  run->packed = packed;
  if (packed) ns_pack(run->pairs, (const int8_t *)run->w, stride, g->k, run->n, w4);
#endif
  (void)packed;
}

/* How many of `left` rows are worked on together: one or two are less work one by one. */
NS_INLINE int32_t ns_together(int32_t left) { return left >= NS_BLOCK ? NS_BLOCK : left == 3 ? 3 : 1; }

#if NS_DSP

NS_INLINE void ns_word(uint32_t *out, int32_t lanes, uint32_t minus, uint32_t v, uint32_t next, const int32_t w4) {
  const uint32_t even = ns_even(minus, v), odd = ns_odd(minus, v);
  if (w4) {
    const uint32_t even2 = ns_even(minus, next), odd2 = ns_odd(minus, next);
    out[0] = ns_bottoms(odd, odd2);
    out[lanes] = ns_tops(odd, odd2);
    out[2 * lanes] = ns_bottoms(even, even2);
    out[3 * lanes] = ns_tops(even, even2);
  } else {
    out[0] = even;
    out[lanes] = odd;
  }
}

NS_INLINE void ns_put_words(uint32_t *out, const int32_t lanes, uint32_t minus, const int8_t *x, int32_t n, int8_t zero,
                            const int32_t w4) {
  const int32_t whole = ns_whole(w4);
  NS_UNROLL
  for (; n >= whole; n -= whole, x += whole, out += lanes * whole / 2) {
    ns_word(out, lanes, minus, ns_load4(x), w4 ? ns_load4(x + 4) : 0, w4);
  }
  if (n) {
    const uint32_t four = (uint8_t)zero * 0x01010101u;
    uint32_t rest[2] = {four, four};
    for (int32_t i = 0; i < n; i++) ((int8_t *)rest)[i] = x[i];
    ns_word(out, lanes, minus, rest[0], rest[1], w4);
  }
}

/* Codes k to k + n - 1 of row r, one of `rows`. k begins a word; a word that x does not fill is filled with zero points. */
NS_INLINE void ns_put(const ns_rows *g, int16_t *block, int32_t rows, int32_t r, int32_t k, const int8_t *x, int32_t n,
                      const int32_t w4) {
  const uint32_t minus = ((uint32_t)-g->zx & 0xffff) * 0x10001u;
  uint32_t *out = (uint32_t *)block;
  if (rows > 1) ns_put_words(out + k / 2 * NS_BLOCK + r, NS_BLOCK, minus, x, n, (int8_t)g->zx, w4);
  else ns_put_words(out + k / 2, 1, minus, x, n, (int8_t)g->zx, w4);
}

/* Zero points from code k on, n of them; both whole words. */
NS_INLINE void ns_put_zero(const ns_rows *g, int16_t *block, int32_t rows, int32_t r, int32_t k, int32_t n) {
  (void)g;
  const int32_t lanes = rows > 1 ? NS_BLOCK : 1;
  uint32_t *out = (uint32_t *)block + k / 2 * lanes + r;
  for (int32_t i = 0; i < n; i += 2, out += lanes) *out = 0;
}

/* y[r * ys + o] for the rows of the block and the run's channels. */
NS_INLINE void ns_block(const ns_rows *g, const ns_run *run, const int16_t *block, int32_t rows, int8_t *y, const int32_t w4) {
  const ns_scale s = g->scale;
  const int32_t quick = s.quick && (!w4 || s.up == NS_W4_UP) && g->low <= -128 && g->high >= 127;
  const int32_t stride = w4 ? (g->k + 1) / 2 : g->k, groups = g->kp / ns_whole(w4);
  const uint32_t *x = (const uint32_t *)block;
  const int8_t *w = (const int8_t *)run->w;
  const int32_t *bias = run->bias, *m = run->m;
  int32_t done = 0;
  if (rows == 1 && !w4 && quick && bias && run->n > 1) {
    done = run->n & ~1;
    ns_row c = {x, (int32_t)((intptr_t)bias - (intptr_t)m), 2 * stride - 4 * groups, stride, 4 * groups, groups & 3, s.addend,
                s.shift, m + done, m, y, w - (2 * stride - 4 * groups), s.up};
    ns_row_w8(&c);
  }
  if (rows == NS_BLOCK && quick && bias) {
    ns_channels c = {block, (int32_t)((intptr_t)bias - (intptr_t)m), stride - 4 * groups, 4 * groups, groups & 3, m + run->n, m,
                     y, s.addend, s.shift, g->ys, w - (stride - 4 * groups), s.up};
    if (w4) ns_channels_w4(&c);
    else ns_channels_w8(&c);
    return;
  }
  for (int32_t r = 0; r < rows; r++, x++, y += g->ys) { /* what has no loop of its own */
    const int8_t *row = w + done * stride;
    for (int32_t o = done; o < run->n; o++, row += stride) {
      const int32_t total = ns_wrap_add(ns_mac(row, x, rows > 1 ? NS_BLOCK : 1, groups, w4), bias ? bias[o] : 0);
      y[o] = ns_requant(total, m[o], g->shift, g->zy, g->low, g->high);
    }
  }
}

#else

NS_INLINE void ns_put_zero(const ns_rows *g, int16_t *block, int32_t rows, int32_t r, int32_t k, int32_t n) {
  (void)rows;
  for (int32_t i = 0; i < n; i++) block[r * g->kp + k + i] = 0;
}

NS_INLINE void ns_put(const ns_rows *g, int16_t *block, int32_t rows, int32_t r, int32_t k, const int8_t *x, int32_t n,
                      const int32_t w4) {
  int16_t *out = block + r * g->kp + k;
  (void)rows;
  (void)w4;
  for (int32_t i = 0; i < n; i++) out[i] = (int16_t)(x[i] - g->zx);
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

/* y[r * ys + o] for the rows of the block and the run's channels. */
NS_INLINE void ns_block(const ns_rows *g, const ns_run *run, const int16_t *block, int32_t rows, int8_t *y, const int32_t w4) {
  const int32_t *bias = run->bias, *m = run->m, stride = w4 ? (g->k + 1) / 2 : g->k;
  int32_t tile[NS_BLOCK][NS_TILE];
#if NS_WIDE
  if (run->packed) {
    const ns_pass p = {bias, m, g->scale, g->k, g->kp, g->low, g->high, g->ys};
    ns_passes(&p, run->pairs, block, rows, run->n, y);
    return;
  }
#endif
  for (int32_t o0 = 0; o0 < run->n; o0 += NS_TILE) {
    const int32_t n = ns_min(NS_TILE, run->n - o0);
    for (int32_t j = 0; j < n; j++) {
      const int32_t first = bias ? bias[o0 + j] : 0;
      int32_t acc[NS_BLOCK] = {first, first, first, first};
      const int8_t *w = (const int8_t *)run->w + (ptrdiff_t)(o0 + j) * stride;
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
#endif
