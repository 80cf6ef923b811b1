/* Times one matrix-vector product, dense against input-sparse, with the kernels and the division of work of an engine. */
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "engine.h"

typedef struct {
  const ns_kernels *k;
  ns_linear l;
  ns_act act;
  ns_picked picked;
  int threads, sparse, unit;
  float *x, *y, *out[NS_MOST_THREADS];
  void *panel[NS_MOST_THREADS];
  int32_t *sums[NS_MOST_THREADS];
} trial;

static void product(void *argument, ns_turn *turn) {
  trial *t = argument;
  int id = turn->id;
  const ns_linear *l = &t->l;
  int units = (l->outs + t->unit - 1) / t->unit, chunk = t->sparse ? 1 : units / (t->threads * 12) + 1;
  NS_UNITS(turn, units, chunk, u) {
      int row = u * t->unit, rows = l->outs - row < t->unit ? l->outs - row : t->unit;
      if (t->sparse && l->bits) t->k->sparse_quant(l, row, rows, &t->picked, 1, t->out[id], t->sums[id]);
      else if (t->sparse) t->k->sparse_dense(l, row, rows, &t->picked, 1, t->out[id]);
      else if (l->bits) t->k->quant_few(l, row, rows, &t->act, 1, t->out[id], t->panel[id]);
      else t->k->dense(l, row, rows, t->x, (size_t)l->ins, 1, t->out[id]);
      memcpy(t->y + row, t->out[id], (size_t)rows * sizeof(float));
  }
  ns_pass(turn, units);
}

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int rising(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

static uint64_t noise(uint64_t *s) { return *s = *s * 6364136223846793005u + 1442695040888963407u; }

/* bits 32 and 16: floats; 8 … 2: codes in groups of 64. `share`: of the channels that are read. seconds[0] dense, [1] sparse:
 * medians of alternating runs. Matrices rotate through `copies` so that none stays in a cache. 0, or -1 without memory. */
int ns_sparse_trial(int outs, int ins, int bits, double share, int threads, int rounds, double seconds[2]) {
  enum { COPIES = 2 };
  trial *t = calloc(1, sizeof *t);
  ns_pool pool;
  size_t bytes = bits >= 16 ? (size_t)outs * (size_t)ins * (size_t)(bits / 8) : (size_t)outs * (((size_t)ins * (size_t)bits + 7) / 8);
  size_t other = bits >= 16 ? 0 : (size_t)ins * (((size_t)outs * (size_t)bits + 7) / 8);
  bytes = bytes > other ? bytes : other;
  int groups = (ins + 63) / 64, failed = !t || rounds < 1 || rounds > 1000 || ins % 64;
  uint8_t *weights[2][COPIES] = {{0}};
  uint64_t seed = 1;
  for (int s = 0; s < 2 && !failed; s++)
    for (int c = 0; c < COPIES && !failed; c++) {
      failed = posix_memalign((void **)&weights[s][c], 4096, bytes + 64);
      for (size_t i = 0; i < bytes / 8 && !failed; i++) /* as floats: exponents of moderate size */
        ((uint64_t *)(void *)weights[s][c])[i] = bits >= 16 ? noise(&seed) & 0x3dff3dff3dff3dffu : noise(&seed);
    }
  uint16_t *scales = malloc((size_t)outs * (size_t)groups * 2);
  uint8_t *zeros = malloc((size_t)outs * (size_t)groups);
  int32_t *channels = malloc((size_t)ins * 4), *start = malloc(((size_t)groups + 1) * 4), *sum = malloc((size_t)groups * 4);
  int8_t *q = malloc((size_t)ins * 3);
  float *x = malloc((size_t)ins * 8), *scale = malloc((size_t)groups * 4), *y = malloc((size_t)outs * 4);
  double *times = malloc((size_t)rounds * 2 * sizeof *times);
  failed |= !scales || !zeros || !channels || !start || !sum || !q || !x || !scale || !y || !times;
  if (!failed && !ns_pool_open(&pool, threads)) {
    for (size_t i = 0; i < (size_t)outs * (size_t)groups; i++) scales[i] = 0x1c00, zeros[i] = 8;
    int count = 0;
    for (int i = 0; i < ins; i++) {
      if (i % 64 == 0) start[i / 64] = count;
      x[i] = (float)(noise(&seed) >> 40) * 0x1p-24f;
      q[i] = (int8_t)(noise(&seed) >> 56);
      if ((double)(noise(&seed) >> 11) * 0x1p-53 < share) {
        q[2 * ins + count] = q[i];
        x[ins + count] = x[i];
        channels[count++] = i;
      }
    }
    start[groups] = count;
    for (int g = 0; g < groups; g++) scale[g] = 0.01f, sum[g] = 100;
    t->k = ns_kernels_named(NULL);
    t->threads = threads;
    t->x = x;
    t->y = y;
    t->act = (ns_act){64, groups, ins, 0, q, q, q, scale, sum};
    t->picked = (ns_picked){count, ins, 64, groups, channels, start, x + ins, q + 2 * ins, scale, sum};
    ns_linear l = {.kind = NS_QUANT, .outs = outs, .ins = ins, .bits = bits >= 16 ? 0 : bits, .group = 64, .groups = groups, .block = 64, .scales = scales,
                   .zeros = zeros, .dtype = bits == 32 ? NS_F32 : NS_F16};
    int stripe = ((outs + threads - 1) / threads + 63) & ~63;
    for (int i = 0; i < threads; i++) {
      t->out[i] = malloc((size_t)stripe * sizeof(float));
      t->sums[i] = malloc((size_t)stripe * sizeof(int32_t));
      t->panel[i] = malloc(ns_panel_scratch(&l));
      failed |= !t->out[i] || !t->sums[i] || !t->panel[i];
    }
    for (int round = -2; round < rounds && !failed; round++)
      for (int s = 0; s < 2; s++) {
        t->l = l;
        t->l.kind = s ? NS_SPARSE : bits >= 16 ? NS_DENSE : NS_QUANT;
        t->l.w = t->l.codes = weights[s][(round + 2) % COPIES];
        t->l.row_bytes = ((size_t)(s ? outs : ins) * (size_t)bits + 7) / 8;
        t->sparse = s;
        t->unit = s ? stripe : NS_PANEL;
        double begin = now();
        ns_pool_run(&pool, product, t);
        if (round >= 0) times[s * rounds + round] = now() - begin;
      }
    for (int s = 0; s < 2 && !failed; s++) {
      qsort(times + s * rounds, (size_t)rounds, sizeof *times, rising);
      seconds[s] = times[s * rounds + rounds / 2];
    }
    ns_pool_close(&pool);
    for (int i = 0; i < threads; i++) free(t->out[i]), free(t->sums[i]), free(t->panel[i]);
  } else {
    failed = 1;
  }
  for (int s = 0; s < 2; s++)
    for (int c = 0; c < COPIES; c++) free(weights[s][c]);
  free(scales), free(zeros), free(channels), free(start), free(sum), free(q), free(x), free(scale), free(y), free(times), free(t);
  return failed ? -1 : 0;
}
