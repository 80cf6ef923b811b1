/* What an engine holds. The layout is decided in plan.c, the forward pass is in forward.c, products in linear.c. */
#ifndef NS_ENGINE_H
#define NS_ENGINE_H

#include "kernels/kernels.h"
#include "model.h"
#include "threads.h"

enum { NS_MOST_OPS = 3, NS_MOST_BLOCKS = 7, NS_MOST_RUNS = 4096 };

/* The input of one or more linear maps: floats, and int8 copies for each size of block that they use. */
typedef struct {
  float *x; /* (M, stride), zero beyond ins up to a multiple of 16 */
  size_t stride;
  int ins, acts;
  ns_act act[NS_MOST_BLOCKS];
} ns_input;

typedef enum { NS_STORE, NS_ADD, NS_SILU } ns_mode; /* y = r; y += r; y = silu(y) * r */

typedef struct {
  const ns_linear *l;
  float *y; /* (M, ystride) */
  size_t ystride;
  ns_mode mode;
} ns_op;

/* Room for the extra paths of one map of a step: chosen channels, the rest of the input, the narrow middle of a low-rank pair. */
typedef struct {
  ns_picked picked;
  int32_t *channels, *start;
  float *x, *scale;
  int8_t *q;
  int32_t *sum;
  ns_input rest, middle;
} ns_extra;

typedef struct { /* per thread */
  void *tile, *panel;
  float *out;              /* (rows or NS_FEW, 32), and of transposed weights (NS_FEW, width) */
  int32_t *sums;           /* the same for the integers of transposed weights */
  float *query, *attended, *weights;
} ns_scratch;

typedef struct {
  int row, count, slot, start; /* rows of one slot in this forward; the position of the first */
} ns_run;

struct ns_engine {
  ns_options o;
  ns_memory memory;
  ns_model model;
  const ns_kernels *k;
  ns_pool pool;
  uint8_t *arena;
  uint64_t arena_bytes;
  const void *map; /* the weights, unmapped at the end when map_bytes > 0 */
  size_t map_bytes;
  int threads, context, padded; /* padded: context in whole steps of attention */
  /* keys and values: of a slot, a block, a key head */
  uint8_t *kv;
  uint64_t *kv_layer; /* offset of a block's part in a slot */
  uint64_t kv_slot;   /* bytes per slot */
  int32_t *length;    /* tokens held, per slot */
  /* activations */
  float *x, *q, *kk, *v, *up, *logits, *cosine, *sine; /* up: NULL where no block needs it */
  ns_input normed, attended, hidden, last;
  ns_extra extra[NS_MOST_OPS];
  ns_scratch scratch[NS_MOST_THREADS];
  /* the forward under way */
  int runs;
  atomic_int rows, wanted, fused; /* these decide about phases, and a thread of the last forward may still look */
  const int32_t *tokens;
  const uint8_t *want;
  ns_run *run;
  int32_t *wanted_row;
  uint8_t *sparse_row, *sparse_last; /* rows whose channels may be left out */
};

/* Sizes and, with a base, places of everything in the arena. */
int ns_layout(struct ns_engine *e, ns_arena *arena, const json *manifest, const ns_weights *weights, ns_error *error);

/* Products of M rows of `in` with the maps of `ops` (one step of the pass; all threads call it). `norm`: in->x is first filled
 * with the normed rows of `source`. `left_out`: rows whose channels a sparse map may leave out, or NULL. NS_SILU is for the second
 * of two maps that are ns_pairable. */
void ns_step(struct ns_engine *e, ns_turn *turn, const ns_input *in, const float *source, size_t source_stride, const float *norm,
             const ns_op *ops, int count, int M, const uint8_t *left_out);
int ns_pairable(const ns_linear *a, const ns_linear *b);
ns_kv ns_kv_at(const struct ns_engine *e, int layer, int slot, int head);
uint64_t ns_kv_head_bytes(const struct ns_engine *e, int layer); /* keys and values of one key head, one slot */

void ns_forward_job(void *engine, ns_turn *turn);

#endif
