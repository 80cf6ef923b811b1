/* Recurrent layers. graph/ops/recurrent.py and graph/ops/lstm.py say what each one computes. */
#ifndef NS_RECURRENT_H
#define NS_RECURRENT_H

#include "ns.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Floats over a whole sequence, from a state of zero. sequences: y gets every step, else the last. activation and recurrent are
 * numbers of unary_f32.c. Blocks of rows of w, u and bias are gates, in the order of the Python file. The bias of a GRU that
 * resets after its product (after) has a fourth block, which that product gets; what else is added to the gates is in the first
 * three. w8 and w4: codes with a scale per row. u may be NULL with one step. scratch: floats, 2 (rnn) or 4 times as many as
 * there are units. */
typedef struct {
  int32_t steps, i, units, activation, recurrent, sequences, after;
} ns_rnn_f32_params;
typedef ns_rnn_f32_params ns_rnn_f32w8_params;
typedef ns_rnn_f32_params ns_rnn_f32w4_params;
typedef ns_rnn_f32_params ns_lstm_f32_params;
typedef ns_rnn_f32_params ns_lstm_f32w8_params;
typedef ns_rnn_f32_params ns_lstm_f32w4_params;
typedef ns_rnn_f32_params ns_gru_f32_params;
typedef ns_rnn_f32_params ns_gru_f32w8_params;
typedef ns_rnn_f32_params ns_gru_f32w4_params;
void ns_rnn_f32(const ns_rnn_f32_params *p, const float *x, const float *w, const float *u, const float *bias, float *y,
                void *scratch);
void ns_rnn_f32w8(const ns_rnn_f32w8_params *p, const float *x, const int8_t *w, const float *w_scale, const int8_t *u,
                  const float *u_scale, const float *bias, float *y, void *scratch);
void ns_rnn_f32w4(const ns_rnn_f32w4_params *p, const float *x, const uint8_t *w, const float *w_scale, const uint8_t *u,
                  const float *u_scale, const float *bias, float *y, void *scratch);
void ns_lstm_f32(const ns_lstm_f32_params *p, const float *x, const float *w, const float *u, const float *bias, float *y,
                 void *scratch);
void ns_lstm_f32w8(const ns_lstm_f32w8_params *p, const float *x, const int8_t *w, const float *w_scale, const int8_t *u,
                   const float *u_scale, const float *bias, float *y, void *scratch);
void ns_lstm_f32w4(const ns_lstm_f32w4_params *p, const float *x, const uint8_t *w, const float *w_scale, const uint8_t *u,
                   const float *u_scale, const float *bias, float *y, void *scratch);
void ns_gru_f32(const ns_gru_f32_params *p, const float *x, const float *w, const float *u, const float *bias, float *y,
                void *scratch);
void ns_gru_f32w8(const ns_gru_f32w8_params *p, const float *x, const int8_t *w, const float *w_scale, const int8_t *u,
                  const float *u_scale, const float *bias, float *y, void *scratch);
void ns_gru_f32w4(const ns_gru_f32w4_params *p, const float *x, const uint8_t *w, const float *w_scale, const uint8_t *u,
                  const float *u_scale, const float *bias, float *y, void *scratch);

/* int8, the cell c in 16 bits of scale 2^-bits. m: multipliers of the 4 * units sums over x, then of those over h, with their
 * shifts; m_out and shift_out for h. curves: sigmoid, then tanh, 513 entries each. h2 may be h, c2 may be c. */
typedef struct {
  int32_t steps, i, units, zx, zh, shift_x, shift_h, m_out, shift_out, bits, limit;
} ns_lstm_int8_params;
void ns_lstm_int8(const ns_lstm_int8_params *p, const int8_t *x, const int8_t *w, const int8_t *u, const int32_t *bias,
                  const int32_t *m, const int16_t *curves, const int8_t *h, const int16_t *c, int8_t *y, int8_t *h2, int16_t *c2,
                  void *scratch);

#ifdef __cplusplus
}
#endif

#endif
