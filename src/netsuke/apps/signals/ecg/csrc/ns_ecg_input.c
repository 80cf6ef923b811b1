#include <math.h>
#include <string.h>

#include "ns_ecg_parts.h"

#define WIDER (NS_ECG_FS > NS_ECG_RATE ? NS_ECG_FS : NS_ECG_RATE)
#define SPIKE (NS_ECG_SPIKE_WIDTH)
static const float tones[NS_ECG_TONES] = {50.0f, 46.0f, 54.0f, 60.0f, 56.0f, 64.0f};

void ns_ecg_start(ns_ecg *e) {
  memset(e, 0, sizeof *e);
  ns_ecg_input *in = &e->in;
  for (int k = 0; k <= NS_ECG_TONES; k++) {
    const float turns = k < NS_ECG_TONES ? tones[k] / (float)NS_ECG_FS : 1.0f / (float)(NS_ECG_INPUT - 1);
    in->turn[k][0] = 1.0f;
    in->step[k][0] = cosf(6.28318531f * turns);
    in->step[k][1] = sinf(6.28318531f * turns);
  }
}

/* Projection onto windowed sines. The window is one more turning pointer: half of 1 - its cosine. */
static void project(ns_ecg_input *in, float x) {
  const float v = x * (0.5f - 0.5f * in->turn[NS_ECG_TONES][0]);
  for (int k = 0; k <= NS_ECG_TONES; k++) {
    const float c = in->turn[k][0], s = in->turn[k][1];
    if (k < NS_ECG_TONES) {
      in->found[k][0] += v * c;
      in->found[k][1] += v * s;
    }
    in->turn[k][0] = c * in->step[k][0] - s * in->step[k][1];
    in->turn[k][1] = s * in->step[k][0] + c * in->step[k][1];
  }
}

void ns_ecg_hum(const ns_ecg_input *in, float size[2]) {
  float amplitude[NS_ECG_TONES];
  for (int k = 0; k < NS_ECG_TONES; k++)
    amplitude[k] = 4.0f * sqrtf(in->found[k][0] * in->found[k][0] + in->found[k][1] * in->found[k][1]) / (NS_ECG_INPUT - 1);
  for (int m = 0; m < 2; m++) {
    const float *a = amplitude + 3 * m, beside = a[1] > a[2] ? a[1] : a[2];
    size[m] = tones[3 * m] < 0.45f * NS_ECG_FS && a[0] > beside ? a[0] - beside : 0.0f;
  }
}

#if NS_ECG_SPIKES
/* Sizes of spikes, four bits of mantissa and four of exponent (2^-12 to 16 mV): a decision asks for factors of three. */
static uint8_t packed(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  const int32_t code = (int32_t)((bits + (1u << 18)) >> 19) - ((127 - 12) << 4);
  return (uint8_t)(code < 0 ? 0 : code > 255 ? 255 : code);
}

static float unpacked(uint8_t code) {
  const uint32_t bits = ((uint32_t)code + ((127 - 12) << 4)) << 19;
  float x;
  memcpy(&x, &bits, sizeof x);
  return code ? x : 0.0f;
}

/* A peak over both its sides, for the sample `SPIKE` before the newest */
static void spike(ns_ecg *e, float x) {
  float *r = e->in.recent;
  memmove(r, r + 1, sizeof(float) * 2 * SPIKE);
  r[2 * SPIKE] = x;
  if (e->in.bridged >= 2 * SPIKE)
    e->spikes[e->in.bridged - SPIKE] = packed(fabsf(r[SPIKE] - 0.5f * (r[0] + r[2 * SPIKE])));
}

int ns_ecg_paced(ns_ecg *e, const int32_t *peaks, int count) {
  const float fs = NS_ECG_FS;
  if (count < 3) return 0;
  uint16_t histogram[256] = {0};
  uint32_t below = 0;
  for (int i = 0; i < NS_ECG_INPUT; i++) histogram[e->spikes[i]]++;
  int middle = 0, found = 0;
  while ((below += histogram[middle]) <= NS_ECG_INPUT / 2) middle++;
  const float size = unpacked((uint8_t)middle) / 0.6745f + 1e-6f;
  for (int b = 0; b < count; b++) {
    const float p = (float)peaks[b] * fs / (float)NS_ECG_RATE;
    const int low = (int)(p - 0.2f * fs);
    int high = (int)(p + 0.01f * fs), top = low;
    if (low < 0) continue;
    if (high > NS_ECG_INPUT) high = NS_ECG_INPUT;
    for (int i = low; i < high; i++)
      if (e->spikes[i] > e->spikes[top]) top = i;
    uint8_t aside = 0;
    for (int i = low; i < high; i++)
      if ((i < top - 3 * SPIKE || i > top + 3 * SPIKE) && e->spikes[i] > aside) aside = e->spikes[i];
    const float most = unpacked(e->spikes[top]);
    found += most > fmaxf(25.0f * size, 0.12f) && most > 3.0f * unpacked(aside);
  }
  return (float)found >= 0.6f * (float)count;
}
#else
int ns_ecg_paced(ns_ecg *e, const int32_t *peaks, int count) {
  (void)e, (void)peaks, (void)count;
  return 0;
}
#endif

/* To 250 Hz: sample j lies at j / FS; every output is a triangle-weighted mean of the samples around it. Integers: exact. */
static void spread_out(ns_ecg *e, int j, float x) {
  const int at = j * NS_ECG_RATE;
  int i = (at - WIDER) / NS_ECG_FS;
  for (i = i < 0 ? 0 : i; i < NS_ECG_N; i++) {
    const int away = i * NS_ECG_FS - at, weight = WIDER - (away < 0 ? -away : away);
    if (away >= WIDER) break;
    if (weight > 0) e->a[i] += (float)weight * x;
  }
}

static void bridged(ns_ecg *e, float x) {
  if (e->in.bridged == 0) e->in.offset = x; /* every filter but the mains' removes a constant, and that one keeps it */
  x -= e->in.offset;
  project(&e->in, x);
#if NS_ECG_SPIKES
  spike(e, x);
#endif
  spread_out(e, e->in.bridged++, x);
}

static void edge(ns_ecg_edge *m, float x, int first) {
  if (first || x > m->value) {
    *m = (ns_ecg_edge){x, 1, 0};
  } else if (x < m->value) {
    m->run = 0;
  } else if (++m->run == 3) {
    m->count++;
  }
}

/* Flat seconds, levels and cut tops, over the samples that are there */
static void watch(ns_ecg_input *in, float x) {
  edge(&in->top, x, in->pushed == in->bad);
  edge(&in->bottom, -x, in->pushed == in->bad);
  if (in->in_second == 0) in->low = in->high = x, in->sum = 0.0f;
  if (x < in->low) in->low = x;
  if (x > in->high) in->high = x;
  in->sum += x;
  if (++in->in_second < NS_ECG_FS) return;
  const float level = in->sum / (float)NS_ECG_FS;
  in->still += in->high - in->low < NS_ECG_FLAT;
  if (in->seconds == 0 || level < in->lowest) in->lowest = level;
  if (in->seconds == 0 || level > in->highest) in->highest = level;
  in->seconds++;
  in->in_second = 0;
}

void ns_ecg_take(ns_ecg *e, float x) {
  ns_ecg_input *in = &e->in;
  if (x - x != 0.0f) { /* not finite */
    in->bad++;
    in->waiting++;
    in->pushed++;
    return;
  }
  const float from = in->pushed == in->bad ? x : in->last, gap = (float)(in->waiting + 1);
  watch(in, x);
  for (int k = 1; k <= in->waiting; k++) bridged(e, from + (x - from) * (float)k / gap);
  bridged(e, x);
  in->waiting = 0;
  in->last = x;
  in->pushed++;
}

void ns_ecg_close(ns_ecg *e) {
  for (; e->in.waiting > 0; e->in.waiting--) bridged(e, e->in.last);
  for (int i = 0; i < NS_ECG_N; i++) { /* the weights that reached this output */
    const int centre = i * NS_ECG_FS;
    int j = (centre - WIDER) / NS_ECG_RATE, total = 0;
    for (j = j < 0 ? 0 : j; j < NS_ECG_INPUT; j++) {
      const int away = j * NS_ECG_RATE - centre;
      if (away >= WIDER) break;
      if (away > -WIDER) total += WIDER - (away < 0 ? -away : away);
    }
    e->a[i] /= (float)(total > 0 ? total : 1);
  }
}

/* Runs of three and more on the very largest value, again and again. The middle is that of the lead at 250 Hz. */
static int is_clipped(ns_ecg *e) {
  const float top = e->in.top.value, bottom = -e->in.bottom.value;
  const ns_ecg_edge *edges[2] = {&e->in.top, &e->in.bottom};
  if (top == bottom || (e->in.top.count < 2 && e->in.bottom.count < 2)) return 0;
  memcpy(e->b, e->a, sizeof e->b);
  const float middle = ns_ecg_median(e->b, NS_ECG_N) + e->in.offset;
  for (int k = 0; k < 2; k++)
    if (edges[k]->count >= 2 && fabsf((k ? bottom : top) - middle) > 0.2f * (top - bottom)) return 1;
  return 0;
}

uint32_t ns_ecg_signal_flags(ns_ecg *e, const float hum[2]) {
  const ns_ecg_input *in = &e->in;
  uint32_t flags = 0;
  if (2 * in->bad > NS_ECG_INPUT) return 1u << NS_ECG_IS_MISSING;
  if (in->bad) flags |= 1u << NS_ECG_IS_MISSING_IN_PART;
  if ((float)in->still > 0.8f * (float)in->seconds) return flags | 1u << NS_ECG_IS_FLAT;
  if (in->still) flags |= 1u << NS_ECG_IS_PARTLY_FLAT;
  if (is_clipped(e)) flags |= 1u << NS_ECG_IS_CLIPPED;
  if (hum[0] > NS_ECG_HUM_FLAG || hum[1] > NS_ECG_HUM_FLAG) flags |= 1u << NS_ECG_IS_MAINS;
  if (in->seconds > 2 && in->highest - in->lowest > 1.0f) flags |= 1u << NS_ECG_IS_WANDER;
  return flags;
}
