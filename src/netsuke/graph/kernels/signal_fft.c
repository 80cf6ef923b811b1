/* The real transform in 16-bit integers: decimation in time in place, radix 4, the first stage radix 2 for odd powers of 2. */
#include "ns_int.h"
#include "ns_signal.h"

typedef struct {
  int32_t re, im;
} pair;

NS_INLINE pair wrap(int32_t re, int32_t im) {
  const pair v = {(int16_t)re, (int16_t)im};
  return v;
}

NS_INLINE pair get(const int16_t *z) {
  const pair v = {z[0], z[1]};
  return v;
}

NS_INLINE void put(int16_t *z, int32_t re, int32_t im) {
  z[0] = (int16_t)re;
  z[1] = (int16_t)im;
}

NS_INLINE pair plus(pair a, pair b) { return wrap(a.re + b.re, a.im + b.im); }
NS_INLINE pair minus(pair a, pair b) { return wrap(a.re - b.re, a.im - b.im); }

/* v / by */
NS_INLINE pair shrink(pair v, const int32_t by) {
  const pair out = {(v.re * (32767 / by) + (1 << 14)) >> 15, (v.im * (32767 / by) + (1 << 14)) >> 15};
  return out;
}

NS_INLINE pair times(pair a, const int16_t *w) {
  return wrap((a.re * w[0] - a.im * w[1] + (1 << 14)) >> 15, (a.re * w[1] + a.im * w[0] + (1 << 14)) >> 15);
}

/* Samples in pairs, in the order in which the stages want them: a counter whose digits carry downwards. */
static void gather(const ns_rfft_params *p, const int16_t *x, int16_t *z, int32_t radix) {
  for (int32_t j = 0, from = 0; j < p->half; j++, z += 2) {
    put(z, 2 * from < p->n ? x[2 * from] : 0, 2 * from + 1 < p->n ? x[2 * from + 1] : 0);
    int32_t top = p->half, digit = p->half / radix;
    for (; digit && from + digit >= top; digit /= 4) {
      from -= top - digit;
      top = digit;
    }
    from += digit;
  }
}

static void stage2(int32_t half, int16_t *z) {
  for (int16_t *end = z + 2 * half; z < end; z += 4) {
    const pair a = shrink(get(z), 2), b = shrink(get(z + 2), 2);
    put(z, a.re + b.re, a.im + b.im);
    put(z + 2, a.re - b.re, a.im - b.im);
  }
}

/* Transforms of length n out of four of n / 4. */
static void stage4(int32_t half, int32_t n, const int16_t *twiddles, int16_t *z) {
  const int32_t m = n / 4, step = half / n;
  for (int32_t i = 0; i < m; i++) {
    const int16_t *w1 = twiddles + 2 * i * step, *w2 = twiddles + 4 * i * step, *w3 = twiddles + 6 * i * step;
    for (int16_t *a = z + 2 * i, *end = z + 2 * half; a < end; a += 2 * n) {
      int16_t *b = a + 2 * m, *c = b + 2 * m, *d = c + 2 * m;
      const pair p0 = shrink(get(a), 4), p1 = times(shrink(get(b), 4), w1);
      const pair p2 = times(shrink(get(c), 4), w2), p3 = times(shrink(get(d), 4), w3);
      const pair even = plus(p0, p2), odd = plus(p1, p3), across = minus(p0, p2), turned = minus(p1, p3);
      put(a, even.re + odd.re, even.im + odd.im);
      put(b, across.re + turned.im, across.im - turned.re);
      put(c, even.re - odd.re, even.im - odd.im);
      put(d, across.re - turned.im, across.im + turned.re);
    }
  }
}

void ns_rfft(const ns_rfft_params *p, const int16_t *x, const int16_t *twiddles, const int16_t *ends, int16_t *y) {
  const int32_t half = p->half;
  const int32_t odd = !(half & 0x55555555);
  gather(p, x, y, odd ? 2 : 4);
  if (odd) stage2(half, y);
  for (int32_t n = odd ? 8 : 4; n <= half; n *= 4) stage4(half, n, twiddles, y);
  const pair z = shrink(get(y), 2);
  put(y, z.re + z.im, 0);
  put(y + 2 * half, z.re - z.im, 0);
  for (int32_t k = 1; k <= half / 2; k++) {
    int16_t *low = y + 2 * k, *high = y + 2 * (half - k);
    const pair a = shrink(get(low), 2), b = shrink(get(high), 2);
    const pair f = wrap(a.re + b.re, a.im - b.im), g = times(wrap(a.re - b.re, a.im + b.im), ends + 2 * (k - 1));
    put(low, (f.re + g.re) >> 1, (f.im + g.im) >> 1);
    put(high, (f.re - g.re) >> 1, (g.im - f.im) >> 1); /* the middle is its own mirror, and this is what it becomes */
  }
}
