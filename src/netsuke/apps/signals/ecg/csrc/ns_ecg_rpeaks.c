#include "ns_ecg_parts.h"

enum { STRETCHES = NS_ECG_N / NS_ECG_STRETCH ? NS_ECG_N / NS_ECG_STRETCH : 1 };

static float slope(const float *x, int i) {
  if (i == 0) return x[1] - x[0];
  if (i == NS_ECG_N - 1) return x[i] - x[i - 1];
  return 0.5f * (x[i + 1] - x[i - 1]);
}

/* Squared slope, averaged over WIDTH, in place: the squares wait in `ring` until no mean needs them. */
static void slope_energy(float *x, float *work) {
  float ring[NS_ECG_WIDTH];
  ns_ecg_zero_phase(x, NS_ECG_N, work, ns_ecg_qrs, sizeof ns_ecg_qrs / sizeof *ns_ecg_qrs);
  const int before = NS_ECG_WIDTH / 2, after = (NS_ECG_WIDTH + 1) / 2;
  for (int i = 0, next = 0; i < NS_ECG_N; i++) {
    for (; next < i + after && next < NS_ECG_N; next++) {
      const float d = slope(x, next);
      ring[next % NS_ECG_WIDTH] = d * d;
    }
    const int low = i < before ? 0 : i - before, high = i + after < NS_ECG_N ? i + after : NS_ECG_N;
    float total = 0.0f;
    for (int k = low; k < high; k++) total += ring[k % NS_ECG_WIDTH];
    x[i] = total / (float)(high - low);
  }
}

static int local_maxima(const float *e, int32_t *out) {
  int n = 0;
  for (int i = 1; i < NS_ECG_N - 1; i++) {
    if (!(e[i] > e[i - 1] && e[i] >= e[i + 1])) continue;
    if (n && i - out[n - 1] < NS_ECG_REFRACTORY) {
      if (e[i] > e[out[n - 1]]) out[n - 1] = i;
    } else if (n < NS_ECG_BEATS) {
      out[n++] = i;
    }
  }
  return n;
}

/* Per stretch of 2 s the median of the largest energies of the stretches around it */
static void typical_height(const float *e, float *typical) {
  float tops[STRETCHES], some[9];
  for (int s = 0; s < STRETCHES; s++) {
    tops[s] = e[s * NS_ECG_STRETCH];
    for (int i = s * NS_ECG_STRETCH; i < (s + 1) * NS_ECG_STRETCH && i < NS_ECG_N; i++)
      if (e[i] > tops[s]) tops[s] = e[i];
  }
  for (int s = 0; s < STRETCHES; s++) {
    int n = 0;
    for (int k = s - 4; k <= s + 4; k++)
      if (k >= 0 && k < STRETCHES) some[n++] = tops[k];
    typical[s] = ns_ecg_median(some, n);
  }
}

static int without_t_waves(const float *e, int32_t *p, int n) {
  int kept = 0;
  for (int i = 0; i < n; i++) {
    const int close = kept && p[i] - p[kept - 1] < NS_ECG_T_REGION;
    if (close && e[p[i]] < 0.5f * e[p[kept - 1]]) continue;
    if (close && e[p[kept - 1]] < 0.15f * e[p[i]]) kept--;
    p[kept++] = p[i];
  }
  return kept;
}

static float typical_gap(const int32_t *p, int n) {
  float gaps[NS_ECG_BEATS];
  for (int i = 0; i + 1 < n; i++) gaps[i] = (float)(p[i + 1] - p[i]);
  return ns_ecg_median(gaps, n - 1);
}

static int search_back(const float *e, int32_t *p, int n, const int32_t *weaker, int weak) {
  for (int pass = 0; pass < weak && n >= 3; pass++) {
    const float typical = typical_gap(p, n);
    int added = 0;
    for (int i = n - 2; i >= 0; i--) {
      if (!((float)(p[i + 1] - p[i]) > 1.7f * typical)) continue;
      int best = -1;
      for (int k = 0; k < weak; k++) {
        const int w = weaker[k];
        if (w > p[i] + NS_ECG_T_REGION && w < p[i + 1] - NS_ECG_REFRACTORY && (best < 0 || e[w] > e[best])) best = w;
      }
      if (best < 0 || n == NS_ECG_BEATS) continue;
      for (int k = n++; k > i + 1; k--) p[k] = p[k - 1];
      p[i + 1] = best;
      added = 1;
    }
    if (!added) break;
  }
  return n;
}

/* Every peak to the largest deflection within 60 ms, of the sign that most beats have */
static void snap(const float *x, int32_t *p, int n) {
  float most[NS_ECG_BEATS], least[NS_ECG_BEATS], span[2 * NS_ECG_SNAP + 1];
  int highest[NS_ECG_BEATS], lowest[NS_ECG_BEATS];
  for (int b = 0; b < n; b++) {
    const int low = p[b] > NS_ECG_SNAP ? p[b] - NS_ECG_SNAP : 0;
    int high = p[b] + NS_ECG_SNAP + 1, count = 0;
    if (high > NS_ECG_N) high = NS_ECG_N;
    highest[b] = lowest[b] = low;
    for (int i = low; i < high; i++) {
      span[count++] = x[i];
      if (x[i] > x[highest[b]]) highest[b] = i;
      if (x[i] < x[lowest[b]]) lowest[b] = i;
    }
    const float middle = ns_ecg_median(span, count);
    most[b] = x[highest[b]] - middle;
    least[b] = middle - x[lowest[b]];
  }
  const int up = ns_ecg_median(most, n) >= 0.8f * ns_ecg_median(least, n);
  for (int b = 0; b < n; b++) p[b] = up ? highest[b] : lowest[b];
}

int ns_ecg_detect(const float *x, float *e, float *work, int32_t *peaks) {
  int32_t all[NS_ECG_BEATS], weaker[NS_ECG_BEATS];
  float typical[STRETCHES];
  for (int i = 0; i < NS_ECG_N; i++) e[i] = x[i];
  slope_energy(e, work);
  const int count = local_maxima(e, all);
  typical_height(e, typical);
  int n = 0, weak = 0;
  for (int k = 0; k < count; k++) {
    const int s = all[k] / NS_ECG_STRETCH;
    const float height = typical[s < STRETCHES ? s : STRETCHES - 1], here = e[all[k]];
    if (here > NS_ECG_SHARE * height) peaks[n++] = all[k];
    else if (here > NS_ECG_SEARCH_BACK * height) weaker[weak++] = all[k];
  }
  n = without_t_waves(e, peaks, n);
  n = without_t_waves(e, peaks, search_back(e, peaks, n, weaker, weak));
  snap(x, peaks, n);
  return n;
}

float ns_ecg_refined(const float *x, int peak) {
  const int k = peak < 1 ? 1 : peak > NS_ECG_N - 2 ? NS_ECG_N - 2 : peak;
  const float bend = x[k - 1] - 2.0f * x[k] + x[k + 1];
  float move = bend > 1e-12f || bend < -1e-12f ? 0.5f * (x[k - 1] - x[k + 1]) / bend : 0.0f;
  move = move > 0.5f ? 0.5f : move < -0.5f ? -0.5f : move;
  return (float)peak + move;
}
