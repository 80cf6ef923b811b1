#include <math.h>
#include <string.h>

#include "ns_ecg_parts.h"

enum { CORE = NS_ECG_CORE_AFTER + NS_ECG_CORE_BEFORE, MOVES = 2 * NS_ECG_SHIFT + 1 };

/* Mean of the middle half of v (n); v is sorted */
static float trimmed_mean(float *v, int n) {
  for (int i = 1; i < n; i++) {
    const float x = v[i];
    int k = i;
    for (; k > 0 && v[k - 1] > x; k--) v[k] = v[k - 1];
    v[k] = x;
  }
  float total = 0.0f;
  for (int i = n / 4; i < n - n / 4; i++) total += v[i];
  return n ? total / (float)(n - 2 * (n / 4)) : 0.0f;
}

static float mean_of(const float *x, int n) {
  float total = 0.0f;
  for (int i = 0; i < n; i++) total += x[i];
  return total / (float)n;
}

/* x (n) without its mean in the direction of c, and over its own size */
static float likeness(const float *x, const float *c, int n, float least) {
  const float mean = mean_of(x, n);
  float both = 0.0f, size = 0.0f;
  for (int i = 0; i < n; i++) {
    const float v = x[i] - mean;
    both += v * c[i];
    size += v * v;
  }
  return both / sqrtf(fmaxf(size, least));
}

static void centre(float *c, int n) {
  const float mean = mean_of(c, n);
  float size = 0.0f;
  for (int i = 0; i < n; i++) {
    c[i] -= mean;
    size += c[i] * c[i];
  }
  size = fmaxf(sqrtf(size), 1e-12f);
  for (int i = 0; i < n; i++) c[i] /= size;
}

/* How far, within SHIFT, each beat's QRS has to move to be most like `core` */
static void best_shifts(const float *x, ns_ecg_beats *b, float *core) {
  centre(core, CORE);
  for (int k = 0; k < b->count; k++) {
    const int low = b->peaks[k] - NS_ECG_CORE_BEFORE - NS_ECG_SHIFT;
    b->shift[k] = 0;
    b->like[k] = NAN;
    if (low < 0 || low + CORE + 2 * NS_ECG_SHIFT > NS_ECG_N) continue;
    for (int m = 0; m < MOVES; m++) {
      const float r = likeness(x + low + m, core, CORE, 1e-18f);
      if (m && !(r > b->like[k])) continue;
      b->like[k] = r;
      b->shift[k] = m - NS_ECG_SHIFT;
    }
  }
}

static int is_early(const float *gaps, int k, float typical) { return k > 0 && gaps[k - 1] < NS_ECG_EARLY * typical; }

/* The largest group of alike QRS, or its part in rhythm; `used` and their number. `work` holds CORE. */
static int members_of(const float *x, ns_ecg_beats *b, const float *gaps, float typical, float *work) {
  uint64_t alike[NS_ECG_BEATS] = {0}, group = 0;
  float most = -1.0f;
  for (int i = 0; i < b->count; i++) {
    const int at = b->peaks[i] - NS_ECG_CORE_BEFORE;
    if (at < 0 || at + CORE > NS_ECG_N) continue;
    memcpy(work, x + at, CORE * sizeof *work);
    centre(work, CORE);
    for (int k = 0; k < b->count; k++) {
      const int other = b->peaks[k] - NS_ECG_CORE_BEFORE;
      if (other < 0 || other + CORE > NS_ECG_N) continue;
      if (likeness(x + other, work, CORE, 1e-18f) > NS_ECG_LIKE) alike[i] |= (uint64_t)1 << k;
    }
    float votes = is_early(gaps, i, typical) ? 0.0f : 0.5f;
    for (int k = 0; k < b->count; k++) votes += (float)(alike[i] >> k & 1);
    if (votes > most) {
      most = votes;
      group = alike[i];
    }
  }
  int members = 0, steady = 0;
  for (int k = 0; k < b->count; k++) {
    b->used[k] = group >> k & 1;
    members += b->used[k];
    steady += b->used[k] && !is_early(gaps, k, typical);
  }
  if (steady < 2 || 2 * steady < members) return members;
  for (int k = 0; k < b->count; k++) b->used[k] = b->used[k] && !is_early(gaps, k, typical);
  return steady;
}

static int reaches(int peak) { return peak >= NS_ECG_BEFORE && peak + NS_ECG_AFTER <= NS_ECG_N; }

/* Values of the used beats at sample t of the window, each less its own level: their number */
static int column(const float *x, const ns_ecg_beats *b, const float *level, int t, float *out) {
  int n = 0;
  for (int k = 0; k < b->count; k++) {
    const int at = b->peaks[k] + b->shift[k] - NS_ECG_BEFORE + t;
    if (b->used[k] && at >= 0 && at < NS_ECG_N) out[n++] = x[at] - level[k];
  }
  return n;
}

int ns_ecg_representative(const float *x, ns_ecg_beats *b, float *wave, float *work) {
  float gaps[NS_ECG_BEATS], some[NS_ECG_BEATS], core[CORE];
  int whole = 0, complete = 0, n = 0;
  for (int k = 0; k < b->count; k++)
    whole += b->peaks[k] >= NS_ECG_CORE_BEFORE && b->peaks[k] + NS_ECG_CORE_AFTER <= NS_ECG_N;
  if (whole < 2) return 0;
  for (int k = 0; k + 1 < b->count; k++) some[k] = gaps[k] = (float)(b->peaks[k + 1] - b->peaks[k]);
  const float typical = ns_ecg_median(some, b->count - 1);
  if (members_of(x, b, gaps, typical, core) < 2) return 0;
  for (int t = 0; t < CORE; t++) {
    n = 0;
    for (int k = 0; k < b->count; k++)
      if (b->used[k]) some[n++] = x[b->peaks[k] - NS_ECG_CORE_BEFORE + t];
    core[t] = trimmed_mean(some, n);
  }
  best_shifts(x, b, core);
  for (int k = 0; k < b->count; k++) complete += b->used[k] && reaches(b->peaks[k]);
  b->members = 0;
  n = 0;
  for (int k = 0; k < b->count; k++) { /* a beat cut off by the record's end has no baseline to be levelled by */
    if (complete >= 3) b->used[k] = b->used[k] && reaches(b->peaks[k]);
    b->members += b->used[k];
    if (b->used[k] && k > 0) some[n++] = gaps[k - 1];
  }
  b->rr = (n ? ns_ecg_median(some, n) : typical) / (float)NS_ECG_RATE;
  float level[NS_ECG_BEATS];
  for (int k = 0; k < b->count; k++) {
    n = 0;
    for (int t = 0; t < NS_ECG_LENGTH; t++) {
      const int at = b->peaks[k] + b->shift[k] - NS_ECG_BEFORE + t;
      if (at >= 0 && at < NS_ECG_N) work[n++] = x[at];
    }
    level[k] = b->used[k] ? ns_ecg_median(work, n) : 0.0f;
  }
  int columns = 0;
  for (int t = 0; t < NS_ECG_LENGTH; t++) {
    n = column(x, b, level, t, some);
    if (n) {
      const float mean = mean_of(some, n);
      float square = 0.0f;
      for (int k = 0; k < n; k++) square += (some[k] - mean) * (some[k] - mean);
      work[columns++] = sqrtf(square / (float)n);
    }
    wave[t] = trimmed_mean(some, n);
  }
  b->noise = ns_ecg_median(work, columns);
  return 1;
}
