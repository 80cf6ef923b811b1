#include "ns_dense.h"

#include <string.h>

/* exp(x) = 2^k exp(r), |r| <= ln(2) / 2: ln(2) in two parts, a Taylor polynomial of degree 7 (its remainder is 5e-9). */
float ns_exp(float x) {
  if (!(x < 88.0f)) x = 88.0f; /* NaN too: its conversion to an integer is undefined */
  if (x < -87.0f) x = -87.0f;
  const float scaled = x * 1.44269504f;
  const int32_t k = (int32_t)(scaled + (scaled < 0.0f ? -0.5f : 0.5f));
  const float r = (x - (float)k * 0.693145752f) - (float)k * 1.42860677e-6f;
  float p = 1.98412698e-4f;
  p = p * r + 1.38888889e-3f;
  p = p * r + 8.33333333e-3f;
  p = p * r + 4.16666667e-2f;
  p = p * r + 1.66666667e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const uint32_t bits = (uint32_t)(k + 127) << 23;
  float power;
  memcpy(&power, &bits, sizeof power);
  return p * power;
}

/* Below 1 the continued fraction after five steps (relative error 1e-7), above it the exponential. */
float ns_tanh(float x) {
  const float size = x < 0.0f ? -x : x;
  if (size < 1.0f) {
    const float z = x * x;
    return x * (945.0f + z * (105.0f + z)) / (945.0f + z * (420.0f + z * 15.0f));
  }
  const float y = size > 9.0f ? 1.0f : 1.0f - 2.0f / (ns_exp(2.0f * size) + 1.0f);
  return x < 0.0f ? -y : y;
}

float ns_activate(int32_t activation, float x) {
  switch (activation) {
    case NS_RELU: return x > 0.0f ? x : 0.0f;
    case NS_TANH: return ns_tanh(x);
    case NS_SIGMOID: return 1.0f / (1.0f + ns_exp(-x));
    case NS_ELU: return x > 0.0f ? x : ns_exp(x) - 1.0f;
    default: return x;
  }
}

/* The derivative of an activation, from its value. */
static float slope(int32_t activation, float y) {
  switch (activation) {
    case NS_RELU: return y > 0.0f ? 1.0f : 0.0f;
    case NS_TANH: return 1.0f - y * y;
    case NS_SIGMOID: return y * (1.0f - y);
    case NS_ELU: return y > 0.0f ? 1.0f : y + 1.0f;
    default: return 1.0f;
  }
}

/* sum + the products of columns [from, from + n) of row k with x */
static float row(const ns_layer *l, int32_t k, int32_t from, int32_t n, const float *x, float sum) {
  if (l->weight) {
    const float *w = l->weight + k * l->ins + from;
    for (int32_t i = 0; i < n; i++) sum += w[i] * x[i];
  } else {
    const int8_t *w = l->codes + k * l->ins + from;
    for (int32_t i = 0; i < n; i++) sum += (float)w[i] * x[i];
  }
  return sum;
}

void ns_dense_frozen(const ns_dense *net, const float *frozen, float *sums) {
  const ns_layer *l = net->layers;
  for (int32_t k = 0; k < l->outs; k++) sums[k] = frozen ? row(l, k, net->moving, net->frozen, frozen, 0.0f) : 0.0f;
}

const float *ns_dense_forward(const ns_dense *net, const float *sums, const float *moving, float *values) {
  const float *x = moving;
  for (int32_t n = 0; n < net->count; n++) {
    const ns_layer *l = net->layers + n;
    for (int32_t k = 0; k < l->outs; k++) {
      float sum = row(l, k, 0, n ? l->ins : net->moving, x, n ? 0.0f : sums[k]);
      if (!l->weight) sum *= l->scale[k];
      values[k] = ns_activate(l->activation, sum + l->bias[k]);
    }
    x = values;
    values += l->outs;
  }
  return x;
}

float *ns_dense_jacobian(const ns_dense *net, const float *values, float *jacobian, float *spare) {
  int32_t last = net->count - 1;
  for (int32_t n = 0; n < last; n++) values += net->layers[n].outs;
  const int32_t rows = net->layers[last].outs;
  for (int32_t n = last; n >= 0; n--) {
    const ns_layer *l = net->layers + n;
    const int32_t columns = n ? l->ins : net->moving;
    for (int32_t r = 0; r < rows; r++) {
      float *to = spare + r * columns;
      for (int32_t i = 0; i < columns; i++) to[i] = 0.0f;
      for (int32_t k = n == last ? r : 0; k < (n == last ? r + 1 : l->outs); k++) {
        float t = slope(l->activation, values[k]);
        if (n < last) t *= jacobian[r * l->outs + k];
        if (t == 0.0f) continue; /* units at rest pass nothing on: about half of all rectified ones */
        if (l->weight) {
          const float *w = l->weight + k * l->ins;
          for (int32_t i = 0; i < columns; i++) to[i] += t * w[i];
        } else {
          const int8_t *w = l->codes + k * l->ins;
          t *= l->scale[k];
          for (int32_t i = 0; i < columns; i++) to[i] += t * (float)w[i];
        }
      }
    }
    float *swap = jacobian;
    jacobian = spare;
    spare = swap;
    if (n) values -= net->layers[n - 1].outs;
  }
  return jacobian;
}
