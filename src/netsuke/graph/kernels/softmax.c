/* Softmax over the last axis: int8 from a table of exponentials, and float. Outputs may be written over the input. */
#include <math.h>

#include "ns_int.h"

void ns_softmax(const ns_softmax_params *p, const int8_t *x, const uint32_t *exps, int8_t *y) {
  for (int32_t row = 0; row < p->rows; row++, x += p->n, y += p->n) {
    int32_t top = x[0];
    uint64_t total = 0;
    for (int32_t i = 1; i < p->n; i++) top = ns_max(top, x[i]);
    for (int32_t i = 0; i < p->n; i++) total += exps[top - x[i]];
    for (int32_t i = 0; i < p->n; i++) {
      const uint64_t above = ((uint64_t)exps[top - x[i]] << 8) + total / 2;
      /* One instruction where 32 bits hold both; a call where they do not. */
      const uint32_t q = total >> 31 ? (uint32_t)(above / total) : (uint32_t)above / (uint32_t)total;
      y[i] = (int8_t)ns_min((int32_t)q - 128, 127);
    }
  }
}

void ns_softmax_f32(const ns_softmax_f32_params *p, const float *x, float *y) {
  for (int32_t row = 0; row < p->rows; row++, x += p->n, y += p->n) {
    float top = x[0], total = 0.0f;
    for (int32_t i = 1; i < p->n; i++) top = x[i] > top ? x[i] : top;
    for (int32_t i = 0; i < p->n; i++) {
      y[i] = expf(p->beta * (x[i] - top));
      total += y[i];
    }
    for (int32_t i = 0; i < p->n; i++) y[i] /= total;
  }
}
