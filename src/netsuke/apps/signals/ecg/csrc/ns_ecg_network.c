#include <math.h>
#include <string.h>

#include "ns_ecg_parts.h"

enum { IN = 4, WIDE = NS_ECG_WIDE, POSITIONS = NS_ECG_COARSE };

static float coarse(int i) { return (float)(i * NS_ECG_STRIDE - NS_ECG_BEFORE); }

/* Four rows as network.py: (LENGTH, IN) */
static void features(const float *wave, float rr, float *out) {
  for (int t = 0; t < NS_ECG_LENGTH; t++) out[t] = wave[t];
  const float middle = ns_ecg_median(out, NS_ECG_LENGTH);
  float low = wave[NS_ECG_BEFORE], high = low, square = 0.0f;
  int far = 0;
  for (int t = 0; t < NS_ECG_LENGTH; t++) {
    const int from = t - NS_ECG_BEFORE;
    if (from >= -NS_ECG_QRS_REACH && from <= NS_ECG_QRS_REACH) {
      low = fminf(low, wave[t]);
      high = fmaxf(high, wave[t]);
    } else {
      square += (wave[t] - middle) * (wave[t] - middle);
      far++;
    }
  }
  const float height = high - low + 1e-9f, rest = sqrtf(square / (float)far) + 0.01f * height;
  for (int t = 0; t < NS_ECG_LENGTH; t++) {
    const float v = 2.0f * (wave[t] - middle), time = (float)(t - NS_ECG_BEFORE);
    float *f = out + IN * t;
    f[0] = v / height;
    f[1] = asinhf(v / rest);
    f[2] = time / 100.0f;
    f[3] = time / rr;
  }
}

/* y (POSITIONS, WIDE) = relu(convolution of x (size, in)), plus x where it has the same shape */
static inline void convolve(
    const float *x, int size, int in, const float *w, const float *bias, int taps, int stride, int dilation, int residual,
    float *y) {
  for (int i = 0; i < POSITIONS; i++) {
    float sum[WIDE];
    for (int o = 0; o < WIDE; o++) sum[o] = bias[o];
    for (int k = 0; k < taps; k++) {
      const int at = i * stride + (k - taps / 2) * dilation;
      if (at < 0 || at >= size) continue;
      const float *row = x + at * in, *tap = w + k * in * WIDE;
      for (int c = 0; c < in; c++) {
        const float v = row[c];
        for (int o = 0; o < WIDE; o++) sum[o] += v * tap[c * WIDE + o];
      }
    }
    for (int o = 0; o < WIDE; o++) {
      const float rectified = sum[o] > 0.0f ? sum[o] : 0.0f;
      y[i * WIDE + o] = rectified + (residual ? x[i * WIDE + o] : 0.0f);
    }
  }
}

static void block(const float *x, int k, float *y) {
  static const float *const weights[] = {ns_ecg_block0, ns_ecg_block1, ns_ecg_block2, ns_ecg_block3, ns_ecg_block4};
  static const float *const biases[] = {
      ns_ecg_block0_bias, ns_ecg_block1_bias, ns_ecg_block2_bias, ns_ecg_block3_bias, ns_ecg_block4_bias};
  convolve(x, POSITIONS, WIDE, weights[k], biases[k], NS_ECG_KERNEL, 1, 1 << k, 1, y);
}

/* Scores to probabilities; the mark is their mean around the best place, the spread that of all. `s` is overwritten. */
static void place(float *s, const float *region, float rr, float *at, float *spread) {
  const float low = fmaxf(region[0], -region[2] * rr), high = fminf(region[1], region[2] * rr);
  int first = POSITIONS, last = -1, best = 0;
  float most = -INFINITY, total = 0.0f, mean = 0.0f, top = -1.0f;
  for (int i = 0; i < POSITIONS; i++) {
    if (coarse(i) < low || coarse(i) > high) continue;
    if (i < first) first = i;
    last = i;
    most = fmaxf(most, s[i]);
  }
  for (int i = 0; i < POSITIONS; i++) {
    s[i] = i < first || i > last ? 0.0f : expf(s[i] - most);
    total += s[i];
    mean += s[i] * coarse(i);
  }
  mean /= total;
  for (int i = 0; i < POSITIONS; i++) {
    float smooth = 0.0f;
    for (int k = i > 2 ? i - 2 : 0; k <= i + 2 && k < POSITIONS; k++) smooth += s[k];
    if (smooth > top) {
      top = smooth;
      best = i;
    }
  }
  float near = 0.0f, sum = 0.0f, square = 0.0f;
  for (int i = 0; i < POSITIONS; i++) {
    square += s[i] * (coarse(i) - mean) * (coarse(i) - mean);
    if (i < best - NS_ECG_HALF || i > best + NS_ECG_HALF) continue;
    near += s[i];
    sum += s[i] * (coarse(i) - coarse(best));
  }
  *at = coarse(best) + sum / near;
  *spread = sqrtf(fmaxf(square / total, 0.25f));
}

float ns_ecg_mark(const float *wave, float rr, float *x, float *y, float *at, float *spread) {
  features(wave, rr, y);
  convolve(y, NS_ECG_LENGTH, IN, ns_ecg_input_weight, ns_ecg_input_bias, NS_ECG_INPUT_TAPS, NS_ECG_STRIDE, 1, 0, x);
  for (int k = 0; k < NS_ECG_BLOCKS; k++) {
    block(x, k, y);
    float *t = x;
    x = y;
    y = t;
  }
  float present = ns_ecg_present_bias[0];
  for (int o = 0; o < WIDE; o++) {
    float most = x[o];
    for (int i = 1; i < NS_ECG_P_POSITIONS; i++) most = fmaxf(most, x[i * WIDE + o]);
    present += most * ns_ecg_present[o];
  }
  for (int m = 0; m < NS_ECG_MARKS; m++) {
    for (int i = 0; i < POSITIONS; i++) {
      y[i] = ns_ecg_marks_bias[m];
      for (int c = 0; c < WIDE; c++) y[i] += x[i * WIDE + c] * ns_ecg_marks[c * NS_ECG_MARKS + m];
    }
    place(y, ns_ecg_region[m], rr, at + m, spread + m);
  }
  return 1.0f / (1.0f + expf(-present));
}
