/* The two limits of a machine that an engine works against: how fast it reads memory, how fast it multiplies bytes. */
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "kernels/kernels.h"
#include "threads.h"

typedef struct {
  const ns_kernels *k;
  const float *data;
  size_t count;
  int threads;
  float most[NS_MOST_THREADS * 16];
  double work[NS_MOST_THREADS];
} rates;

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void read_part(rates *r, int id) {
  size_t part = r->count / (size_t)r->threads / 64 * 64;
  r->most[id * 16] = r->k->sweep(r->data + part * (size_t)id, part);
}

static void read_job(void *argument, ns_turn *t) {
  rates *r = argument;
  NS_UNITS(t, r->threads, 1, u) read_part(r, u);
  ns_pass(t, r->threads);
}

double ns_read_rate(size_t bytes, int threads, double seconds) {
  rates r = {.threads = threads, .count = bytes / sizeof(float), .k = ns_kernels_named(NULL)};
  ns_pool pool;
  void *data = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED || ns_pool_open(&pool, threads)) return 0;
  memset(data, 1, bytes);
  r.data = data;
  double best = 0, begin = now();
  for (int round = 0; round < 3 || now() - begin < seconds; round++) {
    double start = now();
    ns_pool_run(&pool, read_job, &r);
    double rate = (double)bytes / (now() - start);
    best = rate > best ? rate : best;
  }
  ns_pool_close(&pool);
  munmap(data, bytes);
  return best;
}

static void burst_job(void *argument, ns_turn *t) {
  rates *r = argument;
  NS_UNITS(t, r->threads, 1, u) r->work[u] = r->k->int8_burst(200000);
  ns_pass(t, r->threads);
}

double ns_int8_rate(int threads, double seconds) {
  rates r = {.threads = threads, .k = ns_kernels_named(NULL)};
  ns_pool pool;
  if (ns_pool_open(&pool, threads)) return 0;
  double best = 0, begin = now();
  for (int round = 0; round < 3 || now() - begin < seconds; round++) {
    double start = now(), work = 0;
    ns_pool_run(&pool, burst_job, &r);
    double spent = now() - start;
    for (int i = 0; i < threads; i++) work += r.work[i];
    best = work / spent > best ? work / spent : best;
  }
  ns_pool_close(&pool);
  return best;
}
