/* The forward pass of models/llama.py. All threads run it side by side and meet between steps. */
#include <math.h>

#include "engine.h"

static void embed(ns_engine *e, int id) {
  const ns_model *m = &e->model;
  int half = m->head_dim / 2;
  for (int run = 0; run < e->runs; run++)
    for (int i = 0; i < e->run[run].count; i++) {
      int r = e->run[run].row + i;
      if (r % e->threads != id) continue;
      e->k->row(&m->embed, e->tokens[r], e->x + (size_t)r * (size_t)m->width);
      float position = (float)(e->run[run].start + i);
      for (int j = 0; j < half; j++) {
        e->cosine[(size_t)r * (size_t)half + (size_t)j] = cosf(position * m->frequency[j]) * m->rope_scale;
        e->sine[(size_t)r * (size_t)half + (size_t)j] = sinf(position * m->frequency[j]) * m->rope_scale;
      }
    }
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

void ns_attention(ns_engine *e, int id, int layer) {
  int heads = e->model.kv_heads;
  if (!e->fused) { /* a prompt's rows see one another: all keys first */
    for (int run = 0, unit = 0; run < e->runs; run++)
      for (int i = 0; i < e->run[run].count; i++)
        for (int h = 0; h < heads; h++, unit++)
          if (unit % e->threads == id) remember(e, id, layer, &e->run[run], i, h);
    ns_pool_meet(&e->pool);
  }
  int counter = ns_next(e, id), mine = atomic_fetch_add(&e->counter[counter], 1), unit = 0;
  for (int run = 0; run < e->runs; run++)
    for (int first = e->run[run].count - 1; first >= 0; first -= STRETCH) /* the longest stretches first */
      for (int h = 0; h < heads; h++, unit++) {
        if (unit != mine) continue;
        int start = first - STRETCH + 1 > 0 ? first - STRETCH + 1 : 0;
        if (e->fused) remember(e, id, layer, &e->run[run], 0, h);
        attend(e, id, layer, &e->run[run], start, first - start + 1, h);
        mine = atomic_fetch_add(&e->counter[counter], 1);
      }
  ns_pool_meet(&e->pool);
}

static void feed_forward(ns_engine *e, int id, const ns_block *b, int M) {
  const ns_model *m = &e->model;
  size_t wide = e->hidden.stride;
  if (ns_pairable(&b->gate, &b->up)) {
    ns_op ops[] = {{&b->gate, e->hidden.x, wide, NS_STORE}, {&b->up, e->hidden.x, wide, NS_SILU}};
    ns_step(e, id, &e->normed, e->x, (size_t)m->width, b->mlp_norm, ops, 2, M, e->sparse_row);
    return;
  }
  ns_op ops[] = {{&b->gate, e->hidden.x, wide, NS_STORE}, {&b->up, e->up, wide, NS_STORE}};
  ns_step(e, id, &e->normed, e->x, (size_t)m->width, b->mlp_norm, ops, 2, M, e->sparse_row);
  for (int r = id; r < M; r += e->threads) e->k->silu_mul(e->hidden.x + (size_t)r * wide, e->up + (size_t)r * wide, b->hidden);
  ns_pool_meet(&e->pool);
}

void ns_forward_job(void *argument, int id) {
  ns_engine *e = argument;
  const ns_model *m = &e->model;
  size_t C = (size_t)m->width;
  int M = e->rows;
  embed(e, id);
  ns_pool_meet(&e->pool);
  for (int i = 0; i < m->layers; i++) {
    const ns_block *b = &m->blocks[i];
    ns_op qkv[] = {{&b->q, e->q, (size_t)b->q.outs, NS_STORE}, {&b->k, e->kk, (size_t)b->k.outs, NS_STORE},
                   {&b->v, e->v, (size_t)b->v.outs, NS_STORE}};
    ns_step(e, id, &e->normed, e->x, C, b->attn_norm, qkv, 3, M, e->sparse_row);
    ns_attention(e, id, i);
    ns_op o = {&b->o, e->x, C, NS_ADD}, down = {&b->down, e->x, C, NS_ADD};
    ns_step(e, id, &e->attended, NULL, 0, NULL, &o, 1, M, e->sparse_row);
    feed_forward(e, id, b, M);
    ns_step(e, id, &e->hidden, NULL, 0, NULL, &down, 1, M, e->sparse_row);
  }
  if (!e->wanted) return;
  /* the rows whose logits are asked for move to the front, then the head */
  if (id == 0)
    for (int i = 0; i < e->wanted; i++) {
      e->sparse_last[i] = e->sparse_row[e->wanted_row[i]];
      memmove(e->x + (size_t)i * C, e->x + (size_t)e->wanted_row[i] * C, C * sizeof(float));
    }
  ns_pool_meet(&e->pool);
  ns_op head = {m->tied ? &m->embed : &m->head, e->logits, (size_t)m->vocab, NS_STORE};
  ns_step(e, id, &e->last, e->x, C, m->norm, &head, 1, e->wanted, e->sparse_last);
}
