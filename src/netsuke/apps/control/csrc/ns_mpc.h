/* Newton-Raphson model-predictive control over a small learned model (Soloway & Haley 1996), without malloc.
 *
 * At every tick: roll the network out over the horizon, take gradient and Hessian of the cost with respect to the planned
 * controls, step by the damped Newton method from several starts, apply the first control of the best plan. The reference
 * is newton.py in the package that generated this; the bits are the same. */
#ifndef NS_MPC_H
#define NS_MPC_H

#include "ns_dense.h"

#ifdef __cplusplus
extern "C" {
#endif

/* The network's inputs in this order: controls of `control_past` ticks, newest first (the one to be chosen leads), outputs
 * of `output_past` ticks, newest first, sensors. */
typedef struct {
  const ns_dense *net;
  int32_t controls, outputs, control_past, output_past, sensors;
  int32_t first, last, moves;              /* horizons N1, N2, Nu; controls are held after `moves` ticks */
  int32_t starts, iterations, levels;      /* starts, Newton steps each, step lengths 1, factor, factor^2, ... tried */
  int32_t differences;                     /* central differences of width `epsilon` instead of exact derivatives */
  float factor, epsilon, enough;           /* a plan whose cost is at most `enough` needs no further start */
  float correction;                        /* share of a prediction's error that is added to the next ones; 0 is none */
  float low, high;                         /* saturation of every control */
  float sharpness, range, centre;          /* barrier s, r, b; s = 0 is no barrier */
  const float *q, *lambda;                 /* weights of errors (outputs) and of changes (controls) */
  uint32_t seed;
} ns_mpc_config;

typedef struct {
  const ns_mpc_config *config;
  float *work;
  uint32_t random;
  uint32_t halved; /* ticks in which some full Newton step was refused */
} ns_mpc;

/* Floats of workspace that a configuration needs. */
int32_t ns_mpc_floats(const ns_mpc_config *config);

/* Rest: all controls zero (or the nearest allowed), all outputs `y`. work: ns_mpc_floats(config) floats, kept. */
void ns_mpc_init(ns_mpc *mpc, const ns_mpc_config *config, float *work, const float *y);

/* One tick. y: outputs just measured. sensors: or NULL for zeros. reference: (last, outputs), wanted at the next ticks.
 * u: receives the control to apply. Returns the plan's cost. */
float ns_mpc_step(ns_mpc *mpc, const float *y, const float *sensors, const float *reference, float *u);

#ifdef __cplusplus
}
#endif
#endif
