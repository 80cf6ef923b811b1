/* Recurrent layers on floats: gates are dense layers (ns_dense_f32…), one block of rows at a time, so that few numbers wait. */
#include <float.h>

#include "ns_int.h"
#include "ns_recurrent.h"

enum { F32, W8, W4 };

/* A matrix of blocks of `units` rows. */
typedef struct {
  const void *data;
  const float *scale;
  int32_t i, units;
} blocks;

/* y = block g of m times x, plus bias. */
NS_INLINE void product(const blocks *m, int32_t g, const float *x, const float *bias, float *y, const int32_t type) {
  const ns_dense_f32_params p = {1, m->i, m->units, -FLT_MAX, FLT_MAX};
  const ptrdiff_t row = (ptrdiff_t)g * m->units;
  if (type == F32) ns_dense_f32(&p, x, (const float *)m->data + row * m->i, bias, y);
  else if (type == W8) ns_dense_f32w8(&p, x, (const int8_t *)m->data + row * m->i, m->scale + row, bias, y);
  else ns_dense_f32w4(&p, x, (const uint8_t *)m->data + row * ((m->i + 1) / 2), m->scale + row, bias, y);
}

typedef struct {
  blocks w, u;
  const float *bias;
  float *scratch; /* `units` floats for products */
} layer;

static void apply(int32_t function, int32_t n, float *y) {
  const ns_unary_f32_params p = {n, function};
  ns_unary_f32(&p, y, y);
}

/* y = function(W x + U h + bias) of gate g. h is NULL at the first step, when it is zero. */
NS_INLINE void gate(const layer *l, int32_t g, const float *x, const float *h, int32_t function, float *y, const int32_t type) {
  const int32_t n = l->w.units;
  product(&l->w, g, x, l->bias ? l->bias + g * n : NULL, y, type);
  if (h) {
    product(&l->u, g, h, NULL, l->scratch, type);
    for (int32_t j = 0; j < n; j++) y[j] += l->scratch[j];
  }
  apply(function, n, y);
}

NS_INLINE layer layer_of(const ns_rnn_f32_params *p, const void *w, const float *w_scale, const void *u, const float *u_scale,
                         const float *bias, void *scratch) {
  const layer l = {{w, w_scale, p->i, p->units}, {u, u_scale, p->units, p->units}, bias, (float *)scratch};
  return l;
}

NS_INLINE void rnn(const ns_rnn_f32_params *p, const layer *l, const float *x, float *y, const int32_t type) {
  const int32_t n = p->units;
  float *h = l->scratch + n;
  for (int32_t t = 0; t < p->steps; t++, x += p->i) {
    gate(l, 0, x, t ? h : NULL, p->activation, y, type);
    memcpy(h, y, (size_t)n * sizeof *y);
    if (p->sequences) y += n;
  }
}

enum { INPUT, FORGET, CELL, OUTPUT };

NS_INLINE void lstm(const ns_rnn_f32_params *p, const layer *l, const float *x, float *y, const int32_t type) {
  const int32_t n = p->units;
  float *h = l->scratch + n, *c = h + n, *g = c + n;
  for (int32_t t = 0; t < p->steps; t++, x += p->i) {
    const float *before = t ? h : NULL;
    if (t) {
      gate(l, FORGET, x, before, p->recurrent, y, type);
      for (int32_t j = 0; j < n; j++) c[j] *= y[j];
    } else {
      for (int32_t j = 0; j < n; j++) c[j] = 0.0f;
    }
    gate(l, INPUT, x, before, p->recurrent, y, type);
    gate(l, CELL, x, before, p->activation, g, type);
    for (int32_t j = 0; j < n; j++) g[j] = c[j] += y[j] * g[j];
    gate(l, OUTPUT, x, before, p->recurrent, y, type);
    apply(p->activation, n, g);
    for (int32_t j = 0; j < n; j++) h[j] = y[j] *= g[j];
    if (p->sequences) y += n;
  }
}

enum { UPDATE, RESET, NEW, AGAIN };

NS_INLINE void gru(const ns_rnn_f32_params *p, const layer *l, const float *x, float *y, const int32_t type) {
  const int32_t n = p->units;
  float *a = l->scratch, *h = a + n, *z = h + n, *r = z + n;
  for (int32_t t = 0; t < p->steps; t++, x += p->i) {
    const float *before = t ? h : NULL;
    gate(l, UPDATE, x, before, p->recurrent, z, type);
    gate(l, RESET, x, before, p->recurrent, r, type);
    product(&l->w, NEW, x, l->bias + NEW * n, y, type);
    if (p->after) {
      if (t) product(&l->u, NEW, h, l->bias + AGAIN * n, a, type);
      else memcpy(a, l->bias + AGAIN * n, (size_t)n * sizeof *a);
      for (int32_t j = 0; j < n; j++) y[j] += r[j] * a[j];
    } else if (t) {
      for (int32_t j = 0; j < n; j++) r[j] *= h[j];
      product(&l->u, NEW, r, NULL, a, type);
      for (int32_t j = 0; j < n; j++) y[j] += a[j];
    }
    apply(p->activation, n, y);
    for (int32_t j = 0; j < n; j++) h[j] = y[j] = (t ? z[j] * h[j] : 0.0f) + (1.0f - z[j]) * y[j];
    if (p->sequences) y += n;
  }
}

void ns_rnn_f32(const ns_rnn_f32_params *p, const float *x, const float *w, const float *u, const float *bias, float *y,
                void *scratch) {
  const layer l = layer_of(p, w, NULL, u, NULL, bias, scratch);
  rnn(p, &l, x, y, F32);
}

void ns_rnn_f32w8(const ns_rnn_f32w8_params *p, const float *x, const int8_t *w, const float *w_scale, const int8_t *u,
                  const float *u_scale, const float *bias, float *y, void *scratch) {
  const layer l = layer_of(p, w, w_scale, u, u_scale, bias, scratch);
  rnn(p, &l, x, y, W8);
}

void ns_rnn_f32w4(const ns_rnn_f32w4_params *p, const float *x, const uint8_t *w, const float *w_scale, const uint8_t *u,
                  const float *u_scale, const float *bias, float *y, void *scratch) {
  const layer l = layer_of(p, w, w_scale, u, u_scale, bias, scratch);
  rnn(p, &l, x, y, W4);
}

void ns_lstm_f32(const ns_lstm_f32_params *p, const float *x, const float *w, const float *u, const float *bias, float *y,
                 void *scratch) {
  const layer l = layer_of(p, w, NULL, u, NULL, bias, scratch);
  lstm(p, &l, x, y, F32);
}

void ns_lstm_f32w8(const ns_lstm_f32w8_params *p, const float *x, const int8_t *w, const float *w_scale, const int8_t *u,
                   const float *u_scale, const float *bias, float *y, void *scratch) {
  const layer l = layer_of(p, w, w_scale, u, u_scale, bias, scratch);
  lstm(p, &l, x, y, W8);
}

void ns_lstm_f32w4(const ns_lstm_f32w4_params *p, const float *x, const uint8_t *w, const float *w_scale, const uint8_t *u,
                   const float *u_scale, const float *bias, float *y, void *scratch) {
  const layer l = layer_of(p, w, w_scale, u, u_scale, bias, scratch);
  lstm(p, &l, x, y, W4);
}

void ns_gru_f32(const ns_gru_f32_params *p, const float *x, const float *w, const float *u, const float *bias, float *y,
                void *scratch) {
  const layer l = layer_of(p, w, NULL, u, NULL, bias, scratch);
  gru(p, &l, x, y, F32);
}

void ns_gru_f32w8(const ns_gru_f32w8_params *p, const float *x, const int8_t *w, const float *w_scale, const int8_t *u,
                  const float *u_scale, const float *bias, float *y, void *scratch) {
  const layer l = layer_of(p, w, w_scale, u, u_scale, bias, scratch);
  gru(p, &l, x, y, W8);
}

void ns_gru_f32w4(const ns_gru_f32w4_params *p, const float *x, const uint8_t *w, const float *w_scale, const uint8_t *u,
                  const float *u_scale, const float *bias, float *y, void *scratch) {
  const layer l = layer_of(p, w, w_scale, u, u_scale, bias, scratch);
  gru(p, &l, x, y, W4);
}
