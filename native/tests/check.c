/* Tests of the engine that need no Python, so that they run wherever it is built for (under an emulator, under sanitizers):
 *
 *   check kernels [SEED [ROUNDS]]     every kernel of every instruction set here, on random shapes, against plain loops in
 *                                     float64, and bit for bit against the scalar kernels where sums are integers
 *   check model FOLDER EXPECTED [ISA] an artifact's logits against a file: int32 tokens, int32 vocab, float32 tolerance,
 *                                     the tokens (int32) and their logits (float32, one row each)
 *
 * Buffers have the exact size that the engine gives them: a sanitizer sees a byte too many. Exit status 0, 1 (a difference,
 * which is printed) or 2 (misuse). */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "kernels/kernels.h"
#include "netsuke.h"

static uint64_t state;
static int failures, checks;

static uint64_t draw(void) { /* SplitMix64 */
  uint64_t z = (state += 0x9e3779b97f4a7c15u);
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return z ^ z >> 31;
}
static int below(int n) { return (int)(draw() % (uint64_t)n); }
static int between(int low, int high) { return low + below(high - low + 1); }
static float real(void) { return (float)((double)(draw() >> 11) * 0x1p-52 - 1); }

static void *room(size_t bytes) { /* aligned to 64, of exactly so many bytes */
  void *at = NULL;
  if (posix_memalign(&at, 64, bytes ? bytes : 1)) exit(2);
  memset(at, 0x5a, bytes); /* a kernel must not count on zeros */
  return at;
}

static void expect(int good, const char *isa, const char *what, double got, double wanted) {
  checks++;
  if (good) return;
  if (++failures <= 20) printf("%s %s: %.9g where %.9g was expected\n", isa, what, got, wanted);
}

static void near(const char *isa, const char *what, double got, double wanted, double slack) {
  expect(fabs(got - wanted) <= slack, isa, what, got, wanted);
}

static void same(const char *isa, const char *what, const void *got, const void *wanted, size_t bytes) {
  expect(!memcmp(got, wanted, bytes), isa, what, 1, 0);
}

static size_t up(size_t n, size_t to) { return (n + to - 1) / to * to; }

/* Weights */

static void fill_floats(ns_linear *l, int count) {
  uint16_t *h = room((size_t)count * 2);
  float *f = room((size_t)count * 4);
  for (int i = 0; i < count; i++) {
    float v = below(50) ? real() : real() * 1e-6f; /* subnormal as float16 */
    uint32_t u;
    memcpy(&u, &v, 4);
    h[i] = l->dtype == NS_F16 ? ns_float_to_half(v) : (uint16_t)(u >> 16);
    f[i] = v;
  }
  l->w = l->dtype == NS_F32 ? (void *)f : (void *)h;
  free(l->dtype == NS_F32 ? (void *)h : (void *)f);
}

static float weight(const ns_linear *l, int out, int in) {
  size_t at = l->kind == NS_SPARSE ? (size_t)in * (size_t)l->outs + (size_t)out : (size_t)out * (size_t)l->ins + (size_t)in;
  if (l->dtype == NS_F32) return ((const float *)l->w)[at];
  uint16_t h = ((const uint16_t *)l->w)[at];
  return l->dtype == NS_F16 ? ns_half_to_float(h) : ns_bfloat_to_float(h);
}

static void fill_codes(ns_linear *l, int bits, int group) {
  int rows = l->kind == NS_SPARSE ? l->ins : l->outs, cols = l->kind == NS_SPARSE ? l->outs : l->ins;
  l->bits = bits;
  l->group = group;
  l->groups = (l->ins + group - 1) / group;
  l->block = group % 64 == 0 ? 64 : group < 64 ? group : group % 32 == 0 ? 32 : ns_block_dividing(group);
  l->row_bytes = ((size_t)cols * (size_t)bits + 7) / 8;
  uint8_t *codes = room((size_t)rows * l->row_bytes), *zeros = room((size_t)(l->outs * l->groups));
  uint16_t *scales = room((size_t)(l->outs * l->groups) * 2);
  for (size_t i = 0; i < (size_t)rows * l->row_bytes; i++) codes[i] = (uint8_t)draw(); /* what a file pads with is unknown */
  for (int i = 0; i < l->outs * l->groups; i++) zeros[i] = (uint8_t)below(1 << bits), scales[i] = ns_float_to_half(real() * 0.1f);
  l->codes = codes, l->zeros = zeros, l->scales = scales;
}

static int code(const ns_linear *l, int out, int in) {
  return l->kind == NS_SPARSE ? ns_code(l->codes + (size_t)in * l->row_bytes, l->bits, out)
                              : ns_code(l->codes + (size_t)out * l->row_bytes, l->bits, in);
}

static size_t group_at(const ns_linear *l, int out, int in) {
  size_t g = (size_t)(in / l->group);
  return l->kind == NS_SPARSE ? g * (size_t)l->outs + (size_t)out : (size_t)out * (size_t)l->groups + g;
}

static void drop(ns_linear *l) {
  free((void *)l->w), free((void *)l->codes), free((void *)l->zeros), free((void *)l->scales);
}

/* Activations, laid out as plan.c does */

static ns_act act_room(const ns_linear *l, int M) {
  ns_act a = {.block = l->block, .blocks = (l->ins + l->block - 1) / l->block, .flip = M > NS_FEW ? 128 : 0};
  a.stride = (int)up((size_t)(a.blocks * a.block), 128);
  size_t bytes = (size_t)M * (size_t)a.stride, each = (size_t)M * (size_t)a.blocks * 4;
  a.natural = room(bytes);
  a.split = l->bits == 4 && M <= NS_FEW ? room(bytes) : NULL;
  a.split2 = l->bits == 2 && M <= NS_FEW ? room(bytes) : NULL;
  a.scale = room(each);
  a.sum = room(each);
  return a;
}

static void act_drop(ns_act *a) { free(a->natural), free(a->split), free(a->split2), free(a->scale), free(a->sum); }

static float *inputs(int M, int ins, size_t stride) {
  float *x = room((size_t)M * stride * 4);
  for (int m = 0; m < M; m++)
    for (size_t i = 0; i < stride; i++) x[(size_t)m * stride + i] = i < (size_t)ins && below(9) ? real() * (float)between(1, 30) : 0;
  if (ins > 80) memset(x, 0, 64 * 4); /* a block of zeros */
  return x;
}

static void check_quantize(const ns_kernels *k, const ns_act *a, const float *x, size_t stride, int ins, int M) {
  for (int m = 0; m < M; m++)
    for (int b = 0; b < a->blocks; b++) {
      const float *v = x + (size_t)m * stride + b * a->block;
      int count = ins - b * a->block < a->block ? ins - b * a->block : a->block, sum = 0;
      double most = 0;
      for (int i = 0; i < count; i++) most = fabs(v[i]) > most ? fabs(v[i]) : most;
      size_t at = (size_t)m * (size_t)a->stride + (size_t)(b * a->block), facts = (size_t)(m * a->blocks + b);
      near(k->name, "quantize: scale", a->scale[facts], most / 127, most * 1e-6);
      for (int i = 0; i < a->block; i++) {
        int q = (int8_t)((uint8_t)a->natural[at + (size_t)i] ^ a->flip);
        double exact = i < count && most > 0 ? v[i] * 127 / most : 0;
        near(k->name, "quantize: code", q, exact, 0.5001);
        if (a->split && a->block % 4 == 0)
          expect(a->split[(size_t)m * (size_t)a->stride + ns_split_at(a->block, b * a->block + i)] == q, k->name, "quantize: split", i, q);
        if (a->split2 && a->block % 4 == 0)
          expect(a->split2[at + (size_t)(i % 4 * a->block / 4 + i / 4)] == q, k->name, "quantize: split in four", i, q);
        sum += q;
      }
      expect(a->sum[facts] == sum, k->name, "quantize: sum", a->sum[facts], sum);
    }
}

static void check_quant(const ns_kernels *k, const ns_kernels *scalar) {
  static const int widths[] = {2, 3, 4, 8}, groups[] = {64, 64, 32, 128, 48, 7, 1, 256, 0};
  ns_linear l = {.kind = NS_QUANT, .outs = between(1, 70), .ins = below(4) ? between(1, 300) : between(1000, 2400)};
  int group = groups[below(9)], M = below(2) ? between(1, NS_FEW) : between(NS_FEW + 1, 30);
  fill_codes(&l, widths[below(4)], group ? group : l.ins);
  size_t stride = up((size_t)l.ins, 64);
  float *x = inputs(M, l.ins, stride);
  ns_act a = act_room(&l, M), b = act_room(&l, M);
  for (int m = 0; m < M; m++) {
    k->quantize(x + (size_t)m * stride, l.ins, &a, m, 0, a.blocks);
    scalar->quantize(x + (size_t)m * stride, l.ins, &b, m, 0, b.blocks);
  }
  check_quantize(k, &a, x, stride, l.ins, M);
  for (int m = 0; m < M; m++) { /* what lies between the last block and the next row is nobody's */
    size_t row = (size_t)m * (size_t)a.stride, used = (size_t)(a.blocks * a.block);
    same(k->name, "quantize: codes", a.natural + row, b.natural + row, used);
  }
  same(k->name, "quantize: scales", a.scale, b.scale, (size_t)(M * a.blocks) * 4);
  int wide = M > NS_FEW ? 2 * NS_PANEL : NS_PANEL;
  float *out = room((size_t)(M * wide) * 4), *plain = room((size_t)(M * wide) * 4);
  void *tile = room(ns_tile_bytes(&l)), *scratch = room(ns_panel_scratch(&l));
  for (int row = 0; row < l.outs; row += wide) {
    int rows = l.outs - row < wide ? l.outs - row : wide;
    if (M > NS_FEW) {
      k->quant_pack(&l, row, rows, tile), k->quant_many(&l, tile, &a, M, out);
      scalar->quant_pack(&l, row, rows, tile), scalar->quant_many(&l, tile, &b, M, plain);
    } else {
      k->quant_few(&l, row, rows, &a, M, out, scratch);
      scalar->quant_few(&l, row, rows, &b, M, plain, scratch);
    }
    for (int m = 0; m < M; m++) {
      same(k->name, M > NS_FEW ? "quant_many" : "quant_few", out + m * wide, plain + m * wide, (size_t)rows * 4);
      for (int r = 0; r < rows; r++) {
        double sum = 0, size = 0;
        for (int i = 0; i < l.ins; i++) {
          size_t g = group_at(&l, row + r, i);
          double w = ns_half_to_float(l.scales[g]) * (double)(code(&l, row + r, i) - l.zeros[g]);
          double v = (double)(int8_t)((uint8_t)b.natural[(size_t)m * (size_t)b.stride + (size_t)i] ^ b.flip) *
                     b.scale[m * b.blocks + i / b.block];
          sum += w * v, size += fabs(w * v);
        }
        near(k->name, "quantized product", out[m * wide + r], sum, size * 1e-5);
      }
    }
  }
  float *got = room((size_t)l.ins * 4);
  int r = below(l.outs);
  k->row(&l, r, got);
  for (int i = 0; i < l.ins; i++) {
    size_t g = group_at(&l, r, i);
    near(k->name, "row of codes", got[i], ns_half_to_float(l.scales[g]) * (double)(code(&l, r, i) - l.zeros[g]), 0);
  }
  free(x), free(out), free(plain), free(tile), free(scratch), free(got), act_drop(&a), act_drop(&b), drop(&l);
}

static void check_dense(const ns_kernels *k) {
  ns_linear l = {.kind = NS_DENSE, .outs = between(1, 40), .ins = between(1, 200), .dtype = (ns_dtype)below(3)};
  int M = between(1, 20);
  size_t stride = up((size_t)l.ins, 16);
  fill_floats(&l, l.outs * l.ins);
  float *x = inputs(M, l.ins, stride), *out = room((size_t)(M * NS_PANEL) * 4), *alone = room(NS_PANEL * 4);
  for (int row = 0; row < l.outs; row += NS_PANEL) {
    int rows = l.outs - row < NS_PANEL ? l.outs - row : NS_PANEL;
    k->dense(&l, row, rows, x, stride, M, out);
    for (int m = 0; m < M; m++) {
      k->dense(&l, row, rows, x + (size_t)m * stride, stride, 1, alone);
      same(k->name, "dense: a token alone", alone, out + m * NS_PANEL, (size_t)rows * 4);
      for (int r = 0; r < rows; r++) {
        double sum = 0, size = 0;
        for (int i = 0; i < l.ins; i++) {
          double term = (double)weight(&l, row + r, i) * x[(size_t)m * stride + (size_t)i];
          sum += term, size += fabs(term);
        }
        near(k->name, "dense", out[m * NS_PANEL + r], sum, size * 1e-5);
      }
    }
  }
  free(x), free(out), free(alone), drop(&l);
}

static void check_sparse(const ns_kernels *k, const ns_kernels *scalar) {
  static const int widths[] = {2, 3, 4, 8}, groups[] = {64, 32, 48, 7, 0};
  ns_linear l = {.kind = NS_SPARSE, .outs = between(1, 200), .ins = between(1, 200), .dtype = (ns_dtype)below(3)};
  int quantized = below(2), M = between(1, NS_FEW), group = groups[below(5)], keep = between(0, 4);
  if (quantized) fill_codes(&l, widths[below(4)], group ? group : l.ins);
  else fill_floats(&l, l.outs * l.ins);
  int block = quantized ? l.block : 64, blocks = (l.ins + block - 1) / block, count = 0;
  int32_t *channels = room((size_t)l.ins * 4), *start = room((size_t)(blocks + 1) * 4), *sum = room((size_t)(M * blocks) * 4);
  float *x = room((size_t)(M * l.ins) * 4), *scale = room((size_t)(M * blocks) * 4);
  int8_t *q = room((size_t)(M * l.ins));
  for (int i = 0; i < l.ins; i++) {
    if (i % block == 0) start[i / block] = count;
    if (below(4) < keep) channels[count++] = i;
  }
  start[blocks] = count;
  for (int m = 0; m < M; m++)
    for (int b = 0; b < blocks; b++) {
      scale[m * blocks + b] = real() * 0.1f, sum[m * blocks + b] = 0;
      for (int c = start[b]; c < start[b + 1]; c++) {
        q[m * l.ins + c] = (int8_t)(below(3) ? between(-127, 127) : 0);
        x[m * l.ins + c] = q[m * l.ins + c] ? real() : 0;
        sum[m * blocks + b] += q[m * l.ins + c];
      }
    }
  ns_picked p = {count, l.ins, block, blocks, channels, start, x, q, scale, sum};
  int row = 64 * below((l.outs + 63) / 64), width = l.outs - row;
  if (width > 64 && below(2)) width = 64;
  float *out = room((size_t)(M * width) * 4), *plain = room((size_t)(M * width) * 4);
  int32_t *sums = room((size_t)M * up((size_t)width, 64) * 4);
  if (quantized) {
    k->sparse_quant(&l, row, width, &p, M, out, sums);
    scalar->sparse_quant(&l, row, width, &p, M, plain, sums);
  } else {
    k->sparse_dense(&l, row, width, &p, M, out);
  }
  if (quantized) same(k->name, "sparse_quant", out, plain, (size_t)(M * width) * 4);
  for (int m = 0; m < M; m++)
    for (int r = 0; r < width; r++) {
      double total = 0, size = 0;
      for (int c = 0; c < count; c++) {
        int i = channels[c];
        size_t g = quantized ? group_at(&l, row + r, i) : 0;
        double w = quantized ? ns_half_to_float(l.scales[g]) * (double)(code(&l, row + r, i) - l.zeros[g]) : weight(&l, row + r, i);
        double v = quantized ? (double)q[m * l.ins + c] * scale[m * blocks + i / block] : x[m * l.ins + c];
        total += w * v, size += fabs(w * v);
      }
      near(k->name, quantized ? "sparse_quant" : "sparse_dense", out[m * width + r], total, size * 1e-5);
    }
  free(channels), free(start), free(sum), free(x), free(scale), free(q), free(out), free(plain), free(sums), drop(&l);
}

/* One key head's cache, filled by a kernel table */
static ns_kv cache(const ns_kernels *k, int kind, int qk, int vd, int tokens, const float *keys, const float *values) {
  size_t padded = up((size_t)tokens, NS_KEYS), each = kind == NS_KV_F16 ? 2 : 1;
  ns_kv kv = {kind, qk, vd, (int)up((size_t)vd, 16), room(padded * (size_t)qk * each), NULL, NULL, NULL};
  kv.values = room(padded * (size_t)kv.vd16 * each);
  memset(kv.keys, 0, padded * (size_t)qk * each); /* the engine's block is zero at first */
  memset(kv.values, 0, padded * (size_t)kv.vd16 * each);
  kv.key_scale = calloc(padded, 4), kv.value_scale = calloc(padded, 4);
  for (int t = 0; t < tokens; t++) k->kv_store(&kv, t, keys + t * qk, values + t * vd);
  return kv;
}

static void cache_drop(ns_kv *kv) { free(kv->keys), free(kv->values), free(kv->key_scale), free(kv->value_scale); }

static double cached(const ns_kv *kv, int token, int i, int value) {
  size_t at = value ? (size_t)token * (size_t)kv->vd16 + (size_t)i
                    : (size_t)(token / 16) * (size_t)kv->qk * 16 + (size_t)i * 16 + (size_t)(token % 16);
  const void *p = value ? kv->values : kv->keys;
  if (kv->kind == NS_KV_F16) return ns_half_to_float(((const uint16_t *)p)[at]);
  return ((const int8_t *)p)[at] * (double)(value ? kv->value_scale : kv->key_scale)[token];
}

static void check_attend(const ns_kernels *k, const ns_kernels *scalar) {
  int kind = below(2), qk = 2 * between(1, 40), vd = between(1, 90), tokens = between(1, 200), n = between(1, NS_QUERIES);
  float *keys = room((size_t)(tokens * qk) * 4), *values = room((size_t)(tokens * vd) * 4), *q = room((size_t)(n * qk) * 4);
  for (int i = 0; i < tokens * qk; i++) keys[i] = below(40) ? real() * 3 : real() * 1e-6f;
  for (int i = 0; i < tokens * vd; i++) values[i] = below(40) ? real() : real() * 1e-6f;
  for (int i = 0; i < n * qk; i++) q[i] = real() * 3;
  ns_kv kv = cache(k, kind, qk, vd, tokens, keys, values), other = cache(scalar, kind, qk, vd, tokens, keys, values);
  size_t padded = up((size_t)tokens, NS_KEYS), each = kind == NS_KV_F16 ? 2 : 1;
  same(k->name, "kv_store: keys", kv.keys, other.keys, padded * (size_t)qk * each);
  same(k->name, "kv_store: values", kv.values, other.values, padded * (size_t)kv.vd16 * each);
  same(k->name, "kv_store: scales", kv.key_scale, other.key_scale, padded * 4);
  int from[NS_QUERIES], to[NS_QUERIES], window = below(2) ? between(1, 150) : 1 << 20;
  for (int i = 0; i < n; i++) to[i] = between(1, tokens), from[i] = to[i] > window ? to[i] - window : 0;
  float scale = 1 / sqrtf((float)qk);
  float *out = room((size_t)(n * kv.vd16) * 4), *scratch = room((size_t)(NS_QUERIES * NS_KEYS) * 4);
  k->attend(&kv, n, q, from, to, scale, out, scratch);
  double score[256];
  for (int i = 0; i < n; i++) {
    double most = -1e300, total = 0;
    for (int t = from[i]; t < to[i]; t++) {
      score[t] = 0;
      for (int j = 0; j < qk; j++) score[t] += (double)q[i * qk + j] * cached(&kv, t, j, 0);
      score[t] *= scale;
      most = score[t] > most ? score[t] : most;
    }
    for (int t = from[i]; t < to[i]; t++) total += score[t] = exp(score[t] - most);
    for (int j = 0; j < vd; j++) {
      double sum = 0;
      for (int t = from[i]; t < to[i]; t++) sum += score[t] / total * cached(&kv, t, j, 1);
      near(k->name, kind == NS_KV_F16 ? "attend, float16" : "attend, int8", out[i * kv.vd16 + j], sum, 2e-5);
    }
  }
  cache_drop(&kv), cache_drop(&other), free(keys), free(values), free(q), free(out), free(scratch);
}

static void check_small(const ns_kernels *k) {
  int width = between(1, 150), half = between(1, 40);
  size_t bytes = (size_t)width * 4;
  float *x = room(bytes), *w = room(bytes), *out = room(bytes), *pair = room((size_t)half * 8), *turn = room((size_t)half * 8);
  double squares = 0;
  for (int i = 0; i < width; i++) x[i] = real() * 20, w[i] = real() * 2, squares += (double)x[i] * x[i];
  int from = below(width), to = between(from, width);
  k->rmsnorm(x, w, 1e-5f, width, from, to, out);
  double factor = 1 / sqrt(squares / width + 1e-5);
  for (int i = from; i < to; i++) near(k->name, "rmsnorm", out[i], x[i] * factor * w[i], fabs(x[i] * factor * w[i]) * 1e-5);
  if (below(2)) x[below(width)] = below(2) ? 1e4f : -1e4f;
  memcpy(out, x, bytes);
  k->silu_mul(out, w, width);
  for (int i = 0; i < width; i++) {
    double silu = x[i] / (1 + exp(-(double)x[i]));
    near(k->name, "silu_mul", out[i], silu * w[i], fabs(silu * w[i]) * 1e-5 + 1e-30);
  }
  for (int j = 0; j < half; j++) {
    double angle = real() * 50;
    pair[j] = real(), pair[j + half] = real(), turn[j] = (float)cos(angle), turn[j + half] = (float)sin(angle);
  }
  float a = pair[half / 2], b = pair[half / 2 + half], c = turn[half / 2], s = turn[half / 2 + half];
  k->rotate(pair, turn, turn + half, half);
  near(k->name, "rotate", pair[half / 2], (double)a * c - (double)b * s, 1e-6);
  near(k->name, "rotate", pair[half / 2 + half], (double)b * c + (double)a * s, 1e-6);
  ns_linear l = {.kind = NS_DENSE, .outs = 3, .ins = width, .dtype = (ns_dtype)below(3)};
  fill_floats(&l, 3 * width);
  k->row(&l, 2, out);
  for (int i = 0; i < width; i++) near(k->name, "row", out[i], weight(&l, 2, i), 0);
  free(x), free(w), free(out), free(pair), free(turn), drop(&l);
}

static int check_kernels(uint64_t seed, int rounds) {
  for (int h = 0; h < 65536; h++) { /* every finite half and its neighbours as floats */
    float f = ns_half_to_float((uint16_t)h);
    if (isnan(f)) continue;
    expect(ns_float_to_half(f) == h, "all", "halves return", h, f);
    if (isfinite(f)) expect(ns_float_to_half(nextafterf(f, 2 * f)) == h, "all", "halves round", h, f);
  }
  for (int i = 0; ns_kernels_list(i); i++) {
    const ns_kernels *k = ns_kernels_list(i), *scalar = ns_kernels_named("scalar");
    state = seed;
    for (int round = 0; round < rounds; round++) {
      check_quant(k, scalar);
      check_dense(k);
      check_sparse(k, scalar);
      check_attend(k, scalar);
      check_small(k);
    }
    expect(k->int8_burst(100) > 100, k->name, "int8_burst", k->int8_burst(100), 100);
    printf("%s: %d differences in %d comparisons so far\n", k->name, failures, checks);
  }
  return failures > 0;
}

static int read_or_die(FILE *f, void *to, size_t size, size_t count) {
  if (fread(to, size, count, f) == count) return 0;
  fprintf(stderr, "the file of expected logits is too short\n");
  exit(2);
}

static int check_model(const char *folder, const char *file, const char *isa) {
  int32_t shape[2];
  float tolerance;
  FILE *f = fopen(file, "rb");
  if (!f) return fprintf(stderr, "%s cannot be opened\n", file), 2;
  read_or_die(f, shape, 4, 2);
  read_or_die(f, &tolerance, 4, 1);
  int rows = shape[0], vocab = shape[1], half = rows / 2, near_rows = 0, exact_rows = 0;
  if (rows < 2 || rows > 4096 || vocab < 1 || vocab > 1 << 20) return fprintf(stderr, "%d rows of %d\n", rows, vocab), 2;
  int32_t *tokens = room((size_t)rows * 4), *slots = calloc((size_t)rows, 4);
  uint8_t *want = room((size_t)rows);
  float *wanted = room((size_t)rows * (size_t)vocab * 4), *got = room((size_t)rows * (size_t)vocab * 4);
  read_or_die(f, tokens, 4, (size_t)rows);
  read_or_die(f, wanted, 4, (size_t)rows * (size_t)vocab);
  fclose(f);
  memset(want, 1, (size_t)rows);
  ns_engine *e;
  ns_error error;
  ns_options o = {.slots = 1, .rows = half, .logit_rows = half, .threads = 2, .isa = isa};
  if (ns_open(&e, folder, &o, &error)) return printf("%s; allowed: %s\n", error.found, error.allowed), 1;
  int failed = ns_forward(e, half, tokens, slots, want, &error); /* half of the tokens at once, the others one by one */
  if (!failed) memcpy(got, ns_logits(e), (size_t)half * (size_t)vocab * 4);
  for (int i = half; i < rows && !failed; i++) {
    failed = ns_forward(e, 1, tokens + i, slots, want, &error);
    if (!failed) memcpy(got + (size_t)i * (size_t)vocab, ns_logits(e), (size_t)vocab * 4);
  }
  if (failed) return printf("%s; allowed: %s\n", error.found, error.allowed), 1;
  double worst = 0;
  for (int i = 0; i < rows; i++) {
    double square = 0, size = 0;
    for (int j = 0; j < vocab; j++) {
      double d = got[(size_t)i * (size_t)vocab + (size_t)j], w = wanted[(size_t)i * (size_t)vocab + (size_t)j];
      square += (d - w) * (d - w), size += w * w;
    }
    double error_of_row = sqrt(square / size);
    near_rows += error_of_row <= tolerance;
    exact_rows += error_of_row <= 1e-5;
    worst = error_of_row > worst ? error_of_row : worst;
  }
  printf("%s: %d rows, %d within 1e-5, %d within %g, the worst %.3g\n", ns_describe(e).isa, rows, exact_rows, near_rows, (double)tolerance, worst);
  ns_close(e);
  free(tokens), free(slots), free(want), free(wanted), free(got);
  /* A number on the edge of a rounding to int8 or float16 may fall to the other side where libm or sums differ in a bit. */
  return !(exact_rows > 0 && near_rows * 2 > rows && worst < 0.25 + tolerance);
}

int main(int count, char **argument) {
  if (count >= 2 && !strcmp(argument[1], "kernels"))
    return check_kernels(count > 2 ? strtoull(argument[2], NULL, 10) : 1, count > 3 ? atoi(argument[3]) : 150);
  if (count >= 4 && !strcmp(argument[1], "model")) return check_model(argument[2], argument[3], count > 4 ? argument[4] : NULL);
  fprintf(stderr, "check kernels [SEED [ROUNDS]] | check model FOLDER EXPECTED [ISA]\n");
  return 2;
}
