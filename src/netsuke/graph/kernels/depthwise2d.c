/* Depthwise convolutions, int8, with int8 or int4 weights.
 *
 * In place, and where there is no vector unit, channel by channel: a strip of the channel's rows is copied out, widened to 16
 * bits and padded, and the channel's lane is overwritten. The zero point is inside the bias: sum (x - zx) w = sum x w - zx sum w. */
#include "ns_int.h"

#define LANES 16

/* Weight `tap` of output channel o, of `outs`. */
NS_INLINE int32_t weight(const void *w, int32_t tap, int32_t taps, int32_t o, int32_t outs, const int32_t w4) {
  return w4 ? ns_nibble((const uint8_t *)w + (ptrdiff_t)o * ((taps + 1) / 2), tap)
            : ((const int8_t *)w)[(ptrdiff_t)tap * outs + o];
}

/* Row `iy` of a channel; rows outside are all zero point. The padding at the left and right stays from call to call. */
NS_INLINE void load_row(const ns_depthwise2d_params *p, const int8_t *x, int32_t iy, int32_t width, int16_t *out) {
  if (iy < 0 || iy >= p->h) {
    for (int32_t i = 0; i < width; i++) out[i] = (int16_t)p->zx;
    return;
  }
  x += (ptrdiff_t)iy * p->w * p->c;
  const int32_t n = ns_min(p->w, width - p->left);
  for (int32_t i = 0; i < n; i++) out[p->left + i] = x[(ptrdiff_t)i * p->c];
}

/* One row of outputs of one channel from the strip's rows. */
NS_INLINE void strip_row(const ns_depthwise2d_params *p, const int16_t *strip, int32_t width, const void *w, int32_t o,
                         int32_t outs, int32_t first, int32_t m, int8_t *y, const int32_t w4) {
  for (int32_t x0 = 0; x0 < p->ow; x0 += LANES) {
    const int32_t n = ns_min(LANES, p->ow - x0);
    int32_t acc[LANES];
    for (int32_t i = 0; i < LANES; i++) acc[i] = first;
    for (int32_t ky = 0; ky < p->kh; ky++) {
      for (int32_t kx = 0; kx < p->kw; kx++) {
        const int16_t *from = strip + ky * p->dy * width + x0 * p->sx + kx * p->dx;
        const int16_t v = (int16_t)weight(w, ky * p->kw + kx, p->kh * p->kw, o, outs, w4);
        for (int32_t i = 0; i < n; i++) acc[i] += from[i * p->sx] * v;
      }
    }
    for (int32_t i = 0; i < n; i++) {
      y[(ptrdiff_t)(x0 + i) * outs] = ns_requant(acc[i], m, p->shift, p->zy, p->low, p->high);
    }
  }
}

NS_INLINE void strips(const ns_depthwise2d_params *p, const int8_t *x, const void *w, const int32_t *bias, const int32_t *m,
                      int8_t *y, int16_t *strip, const int32_t w4) {
  const int32_t outs = p->c * p->times, taps = p->kh * p->kw;
  const int32_t odd = ns_max(p->kw | 1, 3), width = (p->sx * ((p->ow + 3) & ~3) + p->dx * (odd - 1) + 1) & ~1;
  const int32_t rows = (p->rows - 1) * p->sy + (p->kh - 1) * p->dy + 1, kept = ns_max(rows - p->rows * p->sy, 0);
  for (int32_t i = 0; i < rows * width; i++) strip[i] = (int16_t)p->zx;
  for (int32_t c = 0; c < p->c; c++) {
    for (int32_t y0 = 0; y0 < p->oh; y0 += p->rows) {
      const int32_t have = y0 ? kept : 0, last = ns_min(p->rows, p->oh - y0);
      if (have) memmove(strip, strip + (rows - kept) * width, (size_t)(kept * width) * sizeof(int16_t));
      for (int32_t r = have; r < rows; r++) load_row(p, x + c, y0 * p->sy - p->top + r, width, strip + r * width);
      for (int32_t o = c * p->times; o < (c + 1) * p->times; o++) {
        int32_t total = 0;
        for (int32_t tap = 0; tap < taps; tap++) total += weight(w, tap, taps, o, outs, w4);
        const int32_t first = ns_wrap_add(bias ? bias[o] : 0, -ns_wrap_mul(p->zx, total));
        for (int32_t r = 0; r < last; r++) {
          strip_row(p, strip + r * p->sy * width, width, w, o, outs, first, m[o], y + (ptrdiff_t)(y0 + r) * p->ow * outs + o,
                    w4);
        }
      }
    }
  }
}

/* Pixel by pixel over runs of channels, straight from the input. */
NS_INLINE void direct(const ns_depthwise2d_params *p, const int8_t *x, const void *w, const int32_t *bias, const int32_t *m,
                      int8_t *y, const int32_t w4) {
  const int32_t outs = p->c * p->times, taps = p->kh * p->kw;
  for (int32_t oy = 0; oy < p->oh; oy++) {
    for (int32_t ox = 0; ox < p->ow; ox++, y += outs) {
      for (int32_t c0 = 0; c0 < outs; c0 += LANES) {
        const int32_t n = ns_min(LANES, outs - c0);
        int32_t acc[LANES];
        for (int32_t i = 0; i < n; i++) acc[i] = bias ? bias[c0 + i] : 0;
        for (int32_t ky = 0; ky < p->kh; ky++) {
          const int32_t iy = oy * p->sy - p->top + ky * p->dy;
          if (iy < 0 || iy >= p->h) continue;
          for (int32_t kx = 0; kx < p->kw; kx++) {
            const int32_t ix = ox * p->sx - p->left + kx * p->dx, tap = ky * p->kw + kx;
            if (ix < 0 || ix >= p->w) continue;
            const int8_t *from = x + ((ptrdiff_t)iy * p->w + ix) * p->c;
            if (w4 || p->times > 1) {
              for (int32_t i = 0; i < n; i++) {
                acc[i] += (from[(c0 + i) / p->times] - p->zx) * weight(w, tap, taps, c0 + i, outs, w4);
              }
            } else {
              const int8_t *v = (const int8_t *)w + (ptrdiff_t)tap * outs + c0;
              for (int32_t i = 0; i < n; i++) acc[i] += (int16_t)(from[c0 + i] - p->zx) * (int16_t)v[i];
            }
          }
        }
        for (int32_t i = 0; i < n; i++) {
          y[c0 + i] = ns_requant(acc[i], m[c0 + i], p->shift, p->zy, p->low, p->high);
        }
      }
    }
  }
}

NS_HOT void ns_depthwise2d(const ns_depthwise2d_params *p, const int8_t *x, const int8_t *w, const int32_t *bias,
                           const int32_t *m, int8_t *y, void *scratch) {
  if (x == y) strips(p, x, w, bias, m, y, (int16_t *)scratch, 0);
  else direct(p, x, w, bias, m, y, 0);
}

NS_HOT void ns_depthwise2d_w4(const ns_depthwise2d_w4_params *p, const int8_t *x, const uint8_t *w, const int32_t *bias,
                              const int32_t *m, int8_t *y, void *scratch) {
  if (x == y) strips(p, x, w, bias, m, y, (int16_t *)scratch, 1);
  else direct(p, x, w, bias, m, y, 1);
}
