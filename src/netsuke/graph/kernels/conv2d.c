/* Convolutions of any window, stride, dilation and number of groups, int8, with int8 or int4 weights. */
#include "ns_rows.h"

/* A block and what is being put into it. `staged`: a window's codes are collected as bytes first, because a pixel's channels
 * do not fill whole words of the block. */
typedef struct {
  const ns_rows *g;
  int16_t *block;
  int8_t *staged;
  int32_t rows, r, k;
} gathering;

NS_INLINE void put(gathering *to, const int8_t *x, int32_t n, const int32_t w4) {
  if (to->staged) {
    int8_t *out = to->staged + to->k;
    for (int32_t i = 0; i < n; i++) out[i] = x[i];
  } else {
    ns_put(to->g, to->block, to->rows, to->r, to->k, x, n, w4);
  }
  to->k += n;
}

NS_INLINE void put_zero(gathering *to, int32_t n) {
  if (to->staged) {
    for (int32_t i = 0; i < n; i++) to->staged[to->k + i] = (int8_t)to->g->zx;
  } else {
    ns_put_zero(to->g, to->block, to->rows, to->r, to->k, n);
  }
  to->k += n;
}

/* The window of one output, whose first code is at (iy, ix): n codes a pixel from `channel` on. */
NS_INLINE void gather(const ns_conv2d_params *p, const int8_t *x, int32_t iy, int32_t ix, int32_t channel, int32_t n,
                      gathering *to, const int32_t w4) {
  for (int32_t ky = 0; ky < p->kh; ky++, iy += p->dy) {
    if (iy < 0 || iy >= p->h) {
      put_zero(to, p->kw * n);
      continue;
    }
    const int8_t *from = x + ((ptrdiff_t)iy * p->w + ix) * p->c + channel;
    if (p->dx == 1 && n == p->c) { /* neighbouring pixels are neighbouring bytes */
      const int32_t begin = ns_clip(-ix, 0, p->kw), end = ns_clip(p->w - ix, begin, p->kw);
      if (begin) put_zero(to, begin * n);
      put(to, from + begin * n, (end - begin) * n, w4);
      if (end < p->kw) put_zero(to, (p->kw - end) * n);
      continue;
    }
    for (int32_t kx = 0, at = ix; kx < p->kw; kx++, at += p->dx, from += p->dx * p->c) {
      if (at < 0 || at >= p->w) put_zero(to, n);
      else put(to, from, n, w4);
    }
  }
}

NS_INLINE void conv2d(const ns_conv2d_params *p, const int8_t *x, const void *w, const int32_t *bias, const int32_t *m,
                      int8_t *y, int16_t *block, const int32_t w4) {
  const int32_t n = p->c / p->groups, o = p->o / p->groups, k = p->kh * p->kw * n, pixels = p->oh * p->ow;
  const ns_rows g = ns_rows_of(k, o, p->o, p->zx, p->zy, p->shift, p->low, p->high, w4);
  const int32_t stride = w4 ? (k + 1) / 2 : k;
  int8_t *staged = NS_DSP && n % ns_whole(w4) ? (int8_t *)(block + (pixels < 3 ? pixels : NS_BLOCK) * g.kp) : NULL;
  for (int32_t pixel = 0, rows; pixel < pixels; pixel += rows) {
    rows = ns_together(pixels - pixel);
    for (int32_t group = 0; group < p->groups; group++) {
      int32_t oy = pixel / p->ow, ox = pixel - oy * p->ow;
      for (int32_t r = 0; r < rows; r++) {
        gathering to = {&g, block, staged, rows, r, 0};
        gather(p, x, oy * p->sy - p->top, ox * p->sx - p->left, group * n, n, &to, w4);
        if (staged) ns_put(&g, block, rows, r, 0, staged, k, w4);
        if (++ox == p->ow) ox = 0, oy++;
      }
      ns_block(&g, block, rows, (const int8_t *)w + (ptrdiff_t)group * o * stride, bias ? bias + group * o : NULL,
               m + group * o, y + (ptrdiff_t)pixel * p->o + group * o, w4);
    }
  }
}

NS_HOT void ns_conv2d(const ns_conv2d_params *p, const int8_t *x, const int8_t *w, const int32_t *bias, const int32_t *m,
                      int8_t *y, void *scratch) {
  conv2d(p, x, w, bias, m, y, (int16_t *)scratch, 0);
}

NS_HOT void ns_conv2d_w4(const ns_conv2d_w4_params *p, const int8_t *x, const uint8_t *w, const int32_t *bias, const int32_t *m,
                         int8_t *y, void *scratch) {
  conv2d(p, x, w, bias, m, y, (int16_t *)scratch, 1);
}
