/* The 8-bit LSTM layer: int8 sums, gates in 16 bits through interpolated curves, a 16-bit cell. */
#include "ns_recurrent.h"
#include "ns_rows.h"

#define CURVE 513 /* entries of one */

NS_INLINE int32_t sat16(int64_t v) { return (int32_t)(v < -32768 ? -32768 : v > 32767 ? 32767 : v); }

/* Q3.12 to Q0.15: the upper 9 bits choose a segment, the lower 7 interpolate. */
NS_INLINE int32_t look_up(const int16_t *curve, int32_t a) {
  const int32_t k = (a + 32768) >> 7, f = (a + 32768) & 127, low = curve[k];
  return low + (((curve[k + 1] - low) * f + 64) >> 7);
}

NS_INLINE int64_t rescale(int32_t total, int32_t m, int32_t shift) {
  return ((int64_t)total * m + ((int64_t)1 << (shift - 1))) >> shift;
}

/* The sums of the four gates of one unit, whose rows are `apart` bytes apart. */
#if NS_DSP
/* A function of its own: ns_mac1 needs nearly every register. */
static __attribute__((noinline)) void sums(int32_t acc[4], const int16_t *block, const int8_t *w, ptrdiff_t apart, int32_t length) {
  ns_mac1(acc, w, w + apart, (const uint32_t *)block, length / 4);
  ns_mac1(acc + 2, w + 2 * apart, w + 3 * apart, (const uint32_t *)block, length / 4);
}
#else
NS_INLINE void sums(int32_t acc[4], const int16_t *block, const int8_t *w, ptrdiff_t apart, int32_t length) {
  for (int32_t k = 0; k < 4; k++) ns_dot1(block, w + k * apart, length, acc + k);
}
#endif

void ns_lstm_int8(const ns_lstm_int8_params *p, const int8_t *x, const int8_t *w, const int8_t *u, const int32_t *bias,
                  const int32_t *m, const int16_t *curves, const int8_t *h, const int16_t *c, int8_t *y, int8_t *h2, int16_t *c2,
                  void *scratch) {
  const int32_t n = p->units;
  const int16_t *sigmoid = curves, *tangent = curves + CURVE;
  const ns_rows over_x = ns_rows_of(p->i, n, n, p->zx, 0, 1, -128, 127, 0);
  const ns_rows over_h = ns_rows_of(n, n, n, p->zh, 0, 1, -128, 127, 0);
  int16_t *xs = (int16_t *)scratch, *hs = xs + over_x.kp;
  for (int32_t t = 0; t < p->steps; t++, x += p->i, y += n) {
    ns_put(&over_x, xs, 1, 0, 0, x, p->i, 0);
    ns_put(&over_h, hs, 1, 0, 0, t ? h2 : h, n, 0);
    const int16_t *before = t ? c2 : c;
    for (int32_t j = 0; j < n; j++) {
      int32_t a[4] = {bias[j], bias[n + j], bias[2 * n + j], bias[3 * n + j]}, b[4] = {0, 0, 0, 0};
      sums(a, xs, w + (ptrdiff_t)j * p->i, (ptrdiff_t)n * p->i, NS_DSP ? over_x.kp : p->i);
      sums(b, hs, u + (ptrdiff_t)j * n, (ptrdiff_t)n * n, NS_DSP ? over_h.kp : n);
      for (int32_t k = 0; k < 4; k++) {
        const int32_t row = k * n + j, part = sat16(rescale(a[k], m[row], p->shift_x));
        a[k] = look_up(k == 2 ? tangent : sigmoid, sat16(part + rescale(b[k], m[4 * n + row], p->shift_h)));
      }
      const int32_t total = a[1] * before[j] + ((a[0] * a[2]) >> (15 - p->bits));
      const int32_t cell = ns_clip((total + (1 << 14)) >> 15, -p->limit, p->limit);
      const int32_t inner = p->bits <= 12 ? cell * (1 << (12 - p->bits)) : (cell + (1 << (p->bits - 13))) >> (p->bits - 12);
      c2[j] = (int16_t)cell;
      h2[j] = y[j] = ns_requant(a[3] * look_up(tangent, sat16(inner)), p->m_out, p->shift_out, p->zh, -128, 127);
    }
  }
}
