#include "model.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "kernels/kernels.h"

/* What the reading of one model needs; `failed` stops everything after the first error. */
typedef struct {
  ns_model *m;
  ns_arena *arena;
  const json *doc;
  const json_node *layers;
  const ns_weights *w;
  ns_error *error;
  int failed;
} builder;

static const double PI = 3.14159265358979323846;

static int dtype_size(ns_dtype t) { return t == NS_F32 ? 4 : t == NS_U8 ? 1 : 2; }

static ns_dtype dtype_named(const json_node *n) {
  if (json_is(n, "float32") || json_is(n, "F32")) return NS_F32;
  if (json_is(n, "float16") || json_is(n, "F16")) return NS_F16;
  if (json_is(n, "bfloat16") || json_is(n, "BF16")) return NS_BF16;
  if (json_is(n, "U8")) return NS_U8;
  return NS_OTHER;
}

#define FAIL(b, ...) ((b)->failed = 1, ns_fail((b)->error, __VA_ARGS__))

/* The bytes of a tensor of dtype (NS_OTHER: any float, told in *got, which says what to count without weights) and shape
 * (rows, cols; cols 0: one dimension). */
static const void *tensor(builder *b, const char *name, ns_dtype want, int64_t rows, int64_t cols, ns_dtype *got) {
  if (b->failed) return NULL;
  if (!b->w || !b->w->data) {
    int64_t bytes = rows * (cols ? cols : 1) * dtype_size(want == NS_OTHER ? *got : want);
    b->m->weight_bytes += (uint64_t)bytes;
    return NULL;
  }
  const json *doc = &b->w->header;
  const json_node *t = json_get(doc, &doc->nodes[0], name);
  if (!t) return FAIL(b, "a complete set of weights", "tensor '%s' is missing", name), NULL;
  ns_dtype type = dtype_named(json_get(doc, t, "dtype"));
  int floats = type == NS_F32 || type == NS_F16 || type == NS_BF16;
  if (want == NS_OTHER ? !floats : type != want)
    return FAIL(b, "the type that the manifest says", "tensor '%s' is stored in another type", name), NULL;
  const json_node *shape = json_get(doc, t, "shape"), *span = json_get(doc, t, "data_offsets");
  const json_node *d0 = json_child(doc, shape), *d1 = d0 ? json_next(doc, d0) : NULL;
  int64_t v0 = 0, v1 = 0, from = 0, to = 0;
  int fits = shape && shape->type == JSON_ARRAY && shape->size == (cols ? 2u : 1u) && json_int(d0, rows, rows, &v0) &&
             (!cols || json_int(d1, cols, cols, &v1));
  if (!fits) return FAIL(b, "the shape that the manifest says", "tensor '%s' has another shape", name), NULL;
  const json_node *s0 = json_child(doc, span), *s1 = s0 ? json_next(doc, s0) : NULL;
  int64_t room = (int64_t)(b->w->size - b->w->start), bytes = rows * (cols ? cols : 1) * dtype_size(type);
  if (!span || span->type != JSON_ARRAY || span->size != 2 || !json_int(s0, 0, room, &from) || !json_int(s1, from, room, &to) ||
      to - from != bytes)
    return FAIL(b, "offsets inside the file that fit the shape", "tensor '%s' lies outside the file", name), NULL;
  const uint8_t *at = b->w->data + b->w->start + from;
  if ((uintptr_t)at % (uintptr_t)dtype_size(type))
    return FAIL(b, "tensors aligned to their elements", "tensor '%s' is not aligned: save the model again", name), NULL;
  b->m->weight_bytes += (uint64_t)bytes;
  if (got) *got = type;
  return at;
}

/* A vector of any float type as floats in the arena; `type` is what a plan counts. Not finite: an error. */
static float *vector(builder *b, const char *name, int count, ns_dtype type) {
  const void *at = tensor(b, name, NS_OTHER, count, 0, &type);
  float *out = ns_take(b->arena, (uint64_t)count, sizeof(float));
  if (b->failed || !at || !out) return out;
  for (int i = 0; i < count; i++) {
    out[i] = type == NS_F32   ? ((const float *)at)[i]
             : type == NS_F16 ? ns_half_to_float(((const uint16_t *)at)[i])
                              : ns_bfloat_to_float(((const uint16_t *)at)[i]);
    if (!isfinite(out[i])) {
      FAIL(b, "finite weights", "tensor '%s' holds NaN or infinite numbers", name);
      break;
    }
  }
  return out;
}

static void finite_scales(builder *b, const char *name, const uint16_t *scales, int64_t count) {
  uint32_t bad = 0;
  if (!scales || b->failed) return;
  for (int64_t i = 0; i < count; i++) bad |= (scales[i] & 0x7c00) == 0x7c00;
  if (bad) FAIL(b, "finite weights", "tensor '%s' holds NaN or infinite numbers", name);
}

/* name + "." + leaf, or name alone */
static const char *join(char out[128], const char *name, const char *leaf) {
  snprintf(out, 128, "%s%s%s", name, *leaf ? "." : "", leaf);
  return out;
}

static void quantized(builder *b, ns_linear *l, const char *name, const json_node *spec, int rows, int cols, int by_row) {
  char full[128];
  int64_t bits, group, limit = (int64_t)1 << 30;
  if (!json_int(json_get(b->doc, spec, "bits"), 2, 8, &bits) || (bits != 2 && bits != 3 && bits != 4 && bits != 8) ||
      !json_int(json_get(b->doc, spec, "group"), 1, limit, &group)) {
    FAIL(b, "2, 3, 4 or 8 bits in groups of 1 or more", "the map '%s' has other settings", name);
    return;
  }
  l->bits = (int)bits;
  l->group = (int)group;
  l->groups = (int)((l->ins + group - 1) / group);
  l->block = group % 64 == 0 ? 64 : group < 64 ? (int)group : 0;
  if (!l->block) l->block = group % 32 == 0 ? 32 : ns_block_dividing((int)group);
  l->row_bytes = ((size_t)cols * (size_t)bits + 7) / 8;
  l->codes = tensor(b, join(full, name, "codes"), NS_U8, rows, (int64_t)l->row_bytes, NULL);
  int64_t s0 = by_row ? l->outs : l->groups, s1 = by_row ? l->groups : l->outs;
  l->scales = tensor(b, join(full, name, "scales"), NS_F16, s0, s1, NULL);
  finite_scales(b, full, l->scales, s0 * s1);
  l->zeros = tensor(b, join(full, name, "zeros"), NS_U8, s0, s1, NULL);
}

static void linear(builder *b, ns_linear *l, const char *name, const json_node *spec, int outs, int ins, int bias, int depth);

static void factors(builder *b, ns_linear *l, const char *name, const json_node *spec, int bias) {
  char full[128];
  int64_t rank;
  if (!json_int(json_get(b->doc, spec, "rank"), 1, (int64_t)(l->outs < l->ins ? l->outs : l->ins), &rank)) {
    FAIL(b, "a rank from 1 to the narrower side", "the map '%s' has another rank", name);
    return;
  }
  ns_linear *pair = ns_take(b->arena, 2, sizeof *pair), spare[2];
  if (!pair) pair = spare; /* counting */
  memset(pair, 0, 2 * sizeof *pair);
  linear(b, &pair[0], join(full, name, "first"), json_get(b->doc, spec, "first"), (int)rank, l->ins, 0, 1);
  linear(b, &pair[1], join(full, name, "second"), json_get(b->doc, spec, "second"), l->outs, (int)rank, bias, 1);
  l->first = b->arena->base ? &pair[0] : NULL;
  l->second = b->arena->base ? &pair[1] : NULL;
}

static void linear(builder *b, ns_linear *l, const char *name, const json_node *spec, int outs, int ins, int bias, int depth) {
  char full[128];
  if (b->failed) return;
  memset(l, 0, sizeof *l);
  l->outs = outs;
  l->ins = ins;
  const json_node *kind = json_get(b->doc, spec, "kind");
  if (json_is(kind, "dense")) {
    l->kind = NS_DENSE;
    l->dtype = dtype_named(json_get(b->doc, spec, "dtype"));
    if (l->dtype > NS_BF16) {
      FAIL(b, "float32, float16, bfloat16", "the map '%s' has another dtype", name);
      return;
    }
    l->w = tensor(b, join(full, name, "weight"), l->dtype, outs, ins, NULL);
  } else if (json_is(kind, "quant")) {
    l->kind = NS_QUANT;
    quantized(b, l, name, spec, outs, ins, 1);
  } else if (json_is(kind, "lowrank") && depth == 0) {
    l->kind = NS_LOWRANK;
    factors(b, l, name, spec, bias);
    return;
  } else if (json_is(kind, "sparse") && depth == 0) {
    double t;
    l->kind = NS_SPARSE;
    if (!json_double(json_get(b->doc, spec, "threshold"), &t) || t < 0) {
      FAIL(b, "a threshold of 0 or more", "the map '%s' has another", name);
      return;
    }
    l->threshold = (float)t;
    if (json_get(b->doc, spec, "bits")) {
      quantized(b, l, name, spec, ins, outs, 0);
    } else {
      l->dtype = dtype_named(json_get(b->doc, spec, "dtype"));
      if (l->dtype > NS_BF16) {
        FAIL(b, "float32, float16, bfloat16", "the map '%s' has another dtype", name);
        return;
      }
      l->w = tensor(b, join(full, name, "weight"), l->dtype, ins, outs, NULL);
    }
    l->norms = vector(b, join(full, name, "norms"), ins, NS_F32);
    if (json_get(b->doc, spec, "rank")) factors(b, l, name, spec, 0);
  } else {
    FAIL(b, depth ? "dense, quant" : "dense, quant, lowrank, sparse", "the map '%s' is of an unknown kind", name);
    return;
  }
  if (!bias) return;
  const json_node *type = json_get(b->doc, spec, "bias"); /* dense maps: that of the weight */
  ns_dtype stored = type ? dtype_named(type) : l->kind == NS_DENSE ? l->dtype : NS_F32;
  l->bias = vector(b, join(full, name, "bias"), outs, stored > NS_BF16 ? NS_F32 : stored);
}

static void map(builder *b, ns_linear *l, const char *name, int outs, int ins, int bias) {
  const json_node *spec = json_get(b->doc, b->layers, name);
  if (b->failed) return;
  if (!spec) FAIL(b, "one entry for each linear map", "layer '%s' is missing", name);
  else linear(b, l, name, spec, outs, ins, bias, 0);
}

/* Angular frequency of every rotary pair, as models/llama.py has it. */
static void frequencies(builder *b, const json_node *config, float *out) {
  int half = b->m->head_dim / 2;
  double theta = 10000, factor = 1, low = 1, high = 4, old = 8192, fast = 32, slow = 1, scale = 1;
  const json *doc = b->doc;
  const json_node *s = json_get(doc, config, "rope_scaling"), *kind = json_get(doc, s, "kind");
  json_double(json_get(doc, config, "rope_theta"), &theta);
  json_double(json_get(doc, s, "factor"), &factor);
  json_double(json_get(doc, s, "low"), &low);
  json_double(json_get(doc, s, "high"), &high);
  json_double(json_get(doc, s, "original_context"), &old);
  json_double(json_get(doc, s, "beta_fast"), &fast);
  json_double(json_get(doc, s, "beta_slow"), &slow);
  if (!(theta > 1) || !(factor > 0) || !(old > 0) || !(fast > 0) || !(slow > 0)) {
    FAIL(b, "finite numbers above 0", "the rotary settings have others");
    return;
  }
  int yarn = json_is(kind, "yarn"), llama3 = json_is(kind, "llama3"), stretched = json_is(kind, "linear");
  if (s && s->type != JSON_NULL && !yarn && !llama3 && !stretched) {
    FAIL(b, "linear, llama3, yarn", "the rope scaling is of an unknown kind");
    return;
  }
  if (llama3 && !(low > 0 && high > low)) {
    FAIL(b, "0 < low < high", "the rotary settings have others");
    return;
  }
  double first = 0, last = 0;
  if (yarn) {
    first = fmax(floor(b->m->head_dim * log(old / (fast * 2 * PI)) / (2 * log(theta))), 0);
    last = fmin(ceil(b->m->head_dim * log(old / (slow * 2 * PI)) / (2 * log(theta))), b->m->head_dim - 1);
    scale = 0.1 * log(fmax(factor, 1.0)) + 1.0;
    json_double(json_get(doc, s, "attention_factor"), &scale);
  }
  b->m->rope_scale = (float)scale;
  if (!out) return;
  for (int j = 0; j < half; j++) {
    double f = pow(theta, -2.0 * j / b->m->head_dim);
    if (stretched) f /= factor;
    if (llama3) {
      double ramp = fmin(fmax((old / (2 * PI / f) - low) / (high - low), 0), 1);
      f = (1 - ramp) * f / factor + ramp * f;
    }
    if (yarn) {
      double span = last - first, ramp = fmin(fmax((j - first) / (span != 0 ? span : 1e-3), 0), 1);
      f = f / factor * ramp + f * (1 - ramp);
    }
    out[j] = (float)f;
  }
}

static int integer(builder *b, const json_node *object, const char *name, int64_t low, int64_t high, int fallback) {
  int64_t v = fallback;
  const json_node *n = json_get(b->doc, object, name);
  if (b->failed) return fallback;
  if (n && n->type == JSON_NULL) n = NULL;
  if (n ? !json_int(n, low, high, &v) : fallback < 0)
    FAIL(b, "a config as netsuke writes it", "'%s' is no number from %lld to %lld", name, (long long)low, (long long)high);
  return (int)v;
}

static int flag(builder *b, const json_node *object, const char *name) {
  const json_node *n = json_get(b->doc, object, name);
  return n && n->type == JSON_TRUE;
}

static void block(builder *b, ns_block *out, int i, const json_node *shape) {
  ns_model *m = b->m;
  char name[64], full[128];
  memset(out, 0, sizeof *out);
  out->hidden = integer(b, shape, "hidden", 1, 1 << 20, -1);
  out->value_dim = integer(b, shape, "value_dim", 1, 1 << 12, -1);
  out->pairs = m->head_dim / 2;
  const json_node *pairs = json_get(b->doc, shape, "pairs");
  if (pairs && pairs->type == JSON_ARRAY) {
    const json_node *row = json_child(b->doc, pairs);
    int64_t count = row && row->type == JSON_ARRAY ? (int64_t)row->size : 0, v;
    if (pairs->size != (size_t)m->kv_heads || count < 1 || count > m->head_dim / 2) {
      FAIL(b, "one list of pairs for each key head", "the pairs of block %d are uneven", i);
      return;
    }
    out->pairs = (int)count;
    out->pair = ns_take(b->arena, (uint64_t)m->kv_heads * (uint64_t)count, sizeof(int32_t));
    int at = 0;
    for (; row; row = json_next(b->doc, row)) {
      if (row->type != JSON_ARRAY || row->size != (size_t)count) {
        FAIL(b, "lists of one length", "the pairs of block %d are uneven", i);
        return;
      }
      for (const json_node *p = json_child(b->doc, row); p; p = json_next(b->doc, p), at++) {
        if (!json_int(p, 0, m->head_dim / 2 - 1, &v)) {
          FAIL(b, "numbers below half the head's width", "the pairs of block %d are others", i);
          return;
        }
        if (out->pair) out->pair[at] = (int32_t)v;
      }
    }
  }
  if (b->failed) return;
  int qk = 2 * out->pairs, vd = out->value_dim;
  struct { const char *leaf; ns_linear *l; int64_t outs, ins; int bias; } maps[] = {
      {"q", &out->q, (int64_t)m->heads * qk, m->width, m->qkv_bias},
      {"k", &out->k, (int64_t)m->kv_heads * qk, m->width, m->qkv_bias},
      {"v", &out->v, (int64_t)m->kv_heads * vd, m->width, m->qkv_bias},
      {"o", &out->o, m->width, (int64_t)m->heads * vd, m->out_bias},
      {"gate", &out->gate, out->hidden, m->width, m->mlp_bias},
      {"up", &out->up, out->hidden, m->width, m->mlp_bias},
      {"down", &out->down, m->width, out->hidden, m->mlp_bias},
  };
  for (int j = 0; j < 7; j++) {
    snprintf(name, sizeof name, "blocks.%d.%s", i, maps[j].leaf);
    if (maps[j].outs > 1 << 24 || maps[j].ins > 1 << 24) {
      FAIL(b, "heads times width below 2^24", "the map '%s' is too wide", name);
      return;
    }
    map(b, maps[j].l, name, (int)maps[j].outs, (int)maps[j].ins, maps[j].bias);
  }
  snprintf(name, sizeof name, "blocks.%d", i);
  out->attn_norm = vector(b, join(full, name, "attn_norm.weight"), m->width, NS_F32);
  out->mlp_norm = vector(b, join(full, name, "mlp_norm.weight"), m->width, NS_F32);
  if (m->qk_norm) {
    if (qk != m->head_dim) {
      FAIL(b, "all rotary pairs", "the normed heads of block %d are cut", i);
      return;
    }
    out->q_norm = vector(b, join(full, name, "q_norm.weight"), m->head_dim, NS_F32);
    out->k_norm = vector(b, join(full, name, "k_norm.weight"), m->head_dim, NS_F32);
  }
}

int ns_model_read(ns_model *m, ns_arena *arena, const json *doc, const ns_weights *w, ns_error *error) {
  memset(m, 0, sizeof *m);
  builder *b = &(builder){m, arena, doc, NULL, w, error, 0};
  const json_node *root = &doc->nodes[0], *config = json_get(doc, root, "config"), *n;
  int64_t version;
  if (!json_is(json_get(doc, root, "format"), "netsuke") || !json_int(json_get(doc, root, "version"), 1, 1, &version) ||
      !json_is(json_get(doc, root, "family"), "llama"))
    return ns_fail(error, "a netsuke artifact of version 1, family llama", "the manifest says something else");
  if ((n = json_get(doc, root, "sites")) && n->size)
    return ns_fail(error, "activations in floats", "the artifact quantizes activations to static grids, which this engine does not");
  b->layers = json_get(doc, root, "layers");
  m->vocab = integer(b, config, "vocab", 1, 1 << 22, -1);
  m->width = integer(b, config, "width", 1, 1 << 17, -1);
  m->heads = integer(b, config, "heads", 1, 1 << 12, -1);
  m->kv_heads = integer(b, config, "kv_heads", 1, 1 << 12, -1);
  m->head_dim = integer(b, config, "head_dim", 2, 1 << 12, -1);
  m->context = integer(b, config, "context", 1, 1 << 28, -1);
  m->window = integer(b, config, "window", 1, 1 << 28, 0);
  m->tied = flag(b, config, "tied");
  m->qkv_bias = flag(b, config, "qkv_bias");
  m->out_bias = flag(b, config, "out_bias");
  m->mlp_bias = flag(b, config, "mlp_bias");
  m->qk_norm = flag(b, config, "qk_norm");
  double eps = 1e-5;
  if ((n = json_get(doc, config, "norm_eps")) && (!json_double(n, &eps) || eps < 0 || eps >= 1))
    FAIL(b, "0 to 1", "'norm_eps' is something else");
  m->eps = (float)eps;
  const json_node *shapes = json_get(doc, config, "blocks");
  if (!b->failed && (!shapes || shapes->type != JSON_ARRAY || shapes->size < 1 || shapes->size > 1 << 11))
    FAIL(b, "1 to 2048 blocks", "the config has another number of blocks");
  if (!b->failed && (m->heads % m->kv_heads || m->head_dim % 2))
    FAIL(b, "heads that divide among key heads, an even head_dim", "%d heads, %d key heads, head_dim %d", m->heads, m->kv_heads,
         m->head_dim);
  if (b->failed) return -1;
  m->layers = (int)shapes->size;
  m->frequency = ns_take(arena, (uint64_t)m->head_dim / 2, sizeof(float));
  frequencies(b, config, m->frequency);
  m->blocks = ns_take(arena, (uint64_t)m->layers, sizeof(ns_block));
  map(b, &m->embed, "embed", m->vocab, m->width, 0);
  if (!b->failed && (m->embed.kind == NS_LOWRANK || m->embed.kind == NS_SPARSE))
    FAIL(b, "a dense or quantized table", "the embedding table is of another kind");
  int i = 0;
  for (const json_node *s = json_child(doc, shapes); s && !b->failed; s = json_next(doc, s), i++) {
    ns_block spare;
    block(b, m->blocks ? &m->blocks[i] : &spare, i, s);
  }
  m->norm = vector(b, "norm.weight", m->width, NS_F32);
  if (!m->tied) map(b, &m->head, "head", m->vocab, m->width, 0);
  m->table_bytes = arena->used;
  return b->failed ? -1 : 0;
}
