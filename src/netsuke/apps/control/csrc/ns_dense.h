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
 * codes * scale, 8 bits each with one scale an output. */
typedef struct {
  int32_t ins, outs, activation;
  const float *weight, *bias;
  const int8_t *codes;
  const float *scale;
} ns_layer;

/* A network whose input is in two parts: `moving` values that change within a tick, then `frozen` ones that do not. */
typedef struct {
  int32_t count, moving, frozen;
  const ns_layer *layers;
} ns_dense;

float ns_exp(float x);
float ns_tanh(float x);
float ns_activate(int32_t activation, float x);

/* sums[outs of the first layer]: what the frozen inputs add to the first layer; NULL stands for zeros. */
void ns_dense_frozen(const ns_dense *net, const float *frozen, float *sums);

/* All activations into `values`, layer after layer; returns where the last layer's begin. */
const float *ns_dense_forward(const ns_dense *net, const float *sums, const float *moving, float *values);

/* jacobian (outs, moving) of the forward pass that left `values`; `spare` and `jacobian` each hold outs rows of the
 * widest layer's outputs or of `moving`, whichever is more. Returns whichever of the two holds the result. */
float *ns_dense_jacobian(const ns_dense *net, const float *values, float *jacobian, float *spare);

#ifdef __cplusplus
}
#endif
#endif
