/* Float activations by number, in the order of graph/lower_ops.py's UNARY. y may be x. */
#include <math.h>

#include "ns_int.h"

enum {
  LINEAR, RELU, RELU6, SIGMOID, HARD_SIGMOID, TANH, SOFTPLUS, SOFTSIGN, ELU, SELU, EXPONENTIAL, SWISH, HARD_SWISH,
  HARD_SIGMOID6, GELU, LEAKY_RELU
};

NS_INLINE float between(float v, float low, float high) { return v < low ? low : v > high ? high : v; }
NS_INLINE float sigmoid(float v) { return 0.5f * (1.0f + tanhf(0.5f * v)); }

static float unary(int32_t function, float v) {
  switch (function) {
    case RELU: return v > 0.0f ? v : 0.0f;
    case RELU6: return between(v, 0.0f, 6.0f);
    case SIGMOID: return sigmoid(v);
    case HARD_SIGMOID: return between(0.2f * v + 0.5f, 0.0f, 1.0f);
    case TANH: return tanhf(v);
    case SOFTPLUS: return (v > 0.0f ? v : 0.0f) + log1pf(expf(-fabsf(v)));
    case SOFTSIGN: return v / (1.0f + fabsf(v));
    case ELU: return v > 0.0f ? v : expm1f(v);
    case SELU: return 1.05070099f * (v > 0.0f ? v : 1.67326324f * expm1f(v));
    case EXPONENTIAL: return expf(v);
    case SWISH: return v * sigmoid(v);
    case HARD_SWISH: return v * between(v + 3.0f, 0.0f, 6.0f) / 6.0f;
    case HARD_SIGMOID6: return between(v + 3.0f, 0.0f, 6.0f) / 6.0f;
    case GELU: return v * 0.5f * (1.0f + tanhf(0.797884561f * (v + 0.044715f * v * v * v)));
    case LEAKY_RELU: return v > 0.0f ? v : 0.01f * v;
    default: return v;
  }
}

void ns_unary_f32(const ns_unary_f32_params *p, const float *x, float *y) {
  for (int32_t i = 0; i < p->n; i++) y[i] = unary(p->function, x[i]);
}
