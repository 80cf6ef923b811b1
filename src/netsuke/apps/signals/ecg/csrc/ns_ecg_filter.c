#include "ns_ecg_parts.h"

/* Direct form II transposed, as scipy's; `z` starts as after a long row of the first value. */
static inline float through(const ns_ecg_section *s, float (*z)[2], int sections, float v) {
  for (int k = 0; k < sections; k++) {
    const float y = s[k].b0 * v + z[k][0];
    z[k][0] = s[k].b1 * v - s[k].a1 * y + z[k][1];
    z[k][1] = s[k].b2 * v - s[k].a2 * y;
    v = y;
  }
  return v;
}

static inline void settle(const ns_ecg_section *s, float (*z)[2], int sections, float first) {
  for (int k = 0; k < sections; k++) {
    z[k][0] = s[k].z0 * first;
    z[k][1] = s[k].z1 * first;
  }
}

/* `sections` is a constant wherever this is called, so that the states stay in registers */
static inline void both_ways(float *x, int n, float *work, const ns_ecg_section *s, int sections) {
  const int pad = n - 1 < NS_ECG_PAD ? n - 1 : NS_ECG_PAD;
  const float first = 2.0f * x[0], last = 2.0f * x[n - 1];
  float z[3][2];
  for (int i = 0; i < pad; i++) work[i] = last - x[n - 2 - i];
  settle(s, z, sections, first - x[pad]);
  for (int i = pad; i >= 1; i--) (void)through(s, z, sections, first - x[i]);
  for (int i = 0; i < n; i++) x[i] = through(s, z, sections, x[i]);
  for (int i = 0; i < pad; i++) work[i] = through(s, z, sections, work[i]);
  settle(s, z, sections, work[pad - 1]);
  for (int i = pad - 1; i >= 0; i--) (void)through(s, z, sections, work[i]);
  for (int i = n - 1; i >= 0; i--) x[i] = through(s, z, sections, x[i]);
}

void ns_ecg_zero_phase(float *x, int n, float *work, const ns_ecg_section *s, int sections) {
  if (sections == 1) both_ways(x, n, work, s, 1);
  if (sections == 2) both_ways(x, n, work, s, 2);
  if (sections == 3) both_ways(x, n, work, s, 3);
}

/* The k-th smallest comes to x[k], nothing larger before it (Hoare). */
static void select_at(float *x, int n, int k) {
  int low = 0, high = n - 1;
  while (low < high) {
    const float pivot = x[low + (high - low) / 2];
    int i = low, j = high;
    while (i <= j) {
      while (x[i] < pivot) i++;
      while (pivot < x[j]) j--;
      if (i <= j) {
        const float t = x[i];
        x[i++] = x[j];
        x[j--] = t;
      }
    }
    if (k <= j) high = j;
    else if (k >= i) low = i;
    else return;
  }
}

float ns_ecg_median(float *x, int n) {
  if (n < 1) return 0.0f;
  select_at(x, n, n / 2);
  float below = x[n / 2];
  if (n % 2 == 0) {
    below = x[0];
    for (int i = 1; i < n / 2; i++)
      if (x[i] > below) below = x[i];
  }
  return 0.5f * (below + x[n / 2]);
}
