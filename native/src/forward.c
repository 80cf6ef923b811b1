/* The forward pass of models/llama.py. All threads go through it side by side and share out the units of every phase. */
#include <math.h>

#include "engine.h"

/* The run that row r belongs to. */
static const ns_run *run_of(const ns_engine *e, int r) {
  const ns_run *run = e->run;
  while (r >= run->row + run->count) run++;
  return run;
}

static void embed(ns_engine *e, ns_turn *t, int M) {
  const ns_model *m = &e->model;
  size_t half = (size_t)m->head_dim / 2;
  NS_UNITS(t, M, M / (e->threads * 4) + 1, r) {
    const ns_run *run = run_of(e, r);
    e->k->row(&m->embed, e->tokens[r], e->x + (size_t)r * (size_t)m->width);
    float position = (float)(run->start + r - run->row);
    for (size_t j = 0; j < half; j++) {
      e->cosine[(size_t)r * half + j] = cosf(position * m->frequency[j]) * m->rope_scale;
      e->sine[(size_t)r * half + j] = sinf(position * m->frequency[j]) * m->rope_scale;
    }
  }
  ns_pass(t, M);
}

/* Turns one head of row r; `head` counts key heads. `turned` has room for cos and sin of a cut head. */
static void turn(const ns_engine *e, const ns_block *b, float *x, int r, int head, float *turned) {
  size_t at = (size_t)r * (size_t)(e->model.head_dim / 2);
  const float *cosine = e->cosine + at, *sine = e->sine + at;
  if (b->pair) {
    const int32_t *pair = b->pair + (size_t)head * (size_t)b->pairs;
    for (int j = 0; j < b->pairs; j++) turned[j] = cosine[pair[j]], turned[b->pairs + j] = sine[pair[j]];
    cosine = turned, sine = turned + b->pairs;
  }
  e->k->rotate(x, cosine, sine, b->pairs);
}

/* Rotates and stores one key head of one row. */
static void remember(ns_engine *e, int id, int layer, const ns_run *run, int i, int head) {
  const ns_block *b = &e->model.blocks[layer];
  int r = run->row + i, qk = 2 * b->pairs;
  float *key = e->kk + (size_t)r * (size_t)b->k.outs + (size_t)(head * qk);
  ns_scratch *s = &e->scratch[id];
  if (b->k_norm) e->k->rmsnorm(key, b->k_norm, e->model.eps, qk, 0, qk, key);
  turn(e, b, key, r, head, s->query);
  ns_kv kv = ns_kv_at(e, layer, run->slot, head);
  e->k->kv_store(&kv, run->start + i, key, e->v + (size_t)r * (size_t)b->v.outs + (size_t)(head * b->value_dim));
}

/* Attention of rows first … first+count-1 of a run, for the queries that share one key head. */
static void attend(ns_engine *e, int id, int layer, const ns_run *run, int first, int count, int head) {
  const ns_model *m = &e->model;
  const ns_block *b = &m->blocks[layer];
  int group = m->heads / m->kv_heads, qk = 2 * b->pairs, vd = b->value_dim;
  ns_kv kv = ns_kv_at(e, layer, run->slot, head);
  ns_scratch *s = &e->scratch[id];
  float *turned = s->query + NS_QUERIES * qk, scale = 1.0f / sqrtf((float)m->head_dim);
  for (int at = 0; at < count * group; at += NS_QUERIES) {
    int n = count * group - at < NS_QUERIES ? count * group - at : NS_QUERIES, from[NS_QUERIES], to[NS_QUERIES];
    for (int j = 0; j < n; j++) {
      int i = first + (at + j) / group, h = head * group + (at + j) % group, r = run->row + i;
      float *q = s->query + j * qk;
      memcpy(q, e->q + (size_t)r * (size_t)b->q.outs + (size_t)(h * qk), (size_t)qk * sizeof(float));
      if (b->q_norm) e->k->rmsnorm(q, b->q_norm, m->eps, qk, 0, qk, q);
      turn(e, b, q, r, head, turned);
      to[j] = run->start + i + 1;
      from[j] = m->window && to[j] > m->window ? to[j] - m->window : 0;
    }
    e->k->attend(&kv, n, s->query, from, to, scale, s->attended, s->weights);
    for (int j = 0; j < n; j++) {
      int r = run->row + first + (at + j) / group, h = head * group + (at + j) % group;
      memcpy(e->attended.x + (size_t)r * e->attended.stride + (size_t)(h * vd), s->attended + j * kv.vd16, (size_t)vd * sizeof(float));
    }
  }
}

enum { STRETCH = 16 }; /* rows of a prompt that one thread takes at a time */

static void attention(ns_engine *e, ns_turn *t, int layer, int M, int fused) {
  int heads = e->model.kv_heads;
  if (fused) { /* one row per sequence */
    NS_UNITS(t, M * heads, 1, u) {
      const ns_run *run = &e->run[u / heads];
      remember(e, t->id, layer, run, 0, u % heads);
      attend(e, t->id, layer, run, 0, 1, u % heads);
    }
    ns_pass(t, M * heads);
    return;
  }
  /* a prompt's rows see one another: all keys first */
  NS_UNITS(t, M * heads, M * heads / (e->threads * 8) + 1, u) {
    const ns_run *run = run_of(e, u / heads);
    remember(e, t->id, layer, run, u / heads - run->row, u % heads);
  }
  ns_pass(t, M * heads);
  /* stretches of rows counted from the end of all rows, since later rows see more and should not be drawn last */
  int stretches = (M + STRETCH - 1) / STRETCH;
  NS_UNITS(t, stretches * heads, 1, u) {
    int last = M - u / heads * STRETCH, first = last > STRETCH ? last - STRETCH : 0;
    while (first < last) { /* a stretch may touch several sequences */
      const ns_run *run = run_of(e, first);
      int end = run->row + run->count < last ? run->row + run->count : last;
      attend(e, t->id, layer, run, first - run->row, end - first, u % heads);
      first = end;
    }
  }
  ns_pass(t, stretches * heads);
}

static void feed_forward(ns_engine *e, ns_turn *t, const ns_block *b, int M) {
  const ns_model *m = &e->model;
  size_t wide = e->hidden.stride;
  if (ns_pairable(&b->gate, &b->up)) {
    ns_op ops[] = {{&b->gate, e->hidden.x, wide, NS_STORE}, {&b->up, e->hidden.x, wide, NS_SILU}};
    ns_step(e, t, &e->normed, e->x, (size_t)m->width, b->mlp_norm, ops, 2, M, e->sparse_row);
    return;
  }
  ns_op ops[] = {{&b->gate, e->hidden.x, wide, NS_STORE}, {&b->up, e->up, wide, NS_STORE}};
  ns_step(e, t, &e->normed, e->x, (size_t)m->width, b->mlp_norm, ops, 2, M, e->sparse_row);
  NS_UNITS(t, M, 1, r) e->k->silu_mul(e->hidden.x + (size_t)r * wide, e->up + (size_t)r * wide, b->hidden);
  ns_pass(t, M);
}

void ns_forward_job(void *argument, ns_turn *t) {
  ns_engine *e = argument;
  const ns_model *m = &e->model;
  size_t C = (size_t)m->width;
  int M = atomic_load_explicit(&e->rows, memory_order_relaxed), wanted = atomic_load_explicit(&e->wanted, memory_order_relaxed);
  int fused = atomic_load_explicit(&e->fused, memory_order_relaxed);
  embed(e, t, M);
  for (int i = 0; i < m->layers; i++) {
    const ns_block *b = &m->blocks[i];
    ns_op qkv[] = {{&b->q, e->q, (size_t)b->q.outs, NS_STORE}, {&b->k, e->kk, (size_t)b->k.outs, NS_STORE},
                   {&b->v, e->v, (size_t)b->v.outs, NS_STORE}};
    ns_step(e, t, &e->normed, e->x, C, b->attn_norm, qkv, 3, M, e->sparse_row);
    attention(e, t, i, M, fused);
    ns_op o = {&b->o, e->x, C, NS_ADD}, down = {&b->down, e->x, C, NS_ADD};
    ns_step(e, t, &e->attended, NULL, 0, NULL, &o, 1, M, e->sparse_row);
    feed_forward(e, t, b, M);
    ns_step(e, t, &e->hidden, NULL, 0, NULL, &down, 1, M, e->sparse_row);
  }
  if (!wanted) return;
  NS_UNITS(t, 1, 1, u) { /* the rows whose logits are asked for move to the front, then the head */
    for (int i = u; i < wanted; i++) {
      e->sparse_last[i] = e->sparse_row[e->wanted_row[i]];
      memmove(e->x + (size_t)i * C, e->x + (size_t)e->wanted_row[i] * C, C * sizeof(float));
    }
  }
  ns_pass(t, 1);
  ns_op head = {m->tied ? &m->embed : &m->head, e->logits, (size_t)m->vocab, NS_STORE};
  ns_step(e, t, &e->last, e->x, C, m->norm, &head, 1, wanted, e->sparse_last);
}
