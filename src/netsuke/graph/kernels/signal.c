/* The audio front end apart from its transform: window, spectrum, filters, noise, gain, logarithm. */
#include "ns_int.h"
#include "ns_signal.h"

/* Numbers that may be overwritten by others of another type, or lie at a multiple of 4 bytes only. */
NS_INLINE uint32_t load32(const void *p) {
  uint32_t v;
  memcpy(&v, p, sizeof v);
  return v;
}
NS_INLINE uint64_t load64(const void *p) {
  uint64_t v;
  memcpy(&v, p, sizeof v);
  return v;
}

/* Bits that v needs. */
NS_INLINE int32_t bits(uint32_t v) {
#if defined(__GNUC__)
  return v ? 32 - __builtin_clz(v) : 0;
#else
  int32_t n = 0;
  for (; v; v >>= 1) n++;
  return n;
#endif
}

void ns_window(const ns_window_params *p, const int16_t *x, const int16_t *w, int16_t *y) {
  for (int32_t i = 0; i < p->n; i++) y[i] = (int16_t)ns_clip((x[i] * w[i]) >> p->shift, -32768, 32767);
}

void ns_fft_scale(const ns_fft_scale_params *p, const int16_t *x, int16_t *y, int32_t *shift) {
  int32_t low = 0, high = 0;
  for (int32_t i = 0; i < p->n; i++) {
    low = ns_min(low, x[i]);
    high = ns_max(high, x[i]);
  }
  const int32_t largest = ns_max(-low, high), s = largest ? ns_max(0, 15 - bits((uint32_t)largest)) : 0;
  for (int32_t i = 0; i < p->n; i++) y[i] = (int16_t)(x[i] * (1 << s));
  *shift = s;
}

void ns_energy(const ns_energy_params *p, const void *x, void *y) {
  for (int32_t k = 0; k < p->n; k++) {
    int16_t z[2];
    memcpy(z, (const int8_t *)x + 4 * k, sizeof z);
    const uint32_t e = k < p->start || k >= p->end ? 0 : (uint32_t)(z[0] * z[0]) + (uint32_t)(z[1] * z[1]);
    memcpy((int8_t *)y + 4 * k, &e, sizeof e);
  }
}

void ns_filter_bank(const ns_filter_bank_params *p, const uint32_t *x, const int16_t *w, const int16_t *u, const int16_t *start,
                    const int16_t *at, const int16_t *width, void *y) {
  uint64_t rest = 0;
  for (int32_t c = 0; c < p->bands; c++) {
    const uint32_t *from = x + start[c];
    const int16_t *wc = w + at[c], *uc = u + at[c];
    uint64_t part = rest;
    rest = 0;
    for (int32_t j = 0; j < width[c]; j++) {
      part += (uint64_t)from[j] * (uint32_t)wc[j];
      rest += (uint64_t)from[j] * (uint32_t)uc[j];
    }
    if (c) memcpy((int8_t *)y + 8 * (c - 1), &part, sizeof part);
  }
}

/* The nearest square root, digit by digit; one that needs a bit too many is cut. */
static uint32_t root32(uint32_t x) {
  uint32_t r = 0;
  for (uint32_t bit = (uint32_t)1 << (x ? (bits(x) - 1) & ~1 : 0); bit; bit >>= 2) {
    const uint32_t next = r + bit;
    r >>= 1;
    if (x >= next) {
      x -= next;
      r += bit;
    }
  }
  return r + (x > r && r != 0xffff);
}

static uint32_t root64(uint64_t x) {
  uint64_t r = 0;
  if (!(x >> 32)) return root32((uint32_t)x);
  for (uint64_t bit = (uint64_t)1 << ((bits((uint32_t)(x >> 32)) + 31) & ~1); bit; bit >>= 2) {
    const uint64_t next = r + bit;
    r >>= 1;
    if (x >= next) {
      x -= next;
      r += bit;
    }
  }
  return (uint32_t)r + (x > r && r != 0xffffffff);
}

void ns_filter_sqrt(const ns_filter_sqrt_params *p, const void *x, const int32_t *shift, uint32_t *y) {
  const uint32_t s = (uint32_t)*shift;
  for (int32_t c = 0; c < p->n; c++) y[c] = s < 32 ? root64(load64((const int8_t *)x + 8 * c)) >> s : 0;
}

void ns_noise_subtract(const ns_noise_subtract_params *p, const uint32_t *x, const uint32_t *noise, uint32_t *y, uint32_t *noise2) {
  const uint32_t take[2] = {(uint32_t)p->take0, (uint32_t)p->take1}, keep[2] = {(uint32_t)p->keep0, (uint32_t)p->keep1};
  for (int32_t c = 0; c < p->n; c++) {
    const uint32_t up = x[c] << p->smoothing;
    const uint32_t mean = (uint32_t)(((uint64_t)up * take[c & 1] + (uint64_t)noise[c] * keep[c & 1]) >> p->subtraction);
    const uint32_t below = up < mean ? up : mean, rest = (up - below) >> p->smoothing;
    const uint64_t least = ((uint64_t)x[c] * (uint32_t)p->least) >> p->subtraction;
    y[c] = rest > least ? rest : (uint32_t)least;
    noise2[c] = p->clamp ? below : mean;
  }
}

static int32_t gain(uint32_t x, const int16_t *gains) {
  if (x <= 2) return gains[x];
  const int32_t n = bits(x), f = (int32_t)(n < 11 ? x << (11 - n) : x >> (n - 11)) & 0x3ff;
  const int16_t *g = gains + 4 * n - 6;
  return (((((g[2] * f) >> 5) + g[1] * 32) * f + (1 << 14)) >> 15) + g[0];
}

void ns_pcan(const ns_pcan_params *p, const uint32_t *x, const uint32_t *noise, const int16_t *gains, uint32_t *y) {
  for (int32_t c = 0; c < p->n; c++) {
    const uint32_t r = (uint32_t)(((uint64_t)x[c] * (uint32_t)gain(noise[c], gains)) >> p->shift);
    y[c] = r < 8192 ? (r * r) >> 20 : (r >> 6) - 64;
  }
}

/* scale * ln x in integers, x >= 2 */
static uint32_t log_scaled(uint32_t x, int32_t scale, const uint16_t *table) {
  const int32_t whole = bits(x) - 1;
  const uint32_t rest = x - ((uint32_t)1 << whole);
  const int32_t frac = (int32_t)(whole < 16 ? rest << (16 - whole) : rest >> (whole - 16)), k = frac >> 9;
  const int32_t log2 = whole * 65536 + frac + table[k] + (((table[k + 1] - table[k]) * (frac - k * 512)) >> 16);
  const uint32_t ln = (uint32_t)(((uint64_t)45426 * (uint32_t)log2 + (1 << 15)) >> 16);
  return ((uint32_t)scale * ln + (1 << 15)) >> 16;
}

void ns_filter_log(const ns_filter_log_params *p, const void *x, const uint16_t *table, void *y) {
  for (int32_t c = 0; c < p->n; c++) {
    const uint32_t v = load32((const int8_t *)x + 4 * c) << p->correction;
    const int16_t out = (int16_t)(v > 1 ? ns_min((int32_t)log_scaled(v, p->scale, table), 32767) : 0);
    memcpy((int8_t *)y + 2 * c, &out, sizeof out);
  }
}
