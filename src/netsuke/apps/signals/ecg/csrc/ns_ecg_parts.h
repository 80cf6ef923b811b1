/* Steps of the pipeline, each as in the Python file of the same name, in single precision. */
#ifndef NS_ECG_PARTS_H
#define NS_ECG_PARTS_H

#include "ns_ecg.h"

/* The lead as it is pushed (conditioning.py, quality.py) */
void ns_ecg_take(ns_ecg *e, float x);
void ns_ecg_close(ns_ecg *e);                      /* the last samples are bridged, `a` is the lead at 250 Hz */
void ns_ecg_hum(const ns_ecg_input *in, float size[2]); /* mV at 50 and 60 Hz */
uint32_t ns_ecg_signal_flags(ns_ecg *e, const float hum[2]); /* overwrites b */
/* x (n) forwards and backwards, odd reflection at the ends; work holds NS_ECG_PAD */
void ns_ecg_zero_phase(float *x, int n, float *work, const ns_ecg_section *s, int sections);

/* rpeaks.py: peaks of x; e (n) and work (NS_ECG_PAD) are overwritten */
int ns_ecg_detect(const float *x, float *e, float *work, int32_t *peaks);
float ns_ecg_refined(const float *x, int peak);

/* beats.py */
typedef struct {
  int32_t peaks[NS_ECG_BEATS], shift[NS_ECG_BEATS];
  float like[NS_ECG_BEATS]; /* NaN beyond the record */
  uint8_t used[NS_ECG_BEATS];
  int32_t count, members;
  float rr, noise;
} ns_ecg_beats;
int ns_ecg_representative(const float *x, ns_ecg_beats *b, float *wave, float *work); /* 0: no two beats alike */

/* network.py: marks and spread from `wave`; x and y hold NS_ECG_WIDE * NS_ECG_COARSE */
float ns_ecg_mark(const float *wave, float rr, float *x, float *y, float *at, float *spread);

/* median; x is reordered */
float ns_ecg_median(float *x, int n);
/* whether most beats follow a pacing spike; b is overwritten */
int ns_ecg_paced(ns_ecg *e, const int32_t *peaks, int count);

#endif
