#include "ns_ecg.h"

#include <math.h>

#include "ns_ecg_parts.h"

#define BIT(name) (1u << NS_ECG_IS_##name)
#define BECAUSE(name) (NS_ECG_IS_##name + 1)
enum { P_WAVE, QRS_WAVE, T_WAVE, WAVES };
static const int8_t starts[WAVES + 1] = {NS_ECG_AT_P_ON, NS_ECG_AT_QRS_ON, NS_ECG_AT_T_ON, NS_ECG_MARKS};

static int bits(uint32_t flags, uint32_t mask) { return (flags & mask) != 0; }

/* Noise above the waves: median size of 45 Hz and more of the lead in `a`, by way of b */
static float rumble(ns_ecg *e) {
  for (int i = 0; i < NS_ECG_N; i++) e->b[i] = e->a[i];
  ns_ecg_zero_phase(e->b, NS_ECG_N, e->side.c, ns_ecg_rumble, sizeof ns_ecg_rumble / sizeof *ns_ecg_rumble);
  for (int i = 0; i < NS_ECG_N; i++) e->b[i] = fabsf(e->b[i]);
  return ns_ecg_median(e->b, NS_ECG_N) / 0.6745f;
}

/* quality.of_beats */
static uint32_t beat_flags(const float *wave, const ns_ecg_beats *b, float noise) {
  float low = wave[90], high = low, rr[NS_ECG_BEATS], change[NS_ECG_BEATS];
  uint32_t flags = 0;
  for (int t = 90; t < 135; t++) {
    low = fminf(low, wave[t]);
    high = fmaxf(high, wave[t]);
  }
  const float height = high - low;
  if (!(height >= 0.1f && height <= 10.0f)) flags |= BIT(UNIT);
  if (b->noise > NS_ECG_UNSTEADY * height || noise > NS_ECG_VERY_NOISY * height) flags |= BIT(VERY_NOISY);
  else if (noise > NS_ECG_NOISY * height) flags |= BIT(NOISY);
  int known = 0, alike = 0;
  for (int k = 0; k < b->count; k++) {
    known += !isnan(b->like[k]);
    alike += b->like[k] >= NS_ECG_LIKE;
  }
  if (b->count >= 4 && known && (float)alike < 0.34f * (float)known) flags |= BIT(NOISE_ONLY);
  else if (alike < known || (float)b->members < 0.6f * (float)b->count) flags |= BIT(EXTRASYSTOLES);
  const int n = b->count - 1;
  for (int k = 0; k < n; k++) rr[k] = (float)(b->peaks[k + 1] - b->peaks[k]);
  for (int k = 0; k + 1 < n; k++) change[k] = fabsf(rr[k + 1] - rr[k]);
  if (n > 3 && ns_ecg_median(change, n - 1) > 0.09f * ns_ecg_median(rr, n)) flags |= BIT(IRREGULAR);
  if (b->rr < NS_ECG_FASTEST_RR) flags |= BIT(FAST);
  else if (b->rr < NS_ECG_BRISK_RR) flags |= BIT(BRISK);
  return b->count < 3 ? flags | BIT(SHORT) : flags;
}

/* delineate.judged: reasons per wave; marks of waves that are not believed become NaN. */
static void judge(ns_ecg *e, ns_ecg_report *r, int32_t *why) {
  const float *wave = e->side.beat.wave;
  float *at = r->marks, limit = NS_ECG_P_SURE;
  if (bits(r->flags, BIT(IRREGULAR))) limit = fmaxf(limit, NS_ECG_P_SURE_IF_IRREGULAR);
  if (bits(r->flags, BIT(PACED))) limit = fmaxf(limit, NS_ECG_P_SURE_IF_PACED);
  const int unsure = r->p_present < limit, fast = bits(r->flags, BIT(FAST));
  if (unsure && bits(r->flags, BIT(IRREGULAR))) r->flags = (r->flags & ~BIT(IRREGULAR)) | BIT(FIBRILLATION);
  for (int w = 0; w < WAVES; w++) why[w] = 0;
  if (unsure) {
    why[P_WAVE] = bits(r->flags, BIT(FIBRILLATION)) ? BECAUSE(FIBRILLATION)
                  : bits(r->flags, BIT(PACED))      ? BECAUSE(PACED)
                                                    : NS_ECG_BECAUSE_NO_P;
  } else if (fast) {
    why[P_WAVE] = BECAUSE(FAST);
  } else if (!(at[NS_ECG_AT_P_ON] < at[NS_ECG_AT_P_OFF] && at[NS_ECG_AT_P_OFF] <= at[NS_ECG_AT_QRS_ON] + 2.0f)) {
    why[P_WAVE] = NS_ECG_BECAUSE_P_ORDER;
  }
  if (!(at[NS_ECG_AT_QRS_ON] < at[NS_ECG_AT_QRS_OFF])) why[QRS_WAVE] = NS_ECG_BECAUSE_QRS_ORDER;
  if (fast) why[T_WAVE] = BECAUSE(FAST);
  else if (!(at[NS_ECG_AT_QRS_OFF] <= at[NS_ECG_AT_T_PEAK] && at[NS_ECG_AT_T_PEAK] < at[NS_ECG_AT_T_OFF]))
    why[T_WAVE] = NS_ECG_BECAUSE_T_ORDER;
  for (int w = 0; w < WAVES; w++) {
    for (int m = starts[w]; m < starts[w + 1]; m++)
      if (!why[w] && !isfinite(at[m])) why[w] = NS_ECG_BECAUSE_NOT_FOUND;
    for (int m = starts[w]; why[w] && m < starts[w + 1]; m++) at[m] = r->spread[m] = NAN;
  }
  if (why[P_WAVE]) return;
  float level = 0.0f, area = 0.0f; /* level at QRS onset, else the median */
  if (!why[QRS_WAVE]) {
    const int k = NS_ECG_BEFORE + (int)lrintf(at[NS_ECG_AT_QRS_ON]), from = k > 2 ? k - 2 : 0;
    for (int t = from; t <= k; t++) level += wave[t] / (float)(k - from + 1);
  } else {
    for (int t = 0; t < NS_ECG_LENGTH; t++) e->side.beat.work[t] = wave[t];
    level = ns_ecg_median(e->side.beat.work, NS_ECG_LENGTH);
  }
  for (int t = NS_ECG_BEFORE - 20; t < NS_ECG_BEFORE + 20; t++) area += wave[t] - level;
  if (wave[NS_ECG_BEFORE + (int)lrintf(at[NS_ECG_AT_P_PEAK])] < level && area < 0.0f) r->flags |= BIT(INVERTED);
}

static int grade(float plus_minus, uint32_t flags) {
  if (plus_minus >= NS_ECG_POOR_FROM || bits(flags, NS_ECG_SEVERE)) return NS_ECG_POOR;
  return !(plus_minus < NS_ECG_FAIR_FROM) || bits(flags, NS_ECG_DOUBTFUL) ? NS_ECG_FAIR : NS_ECG_GOOD;
}

static ns_ecg_value gap(int32_t reason) { return (ns_ecg_value){NAN, NAN, NS_ECG_NONE, reason, 0}; }

static ns_ecg_value between(const ns_ecg_report *r, int from, int to, int32_t first, int32_t second, int on_p) {
  if (first || second) return gap(first ? first : second);
  const float ms = 1000.0f / (float)NS_ECG_RATE, pm = hypotf(r->spread[from], r->spread[to]) * ms;
  int quality = grade(pm, r->flags);
  if (on_p && r->p_present < NS_ECG_P_CERTAIN && quality == NS_ECG_GOOD) quality = NS_ECG_FAIR;
  return (ns_ecg_value){(r->marks[to] - r->marks[from]) * ms, pm, quality, 0, r->used};
}

/* parameters.intervals */
static void intervals(ns_ecg_report *r, const int32_t *why) {
  ns_ecg_value *v = r->values;
  const float rr = r->rr, rate = 60.0f / rr;
  v[NS_ECG_PR] = between(r, NS_ECG_AT_P_ON, NS_ECG_AT_QRS_ON, why[P_WAVE], why[QRS_WAVE], 1);
  v[NS_ECG_QRS] = between(r, NS_ECG_AT_QRS_ON, NS_ECG_AT_QRS_OFF, why[QRS_WAVE], 0, 0);
  v[NS_ECG_QT] = between(r, NS_ECG_AT_QRS_ON, NS_ECG_AT_T_OFF, why[QRS_WAVE], why[T_WAVE], 0);
  v[NS_ECG_P_DURATION] = between(r, NS_ECG_AT_P_ON, NS_ECG_AT_P_OFF, why[P_WAVE], 0, 1);
  v[NS_ECG_T_DURATION] = between(r, NS_ECG_AT_T_ON, NS_ECG_AT_T_OFF, why[T_WAVE], 0, 0);
  v[NS_ECG_RR_USED] = (ns_ecg_value){rr, NAN, NS_ECG_GOOD, 0, r->used};
  const ns_ecg_value qt = v[NS_ECG_QT];
  for (int k = NS_ECG_QTC_BAZETT; k <= NS_ECG_QTC_HODGES; k++) v[k] = qt;
  if (qt.quality == NS_ECG_NONE) return;
  v[NS_ECG_QTC_BAZETT].value = qt.value / sqrtf(rr);
  v[NS_ECG_QTC_FRIDERICIA].value = qt.value / cbrtf(rr);
  v[NS_ECG_QTC_FRAMINGHAM].value = qt.value + 154.0f * (1.0f - rr);
  v[NS_ECG_QTC_HODGES].value = qt.value + 1.75f * (rate - 60.0f);
  if (!(rate >= 50.0f && rate <= 110.0f) && qt.quality == NS_ECG_GOOD) v[NS_ECG_QTC_BAZETT].quality = NS_ECG_FAIR;
}

/* pipeline.rates for one block; r holds the refined peaks */
static ns_ecg_value heart_rate(const ns_ecg_report *r) {
  const uint32_t bad = BIT(NOISE_ONLY) | BIT(FLAT) | BIT(MISSING) | BIT(SHORT);
  const uint32_t doubtful = BIT(VERY_NOISY) | BIT(PARTLY_FLAT) | BIT(MISSING_IN_PART);
  float rr[NS_ECG_BEATS];
  int n = 0;
  for (int k = 0; k + 1 < r->peaks; k++) {
    const float s = (r->r[k + 1] - r->r[k]) / (float)NS_ECG_RATE;
    if (s > 0.2f && s < 4.0f) rr[n++] = s;
  }
  if (n < 2 || bits(r->flags, bad))
    return gap(bits(r->flags, BIT(MISSING))      ? BECAUSE(MISSING)
               : bits(r->flags, BIT(FLAT))       ? BECAUSE(FLAT)
               : bits(r->flags, BIT(NOISE_ONLY)) ? BECAUSE(NOISE_ONLY)
                                                 : BECAUSE(SHORT));
  const int quality = bits(r->flags, doubtful) ? NS_ECG_POOR : NS_ECG_GOOD;
  return (ns_ecg_value){60.0f / ns_ecg_median(rr, n), NAN, quality, 0, r->peaks};
}

static void nothing(ns_ecg_report *r, int flag) {
  r->flags |= 1u << flag;
  for (int k = 0; k < NS_ECG_VALUES; k++) r->values[k] = gap(flag + 1);
  for (int m = 0; m < NS_ECG_MARKS; m++) r->marks[m] = r->spread[m] = NAN;
  r->values[NS_ECG_HEART_RATE] = heart_rate(r);
}

void ns_ecg_finish(ns_ecg *e, ns_ecg_report *r) {
  ns_ecg_beats b;
  float hum[2];
  *r = (ns_ecg_report){.rr = NAN, .noise = NAN};
  ns_ecg_close(e);
  ns_ecg_hum(&e->in, hum);
  r->flags = ns_ecg_signal_flags(e, hum);
  if (bits(r->flags, BIT(MISSING) | BIT(FLAT))) {
    nothing(r, bits(r->flags, BIT(MISSING)) ? NS_ECG_IS_MISSING : NS_ECG_IS_FLAT);
    return;
  }
  if (hum[0] > NS_ECG_HUM) ns_ecg_zero_phase(e->a, NS_ECG_N, e->side.c, ns_ecg_mains50, 1);
  if (hum[1] > NS_ECG_HUM) ns_ecg_zero_phase(e->a, NS_ECG_N, e->side.c, ns_ecg_mains60, 1);
  const float noise = rumble(e);
  for (int i = 0; i < NS_ECG_N; i++) e->b[i] = e->a[i];
  ns_ecg_zero_phase(e->b, NS_ECG_N, e->side.c, ns_ecg_band, sizeof ns_ecg_band / sizeof *ns_ecg_band);
  b.count = ns_ecg_detect(e->b, e->a, e->side.c, b.peaks);
  for (int k = 0; k < b.count; k++) { /* a top before the block's first or behind its last sample is not the block's */
    r->r[r->peaks] = ns_ecg_refined(e->b, b.peaks[k]);
    if (r->r[r->peaks] >= 0.0f && r->r[r->peaks] < (float)NS_ECG_N) r->peaks++;
  }
  if (b.count < 2 || !ns_ecg_representative(e->b, &b, e->side.beat.wave, e->side.beat.work)) {
    nothing(r, b.count < 3 ? NS_ECG_IS_SHORT : NS_ECG_IS_NOISE_ONLY);
    return;
  }
  r->rr = b.rr;
  r->used = b.members;
  r->noise = b.noise;
  r->flags |= beat_flags(e->side.beat.wave, &b, noise);
  if (bits(r->flags, BIT(NOISE_ONLY) | BIT(SHORT))) {
    nothing(r, bits(r->flags, BIT(NOISE_ONLY)) ? NS_ECG_IS_NOISE_ONLY : NS_ECG_IS_SHORT);
    return;
  }
  if (ns_ecg_paced(e, b.peaks, b.count)) r->flags |= BIT(PACED);
  r->p_present = ns_ecg_mark(e->side.beat.wave, (float)NS_ECG_RATE * b.rr, e->a, e->b, r->marks, r->spread);
  int32_t why[WAVES];
  judge(e, r, why);
  intervals(r, why);
  r->values[NS_ECG_HEART_RATE] = heart_rate(r);
}

int ns_ecg_push(ns_ecg *e, float millivolts) {
  if (e->in.pushed < NS_ECG_INPUT) ns_ecg_take(e, millivolts);
  return e->in.pushed >= NS_ECG_INPUT;
}

void ns_ecg_block(ns_ecg *e, const float *millivolts, ns_ecg_report *report) {
  ns_ecg_start(e);
  for (int i = 0; i < NS_ECG_INPUT; i++) (void)ns_ecg_push(e, millivolts[i]);
  ns_ecg_finish(e, report);
}
