/* Float kernels, compiled once for each instruction set (see vec.h). Results of a token never depend on the tokens beside it. */
#include "vec.h"

#ifdef NS_AVX512
enum { ROWS_ONE = 8, ROWS_TILE = 4, TOKENS_TILE = 6 }; /* accumulators that fit into 32 registers */
#elif defined(NS_NEON)
enum { ROWS_ONE = 4, ROWS_TILE = 2, TOKENS_TILE = 3 };
#else
enum { ROWS_ONE = 4, ROWS_TILE = 2, TOKENS_TILE = 2 };
#endif

INLINE v16 w_float(const void *p, size_t i) { return v_load((const float *)p + i); }
INLINE v16 w_half(const void *p, size_t i) { return v_half((const uint16_t *)p + i); }
INLINE v16 w_bfloat(const void *p, size_t i) { return v_bfloat((const uint16_t *)p + i); }
typedef v16 (*w_loader)(const void *, size_t);

/* R rows times N tokens; lane l of each sum takes inputs = l mod 16, in order. */
INLINE void dot_tile(w_loader load, int size, const uint8_t *const *w, int ins, const float *x, size_t xstride, int R, int N,
                     float *out) {
  v16 acc[8][6];
  UNROLL(8) for (int r = 0; r < R; r++) UNROLL(6) for (int n = 0; n < N; n++) acc[r][n] = v_set(0);
  int full = ins & ~15;
  size_t ahead = (size_t)R * (size_t)ins * (size_t)size; /* the rows after these follow in memory */
  for (int k = 0; k < full; k += 16) {
    v16 wv[8];
    if (N <= 2 && k * size % 64 == 0)
      UNROLL(8) for (int r = 0; r < R; r++) __builtin_prefetch(w[r] + ahead + (size_t)k * (size_t)size);
    UNROLL(8) for (int r = 0; r < R; r++) wv[r] = load(w[r], (size_t)k);
    UNROLL(6) for (int n = 0; n < N; n++) {
      v16 xv = v_load(x + (size_t)n * xstride + k);
      UNROLL(8) for (int r = 0; r < R; r++) acc[r][n] = v_fma(wv[r], xv, acc[r][n]);
    }
  }
  if (full < ins) {
    uint8_t tail[8][64];
    memset(tail, 0, sizeof tail);
    UNROLL(8) for (int r = 0; r < R; r++) {
      memcpy(tail[r], w[r] + (size_t)full * (size_t)size, (size_t)(ins - full) * (size_t)size);
      UNROLL(6) for (int n = 0; n < N; n++) acc[r][n] =
          v_fma(load(tail[r], 0), v_load(x + (size_t)n * xstride + full), acc[r][n]);
    }
  }
  UNROLL(8) for (int r = 0; r < R; r++) UNROLL(6) for (int n = 0; n < N; n++) out[n * NS_PANEL + r] =
      v_sum(acc[r][n]);
}

INLINE void dense_panel(w_loader load, int size, const ns_linear *l, int row, int rows, const float *x, size_t xstride, int M,
                        float *out) {
  const uint8_t *w[NS_PANEL];
  for (int r = 0; r < NS_PANEL; r++) {
    int at = row + (r < rows ? r : rows - 1);
    w[r] = (const uint8_t *)l->w + (size_t)at * (size_t)l->ins * (size_t)size;
  }
  if (M == 1) {
    for (int r = 0; r < NS_PANEL; r += ROWS_ONE) dot_tile(load, size, w + r, l->ins, x, xstride, ROWS_ONE, 1, out + r);
    return;
  }
  for (int m = 0; m < M;) {
    int n = M - m < TOKENS_TILE ? M - m : TOKENS_TILE;
    const float *xm = x + (size_t)m * xstride;
    for (int r = 0; r < NS_PANEL; r += ROWS_TILE) {
      float *to = out + m * NS_PANEL + r;
      switch (n) {
        case 1: dot_tile(load, size, w + r, l->ins, xm, xstride, ROWS_TILE, 1, to); break;
        case 2: dot_tile(load, size, w + r, l->ins, xm, xstride, ROWS_TILE, 2, to); break;
#ifdef NS_AVX512
        case 4: dot_tile(load, size, w + r, l->ins, xm, xstride, ROWS_TILE, 4, to); break;
        case 5: dot_tile(load, size, w + r, l->ins, xm, xstride, ROWS_TILE, 5, to); break;
        case 6: dot_tile(load, size, w + r, l->ins, xm, xstride, ROWS_TILE, 6, to); break;
#endif
        default: dot_tile(load, size, w + r, l->ins, xm, xstride, ROWS_TILE, 3, to); break;
      }
    }
    m += n;
  }
}

static void dense(const ns_linear *l, int row, int rows, const float *x, size_t xstride, int M, float *out) {
  if (l->dtype == NS_F32) dense_panel(w_float, 4, l, row, rows, x, xstride, M, out);
  else if (l->dtype == NS_F16) dense_panel(w_half, 2, l, row, rows, x, xstride, M, out);
  else dense_panel(w_bfloat, 2, l, row, rows, x, xstride, M, out);
}

/* Transposed weight: y += x[c] * w[c, :], channel after channel, eight streams at a time. */
INLINE void axpy(w_loader load, int size, const ns_linear *l, int row, int width, const ns_picked *x, int M, float *out) {
  int full = width & ~15, count = x->count;
  for (int m = 0; m < M; m++) memset(out + (size_t)m * (size_t)width, 0, (size_t)width * sizeof(float));
  for (int c = 0; c < count; c += 8) {
    int n = count - c < 8 ? count - c : 8;
    const uint8_t *w[8], *next[8];
    for (int i = 0; i < 8; i++) { /* the eight channels after these are asked for meanwhile */
      int then = c + 8 + i < count ? c + 8 + i : count - 1;
      next[i] = (const uint8_t *)l->w + ((size_t)x->channels[then] * (size_t)l->outs + (size_t)row) * (size_t)size;
    }
    for (int i = 0; i < n; i++) w[i] = (const uint8_t *)l->w + ((size_t)x->channels[c + i] * (size_t)l->outs + (size_t)row) * (size_t)size;
    for (int m = 0; m < M; m++) {
      float *y = out + (size_t)m * (size_t)width;
      const float *xc = x->x + (size_t)m * (size_t)x->stride + c;
      if (n == 8) {
        v16 xv[8];
        UNROLL(8) for (int i = 0; i < 8; i++) xv[i] = v_set(xc[i]);
        for (int j = 0; j < full; j += 16) {
          v16 acc = v_load(y + j);
          if (m == 0)
            UNROLL(8) for (int i = 0; i < 8; i++) __builtin_prefetch(next[i] + (size_t)j * (size_t)size);
          UNROLL(8) for (int i = 0; i < 8; i++) acc = v_fma(xv[i], load(w[i], (size_t)j), acc);
          v_store(y + j, acc);
        }
      } else {
        for (int j = 0; j < full; j += 16) {
          v16 acc = v_load(y + j);
          for (int i = 0; i < n; i++) acc = v_fma(v_set(xc[i]), load(w[i], (size_t)j), acc);
          v_store(y + j, acc);
        }
      }
      if (full < width) {
        float tail[16] = {0};
        uint8_t wt[64];
        memcpy(tail, y + full, (size_t)(width - full) * sizeof(float));
        v16 acc = v_load(tail);
        for (int i = 0; i < n; i++) {
          memset(wt, 0, sizeof wt);
          memcpy(wt, w[i] + (size_t)full * (size_t)size, (size_t)(width - full) * (size_t)size);
          acc = v_fma(v_set(xc[i]), load(wt, 0), acc);
        }
        v_store(tail, acc);
        memcpy(y + full, tail, (size_t)(width - full) * sizeof(float));
      }
    }
  }
}

static void sparse_dense(const ns_linear *l, int row, int width, const ns_picked *x, int M, float *out) {
  if (l->dtype == NS_F32) axpy(w_float, 4, l, row, width, x, M, out);
  else if (l->dtype == NS_F16) axpy(w_half, 2, l, row, width, x, M, out);
  else axpy(w_bfloat, 2, l, row, width, x, M, out);
}

static void rmsnorm(const float *x, const float *weight, float eps, int width, int from, int to, float *out) {
  v16 sum = v_set(0);
  int full = width & ~15;
  for (int i = 0; i < full; i += 16) {
    v16 v = v_load(x + i);
    sum = v_fma(v, v, sum);
  }
  float rest = 0;
  for (int i = full; i < width; i++) rest += x[i] * x[i];
  float factor = 1.0f / sqrtf((v_sum(sum) + rest) / (float)width + eps);
  for (int i = from; i < to; i++) out[i] = x[i] * factor * weight[i];
}

INLINE v16 silu(v16 g) { return v_div(g, v_add(v_set(1), v_exp(v_sub(v_set(0), g)))); }

static void silu_mul(float *gate, const float *up, int count) {
  int full = count & ~15;
  for (int i = 0; i < full; i += 16) v_store(gate + i, v_mul(silu(v_load(gate + i)), v_load(up + i)));
  if (full < count) {
    float g[16] = {0}, u[16] = {0};
    size_t bytes = (size_t)(count - full) * sizeof(float);
    memcpy(g, gate + full, bytes), memcpy(u, up + full, bytes);
    v_store(g, v_mul(silu(v_load(g)), v_load(u)));
    memcpy(gate + full, g, bytes);
  }
}

static void rotate(float *x, const float *cosine, const float *sine, int half) {
  for (int j = 0; j < half; j++) {
    float a = x[j], b = x[j + half];
    x[j] = a * cosine[j] - b * sine[j];
    x[j + half] = b * cosine[j] + a * sine[j];
  }
}

static float int8_row(const float *x, int n, int8_t *to, int step) {
  float most = 0;
  for (int i = 0; i < n; i++) most = fabsf(x[i]) > most ? fabsf(x[i]) : most;
  float scale = most / 127, inverse = most > 0 ? 127 / most : 0;
  for (int i = 0; i < n; i++) {
    float t = x[i] * inverse + 12582912.0f;
    uint32_t u;
    memcpy(&u, &t, 4);
    to[(size_t)i * (size_t)step] = (int8_t)(uint8_t)(u & 255);
  }
  return scale;
}

static void kv_store(const ns_kv *kv, int position, const float *key, const float *value) {
  size_t tile = (size_t)(position / 16) * (size_t)kv->qk * 16 + (size_t)(position % 16), row = (size_t)position * (size_t)kv->vd16;
  if (kv->kind == NS_KV_INT8) {
    kv->key_scale[position] = int8_row(key, kv->qk, (int8_t *)kv->keys + tile, 16);
    kv->value_scale[position] = int8_row(value, kv->vd, (int8_t *)kv->values + row, 1);
    return;
  }
  uint16_t *k = (uint16_t *)kv->keys + tile, *v = (uint16_t *)kv->values + row;
  for (int i = 0; i < kv->qk; i++) k[(size_t)i * 16] = ns_float_to_half(key[i]);
  int full = kv->vd & ~15;
  for (int i = 0; i < full; i += 16) v_store_half(v + i, v_load(value + i));
  for (int i = full; i < kv->vd; i++) v[i] = ns_float_to_half(value[i]);
}

INLINE v16 kv_load(int kind, const void *p, size_t i) {
  return kind == NS_KV_F16 ? v_half((const uint16_t *)p + i) : v_int8((const int8_t *)p + i);
}

/* Softmax over blocks of NS_KEYS keys counted from token 0, so that sums are grouped alike however a token was fed. */
INLINE void attend_block(int kind, int n, const ns_kv *kv, int block, int last, const float *q, const int *from, const int *to,
                         float scale, float *most, float *total, float *out, float *p) {
  size_t qk = (size_t)kv->qk, tile = qk * 16;
  v16 s[NS_QUERIES][4];
  UNROLL(4) for (int i = 0; i < n; i++) UNROLL(4) for (int t = 0; t < 4; t++) s[i][t] = v_set(0);
  size_t first = (size_t)(block / 16) * tile;
  for (size_t d = 0; d < qk; d++) {
    v16 k[4];
    UNROLL(4) for (int t = 0; t < 4; t++) k[t] = kv_load(kind, kv->keys, first + (size_t)t * tile + d * 16);
    UNROLL(4) for (int i = 0; i < n; i++) {
      v16 qv = v_set(q[(size_t)i * qk + d]);
      UNROLL(4) for (int t = 0; t < 4; t++) s[i][t] = v_fma(qv, k[t], s[i][t]);
    }
  }
  float fade[NS_QUERIES];
  UNROLL(4) for (int i = 0; i < n; i++) {
    int low = from[i] - block, high = to[i] - block;
    fade[i] = 1;
    if (high <= 0 || low >= NS_KEYS) { /* this query sees nothing here */
      memset(p + i * NS_KEYS, 0, NS_KEYS * sizeof(float));
      continue;
    }
    UNROLL(4) for (int t = 0; t < 4; t++) {
      v16 factor = kind == NS_KV_INT8 ? v_mul(v_set(scale), v_load(kv->key_scale + block + 16 * t)) : v_set(scale);
      s[i][t] = v_where(v_mul(s[i][t], factor), low - 16 * t, high - 16 * t, -INFINITY);
    }
    float now = v_most(v_max(v_max(s[i][0], s[i][1]), v_max(s[i][2], s[i][3])));
    now = now > most[i] ? now : most[i];
    if (most[i] != now) {
      float f[16];
      v_store(f, v_exp(v_set(most[i] - now)));
      fade[i] = most[i] == -INFINITY ? 0 : f[0];
      most[i] = now;
    }
    v16 sum = v_set(0);
    UNROLL(4) for (int t = 0; t < 4; t++) {
      v16 e = v_where(v_exp(v_sub(s[i][t], v_set(now))), low - 16 * t, high - 16 * t, 0);
      sum = v_add(sum, e);
      if (kind == NS_KV_INT8) e = v_mul(e, v_load(kv->value_scale + block + 16 * t));
      v_store(p + i * NS_KEYS + 16 * t, e);
    }
    total[i] = total[i] * fade[i] + v_sum(sum);
  }
  size_t vd = (size_t)kv->vd16;
  int keys = last - block < NS_KEYS ? last - block : NS_KEYS;
  size_t j = 0;
#define VALUES(W)                                                                                                                 \
  {                                                                                                                               \
    v16 acc[NS_QUERIES][W];                                                                                                       \
    UNROLL(4) for (int i = 0; i < n; i++) UNROLL(4) for (int t = 0; t < W; t++) acc[i][t] =           \
        v_mul(v_load(out + (size_t)i * vd + j + 16 * (size_t)t), v_set(fade[i]));                                                 \
    for (int key = 0; key < keys; key++) {                                                                                        \
      v16 v[W];                                                                                                                   \
      UNROLL(4) for (int t = 0; t < W; t++) v[t] =                                                                  \
          kv_load(kind, kv->values, (size_t)(block + key) * vd + j + 16 * (size_t)t);                                             \
      UNROLL(4) for (int i = 0; i < n; i++) {                                                                       \
        v16 pv = v_set(p[i * NS_KEYS + key]);                                                                                     \
        UNROLL(4) for (int t = 0; t < W; t++) acc[i][t] = v_fma(pv, v[t], acc[i][t]);                               \
      }                                                                                                                           \
    }                                                                                                                             \
    UNROLL(4) for (int i = 0; i < n; i++) UNROLL(4) for (int t = 0; t < W; t++)                       \
        v_store(out + (size_t)i * vd + j + 16 * (size_t)t, acc[i][t]);                                                            \
  }
  for (; j + 64 <= vd; j += 64) VALUES(4)
  for (; j < vd; j += 16) VALUES(1)
#undef VALUES
}

static void attend(const ns_kv *kv, int n, const float *q, const int *from, const int *to, float scale, float *out, float *scratch) {
  float most[NS_QUERIES], total[NS_QUERIES];
  int first = from[0], last = to[0];
  size_t vd = (size_t)kv->vd16;
  for (int i = 0; i < n; i++) {
    most[i] = -INFINITY, total[i] = 0;
    first = from[i] < first ? from[i] : first;
    last = to[i] > last ? to[i] : last;
  }
  memset(out, 0, (size_t)n * vd * sizeof(float));
#define BLOCK(kind, count) attend_block(kind, count, kv, b, last, q, from, to, scale, most, total, out, scratch)
  for (int b = first & ~(NS_KEYS - 1); b < last; b += NS_KEYS) {
    if (kv->kind == NS_KV_F16) {
      if (n == 1) BLOCK(NS_KV_F16, 1);
      else if (n == 2) BLOCK(NS_KV_F16, 2);
      else if (n == 3) BLOCK(NS_KV_F16, 3);
      else BLOCK(NS_KV_F16, 4);
    } else {
      if (n == 1) BLOCK(NS_KV_INT8, 1);
      else if (n == 2) BLOCK(NS_KV_INT8, 2);
      else if (n == 3) BLOCK(NS_KV_INT8, 3);
      else BLOCK(NS_KV_INT8, 4);
    }
  }
#undef BLOCK
  for (int i = 0; i < n; i++)
    for (size_t j = 0; j < vd; j++) out[(size_t)i * vd + j] /= total[i];
}

static void row(const ns_linear *l, int r, float *out) {
  size_t at = (size_t)r * (size_t)l->ins;
  for (int i = 0; i < l->ins; i++) {
    if (l->kind == NS_QUANT) {
      size_t g = (size_t)r * (size_t)l->groups + (size_t)(i / l->group);
      int code = ns_code(l->codes + (size_t)r * l->row_bytes, l->bits, i);
      out[i] = ns_half_to_float(l->scales[g]) * (float)(code - l->zeros[g]);
    } else if (l->dtype == NS_F32) {
      out[i] = ((const float *)l->w)[at + (size_t)i];
    } else {
      uint16_t h = ((const uint16_t *)l->w)[at + (size_t)i];
      out[i] = l->dtype == NS_F16 ? ns_half_to_float(h) : ns_bfloat_to_float(h);
    }
  }
}

static float sweep(const float *data, size_t count) {
  v16 most[4] = {v_set(0), v_set(0), v_set(0), v_set(0)};
  for (size_t i = 0; i < count; i += 64) {
    UNROLL(4) for (int j = 0; j < 4; j++) __builtin_prefetch(data + i + 512 + 16 * j);
    UNROLL(4) for (int j = 0; j < 4; j++) most[j] = v_max(most[j], v_load(data + i + 16 * (size_t)j));
  }
  return v_most(v_max(v_max(most[0], most[1]), v_max(most[2], most[3])));
}
