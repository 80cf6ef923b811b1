#include "threads.h"

#include <sched.h>

enum { SPINS = 2000, LONG_SPINS = 40000 }; /* before the core is offered to others; before an idle thread sleeps, about a millisecond */

static inline void pause_cpu(void) {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

static const uint64_t CLOSED = 0xffff; /* a phase that no job reaches */

int ns_draw(ns_turn *t, int total, int least, int most, int *from) {
  uint64_t v = atomic_load_explicit(&t->pool->ticket, memory_order_acquire);
  for (;;) {
    int next = (int)(v & 0xffffff);
    if (v >> 24 != t->place || next >= total) return 0;
    int left = total - next, n = left / (t->pool->threads + 1);
    n = n > most ? most : n < least ? least : n;
    n = n > left ? left : n;
    if (atomic_compare_exchange_weak_explicit(&t->pool->ticket, &v, v + (uint64_t)n, memory_order_acq_rel, memory_order_acquire)) {
      *from = next;
      return n;
    }
  }
}

void ns_done(ns_turn *t, int n, int total) {
  if (atomic_fetch_add_explicit(&t->pool->done, n, memory_order_acq_rel) + n < total) return;
  atomic_store_explicit(&t->pool->done, 0, memory_order_relaxed);
  atomic_store_explicit(&t->pool->ticket, (t->place + 1) << 24, memory_order_release);
  atomic_store_explicit(&t->pool->place, t->place + 1, memory_order_release);
}

void ns_pass(ns_turn *t, int total) {
  if (total <= 0) return; /* nothing was to be done: no phase */
  for (int spins = 0; atomic_load_explicit(&t->pool->place, memory_order_acquire) == t->place; spins++) {
    if (spins < SPINS) pause_cpu();
    else sched_yield();
  }
  t->place++;
}

static void *work(void *argument) {
  ns_worker *me = argument;
  ns_pool *p = me->pool;
  for (unsigned seen = 0, turn;;) {
    for (int spins = 0; (turn = atomic_load_explicit(&p->turn, memory_order_acquire)) == seen; spins++) {
      if (spins < LONG_SPINS) {
        pause_cpu();
        continue;
      }
      pthread_mutex_lock(&p->lock);
      atomic_fetch_add(&p->asleep, 1);
      while (atomic_load(&p->turn) == seen) pthread_cond_wait(&p->wake, &p->lock);
      atomic_fetch_sub(&p->asleep, 1);
      pthread_mutex_unlock(&p->lock);
    }
    seen = turn;
    if (atomic_load(&p->stop)) return NULL;
    ns_turn t = {p, me->id, (uint64_t)(turn & 0xffffff) << 16};
    p->job(p->argument, &t);
  }
}

void ns_pool_run(ns_pool *p, ns_job job, void *argument) {
  unsigned turn = atomic_load_explicit(&p->turn, memory_order_relaxed) + 1;
  ns_turn t = {p, 0, (uint64_t)(turn & 0xffffff) << 16};
  if (p->job != job || p->argument != argument) p->job = job, p->argument = argument; /* the first time: none is late yet */
  atomic_store_explicit(&p->place, t.place, memory_order_release);
  atomic_store_explicit(&p->ticket, t.place << 24, memory_order_release);
  atomic_store(&p->turn, turn);
  if (atomic_load(&p->asleep)) {
    pthread_mutex_lock(&p->lock);
    pthread_cond_broadcast(&p->wake);
    pthread_mutex_unlock(&p->lock);
  }
  job(argument, &t);
  atomic_store_explicit(&p->ticket, (t.place | CLOSED) << 24, memory_order_release);
}

int ns_pool_open(ns_pool *p, int threads) {
  atomic_init(&p->turn, 0);
  atomic_init(&p->ticket, CLOSED << 24);
  atomic_init(&p->place, CLOSED);
  atomic_init(&p->done, 0);
  atomic_init(&p->stop, 0);
  atomic_init(&p->asleep, 0);
  p->threads = threads;
  p->job = NULL;
  p->argument = NULL;
  pthread_mutex_init(&p->lock, NULL);
  pthread_cond_init(&p->wake, NULL);
  for (p->started = 1; p->started < threads; p->started++) {
    p->worker[p->started] = (ns_worker){p, p->started};
    if (pthread_create(&p->thread[p->started], NULL, work, &p->worker[p->started])) {
      ns_pool_close(p);
      return -1;
    }
  }
  return 0;
}

void ns_pool_close(ns_pool *p) {
  atomic_store(&p->stop, 1);
  atomic_fetch_add(&p->turn, 1);
  pthread_mutex_lock(&p->lock);
  pthread_cond_broadcast(&p->wake);
  pthread_mutex_unlock(&p->lock);
  for (int i = 1; i < p->started; i++) pthread_join(p->thread[i], NULL);
  pthread_mutex_destroy(&p->lock);
  pthread_cond_destroy(&p->wake);
}
