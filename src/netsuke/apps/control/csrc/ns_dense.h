/* Small dense networks in float32 with their Jacobian: the model inside the predictive controller.
 *
 * Every sum runs in the order of its index and every product is rounded before it is added (-ffp-contract=off), and the
 * exponential is computed here and not by the C library: so a PC, a Cortex-M and the NumPy reference (network.py) get the
 * same bits, and a controller that compares costs takes the same branches on all of them. */
#ifndef NS_DENSE_H
#define NS_DENSE_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { NS_LINEAR, NS_RELU, NS_TANH, NS_SIGMOID, NS_ELU };

/* One layer, outs = f(weight * ins + bias). `weight` is (outs, ins) in rows; when it is NULL the weights are
 * codes * scale, 8 bits each with one scale an output, and the first layer's inputs are multiplied by `unit` before. */
typedef struct {
  int32_t ins, outs, activation;
  const float *weight, *bias;
  const int8_t *codes;
  const float *scale, *unit;
} ns_layer;

typedef struct {
  int32_t count;
  const ns_layer *layers;
} ns_dense;

float ns_exp(float x);
float ns_tanh(float x);
float ns_activate(int32_t activation, float x);

/* out[outs of the first layer] = sums + what the inputs [from, from + n), x, add to the first layer; sums may be NULL. So
 * the part of inputs that stay is added up once. x is left in the layer's units, out is not sums. */
void ns_dense_add(const ns_dense *net, int32_t from, int32_t n, float *x, const float *sums, float *out);

/* All outputs into `values`, layer after layer, from `sums` and the inputs [from, from + n), which are left in the first
 * layer's units. Returns the last layer's. */
const float *ns_dense_forward(const ns_dense *net, int32_t from, int32_t n, float *x, const float *sums, float *values);

/* d outputs / d the first `columns` inputs, (outs, columns), at the pass that left `values`, which are used up. `jacobian`
 * and `spare` each hold outs rows of the widest layer or of `columns`, whichever is more; returns the one with the result. */
float *ns_dense_jacobian(const ns_dense *net, int32_t columns, float *values, float *jacobian, float *spare);

/* to (rows, columns) += the product of t, whose element [r][k] is at r * t_row + k * t_term, and b (terms, columns). */
void ns_product(const float *b, int32_t terms, const float *t, int32_t t_row, int32_t t_term, int32_t rows, int32_t columns,
                float *to);

#ifdef __cplusplus
}
#endif
#endif
