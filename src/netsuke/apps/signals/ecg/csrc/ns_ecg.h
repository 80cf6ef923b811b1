/* PR, QRS, QT, QTc and heart rate of one ECG lead, block by block of 10 s. C99, no malloc, single precision.
 *
 *   static ns_ecg ecg;
 *   ns_ecg_report report;
 *   ns_ecg_start(&ecg);
 *   for (;;)
 *     if (ns_ecg_push(&ecg, millivolts)) {  // the block is full
 *       ns_ecg_finish(&ecg, &report);
 *       ns_ecg_start(&ecg);
 *     }
 */
#ifndef NS_ECG_H
#define NS_ECG_H

#include <stdint.h>

#include "ns_ecg_tables.h"

#ifdef __cplusplus
extern "C" {
#endif

/* quality: NS_ECG_NONE (no value, because of `reason`), NS_ECG_POOR, NS_ECG_FAIR, NS_ECG_GOOD */
typedef struct {
  float value, plus_minus;
  int32_t quality, reason, beats;
} ns_ecg_value;

/* values in ms, RR_USED in s, HEART_RATE per minute; marks and their spread in samples at 250 Hz from R, NaN where there is no
 * wave; r: beats in samples at 250 Hz of the block */
typedef struct {
  ns_ecg_value values[NS_ECG_VALUES];
  uint32_t flags;
  int32_t peaks, used;
  float p_present, rr, noise;
  float marks[NS_ECG_MARKS], spread[NS_ECG_MARKS];
  float r[NS_ECG_BEATS];
} ns_ecg_report;

/* The largest or smallest value so far, and how often it lasted for three samples */
typedef struct {
  float value;
  int32_t run, count;
} ns_ecg_edge;

enum { NS_ECG_TONES = 6 };

/* What is known of a block while its samples arrive */
typedef struct {
  int32_t pushed, bridged, bad, waiting, seconds, still, in_second;
  float offset, last, low, high, sum, lowest, highest;
  ns_ecg_edge top, bottom;
  float turn[NS_ECG_TONES + 1][2], step[NS_ECG_TONES + 1][2], found[NS_ECG_TONES][2];
  float recent[9];
} ns_ecg_input;

typedef struct {
  float a[NS_ECG_N], b[NS_ECG_N];
  union {
    float c[NS_ECG_PAD]; /* edges of a block while it is filtered, later the representative beat and room to sort */
    struct {
      float wave[NS_ECG_LENGTH], work[NS_ECG_LENGTH];
    } beat;
  } side;
  ns_ecg_input in;
#if NS_ECG_SPIKES
  uint8_t spikes[NS_ECG_SPIKES];
#endif
} ns_ecg;

void ns_ecg_start(ns_ecg *e);
/* One sample in mV, NaN where it is missing. 1 when the block is full: then call ns_ecg_finish. */
int ns_ecg_push(ns_ecg *e, float millivolts);
void ns_ecg_finish(ns_ecg *e, ns_ecg_report *report);
/* All three for one block of NS_ECG_INPUT samples */
void ns_ecg_block(ns_ecg *e, const float *millivolts, ns_ecg_report *report);

#ifdef __cplusplus
}
#endif

#endif
