/* Forecasts of n periods by m: centre, smooth, one matrix for every phase of the period, add the mean. C99, no malloc. */
#ifndef NS_FORECAST_H
#define NS_FORECAST_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* The matrix (m, n) is the sum of the parts that are not NULL:
 *   matrix (m, n);  scale * codes (m, n)
 *   time path: across (q, p) by inside (q, p); entry (a q + b, c p + d) is across[a, c] * inside[b, d]
 *   frequency path: left (m, rank) by right (rank, n) */
typedef struct {
  int32_t period, n, m, horizon;
  const float *kernel; /* period + 1 taps, or NULL: no smoothing */
  const float *matrix;
  const int8_t *codes;
  float scale;
  const float *across, *inside;
  int32_t p, q;
  const float *left, *right;
  int32_t rank;
} ns_forecast;

/* y (horizon) from x (n * period, oldest first), which is overwritten. Apart from both nothing is stored: a delay line of the
 * smoothing lies in y before y is needed. */
void ns_forecast_run(const ns_forecast *f, float *x, float *y);

/* Second moments of all windows of (n + m) * period rows, and the time path that alternating least squares makes of them. */
typedef struct {
  int32_t period, n, m, p, q;
  float *sxx; /* n (n + 1) / 2, rows of the lower triangle */
  float *sxy; /* (n, m) */
  float *across, *inside; /* (q, p) each, refined in place */
} ns_moments;

/* One more window: the sums over its phases, centred by the mean of its first n periods, added to `keep` times the old ones. */
void ns_moments_add(const ns_moments *s, const float *window, float keep);

/* One sweep: each row of `inside` with `across` fixed, then the other way round. p <= NS_FORECAST_LARGEST_P. */
void ns_moments_sweep(const ns_moments *s);

#define NS_FORECAST_LARGEST_P 16

#ifdef __cplusplus
}
#endif

#endif
