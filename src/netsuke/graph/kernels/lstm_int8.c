/* The 8-bit LSTM layer: int8 sums, gates in 16 bits through interpolated curves, a 16-bit cell. */
#include "ns_dsp.h"
#include "ns_recurrent.h"

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

#if NS_DSP && defined(__OPTIMIZE__) /* without optimisation a register is missing */
/* Codes without their zero point in pairs, as the weights of a word come: (0, 2) and (1, 3). */
static void widen(int16_t *block, const int8_t *x, int32_t n, int32_t zero) {
  const uint32_t minus = ((uint32_t)-zero & 0xffff) * 0x10001u;
  uint32_t *out = (uint32_t *)block;
  for (; n > 0; n -= 4, x += 4, out += 2) {
    uint32_t four = (uint8_t)zero * 0x01010101u;
    if (n >= 4) four = ns_load4(x);
    else memcpy(&four, x, (size_t)n);
    out[0] = ns_even(minus, four);
    out[1] = ns_odd(minus, four);
  }
}

#define ROW(sum, from)                          \
  "ldr %[v], " from "\n"                        \
  "sxtb16 %[t], %[v]\n"                         \
  "smlad " sum ", %[t], r3, " sum "\n"          \
  "sxtb16 %[t], %[v], ror #8\n"                 \
  "smlad " sum ", %[t], r4, " sum "\n"

/* The sums of the four gates of one unit, whose rows are `apart` bytes apart. As assembly and a function of its own because the
 * loop needs 13 registers. */
static __attribute__((noinline)) void sums(int32_t acc[4], const int16_t *x, const int8_t *w, int32_t apart, int32_t n) {
  int32_t a = acc[0], b = acc[1], c = acc[2], d = acc[3], v, t;
  const int8_t *u = w + 2 * apart, *end = w + ((n + 3) & ~3);
  __asm__ volatile(
      "1:\n"
      "ldmia %[x]!, {r3, r4}\n"
      ROW("%[b]", "[%[w], %[apart]]") ROW("%[a]", "[%[w]], #4")
      ROW("%[d]", "[%[u], %[apart]]") ROW("%[c]", "[%[u]], #4")
      "cmp %[w], %[end]\n"
      "bne 1b\n"
      : [a] "+r"(a), [b] "+r"(b), [c] "+r"(c), [d] "+r"(d), [w] "+r"(w), [u] "+r"(u), [x] "+r"(x), [v] "=&r"(v), [t] "=&r"(t)
      : [apart] "r"(apart), [end] "r"(end)
      : "r3", "r4", "cc", "memory");
  acc[0] = a, acc[1] = b, acc[2] = c, acc[3] = d;
}

#else

static void widen(int16_t *block, const int8_t *x, int32_t n, int32_t zero) {
  for (int32_t i = 0; i < n; i++) block[i] = (int16_t)(x[i] - zero);
}

static void sums(int32_t acc[4], const int16_t *x, const int8_t *w, int32_t apart, int32_t n) {
  const int8_t *w1 = w + apart, *w2 = w1 + apart, *w3 = w2 + apart;
  int32_t a = acc[0], b = acc[1], c = acc[2], d = acc[3];
  for (int32_t k = 0; k < n; k++) {
    const int16_t v = x[k];
    a += v * (int16_t)w[k];
    b += v * (int16_t)w1[k];
    c += v * (int16_t)w2[k];
    d += v * (int16_t)w3[k];
  }
  acc[0] = a, acc[1] = b, acc[2] = c, acc[3] = d;
}

#endif

void ns_lstm_int8(const ns_lstm_int8_params *p, const int8_t *x, const int8_t *w, const int8_t *u, const int32_t *bias,
                  const int32_t *m, const int16_t *curves, const int8_t *h, const int16_t *c, int8_t *y, int8_t *h2, int16_t *c2,
                  void *scratch) {
  const int32_t n = p->units;
  const int16_t *sigmoid = curves, *tangent = curves + CURVE;
  int16_t *xs = (int16_t *)scratch, *hs = xs + ((p->i + 3) & ~3);
  for (int32_t t = 0; t < p->steps; t++, x += p->i, y += n) {
    widen(xs, x, p->i, p->zx);
    widen(hs, t ? h2 : h, n, p->zh);
    const int16_t *before = t ? c2 : c;
    for (int32_t j = 0; j < n; j++) {
      int32_t a[4] = {bias[j], bias[n + j], bias[2 * n + j], bias[3 * n + j]}, b[4] = {0, 0, 0, 0};
      sums(a, xs, w + (ptrdiff_t)j * p->i, n * p->i, p->i);
      sums(b, hs, u + (ptrdiff_t)j * n, n * n, n);
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
