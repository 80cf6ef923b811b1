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

/* Values of an activation become its derivatives there. */
static void slopes(int32_t activation, int32_t n, float *y) {
  if (activation == NS_RELU) {
    for (int32_t k = 0; k < n; k++) y[k] = y[k] > 0.0f ? 1.0f : 0.0f;
    return;
  }
  for (int32_t k = 0; k < n; k++) switch (activation) {
      case NS_TANH: y[k] = 1.0f - y[k] * y[k]; break;
      case NS_SIGMOID: y[k] = y[k] * (1.0f - y[k]); break;
      case NS_ELU: y[k] = y[k] > 0.0f ? 1.0f : y[k] + 1.0f; break;
      default: y[k] = 1.0f;
    }
}

/* The two loops that take the time, for weights of either type. Several products share a number that was loaded; each sum
 * still runs in the order of its index.
 *
 * ROWS:     out[k] = sums[k] + sum over i of w[k][i] x[i], four rows k at once. The last block overlaps the one before.
 * PRODUCT:  to[r][i] = sum over k of t[r][k] b[k][i], three by three at once, where `add` behind what is in `to`; without
 *           it the last block overlaps the one before. Terms with live[k] = 0 are passed over. */
#define ROWS(NAME, TYPE)                                                                                             \
  static void NAME(const TYPE *w, int32_t stride, int32_t rows, int32_t n, const float *x, const float *sums, float *out) { \
    for (int32_t k = 0; rows >= 4 && k < rows; k += 4) {                                                             \
      if (k > rows - 4) k = rows - 4;                                                                                \
      float a = sums ? sums[k] : 0.0f, b = sums ? sums[k + 1] : 0.0f;                                                \
      float c = sums ? sums[k + 2] : 0.0f, d = sums ? sums[k + 3] : 0.0f;                                            \
      const TYPE *e = w + k * stride, *f = e + stride, *g = f + stride, *h = g + stride;                             \
      for (int32_t i = 0; i < n; i++) {                                                                              \
        const float v = x[i];                                                                                        \
        a += (float)e[i] * v, b += (float)f[i] * v, c += (float)g[i] * v, d += (float)h[i] * v;                      \
      }                                                                                                              \
      out[k] = a, out[k + 1] = b, out[k + 2] = c, out[k + 3] = d;                                                    \
    }                                                                                                                \
    for (int32_t k = 0; rows < 4 && k < rows; k++, w += stride) {                                                    \
      float a = sums ? sums[k] : 0.0f;                                                                               \
      for (int32_t i = 0; i < n; i++) a += (float)w[i] * x[i];                                                       \
      out[k] = a;                                                                                                    \
    }                                                                                                                \
  }

#define PRODUCT(NAME, TYPE)                                                                                          \
  static void NAME(const TYPE *b, int32_t stride, int32_t terms, const float *live, const float *t, int32_t t_row,   \
                   int32_t t_term, int32_t rows, int32_t columns, int add, float *to) {                              \
    for (int32_t r = 0; r < rows; r += 3) {                                                                          \
      if (!add && rows >= 3 && r > rows - 3) r = rows - 3;                                                           \
      for (int32_t i = 0; i < columns; i += 3) {                                                                     \
        if (!add && columns >= 3 && i > columns - 3) i = columns - 3;                                                \
        const float *p = t + r * t_row;                                                                              \
        const TYPE *w = b + i;                                                                                       \
        float *y = to + r * columns + i;                                                                             \
        if (rows - r >= 3 && columns - i >= 3) {                                                                     \
          float *z = y + columns, *u = z + columns;                                                                  \
          const float *q = p + t_row, *s = q + t_row;                                                                \
          float y0 = 0, y1 = 0, y2 = 0, z0 = 0, z1 = 0, z2 = 0, u0 = 0, u1 = 0, u2 = 0;                              \
          if (add) y0 = y[0], y1 = y[1], y2 = y[2], z0 = z[0], z1 = z[1], z2 = z[2], u0 = u[0], u1 = u[1], u2 = u[2]; \
          for (int32_t k = 0; k < terms; k++, w += stride, p += t_term, q += t_term, s += t_term) {                  \
            if (live && live[k] == 0.0f) continue;                                                                   \
            const float w0 = (float)w[0], w1 = (float)w[1], w2 = (float)w[2], a = *p, c = *q, d = *s;                \
            y0 += a * w0, y1 += a * w1, y2 += a * w2;                                                                \
            z0 += c * w0, z1 += c * w1, z2 += c * w2;                                                                \
            u0 += d * w0, u1 += d * w1, u2 += d * w2;                                                                \
          }                                                                                                          \
          y[0] = y0, y[1] = y1, y[2] = y2, z[0] = z0, z[1] = z1, z[2] = z2, u[0] = u0, u[1] = u1, u[2] = u2;         \
          continue;                                                                                                  \
        }                                                                                                            \
        for (int32_t f = 0; f < 3 && r + f < rows; f++)                                                              \
          for (int32_t g = 0; g < 3 && i + g < columns; g++) {                                                       \
            float sum = add ? y[f * columns + g] : 0.0f;                                                             \
            for (int32_t k = 0; k < terms; k++)                                                                      \
              if (!live || live[k] != 0.0f) sum += p[f * t_row + k * t_term] * (float)w[g + k * stride];             \
            y[f * columns + g] = sum;                                                                                \
          }                                                                                                          \
      }                                                                                                              \
    }                                                                                                                \
  }

ROWS(rows_f32, float)
ROWS(rows_s8, int8_t)
PRODUCT(product_f32, float)
PRODUCT(product_s8, int8_t)

void ns_product(const float *b, int32_t terms, const float *t, int32_t t_row, int32_t t_term, int32_t rows, int32_t columns,
                float *to) {
  product_f32(b, columns, terms, 0, t, t_row, t_term, rows, columns, 1, to);
}

static void add_products(const ns_layer *l, int32_t from, int32_t n, const float *x, const float *sums, float *out) {
  if (l->weight) {
    rows_f32(l->weight + from, l->ins, l->outs, n, x, sums, out);
  } else {
    rows_s8(l->codes + from, l->ins, l->outs, n, x, sums, out);
  }
}

static float weighted(const ns_layer *l, int32_t k, float t) { return l->weight ? t : t * l->scale[k]; }

static void to_units(const ns_layer *l, int32_t from, int32_t n, float *x) {
  for (int32_t i = 0; l->unit && i < n; i++) x[i] *= l->unit[from + i];
}

void ns_dense_add(const ns_dense *net, int32_t from, int32_t n, float *x, const float *sums, float *out) {
  to_units(net->layers, from, n, x);
  add_products(net->layers, from, n, x, sums, out);
}

const float *ns_dense_forward(const ns_dense *net, int32_t from, int32_t n, float *inputs, const float *sums, float *values) {
  const float *x = inputs;
  to_units(net->layers, from, n, inputs);
  for (int32_t layer = 0; layer < net->count; layer++) {
    const ns_layer *l = net->layers + layer;
    add_products(l, from, n, x, sums, values);
    for (int32_t k = 0; k < l->outs; k++) {
      const float sum = weighted(l, k, values[k]) + l->bias[k];
      values[k] = l->activation == NS_RELU ? (sum > 0.0f ? sum : 0.0f) : ns_activate(l->activation, sum);
    }
    x = values, sums = 0, from = 0, n = l->outs;
    values += l->outs;
  }
  return x;
}

float *ns_dense_jacobian(const ns_dense *net, int32_t columns, float *values, float *jacobian, float *spare) {
  const int32_t last = net->count - 1, rows = net->layers[last].outs;
  for (int32_t n = 0; n < last; n++) values += net->layers[n].outs;
  for (int32_t n = last; n >= 0; n--) {
    const ns_layer *l = net->layers + n;
    const int32_t width = n ? l->ins : columns;
    slopes(l->activation, l->outs, values);
    if (n == last) { /* output r depends on sum r alone */
      for (int32_t r = 0; r < rows; r++) {
        const float t = weighted(l, r, values[r]);
        const int32_t at = r * l->ins;
        for (int32_t i = 0; i < width; i++) spare[r * width + i] = t * (l->weight ? l->weight[at + i] : (float)l->codes[at + i]);
      }
    } else {
      float *t = jacobian;
      for (int32_t r = 0; r < rows; r++)
        for (int32_t k = 0; k < l->outs; k++, t++) *t = weighted(l, k, values[k] * *t);
      /* units at rest pass nothing on: about half of all rectified ones */
      if (l->weight) {
        product_f32(l->weight, l->ins, l->outs, values, jacobian, l->outs, 1, rows, width, 0, spare);
      } else {
        product_s8(l->codes, l->ins, l->outs, values, jacobian, l->outs, 1, rows, width, 0, spare);
      }
    }
    float *swap = jacobian;
    jacobian = spare;
    spare = swap;
    if (n) values -= net->layers[n - 1].outs;
  }
  for (int32_t r = 0; r < rows; r++) to_units(net->layers, 0, columns, jacobian + r * columns);
  return jacobian;
}
