/* Decides where everything lies in the one block that an engine allocates. The same code counts for `ns_plan` and places for
 * `ns_open`, so a plan is exact by construction. */
#include "engine.h"

static const uint64_t MOST_BYTES = (uint64_t)1 << 56, MOST_UNITS = 1 << 24; /* of work in a phase, as threads.c counts them */

static uint64_t up(uint64_t n, uint64_t to) { return (n + to - 1) / to * to; }

uint64_t ns_kv_head_bytes(const ns_engine *e, int layer) {
  const ns_block *b = &e->model.blocks[layer];
  uint64_t each = e->o.kv == NS_KV_F16 ? 2 : 1, tokens = (uint64_t)e->padded;
  uint64_t bytes = up(tokens * 2 * (uint64_t)b->pairs * each, 64) + up(tokens * up((uint64_t)b->value_dim, 16) * each, 64);
  return bytes + (e->o.kv == NS_KV_INT8 ? 2 * tokens * sizeof(float) : 0);
}

ns_kv ns_kv_at(const ns_engine *e, int layer, int slot, int head) {
  const ns_block *b = &e->model.blocks[layer];
  uint64_t each = e->o.kv == NS_KV_F16 ? 2 : 1, tokens = (uint64_t)e->padded;
  uint8_t *at = e->kv + (uint64_t)slot * e->kv_slot + e->kv_layer[layer] + (uint64_t)head * ns_kv_head_bytes(e, layer);
  ns_kv kv = {e->o.kv, 2 * b->pairs, b->value_dim, (int)up((uint64_t)b->value_dim, 16), at, NULL, NULL, NULL};
  at += up(tokens * (uint64_t)kv.qk * each, 64);
  kv.values = at;
  at += up(tokens * (uint64_t)kv.vd16 * each, 64);
  if (kv.kind == NS_KV_INT8) {
    kv.key_scale = (float *)(void *)at;
    kv.value_scale = kv.key_scale + tokens;
  }
  return kv;
}

/* What the maps of one step need of their shared input. */
typedef struct {
  int blocks[NS_MOST_BLOCKS], count, four, two, over; /* over: more sizes than there is room for */
} needs;

static void need_block(needs *n, const ns_linear *l) {
  if (!l->bits) return;
  if (l->kind == NS_QUANT) {
    n->four |= l->bits == 4;
    n->two |= l->bits == 2;
  }
  for (int i = 0; i < n->count; i++)
    if (n->blocks[i] == l->block) return;
  n->over |= n->count == NS_MOST_BLOCKS;
  if (!n->over) n->blocks[n->count++] = l->block;
}

static void need(needs *n, const ns_linear *l) {
  if (l->kind == NS_LOWRANK) need_block(n, l->first);
  else need_block(n, l);
}

/* Places for an input of up to M rows; `ins` is its widest use, `blocks` the sizes that occur. */
static void place_input(ns_input *in, ns_arena *a, uint64_t M, uint64_t ins, const needs *n) {
  in->stride = up(ins, 64);
  in->x = ns_take(a, M * in->stride, sizeof(float));
  in->acts = n->count;
  for (int i = 0; i < n->count; i++) {
    ns_act *act = &in->act[i];
    act->block = n->blocks[i];
    uint64_t most = up(ins, (uint64_t)act->block) / (uint64_t)act->block;
    act->stride = (int)up(most * (uint64_t)act->block, 128);
    act->natural = ns_take(a, M * (uint64_t)act->stride, 1);
    uint64_t few = M < NS_FEW ? M : NS_FEW;
    act->split = n->four ? ns_take(a, few * (uint64_t)act->stride, 1) : NULL;
    act->split2 = n->two ? ns_take(a, few * (uint64_t)act->stride, 1) : NULL;
    act->scale = ns_take(a, M * most, sizeof(float));
    act->sum = ns_take(a, M * most, sizeof(int32_t));
  }
}

typedef struct {
  uint64_t tile, panel, sparse_width, sparse_ins, sparse_blocks, rank, rest;
  needs middle, rests;
} extremes;

static void widen(uint64_t *most, uint64_t value) { *most = value > *most ? value : *most; }

static void look(extremes *x, const ns_linear *l) {
  if (l->kind == NS_QUANT) {
    widen(&x->tile, ns_tile_bytes(l));
    widen(&x->panel, ns_panel_scratch(l));
  }
  if (l->kind == NS_SPARSE) {
    widen(&x->sparse_width, up((uint64_t)l->outs, 64));
    widen(&x->sparse_ins, (uint64_t)l->ins);
    widen(&x->sparse_blocks, l->bits ? up((uint64_t)l->ins, (uint64_t)l->block) / (uint64_t)l->block : 0);
    if (l->first) widen(&x->rest, (uint64_t)l->ins), need_block(&x->rests, l->first);
  }
  if (l->first) {
    widen(&x->rank, (uint64_t)l->first->outs);
    need_block(&x->middle, l->second);
    look(x, l->first);
    look(x, l->second);
  }
}

/* Reads the model twice when counting: descriptions of layers must exist before what they need can be counted. */
int ns_layout(ns_engine *e, ns_arena *a, const json *manifest, const ns_weights *w, ns_error *error) {
  ns_model *m = &e->model;
  if (ns_model_read(m, a, manifest, w, error)) return -1;
  if (!m->blocks) return 0; /* counting the tables only */
  uint64_t rows = (uint64_t)e->o.rows, slots = (uint64_t)e->o.slots, layers = (uint64_t)m->layers;
  if (rows * (uint64_t)m->kv_heads >= MOST_UNITS)
    return ns_fail(error, "rows times key heads below 2^24", "%d rows of %d key heads", e->o.rows, m->kv_heads);
  e->length = ns_take(a, slots, sizeof(int32_t));
  e->kv_layer = ns_take(a, layers, sizeof(uint64_t));
  e->run = ns_take(a, rows, sizeof(ns_run));
  e->wanted_row = ns_take(a, rows, sizeof(int32_t));
  e->sparse_row = ns_take(a, rows, 1);
  e->sparse_last = ns_take(a, rows, 1);
  e->memory.tables = a->used + sizeof(ns_engine);
  uint64_t mark = a->used;

  uint64_t per_slot = 0, q = 0, k = 0, v = 0, y = 0, f = 0;
  needs normed = {0}, attended = {0}, hidden = {0}, last = {0};
  extremes x = {0};
  int unpaired = 0;
  look(&x, &m->embed);
  look(&x, m->tied ? &m->embed : &m->head);
  need(&last, m->tied ? &m->embed : &m->head);
  for (uint64_t i = 0; i < layers; i++) {
    const ns_block *b = &m->blocks[i];
    const ns_linear *all[] = {&b->q, &b->k, &b->v, &b->gate, &b->up};
    if (e->kv_layer) e->kv_layer[i] = per_slot;
    per_slot += (uint64_t)m->kv_heads * ns_kv_head_bytes(e, (int)i);
    if (per_slot > MOST_BYTES / slots) /* before sums could wrap around */
      return ns_fail(error, "less context or fewer slots", "a cache of more than 2^56 bytes");
    widen(&q, (uint64_t)b->q.outs), widen(&k, (uint64_t)b->k.outs), widen(&v, (uint64_t)b->v.outs);
    widen(&y, (uint64_t)b->o.ins), widen(&f, (uint64_t)b->hidden);
    for (int j = 0; j < 5; j++) need(&normed, all[j]), look(&x, all[j]);
    unpaired |= !ns_pairable(&b->gate, &b->up);
    need(&attended, &b->o), look(&x, &b->o);
    need(&hidden, &b->down), look(&x, &b->down);
  }
  if (normed.over || attended.over || hidden.over || last.over || x.rests.over || x.middle.over)
    return ns_fail(error, "at most 7 sizes of groups among maps that read the same input", "maps in groups of too many sizes");
  e->kv_slot = per_slot;
  e->kv = ns_take(a, slots * per_slot, 1);
  e->memory.kv_cache = a->used - mark;
  mark = a->used;

  uint64_t C = (uint64_t)m->width, half = (uint64_t)m->head_dim / 2, logit_rows = (uint64_t)e->o.logit_rows;
  e->x = ns_take(a, rows * up(C, 16), sizeof(float));
  e->q = ns_take(a, rows * q, sizeof(float));
  e->kk = ns_take(a, rows * k, sizeof(float));
  e->v = ns_take(a, rows * up(v, 16), sizeof(float));
  e->cosine = ns_take(a, rows * half, sizeof(float));
  e->sine = ns_take(a, rows * half, sizeof(float));
  place_input(&e->normed, a, rows, C, &normed);
  place_input(&e->attended, a, rows, y, &attended);
  place_input(&e->hidden, a, rows, f, &hidden);
  place_input(&e->last, a, logit_rows, C, &last);
  e->up = unpaired ? ns_take(a, rows * e->hidden.stride, sizeof(float)) : NULL;
  e->logits = ns_take(a, logit_rows * (uint64_t)m->vocab, sizeof(float));
  for (int i = 0; i < NS_MOST_OPS; i++) {
    ns_extra *extra = &e->extra[i];
    if (x.sparse_ins) {
      extra->channels = ns_take(a, x.sparse_ins, sizeof(int32_t));
      extra->start = ns_take(a, x.sparse_ins + 1, sizeof(int32_t));
      extra->x = ns_take(a, rows * x.sparse_ins, sizeof(float));
      extra->q = ns_take(a, rows * x.sparse_ins, 1);
      extra->scale = ns_take(a, rows * x.sparse_blocks, sizeof(float));
      extra->sum = ns_take(a, rows * x.sparse_blocks, sizeof(int32_t));
    }
    if (x.rest) place_input(&extra->rest, a, rows, x.rest, &x.rests);
    if (x.rank) place_input(&extra->middle, a, rows, x.rank, &x.middle);
  }
  e->memory.activations = a->used - mark;
  mark = a->used;

  uint64_t qk = 0, vd = 0;
  for (uint64_t i = 0; i < layers; i++) widen(&qk, 2 * (uint64_t)m->blocks[i].pairs), widen(&vd, up((uint64_t)m->blocks[i].value_dim, 16));
  uint64_t wide = up(rows, NS_FEW) * 32;
  widen(&wide, x.sparse_width * NS_FEW);
  for (int t = 0; t < e->threads; t++) {
    ns_scratch *s = &e->scratch[t];
    s->tile = ns_take(a, rows > NS_FEW ? x.tile : 0, 1);
    s->panel = ns_take(a, x.panel, 1);
    s->out = ns_take(a, wide, sizeof(float));
    s->sums = ns_take(a, x.sparse_width * NS_FEW, sizeof(int32_t));
    s->query = ns_take(a, (NS_QUERIES + 1) * qk, sizeof(float));
    s->attended = ns_take(a, NS_QUERIES * vd, sizeof(float));
    s->weights = ns_take(a, NS_QUERIES * NS_KEYS, sizeof(float));
  }
  e->memory.scratch = a->used - mark;
  e->memory.weights = m->weight_bytes;
  e->memory.allocated = e->memory.tables + e->memory.kv_cache + e->memory.activations + e->memory.scratch;
  return 0;
}
