/* Convolutions of any window, stride, dilation and number of groups, int8, with int8 or int4 weights. */
#include "ns_rows.h"

/* The row of a block that a window goes to, from code k on. Where a pixel's channels do not fill whole words of the block, the
 * window's codes are collected as bytes first (`bytes`), and are put into the block as one. */
typedef struct {
  const ns_rows *g;
  int16_t *block;
  int8_t *bytes;
  int32_t rows, r, k;
} target;

NS_INLINE void put(target *to, const int8_t *x, int32_t n, const int32_t staged, const int32_t w4) {
  if (staged) {
    int8_t *out = to->bytes + to->k;
    int32_t i = 0;
    for (; i + 4 <= n; i += 4) memcpy(out + i, x + i, 4);
    for (; i < n; i++) out[i] = x[i];
  } else {
    ns_put(to->g, to->block, to->rows, to->r, to->k, x, n, w4);
  }
  to->k += n;
}

NS_INLINE void put_zero(target *to, int32_t n, const int32_t staged) {
  if (staged) {
    for (int32_t i = 0; i < n; i++) to->bytes[to->k + i] = (int8_t)to->g->zx;
  } else {
    ns_put_zero(to->g, to->block, to->rows, to->r, to->k, n);
  }
  to->k += n;
}

/* The window whose first code is at (iy, ix): n codes a pixel from `channel` on. */
NS_INLINE void gather(const ns_conv2d_params *p, const int8_t *x, int32_t iy, int32_t ix, int32_t channel, int32_t n, target to,
                      const int32_t staged, const int32_t w4) {
  const int32_t runs = p->dx == 1 && n == p->c; /* neighbouring pixels are neighbouring bytes */
  const int8_t *from = x + ((ptrdiff_t)iy * p->w + ix) * p->c + channel;
  if (runs && iy >= 0 && ix >= 0 && iy + (p->kh - 1) * p->dy < p->h && ix + p->kw <= p->w) {
    for (int32_t ky = 0; ky < p->kh; ky++, from += p->dy * p->w * p->c) put(&to, from, p->kw * n, staged, w4);
    return;
  }
  for (int32_t ky = 0; ky < p->kh; ky++, iy += p->dy, from += p->dy * p->w * p->c) {
    if (iy < 0 || iy >= p->h) {
      put_zero(&to, p->kw * n, staged);
    } else if (runs) {
      const int32_t begin = ns_clip(-ix, 0, p->kw), end = ns_clip(p->w - ix, begin, p->kw);
      put_zero(&to, begin * n, staged);
      put(&to, from + begin * n, (end - begin) * n, staged, w4);
      put_zero(&to, (p->kw - end) * n, staged);
    } else {
      for (int32_t kx = 0, at = ix; kx < p->kw; kx++, at += p->dx) {
        if (at < 0 || at >= p->w) put_zero(&to, n, staged);
        else put(&to, from + kx * p->dx * p->c, n, staged, w4);
      }
    }
  }
}

NS_INLINE void conv2d(const ns_conv2d_params *p, const int8_t *x, const void *w, const int32_t *bias, const int32_t *m,
                      int8_t *y, int16_t *block, const int32_t staged, const int32_t w4) {
  const int32_t n = p->c / p->groups, o = p->o / p->groups, k = p->kh * p->kw * n, pixels = p->oh * p->ow;
  const ns_rows g = ns_rows_of(k, o, p->o, p->zx, p->zy, p->shift, p->room, p->low, p->high, w4);
  const int32_t stride = w4 ? (k + 1) / 2 : k;
  target to = {&g, block, staged ? (int8_t *)(block + (pixels < 3 ? pixels : NS_BLOCK) * g.kp) : NULL, 0, 0, 0};
  if (staged) memset(to.bytes + k, p->zx, (size_t)(g.kp - k)); /* what fills the last word stays */
  int32_t packed;
  const int32_t length = ns_run_length(&g, pixels, 1, &packed);
  ns_run run;
  for (int32_t first = 0; first < p->o; first += o) { /* a group */
    const int32_t channel = first / o * n;
    for (int32_t from = 0; from < o; from += length) {
      ns_run_of(&run, &g, (const int8_t *)w + (ptrdiff_t)first * stride, bias ? bias + first : NULL, m + first, from, length,
                packed, w4);
      for (int32_t pixel = 0, iy = -p->top, ox = 0; pixel < pixels; pixel += to.rows) {
        to.rows = ns_together(pixels - pixel);
        for (to.r = 0; to.r < to.rows; to.r++) {
          gather(p, x, iy, ox * p->sx - p->left, channel, n, to, staged, w4);
          if (staged) ns_put(&g, block, to.rows, to.r, 0, to.bytes, g.kp, w4);
          if (++ox == p->ow) ox = 0, iy += p->sy;
        }
        ns_block(&g, &run, block, to.rows, y + (ptrdiff_t)pixel * p->o + first + from, w4);
      }
    }
  }
}

NS_INLINE void either(const ns_conv2d_params *p, const int8_t *x, const void *w, const int32_t *bias, const int32_t *m,
                      int8_t *y, int16_t *block, const int32_t w4) {
  if (NS_DSP && p->c / p->groups % ns_whole(w4)) conv2d(p, x, w, bias, m, y, block, 1, w4);
  else conv2d(p, x, w, bias, m, y, block, 0, w4);
}

void ns_conv2d(const ns_conv2d_params *p, const int8_t *x, const int8_t *w, const int32_t *bias, const int32_t *m,
                      int8_t *y, void *scratch) {
  either(p, x, w, bias, m, y, (int16_t *)scratch, 0);
}

void ns_conv2d_w4(const ns_conv2d_w4_params *p, const int8_t *x, const uint8_t *w, const int32_t *bias, const int32_t *m,
                         int8_t *y, void *scratch) {
  either(p, x, w, bias, m, y, (int16_t *)scratch, 1);
}
