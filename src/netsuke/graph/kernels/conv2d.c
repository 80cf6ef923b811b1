/* Convolutions of any window, stride, dilation and number of groups, int8, with int8 or int4 weights. */
#include "ns_rows.h"

/* One window of the input as a row; what lies outside is the zero point, which is 0 here. */
NS_INLINE void gather(const ns_conv2d_params *p, const int8_t *x, int32_t oy, int32_t ox, int32_t channel, int32_t n,
                      int16_t *row) {
  for (int32_t ky = 0; ky < p->kh; ky++) {
    const int32_t iy = oy * p->sy - p->top + ky * p->dy;
    if (iy < 0 || iy >= p->h) {
      ns_zero(row, p->kw * n);
      row += p->kw * n;
      continue;
    }
    for (int32_t kx = 0; kx < p->kw; kx++, row += n) {
      const int32_t ix = ox * p->sx - p->left + kx * p->dx;
      if (ix < 0 || ix >= p->w) ns_zero(row, n);
      else ns_expand(row, x + ((ptrdiff_t)iy * p->w + ix) * p->c + channel, n, p->zx);
    }
  }
}

NS_INLINE void conv2d(const ns_conv2d_params *p, const int8_t *x, const void *w, const int32_t *bias, const int32_t *m,
                      int8_t *y, int16_t *block, const int32_t w4) {
  const int32_t n = p->c / p->groups, o = p->o / p->groups, k = p->kh * p->kw * n, pixels = p->oh * p->ow;
  const ns_rows g = {k, (k + 3) & ~3, o, p->o, p->zx, p->zy, p->shift, p->low, p->high, w4};
  const int32_t stride = w4 ? (k + 1) / 2 : k;
  for (int32_t pixel = 0; pixel < pixels; pixel += NS_BLOCK) {
    const int32_t rows = ns_min(NS_BLOCK, pixels - pixel);
    for (int32_t group = 0; group < p->groups; group++) {
      for (int32_t r = 0; r < rows; r++) {
        gather(p, x, (pixel + r) / p->ow, (pixel + r) % p->ow, group * n, n, block + r * g.kp);
        ns_zero(block + r * g.kp + k, g.kp - k);
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
