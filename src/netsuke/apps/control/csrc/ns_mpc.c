#include "ns_mpc.h"

#include <string.h>

/* Where everything lies in the caller's workspace. Controls and outputs are kept in the order of time, past then future. */
typedef struct {
  float *controls, *outputs, *sums, *pushed, *values, *jacobian, *spare, *inputs, *slopes, *weighted, *gradient, *hessian, *step;
  float *plan, *trial, *best, *kept, *next, *foreseen, *bias;
  int32_t units, floats; /* units: of all layers */
} Layout;

static Layout layout(const ns_mpc_config *c, float *work) {
  Layout w;
  const int32_t m = c->controls, p = c->outputs, n = m * c->moves;
  int32_t at = 0, widest = c->control_past * m + c->output_past * p;
  const int32_t inputs = widest;
  w.units = 0;
  for (int32_t i = 0; i < c->net->count; i++) {
    w.units += c->net->layers[i].outs;
    if (c->net->layers[i].outs > widest) widest = c->net->layers[i].outs;
  }
#define TAKE(name, size) w.name = work ? work + at : 0, at += (size)
  TAKE(controls, (c->control_past - 1 + c->last) * m);
  TAKE(outputs, (c->output_past + c->last) * p);
  TAKE(kept, n);
  TAKE(sums, c->net->layers[0].outs);
  TAKE(pushed, c->net->layers[0].outs);
  TAKE(values, c->last * w.units);
  TAKE(jacobian, p * widest);
  TAKE(spare, p * widest);
  TAKE(inputs, inputs > c->sensors ? inputs : c->sensors);
  TAKE(slopes, c->last * p * n);
  TAKE(weighted, c->last * p * n);
  TAKE(gradient, n);
  TAKE(hessian, n * n);
  TAKE(step, n);
  TAKE(plan, n);
  TAKE(trial, n);
  TAKE(best, n);
  TAKE(next, p);
  TAKE(foreseen, p);
  TAKE(bias, p);
#undef TAKE
  w.floats = at;
  return w;
}

int32_t ns_mpc_floats(const ns_mpc_config *config) { return layout(config, 0).floats; }

static float clip(const ns_mpc_config *c, float u) { return u < c->low ? c->low : u > c->high ? c->high : u; }

/* Marsaglia's xorshift of 32 bits; the upper 24 as a number in [low, high) */
static float draw(ns_mpc *mpc) {
  uint32_t x = mpc->random;
  x ^= x << 13;
  x ^= x >> 17;
  x ^= x << 5;
  mpc->random = x;
  const ns_mpc_config *c = mpc->config;
  return c->low + (c->high - c->low) * ((float)(x >> 8) * 5.9604644775390625e-8f);
}

void ns_mpc_init(ns_mpc *mpc, const ns_mpc_config *config, float *work, const float *y) {
  mpc->config = config;
  mpc->work = work;
  mpc->random = config->seed;
  mpc->halved = 0;
  const Layout w = layout(config, work);
  const int32_t m = config->controls, p = config->outputs;
  for (int32_t i = 0; i < (config->control_past - 1 + config->last) * m; i++) w.controls[i] = clip(config, 0.0f);
  for (int32_t i = 0; i < m * config->moves; i++) w.kept[i] = clip(config, 0.0f);
  for (int32_t i = 0; i < (config->output_past + config->last) * p; i++) w.outputs[i] = y[i % p];
  for (int32_t k = 0; k < p; k++) w.foreseen[k] = y[k], w.bias[k] = 0.0f;
}

/* Control i of the j-th tick ahead, j from 1 */
static float planned(const ns_mpc_config *c, const float *plan, int32_t j, int32_t i) {
  return plan[((j < c->moves ? j : c->moves) - 1) * c->controls + i];
}

/* Tick j's rows of `slopes` from the network's own Jacobian `a` and the slopes of earlier ticks. */
static void chain(const ns_mpc_config *c, const Layout *w, int32_t j, const float *a) {
  const int32_t m = c->controls, p = c->outputs, n = m * c->moves, width = c->control_past * m + c->output_past * p;
  float *to = w->slopes + (j - 1) * p * n;
  memset(to, 0, (size_t)(p * n) * sizeof *to);
  for (int32_t d = 0; d < c->control_past && d < j; d++) {
    float *block = to + ((j - d < c->moves ? j - d : c->moves) - 1) * m;
    for (int32_t r = 0; r < p; r++)
      for (int32_t i = 0; i < m; i++) block[r * n + i] += a[r * width + d * m + i];
  }
  for (int32_t d = 0; d < c->output_past && d < j - 1; d++)
    ns_product(w->slopes + (j - 2 - d) * p * n, p, a + c->control_past * m + d * p, width, 1, p, n, to);
}

/* Predicts the horizon for a plan into `outputs`, and all units into `values`. */
static void roll(const ns_mpc_config *c, const Layout *w, const float *plan) {
  const int32_t m = c->controls, p = c->outputs, past = c->control_past - 1;
  for (int32_t j = 1; j <= c->last; j++) {
    float *x = w->inputs;
    for (int32_t i = 0; i < m; i++) w->controls[(past + j - 1) * m + i] = planned(c, plan, j, i);
    if (j <= c->moves + past) { /* later the controls in the history are all the last one, and push the same */
      for (int32_t d = 0; d <= past; d++) memcpy(x + d * m, w->controls + (past + j - 1 - d) * m, (size_t)m * sizeof *x);
      ns_dense_add(c->net, 0, (past + 1) * m, x, w->sums, w->pushed);
    }
    for (int32_t d = 0; d < c->output_past; d++)
      memcpy(x + d * p, w->outputs + (c->output_past + j - 2 - d) * p, (size_t)p * sizeof *x);
    const float *y =
        ns_dense_forward(c->net, (past + 1) * m, c->output_past * p, x, w->pushed, w->values + (j - 1) * w->units);
    for (int32_t k = 0; k < p; k++) w->outputs[(c->output_past + j - 1) * p + k] = y[k] + w->bias[k];
  }
}

/* Slopes by the chain rule at the plan that was rolled out last. */
static void exact(const ns_mpc_config *c, const Layout *w) {
  const int32_t columns = c->control_past * c->controls + c->output_past * c->outputs;
  for (int32_t j = 1; j <= c->last; j++)
    chain(c, w, j, ns_dense_jacobian(c->net, columns, w->values + (j - 1) * w->units, w->jacobian, w->spare));
}

/* Cost of the plan whose prediction is in `outputs`. */
static float cost(const ns_mpc_config *c, const Layout *w, const float *plan, const float *reference) {
  const int32_t m = c->controls, p = c->outputs;
  float sum = 0.0f;
  for (int32_t j = c->first; j <= c->last; j++)
    for (int32_t k = 0; k < p; k++) {
      const float e = reference[(j - 1) * p + k] - w->outputs[(c->output_past + j - 1) * p + k];
      sum += c->q[k] * e * e;
    }
  for (int32_t j = 0; j < c->moves; j++)
    for (int32_t i = 0; i < m; i++) {
      const float change = plan[j * m + i] - (j ? plan[(j - 1) * m + i] : w->kept[i]);
      sum += c->lambda[i] * change * change;
    }
  if (c->sharpness > 0.0f)
    for (int32_t i = 0; i < m * c->moves; i++) {
      const float below = plan[i] + 0.5f * c->range - c->centre, above = 0.5f * c->range + c->centre - plan[i];
      sum += c->sharpness / below + c->sharpness / above - 4.0f / c->range;
    }
  return sum;
}

/* Half the gradient and half the Gauss-Newton Hessian at `plan`; `slopes` and `outputs` are up to date. */
static void derivatives(const ns_mpc_config *c, const Layout *w, const float *plan, const float *reference) {
  const int32_t m = c->controls, p = c->outputs, n = m * c->moves;
  memset(w->gradient, 0, (size_t)n * sizeof(float));
  memset(w->hessian, 0, (size_t)(n * n) * sizeof(float));
  const int32_t rows = (c->last - c->first + 1) * p;
  const float *s = w->slopes + (c->first - 1) * p * n, *y = w->outputs + (c->output_past + c->first - 1) * p;
  const float *wanted = reference + (c->first - 1) * p;
  for (int32_t i = 0; i < rows; i++) {
    const float pull = c->q[i % p] * (wanted[i] - y[i]);
    for (int32_t a = 0; a < n; a++) {
      w->gradient[a] -= pull * s[i * n + a];
      w->weighted[i * n + a] = c->q[i % p] * s[i * n + a];
    }
  }
  ns_product(s, rows, w->weighted, 1, n, n, n, w->hessian);
  for (int32_t j = 0; j < c->moves; j++)
    for (int32_t i = 0; i < m; i++) {
      const int32_t a = j * m + i;
      const float pull = c->lambda[i] * (plan[a] - (j ? plan[a - m] : w->kept[i]));
      w->gradient[a] += pull;
      w->hessian[a * n + a] += c->lambda[i];
      if (j) {
        w->gradient[a - m] -= pull;
        w->hessian[(a - m) * n + a - m] += c->lambda[i];
        w->hessian[a * n + a - m] -= c->lambda[i];
      }
    }
  if (c->sharpness > 0.0f)
    for (int32_t a = 0; a < n; a++) {
      const float below = 1.0f / (plan[a] + 0.5f * c->range - c->centre);
      const float above = 1.0f / (0.5f * c->range + c->centre - plan[a]);
      w->gradient[a] += 0.5f * c->sharpness * (above * above - below * below);
      w->hessian[a * n + a] += c->sharpness * (below * below * below + above * above * above);
    }
}

/* step = H^-1 g by LDL' in place. Controls held by a limit do not move. Pivots below 1e-6 of the largest diagonal entry
 * are raised to it: directions without effect. */
static void solve(const ns_mpc_config *c, const Layout *w, const float *plan) {
  const int32_t n = c->controls * c->moves;
  float *h = w->hessian, *x = w->step, least = 0.0f;
  for (int32_t a = 0; a < n; a++) {
    x[a] = w->gradient[a];
    if ((plan[a] <= c->low && x[a] > 0.0f) || (plan[a] >= c->high && x[a] < 0.0f)) {
      for (int32_t b = 0; b < a; b++) h[a * n + b] = 0.0f;
      for (int32_t b = a + 1; b < n; b++) h[b * n + a] = 0.0f;
      x[a] = 0.0f;
    }
    if (h[a * n + a] > least) least = h[a * n + a];
  }
  least *= 1e-6f;
  if (!(least > 0.0f)) least = 1.0f;
  for (int32_t a = 0; a < n; a++) {
    for (int32_t b = 0; b <= a; b++) {
      float sum = h[a * n + b];
      for (int32_t k = 0; k < b; k++) sum -= h[a * n + k] * h[b * n + k] * h[k * n + k];
      h[a * n + b] = b < a ? sum / h[b * n + b] : sum > least ? sum : least;
    }
    for (int32_t k = 0; k < a; k++) x[a] -= h[a * n + k] * x[k];
  }
  for (int32_t a = 0; a < n; a++) x[a] /= h[a * n + a];
  for (int32_t a = n - 1; a >= 0; a--)
    for (int32_t k = a + 1; k < n; k++) x[a] -= h[k * n + a] * x[k];
}

/* Slopes by central differences of the whole roll-out: twice as many roll-outs as planned controls. */
static void differences(const ns_mpc_config *c, const Layout *w) {
  const int32_t p = c->outputs, n = c->controls * c->moves;
  for (int32_t a = 0; a < n; a++) {
    memcpy(w->trial, w->plan, (size_t)n * sizeof(float));
    for (int side = 0; side < 2; side++) {
      w->trial[a] = side ? w->plan[a] - c->epsilon : w->plan[a] + c->epsilon;
      roll(c, w, w->trial);
      for (int32_t i = 0; i < c->last * p; i++) {
        const float y = w->outputs[c->output_past * p + i];
        w->slopes[i * n + a] = side ? (w->slopes[i * n + a] - y) / (2.0f * c->epsilon) : y;
      }
    }
  }
}

/* Keeps what the plan that was rolled out last foresees for the next tick. */
static void keep(const ns_mpc_config *c, const Layout *w) {
  memcpy(w->next, w->outputs + c->output_past * c->outputs, (size_t)c->outputs * sizeof(float));
}

/* Improves `plan` and returns its cost. */
static float descend(ns_mpc *mpc, const Layout *w, const float *reference, int *halved) {
  const ns_mpc_config *c = mpc->config;
  const int32_t n = c->controls * c->moves;
  roll(c, w, w->plan);
  keep(c, w);
  float now = cost(c, w, w->plan, reference);
  for (int32_t it = 0; it < c->iterations; it++) {
    if (c->differences) {
      differences(c, w);
      roll(c, w, w->plan);
    } else {
      exact(c, w);
    }
    derivatives(c, w, w->plan, reference);
    solve(c, w, w->plan);
    float length = 1.0f, then = now;
    for (int32_t level = 0; level < c->levels; level++, length *= c->factor) {
      for (int32_t a = 0; a < n; a++) w->trial[a] = clip(c, w->plan[a] - length * w->step[a]);
      roll(c, w, w->trial);
      then = cost(c, w, w->trial, reference);
      if (then < now) break;
      *halved = 1;
    }
    if (!(then < now)) break;
    memcpy(w->plan, w->trial, (size_t)n * sizeof(float));
    keep(c, w);
    now = then;
  }
  return now;
}

float ns_mpc_step(ns_mpc *mpc, const float *y, const float *sensors, const float *reference, float *u) {
  const ns_mpc_config *c = mpc->config;
  const Layout w = layout(c, mpc->work);
  const int32_t m = c->controls, p = c->outputs, n = m * c->moves;
  float best = 0.0f;
  int halved = 0;
  memmove(w.outputs, w.outputs + p, (size_t)((c->output_past - 1) * p) * sizeof(float));
  for (int32_t k = 0; k < p; k++) /* a measurement that is not finite was lost: the one before, still there, stands in */
    if (y[k] - y[k] == 0.0f) {
      w.outputs[(c->output_past - 1) * p + k] = y[k];
      w.bias[k] += c->correction * (y[k] - w.foreseen[k]);
    }
  const int32_t moving = c->control_past * m + c->output_past * p, count = sensors ? c->sensors : 0;
  if (count) memcpy(w.inputs, sensors, (size_t)count * sizeof(float));
  ns_dense_add(c->net, moving, count, w.inputs, 0, w.sums);
  for (int32_t start = 0; start < c->starts; start++) {
    if (start == 0) { /* the plan of the last tick, one tick on */
      for (int32_t a = 0; a < n; a++) w.plan[a] = w.kept[a + m < n ? a + m : a];
    } else {
      for (int32_t i = 0; i < m; i++) w.plan[i] = draw(mpc);
      for (int32_t a = m; a < n; a++) w.plan[a] = w.plan[a - m];
    }
    const float found = descend(mpc, &w, reference, &halved);
    if (start == 0 || found < best) {
      best = found;
      memcpy(w.best, w.plan, (size_t)n * sizeof(float));
      memcpy(w.foreseen, w.next, (size_t)p * sizeof(float));
    }
    if (best <= c->enough) break;
  }
  memcpy(w.kept, w.best, (size_t)n * sizeof(float));
  memcpy(u, w.best, (size_t)m * sizeof(float));
  /* Only the past is kept in `controls`: the roll-out writes what is ahead. */
  if (c->control_past > 1) {
    memmove(w.controls, w.controls + m, (size_t)((c->control_past - 2) * m) * sizeof(float));
    memcpy(w.controls + (c->control_past - 2) * m, u, (size_t)m * sizeof(float));
  }
  mpc->halved += (uint32_t)halved;
  return best;
}
