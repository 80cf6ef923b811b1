/* A model as its artifact describes it: sizes, and where in the mapped file each tensor lies. */
#ifndef NS_MODEL_H
#define NS_MODEL_H

#include <stddef.h>
#include <stdint.h>

#include "json.h"
#include "netsuke.h"

typedef enum { NS_F32, NS_F16, NS_BF16, NS_U8, NS_OTHER } ns_dtype;
typedef enum { NS_DENSE, NS_QUANT, NS_LOWRANK, NS_SPARSE } ns_kind;

/* y = x W' + b, W (outs, ins). Which fields count depends on the kind:
 *   dense    w (outs, ins) of dtype
 *   quant    codes (outs, row_bytes), scales and zeros (outs, groups)
 *   lowrank  first (rank, ins), second (outs, rank)
 *   sparse   w (ins, outs) of dtype, or codes (ins, row_bytes), scales and zeros (groups, outs); norms (ins); perhaps first, second
 * The dimensions of a weight never change after loading, so kernels may trust them. */
typedef struct ns_linear ns_linear;
struct ns_linear {
  ns_kind kind;
  int outs, ins;
  ns_dtype dtype;
  const void *w;
  int bits, group, groups;  /* bits 0: not quantized */
  int block;                /* inputs that share one scale of the activations; divides group */
  size_t row_bytes;
  const uint8_t *codes, *zeros;
  const uint16_t *scales;
  float *bias;              /* outs floats in the arena, or NULL */
  float threshold;
  const float *norms;
  ns_linear *first, *second;
};

typedef struct {
  int hidden, value_dim, pairs; /* pairs: rotary pairs kept per key head */
  int32_t *pair;                /* (kv_heads, pairs) indices below head_dim / 2, or NULL: all, in order */
  ns_linear q, k, v, o, gate, up, down;
  float *attn_norm, *mlp_norm, *q_norm, *k_norm; /* the last two are NULL without qk_norm */
} ns_block;

typedef struct {
  int vocab, width, layers, heads, kv_heads, head_dim, context, window; /* window 0: attends to everything */
  int tied, qkv_bias, out_bias, mlp_bias, qk_norm;
  float eps, rope_scale;
  float *frequency; /* head_dim / 2 */
  ns_block *blocks;
  ns_linear embed, head;
  float *norm;
  uint64_t weight_bytes; /* mapped */
  uint64_t table_bytes;  /* of this model in the arena */
} ns_model;

/* Memory that is counted first and given out afterwards: run the same code twice, once with base NULL. */
typedef struct {
  uint8_t *base;
  uint64_t used, room;
} ns_arena;

void *ns_take(ns_arena *arena, uint64_t count, uint64_t size); /* aligned to 64; NULL while counting */

typedef struct {
  const uint8_t *data; /* the whole safetensors file, NULL while planning */
  size_t size, start;  /* of the file; where tensors begin */
  json header;
} ns_weights;

int ns_weights_open(ns_weights *weights, const void *data, size_t size, ns_error *error);
void ns_weights_close(ns_weights *weights);

/* Fills `model` with everything from `arena`. With weights NULL or an arena that only counts nothing is read but the manifest.
 * Call it first with a counting arena and then with one of that size. */
int ns_model_read(ns_model *model, ns_arena *arena, const json *manifest, const ns_weights *weights, ns_error *error);

int ns_fail(ns_error *error, const char *allowed, const char *found, ...) __attribute__((format(printf, 3, 4)));

#endif
