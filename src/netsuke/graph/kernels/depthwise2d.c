/* Depthwise convolutions, int8, with int8 or int4 weights.
 *
 * In place, and where there is no vector unit, channel by channel: a strip of the channel's rows is copied out, widened to 16
 * bits and padded, and the channel's lane is overwritten. The zero point is inside the bias: sum (x - zx) w = sum x w - zx sum w. */
#include "ns_depthwise_dsp.h"
#include "ns_wide.h"

#define LANES 16

/* Weight `tap` of output channel o, of `outs`. */
NS_INLINE int32_t weight(const void *w, int32_t tap, int32_t taps, int32_t o, int32_t outs, const int32_t w4) {
  return w4 ? ns_nibble((const uint8_t *)w + (ptrdiff_t)o * ((taps + 1) / 2), tap)
            : ((const int8_t *)w)[(ptrdiff_t)tap * outs + o];
}

/* n codes that lie c apart, to 16 bits. */
NS_INLINE void widen(const int8_t *x, int32_t c, int32_t n, int16_t *out) {
#if NS_DSP
  const int32_t whole = n & ~3;
  if (whole) ns_dw_widen(x, c, whole, out);
  x += whole * c, out += whole, n -= whole;
#endif
  for (int32_t i = 0; i < n; i++) out[i] = x[(ptrdiff_t)i * c];
}

/* What is the same for all strips. A strip of `rows` rows of `width` numbers is enough for p->rows rows of outputs; `kept` of
 * them stay for the next strip. */
typedef struct {
  int32_t outs, taps, width, rows, kept;
} shape;

/* Rows from..to of the strip whose first row is row iy of the channel. Rows outside are all zero point, and so is what is left
 * and right of a row, which is written once. */
NS_INLINE void load(const ns_depthwise2d_params *p, const shape *s, const int8_t *x, int32_t iy, int32_t from, int16_t *strip) {
  const int32_t n = ns_min(p->w, s->width - p->left);
  strip += from * s->width;
  for (int32_t r = from; r < s->rows; r++, strip += s->width) {
    if (iy + r >= 0 && iy + r < p->h) {
      widen(x + (ptrdiff_t)(iy + r) * p->w * p->c, p->c, n, strip + p->left);
    } else if (p->rows < p->oh) { /* else it is still as it was at the start */
      for (int32_t i = 0; i < s->width; i++) strip[i] = (int16_t)p->zx;
    }
  }
}

/* `count` rows of outputs of channel o, any window. */
NS_INLINE void any_rows(const ns_depthwise2d_params *p, const shape *s, const int16_t *strip, int32_t count, const void *w,
                        int32_t o, int32_t bias, int32_t m, int8_t *y, const int32_t w4) {
  int32_t total = 0;
  for (int32_t tap = 0; tap < s->taps; tap++) total += weight(w, tap, s->taps, o, s->outs, w4);
  const int32_t first = ns_wrap_add(bias, -ns_wrap_mul(p->zx, total));
  for (int32_t r = 0; r < count; r++, strip += p->sy * s->width, y += p->ow * s->outs) {
    for (int32_t x0 = 0; x0 < p->ow; x0 += LANES) {
      const int32_t n = ns_min(LANES, p->ow - x0);
      int32_t acc[LANES];
      for (int32_t i = 0; i < LANES; i++) acc[i] = first;
      for (int32_t ky = 0; ky < p->kh; ky++) {
        for (int32_t kx = 0; kx < p->kw; kx++) {
          const int16_t *from = strip + ky * p->dy * s->width + x0 * p->sx + kx * p->dx;
          const int16_t v = (int16_t)weight(w, ky * p->kw + kx, s->taps, o, s->outs, w4);
          for (int32_t i = 0; i < n; i++) acc[i] += from[i * p->sx] * v;
        }
      }
      for (int32_t i = 0; i < n; i++) {
        y[(ptrdiff_t)(x0 + i) * s->outs] = ns_requant(acc[i], m, p->shift, p->zy, p->low, p->high);
      }
    }
  }
}

#if NS_DSP
/* The same for square windows that have a loop of their own. */
NS_INLINE void square_rows(const ns_depthwise2d_params *p, const shape *s, const int16_t *strip, int32_t count, const void *w,
                           int32_t o, int32_t bias, int32_t m, int8_t *y, ns_scale scale, ns_dw_loop loop, const int32_t w4) {
  int32_t words[NS_DW_WORDS], total;
  if (w4) {
    int8_t taps[NS_DW_TAPS * NS_DW_TAPS];
    for (int32_t tap = 0; tap < s->taps; tap++) taps[tap] = (int8_t)weight(w, tap, s->taps, o, s->outs, w4);
    total = ns_dw_weights_of(words, taps, 1, scale.up, p->kw, p->sx);
  } else {
    total = ns_dw_weights_of(words, (const int8_t *)w + o, s->outs, scale.up, p->kw, p->sx);
  }
  const int32_t first = ns_wrap_add(ns_wrap_mul(bias, 1 << scale.up), -ns_wrap_mul(p->zx, total)), bytes = s->width * 2, whole = p->ow & ~3;
  const int32_t row = p->ow * s->outs, down = p->sy * s->width;
  ns_dw_rows rows = {y, s->outs, m, scale.addend, scale.shift, 8 * p->sx - (p->kh - 1) * bytes, {first, first, first, first},
                     y + row, strip, words, bytes, y + count * row, row, 2 * (down - p->ow * p->sx)};
  if (whole == p->ow) {
    loop(&rows);
    return;
  }
  for (int32_t r = 0; r < count; r++, strip += down, y += row) {
    if (whole) {
      rows.y = y, rows.end = rows.last = y + whole * s->outs, rows.x = strip, rows.step = s->outs;
      loop(&rows);
    }
    int8_t last[4]; /* four more, of which not all are wanted */
    rows.y = last, rows.end = rows.last = last + 4, rows.x = strip + whole * p->sx, rows.step = 1;
    loop(&rows);
    for (int32_t i = whole; i < p->ow; i++) y[i * s->outs] = last[i - whole];
  }
}
#endif

#if NS_WIDE
#define STRIP_BYTES 65536 /* of stack, for a strip of NS_WIDE channels */

/* A run of n channels of an image, or of a copy of some of its rows: bytes from pixel to pixel and from row to row. */
typedef struct {
  const int8_t *w; /* of these channels */
  ns_wide first, m;
  ns_scale scale;
  int32_t right, down, n;
} lanes;

NS_INLINE lanes lanes_of(const ns_depthwise2d_params *p, const void *w, const int32_t *bias, const int32_t *m, int32_t c,
                         int32_t right) {
  lanes l;
  l.n = ns_min(NS_WIDE, p->c - c);
  l.w = (const int8_t *)w + c;
  l.first = bias ? ns_wide_load_n(bias + c, l.n) : ns_wide_all(0);
  l.m = ns_wide_load_n(m + c, l.n);
  l.scale = ns_scale_of(p->shift, p->zy, p->room, 0);
  l.right = right;
  l.down = right * p->w;
  return l;
}

/* One output: the window's taps ky0 to ky1 and kx0 to kx1 lie in the input. */
NS_INLINE void one_output(const ns_depthwise2d_params *p, const lanes *l, const int8_t *from, int32_t ky0, int32_t ky1,
                          int32_t kx0, int32_t kx1, int8_t *y, const int32_t n) {
  const ns_wide minus = ns_wide_all(-p->zx);
  const int32_t right = p->dx * l->right;
  ns_wide acc = l->first;
  for (int32_t ky = ky0; ky < ky1; ky++) {
    const int8_t *a = from + ky * p->dy * l->down + kx0 * right, *b = l->w + (ky * p->kw + kx0) * p->c;
    for (int32_t kx = kx0; kx < kx1; kx++, a += right, b += p->c) {
      acc = ns_wide_add(acc, ns_wide_mul(ns_wide_add(ns_wide_codes(a, n), minus), ns_wide_codes(b, n)));
    }
  }
  ns_wide_finish(acc, l->m, &l->scale, p->low, p->high, y, n);
}

/* Taps of a window that begins at `at` which lie inside 0…size: from *begin to *end. */
NS_INLINE void inside(int32_t at, int32_t step, int32_t k, int32_t size, int32_t *begin, int32_t *end) {
  *begin = at < 0 ? (-at + step - 1) / step : 0;
  *end = ns_clip((size - at + step - 1) / step, 0, k);
}

/* One row of outputs; `from` is the first row of its windows, pixel 0. */
NS_INLINE void one_row(const ns_depthwise2d_params *p, const lanes *l, const int8_t *from, int32_t oy, int8_t *y) {
  int32_t ky0, ky1, kx0, kx1;
  inside(oy * p->sy - p->top, p->dy, p->kh, p->h, &ky0, &ky1);
  for (int32_t ox = 0; ox < p->ow; ox++, y += p->c) {
    const int32_t ix = ox * p->sx - p->left;
    inside(ix, p->dx, p->kw, p->w, &kx0, &kx1);
    if (l->n == NS_WIDE) one_output(p, l, from + ix * l->right, ky0, ky1, kx0, kx1, y, NS_WIDE);
    else one_output(p, l, from + ix * l->right, ky0, ky1, kx0, kx1, y, l->n);
  }
}

/* Straight from the input. */
NS_INLINE void direct_wide(const ns_depthwise2d_params *p, const int8_t *x, const void *w, const int32_t *bias,
                           const int32_t *m, int8_t *y) {
  for (int32_t c = 0; c < p->c; c += NS_WIDE) {
    const lanes l = lanes_of(p, w, bias, m, c, p->c);
    for (int32_t oy = 0; oy < p->oh; oy++) {
      one_row(p, &l, x + c + (ptrdiff_t)(oy * p->sy - p->top) * l.down, oy, y + c + (ptrdiff_t)oy * p->ow * p->c);
    }
  }
}

/* In place: strips of all lanes' rows, as codes and without padding. */
NS_INLINE void strips_wide(const ns_depthwise2d_params *p, const shape *s, const int8_t *x, const void *w, const int32_t *bias,
                           const int32_t *m, int8_t *y) {
  int8_t strip[STRIP_BYTES];
  for (int32_t c = 0; c < p->c; c += NS_WIDE) {
    const lanes l = lanes_of(p, w, bias, m, c, NS_WIDE);
    for (int32_t y0 = 0; y0 < p->oh; y0 += p->rows) {
      const int32_t have = y0 ? s->kept : 0, count = ns_min(p->rows, p->oh - y0), iy = y0 * p->sy - p->top;
      if (have) memmove(strip, strip + (s->rows - have) * l.down, (size_t)(have * l.down));
      for (int32_t r = ns_max(have, -iy); r < ns_min(s->rows, p->h - iy); r++) {
        const int8_t *from = x + (ptrdiff_t)(iy + r) * p->w * p->c + c;
        int8_t *to = strip + r * l.down;
        for (int32_t i = 0; i < p->w; i++, from += p->c, to += NS_WIDE) {
          if (l.n == NS_WIDE) memcpy(to, from, NS_WIDE);
          else memcpy(to, from, (size_t)l.n);
        }
      }
      for (int32_t r = 0; r < count; r++) {
        one_row(p, &l, strip + r * p->sy * l.down, y0 + r, y + c + (ptrdiff_t)(y0 + r) * p->ow * p->c);
      }
    }
  }
}
#endif

NS_INLINE void strips(const ns_depthwise2d_params *p, const int8_t *x, const void *w, const int32_t *bias, const int32_t *m,
                      int8_t *y, int16_t *strip, const int32_t w4) {
  shape s;
  s.outs = p->c * p->times, s.taps = p->kh * p->kw;
  s.width = (p->sx * ((p->ow + 3) & ~3) + p->dx * (ns_max(p->kw | 1, 3) - 1) + 1) & ~1;
  s.rows = (p->rows - 1) * p->sy + (p->kh - 1) * p->dy + 1, s.kept = ns_max(s.rows - p->rows * p->sy, 0);
#if NS_WIDE
  if (!w4 && p->times == 1 && ns_scale_of(p->shift, p->zy, p->room, 0).quick && s.rows * p->w * NS_WIDE <= STRIP_BYTES) {
    strips_wide(p, &s, x, w, bias, m, y);
    return;
  }
#endif
#if NS_DSP
  const ns_scale scale = ns_scale_of(p->shift, p->zy, p->room, 0);
  const int32_t quick = scale.quick && p->low <= -128 && p->high >= 127;
  const ns_dw_loop loop = quick && p->kh == p->kw && p->dy == 1 && p->dx == 1 ? ns_dw_of(p->kw, p->sx) : NULL;
#endif
  for (int32_t i = 0; i < s.rows * s.width; i++) strip[i] = (int16_t)p->zx;
  for (int32_t c = 0; c < p->c; c++) {
    for (int32_t y0 = 0; y0 < p->oh; y0 += p->rows) {
      const int32_t have = y0 ? s.kept : 0, count = ns_min(p->rows, p->oh - y0);
      if (have) memmove(strip, strip + (s.rows - have) * s.width, (size_t)(have * s.width) * sizeof(int16_t));
      load(p, &s, x + c, y0 * p->sy - p->top, have, strip);
      for (int32_t o = c * p->times; o < (c + 1) * p->times; o++) {
        int8_t *out = y + (ptrdiff_t)y0 * p->ow * s.outs + o;
#if NS_DSP
        if (loop) {
          square_rows(p, &s, strip, count, w, o, bias ? bias[o] : 0, m[o], out, scale, loop, w4);
          continue;
        }
#endif
        any_rows(p, &s, strip, count, w, o, bias ? bias[o] : 0, m[o], out, w4);
      }
    }
  }
}

#if !NS_DSP
/* Sums of channels c0 to c0 + n - 1 of one output, whose window begins at (iy, ix). */
NS_INLINE void direct_sums(const ns_depthwise2d_params *p, const int8_t *x, const void *w, const int32_t *bias, int32_t iy,
                           int32_t ix, int32_t c0, int32_t n, int32_t acc[LANES], const int32_t w4) {
  const int32_t outs = p->c * p->times, taps = p->kh * p->kw;
  for (int32_t i = 0; i < n; i++) acc[i] = bias ? bias[c0 + i] : 0;
  for (int32_t ky = 0; ky < p->kh; ky++) {
    const int32_t at_y = iy + ky * p->dy;
    if (at_y < 0 || at_y >= p->h) continue;
    for (int32_t kx = 0; kx < p->kw; kx++) {
      const int32_t at_x = ix + kx * p->dx, tap = ky * p->kw + kx;
      if (at_x < 0 || at_x >= p->w) continue;
      const int8_t *from = x + ((ptrdiff_t)at_y * p->w + at_x) * p->c;
      for (int32_t i = 0; i < n; i++) {
        acc[i] += (from[p->times == 1 ? c0 + i : (c0 + i) / p->times] - p->zx) * weight(w, tap, taps, c0 + i, outs, w4);
      }
    }
  }
}

/* Pixel by pixel over runs of channels, straight from the input. */
NS_INLINE void direct(const ns_depthwise2d_params *p, const int8_t *x, const void *w, const int32_t *bias, const int32_t *m,
                      int8_t *y, const int32_t w4) {
  const int32_t outs = p->c * p->times;
#if NS_WIDE
  if (!w4 && p->times == 1 && ns_scale_of(p->shift, p->zy, p->room, 0).quick) {
    direct_wide(p, x, w, bias, m, y);
    return;
  }
#endif
  for (int32_t oy = 0; oy < p->oh; oy++) {
    for (int32_t ox = 0; ox < p->ow; ox++, y += outs) {
      for (int32_t c0 = 0; c0 < outs; c0 += LANES) {
        const int32_t n = ns_min(LANES, outs - c0);
        int32_t acc[LANES];
        direct_sums(p, x, w, bias, oy * p->sy - p->top, ox * p->sx - p->left, c0, n, acc, w4);
        for (int32_t i = 0; i < n; i++) {
          y[c0 + i] = ns_requant(acc[i], m[c0 + i], p->shift, p->zy, p->low, p->high);
        }
      }
    }
  }
}
#endif

NS_INLINE void depthwise2d(const ns_depthwise2d_params *p, const int8_t *x, const void *w, const int32_t *bias, const int32_t *m,
                           int8_t *y, void *scratch, const int32_t w4) {
#if !NS_DSP
  if (x != y) {
    direct(p, x, w, bias, m, y, w4);
    return;
  }
#endif
  strips(p, x, w, bias, m, y, (int16_t *)scratch, w4);
}

void ns_depthwise2d(const ns_depthwise2d_params *p, const int8_t *x, const int8_t *w, const int32_t *bias,
                           const int32_t *m, int8_t *y, void *scratch) {
  depthwise2d(p, x, w, bias, m, y, scratch, 0);
}

void ns_depthwise2d_w4(const ns_depthwise2d_w4_params *p, const int8_t *x, const uint8_t *w, const int32_t *bias,
                              const int32_t *m, int8_t *y, void *scratch) {
  depthwise2d(p, x, w, bias, m, y, scratch, 1);
}
