/* One step of the pass: several linear maps with a common input, any mix of kinds. */
#include <math.h>

#include "engine.h"

static const ns_act *act_of(const ns_input *in, int block) {
  for (int i = 0; i < in->acts; i++)
    if (in->act[i].block == block) return &in->act[i];
  return NULL;
}

/* A thread's own view of an input whose rows have `ins` numbers in this step. */
static ns_input shaped(const ns_input *in, int ins, int M) {
  ns_input out = *in;
  out.ins = ins;
  for (int i = 0; i < out.acts; i++) {
    ns_act *a = &out.act[i];
    a->blocks = (ins + a->block - 1) / a->block;
    a->flip = M > NS_FEW ? 128 : 0;
  }
  return out;
}

/* Inputs from … to-1 of row m in all int8 copies. */
static void quantize(ns_engine *e, const ns_input *in, int m, int from, int to, int M) {
  for (int i = 0; i < in->acts; i++) {
    ns_act a = in->act[i];
    if (M > NS_FEW) a.split = a.split2 = NULL;
    e->k->quantize(in->x + (size_t)m * in->stride, in->ins, &a, m, from / a.block, (to + a.block - 1) / a.block);
  }
}

static void clear_tail(const ns_input *in, int m) {
  float *x = in->x + (size_t)m * in->stride;
  for (int i = in->ins; i < ((in->ins + 15) & ~15); i++) x[i] = 0;
}

/* Fills the input: norms the source if asked to, makes the int8 copies. Rows are divided among threads; few rows are cut into
 * pieces of whole blocks. */
static void prepare(ns_engine *e, ns_turn *t, const ns_input *in, const float *source, size_t stride, const float *norm, int M) {
  int parts = M >= 2 * e->threads || in->ins < 1024 ? 1 : e->threads;
  for (int i = 0; i < in->acts; i++)
    if (64 % in->act[i].block) parts = 1;
  int width = ((in->ins + parts - 1) / parts + 63) & ~63, units = M * parts;
  NS_UNITS(t, units, units / (e->threads * 8) + 1, unit) {
    int m = unit / parts, from = unit % parts * width, to = from + width < in->ins ? from + width : in->ins;
    if (from >= to) continue;
    if (norm) e->k->rmsnorm(source + (size_t)m * stride, norm, e->model.eps, in->ins, from, to, in->x + (size_t)m * in->stride);
    if (to == in->ins) clear_tail(in, m);
    quantize(e, in, m, from, to, M);
  }
  ns_pass(t, units);
}

/* The channels of a sparse map for these rows: those that any row needs. A row takes nothing from a channel that it left out. */
static void pick(ns_extra *x, const ns_linear *l, const ns_input *in, int M, const uint8_t *left_out) {
  const ns_act *a = l->bits ? act_of(in, l->block) : NULL;
  int block = a ? a->block : 64, blocks = (l->ins + block - 1) / block, count = 0;
  for (int i = 0; i < l->ins; i++) {
    if (i % block == 0) x->start[i / block] = count;
    int chosen = 0;
    for (int m = 0; m < M && !chosen; m++)
      chosen = !left_out || !left_out[m] || fabsf(in->x[(size_t)m * in->stride + (size_t)i]) * l->norms[i] > l->threshold ||
               l->threshold == 0;
    if (chosen) x->channels[count++] = i;
  }
  x->start[blocks] = count;
  for (int m = 0; m < M; m++) {
    const float *v = in->x + (size_t)m * in->stride;
    int some = left_out && left_out[m] && l->threshold > 0;
    float *rest = l->first ? x->rest.x + (size_t)m * x->rest.stride : NULL;
    if (rest) memcpy(rest, v, (size_t)l->ins * sizeof(float));
    for (int b = 0; b < blocks; b++) {
      int32_t sum = 0;
      for (int c = x->start[b]; c < x->start[b + 1]; c++) {
        int i = x->channels[c], mine = !some || fabsf(v[i]) * l->norms[i] > l->threshold;
        if (mine && rest) rest[i] = 0;
        if (!a) {
          x->x[(size_t)m * (size_t)l->ins + (size_t)c] = mine ? v[i] : 0;
          continue;
        }
        int8_t q = (int8_t)((uint8_t)a->natural[(size_t)m * (size_t)a->stride + (size_t)i] ^ a->flip);
        x->q[(size_t)m * (size_t)l->ins + (size_t)c] = q = mine ? q : 0;
        sum += q;
      }
      if (!a) continue;
      x->sum[(size_t)m * (size_t)blocks + (size_t)b] = sum;
      x->scale[(size_t)m * (size_t)blocks + (size_t)b] = a->scale[(size_t)m * (size_t)a->blocks + (size_t)b];
    }
  }
  x->picked = (ns_picked){count, l->ins, block, blocks, x->channels, x->start, x->x, x->q, x->scale, x->sum};
}

/* y (mode)= r + bias for `width` outputs of token m. */
static void finish(ns_engine *e, const ns_op *op, int m, int row, int width, float *restrict r) {
  float *restrict y = op->y + (size_t)m * op->ystride + row;
  if (op->l->bias)
    for (int i = 0; i < width; i++) r[i] += op->l->bias[row + i];
  if (op->mode == NS_STORE) memcpy(y, r, (size_t)width * sizeof(float));
  else if (op->mode == NS_ADD)
    for (int i = 0; i < width; i++) y[i] += r[i];
  else e->k->silu_mul(y, r, width);
}

/* A unit of a map: 16 or 32 outputs of a dense or quantized one, a stripe of a transposed one. */
static int unit_width(const ns_engine *e, const ns_linear *l, int M) {
  if (l->kind == NS_SPARSE) return ((l->outs + e->threads - 1) / e->threads + 63) & ~63;
  return l->kind == NS_QUANT && M > NS_FEW ? 2 * NS_PANEL : NS_PANEL;
}

static void run_unit(ns_engine *e, const ns_op *op, const ns_input *in, const ns_extra *x, ns_scratch *s, int unit, int M) {
  const ns_linear *l = op->l;
  int width = unit_width(e, l, M), row = unit * width, rows = l->outs - row < width ? l->outs - row : width;
  if (rows <= 0) return;
  if (l->kind == NS_DENSE) {
    e->k->dense(l, row, rows, in->x, in->stride, M, s->out);
    for (int m = 0; m < M; m++) finish(e, op, m, row, rows, s->out + m * NS_PANEL);
  } else if (l->kind == NS_SPARSE) {
    for (int m = 0; m < M; m += NS_FEW) {
      int n = M - m < NS_FEW ? M - m : NS_FEW;
      ns_picked p = x->picked;
      p.x += (size_t)m * (size_t)p.stride;
      p.q += (size_t)m * (size_t)p.stride;
      p.scale += (size_t)m * (size_t)p.blocks;
      p.sum += (size_t)m * (size_t)p.blocks;
      if (l->bits) e->k->sparse_quant(l, row, rows, &p, n, s->out, s->sums);
      else e->k->sparse_dense(l, row, rows, &p, n, s->out);
      for (int i = 0; i < n; i++) finish(e, op, m + i, row, rows, s->out + (size_t)i * (size_t)rows);
    }
  } else if (M <= NS_FEW) {
    e->k->quant_few(l, row, rows, act_of(in, l->block), M, s->out, s->panel);
    for (int m = 0; m < M; m++) finish(e, op, m, row, rows, s->out + m * NS_PANEL);
  } else {
    e->k->quant_pack(l, row, rows, s->tile);
    e->k->quant_many(l, s->tile, act_of(in, l->block), M, s->out);
    for (int m = 0; m < M; m++) finish(e, op, m, row, rows, s->out + m * 2 * NS_PANEL);
  }
}

/* Bytes of weights that a thread takes at a time: enough to outweigh the drawing (0.3 us), and little enough (10 us) that nobody
 * waits long for a thread that the system puts aside with a share in hand. */
enum { LEAST = 16 << 10, MOST = 256 << 10 };

static int64_t unit_bytes(const ns_linear *l, int width) {
  int64_t row = l->bits ? (int64_t)l->ins * l->bits / 8 : (int64_t)l->ins * (l->dtype == NS_F32 ? 4 : 2);
  return row * width + 1;
}

/* All units of some maps; `paired` maps are equal in shape and a unit is the same rows of each, so that the second can use what
 * the first wrote. */
static void run_maps(ns_engine *e, ns_turn *t, const ns_op *ops, const ns_input *const *in, int count, int M, int paired) {
  int first[NS_MOST_OPS + 1] = {0};
  for (int i = 0; i < count; i++) {
    int width = unit_width(e, ops[i].l, M);
    first[i + 1] = first[i] + (ops[i].l->outs + width - 1) / width;
  }
  int units = paired ? first[1] : first[count];
  int64_t bytes = unit_bytes(ops[0].l, unit_width(e, ops[0].l, M)) * (paired ? 2 : 1) * (M > NS_FEW ? 8 : 1); /* of work, that is */
  int least = (int)(LEAST / bytes) + 1, most = e->threads == 1 ? units : (int)(MOST / bytes) + 1;
  NS_SHARES(t, units, least, most, u) {
    if (paired) {
      for (int i = 0; i < count; i++) run_unit(e, &ops[i], in[i], &e->extra[i], &e->scratch[t->id], u, M);
    } else {
      int i = 0;
      while (u >= first[i + 1]) i++;
      run_unit(e, &ops[i], in[i], &e->extra[i], &e->scratch[t->id], u - first[i], M);
    }
  }
  ns_pass(t, units);
}

int ns_pairable(const ns_linear *a, const ns_linear *b) {
  int plain = !a->first && !b->first && a->outs == b->outs;
  return plain && (a->kind == NS_SPARSE) == (b->kind == NS_SPARSE) && (a->kind == NS_DENSE) == (b->kind == NS_DENSE);
}

void ns_step(ns_engine *e, ns_turn *t, const ns_input *shared, const float *source, size_t stride, const float *norm, const ns_op *ops,
             int count, int M, const uint8_t *left_out) {
  ns_input in = shaped(shared, ops[0].l->ins, M), rest[NS_MOST_OPS], middle[NS_MOST_OPS];
  const ns_input *input[NS_MOST_OPS] = {&in}, *low_in[NS_MOST_OPS], *add_in[NS_MOST_OPS];
  ns_op main[NS_MOST_OPS] = {ops[0]}, low[NS_MOST_OPS], add[NS_MOST_OPS];
  int sparse = 0, lows = 0, adds = 0;
  for (int i = 0; i < count; i++) {
    const ns_linear *l = ops[i].l;
    ns_extra *x = &e->extra[i];
    main[i] = ops[i];
    input[i] = &in;
    sparse |= l->kind == NS_SPARSE;
    if (!l->first) continue;
    rest[i] = shaped(&x->rest, l->ins, M);
    middle[i] = shaped(&x->middle, l->first->outs, M);
    low[lows] = (ns_op){l->first, x->middle.x, x->middle.stride, NS_STORE};
    if (l->kind == NS_SPARSE) { /* the channels left out take the narrow way */
      low_in[lows++] = &rest[i];
      add[adds] = (ns_op){l->second, ops[i].y, ops[i].ystride, NS_ADD};
      add_in[adds++] = &middle[i];
    } else {
      low_in[lows++] = &in;
      main[i].l = l->second;
      input[i] = &middle[i];
    }
  }
  prepare(e, t, &in, source, stride, norm, M);
  if (sparse) {
    NS_UNITS(t, count, 1, i) {
      if (ops[i].l->kind == NS_SPARSE) pick(&e->extra[i], ops[i].l, &in, M, left_out);
    }
    ns_pass(t, count);
  }
  if (lows) {
    for (int i = 0; i < lows; i++)
      if (low_in[i] != &in) prepare(e, t, low_in[i], NULL, 0, NULL, M);
    run_maps(e, t, low, low_in, lows, M, 0);
    for (int i = 0; i < count; i++)
      if (ops[i].l->first) prepare(e, t, &middle[i], NULL, 0, NULL, M);
  }
  run_maps(e, t, main, input, count, M, ops[count - 1].mode == NS_SILU);
  if (adds) run_maps(e, t, add, add_in, adds, M, 0);
}
