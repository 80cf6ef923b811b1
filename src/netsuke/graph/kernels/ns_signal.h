/* From sound to features in integers, and plain arithmetic. graph/ops/signal.py says what each one computes.
 *
 * 64-bit numbers are reached through void *: in the arena they begin at multiples of 4 bytes.
 */
#ifndef NS_SIGNAL_H
#define NS_SIGNAL_H

#include "ns.h"

#ifdef __cplusplus
extern "C" {
#endif

/* y may be x in ns_window, ns_fft_scale, ns_energy, ns_noise_subtract, ns_pcan, ns_filter_log and ns_arithmetic…. */
typedef struct {
  int32_t n, shift;
} ns_window_params;
void ns_window(const ns_window_params *p, const int16_t *x, const int16_t *w, int16_t *y);

typedef struct {
  int32_t n;
} ns_fft_scale_params;
void ns_fft_scale(const ns_fft_scale_params *p, const int16_t *x, int16_t *y, int32_t *shift);

/* n samples, zeros up to half * 2. Pairs of re, im: twiddles the first three quarters of a turn in `half` steps (less the last
 * two), ends those of the last step, y half + 1 pairs. */
typedef struct {
  int32_t n, half;
} ns_rfft_params;
void ns_rfft(const ns_rfft_params *p, const int16_t *x, const int16_t *twiddles, const int16_t *ends, int16_t *y);

/* n pairs; zero before the pair `start` and from `end` on. */
typedef struct {
  int32_t n, start, end;
} ns_energy_params;
void ns_energy(const ns_energy_params *p, const void *x, void *y);

/* y: uint64_t, one for each band after the first. */
typedef struct {
  int32_t bands;
} ns_filter_bank_params;
void ns_filter_bank(const ns_filter_bank_params *p, const uint32_t *x, const int16_t *w, const int16_t *u, const int16_t *start,
                    const int16_t *at, const int16_t *width, void *y);

/* x: uint64_t */
typedef struct {
  int32_t n;
} ns_filter_sqrt_params;
void ns_filter_sqrt(const ns_filter_sqrt_params *p, const void *x, const int32_t *shift, uint32_t *y);

/* take, keep: of the even and of the odd channels. noise2 may be noise. */
typedef struct {
  int32_t n, take0, keep0, take1, keep1, least, smoothing, subtraction, clamp;
} ns_noise_subtract_params;
void ns_noise_subtract(const ns_noise_subtract_params *p, const uint32_t *x, const uint32_t *noise, uint32_t *y, uint32_t *noise2);

typedef struct {
  int32_t n, shift;
} ns_pcan_params;
void ns_pcan(const ns_pcan_params *p, const uint32_t *x, const uint32_t *noise, const int16_t *gains, uint32_t *y);

/* x: uint32_t, y: int16_t */
typedef struct {
  int32_t n, correction, scale;
} ns_filter_log_params;
void ns_filter_log(const ns_filter_log_params *p, const void *x, const uint16_t *table, void *y);

/* from: bytes of an integer, negative when it has a sign. to: bytes of an integer, 0 a float. */
typedef struct {
  int32_t n, from, to;
} ns_cast_params;
void ns_cast(const ns_cast_params *p, const void *x, void *y);

/* function: the place of a name in graph/ops/signal.py's ARITHMETIC; int8 has minimum and maximum only. a and y have n0 x … x n3
 * elements; b advances by s0…s3 elements (0 repeats it). */
typedef struct {
  int32_t n0, n1, n2, n3, s0, s1, s2, s3, function;
} ns_arithmetic_i32_params;
typedef ns_arithmetic_i32_params ns_arithmetic_i8_params;
typedef ns_arithmetic_i32_params ns_arithmetic_f32_params;
void ns_arithmetic_i32(const ns_arithmetic_i32_params *p, const int32_t *a, const int32_t *b, int32_t *y);
void ns_arithmetic_i8(const ns_arithmetic_i8_params *p, const int8_t *a, const int8_t *b, int8_t *y);
void ns_arithmetic_f32(const ns_arithmetic_f32_params *p, const float *a, const float *b, float *y);

#ifdef __cplusplus
}
#endif

#endif
