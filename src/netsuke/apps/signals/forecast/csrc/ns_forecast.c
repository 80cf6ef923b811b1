#include "ns_forecast.h"

#include <math.h>
#include <stddef.h>

#define RIDGE 1e-6f /* of the mean diagonal, as in Python */

static float mean_of(const float *x, int32_t count) {
  float total = 0.0f;
  for (int32_t t = 0; t < count; t++) total += x[t];
  return total / (float)count;
}

/* x + its convolution, in place: values that were overwritten and are still wanted wait in `delay`, a ring. */
static void smooth(const float *kernel, int32_t period, float *x, int32_t count, float *delay) {
  const int32_t left = period / 2;
  for (int32_t k = 0; k < left; k++) delay[k] = 0.0f;
  for (int32_t t = 0, oldest = 0; t < count; t++) {
    const float now = x[t];
    float s = now;
    for (int32_t d = 0; d < left; d++) {
      const int32_t at = oldest + d;
      s += kernel[d] * delay[at < left ? at : at - left];
    }
    for (int32_t d = left; d <= period && t + d - left < count; d++) s += kernel[d] * x[t + d - left];
    if (left > 0) {
      delay[oldest] = now;
      if (++oldest == left) oldest = 0;
    }
    x[t] = s;
  }
}

static float entry(const ns_forecast *f, int32_t k, int32_t i) {
  float v = 0.0f;
  if (f->matrix) v += f->matrix[k * f->n + i];
  if (f->codes) v += f->scale * (float)f->codes[k * f->n + i];
  if (f->across) v += f->across[k / f->q * f->p + i / f->p] * f->inside[k % f->q * f->p + i % f->p];
  for (int32_t r = 0; r < f->rank; r++) v += f->left[k * f->rank + r] * f->right[r * f->n + i];
  return v;
}

void ns_forecast_run(const ns_forecast *f, float *x, float *y) {
  const int32_t w = f->period, count = f->n * w;
  const float mean = mean_of(x, count);
  for (int32_t t = 0; t < count; t++) x[t] -= mean;
  if (f->kernel) smooth(f->kernel, w, x, count, y);
  for (int32_t k = 0; k < f->m; k++) {
    float *to = y + k * w;
    const int32_t phases = f->horizon - k * w < w ? f->horizon - k * w : w;
    for (int32_t j = 0; j < phases; j++) to[j] = mean;
    for (int32_t i = 0; i < f->n; i++) {
      const float v = entry(f, k, i), *from = x + i * w;
      for (int32_t j = 0; j < phases; j++) to[j] += v * from[j];
    }
  }
}

void ns_moments_add(const ns_moments *s, const float *window, float keep) {
  const int32_t w = s->period;
  const float mean = mean_of(window, s->n * w), *later = window + s->n * w;
  float *xx = s->sxx, *xy = s->sxy;
  for (int32_t i = 0; i < s->n; i++) {
    for (int32_t e = 0; e <= i; e++, xx++) {
      float total = 0.0f;
      for (int32_t j = 0; j < w; j++) total += (window[i * w + j] - mean) * (window[e * w + j] - mean);
      *xx = *xx * keep + total;
    }
    for (int32_t k = 0; k < s->m; k++, xy++) {
      float total = 0.0f;
      for (int32_t j = 0; j < w; j++) total += (window[i * w + j] - mean) * (later[k * w + j] - mean);
      *xy = *xy * keep + total;
    }
  }
}

/* Solves (a + ridge) v = b for symmetric a (p, p), by Cholesky, in place. */
static void solve(float *a, float *b, int32_t p) {
  float trace = 0.0f;
  for (int32_t i = 0; i < p; i++) trace += a[i * p + i];
  const float ridge = RIDGE * trace / (float)p;
  for (int32_t i = 0; i < p; i++) {
    for (int32_t j = 0; j <= i; j++) {
      float v = a[i * p + j] + (i == j ? ridge : 0.0f);
      for (int32_t k = 0; k < j; k++) v -= a[i * p + k] * a[j * p + k];
      a[i * p + j] = i == j ? sqrtf(v > ridge ? v : ridge) : v / a[j * p + j];
    }
    for (int32_t k = 0; k < i; k++) b[i] -= a[i * p + k] * b[k];
    b[i] /= a[i * p + i];
  }
  for (int32_t i = p - 1; i >= 0; i--) {
    for (int32_t k = i + 1; k < p; k++) b[i] -= a[k * p + i] * b[k];
    b[i] /= a[i * p + i];
  }
}

/* Rows of one factor, the other one, `fixed`, held. Of an index pair the inner part belongs to `inside`: input i = c p + d,
 * output k = a q + b. `in` says whether the rows that are solved are those of `inside` (b, over d) or of `across` (a, over c). */
static void rows(const ns_moments *s, const float *fixed, float *solved, int in) {
  const int32_t p = s->p, q = s->q;
  float gram[NS_FORECAST_LARGEST_P * NS_FORECAST_LARGEST_P], right[NS_FORECAST_LARGEST_P];
  for (int32_t row = 0; row < q; row++) {
    for (int32_t i = 0; i < p * p; i++) gram[i] = 0.0f;
    for (int32_t i = 0; i < p; i++) right[i] = 0.0f;
    for (int32_t o = 0; o < q; o++) {
      const int32_t k = in ? o * q + row : row * q + o;
      if (k >= s->m) continue;
      for (int32_t i = 0; i < s->n; i++) {
        const int32_t mine = in ? i % p : i / p;
        const float v = fixed[o * p + (in ? i / p : i % p)];
        right[mine] += v * s->sxy[i * s->m + k];
        for (int32_t e = 0; e < s->n; e++) {
          const float xx = i > e ? s->sxx[i * (i + 1) / 2 + e] : s->sxx[e * (e + 1) / 2 + i];
          gram[mine * p + (in ? e % p : e / p)] += v * fixed[o * p + (in ? e / p : e % p)] * xx;
        }
      }
    }
    float trace = 0.0f;
    for (int32_t i = 0; i < p; i++) trace += gram[i * p + i];
    if (!(trace > 0.0f)) continue; /* nothing is known of this row: it stays */
    solve(gram, right, p);
    for (int32_t i = 0; i < p; i++) solved[row * p + i] = right[i];
  }
}

void ns_moments_sweep(const ns_moments *s) {
  rows(s, s->across, s->inside, 1);
  rows(s, s->inside, s->across, 0);
}
