#include "threads.h"

#include <sched.h>

enum { SPINS = 4000, LONG_SPINS = 40000 }; /* about 0.1 ms at barriers before the core is offered to others, 1 ms between jobs */

static inline void pause_cpu(void) {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

void ns_pool_meet(ns_pool *p) {
  if (p->threads == 1) return;
  unsigned phase = atomic_load_explicit(&p->phase, memory_order_relaxed);
  if (atomic_fetch_add_explicit(&p->arrived, 1, memory_order_acq_rel) == p->threads - 1) {
    atomic_store_explicit(&p->arrived, 0, memory_order_relaxed);
    atomic_store_explicit(&p->phase, phase + 1, memory_order_release);
    return;
  }
  for (int spins = 0; atomic_load_explicit(&p->phase, memory_order_acquire) == phase; spins++) {
    if (spins < SPINS) pause_cpu();
    else sched_yield();
  }
}

static void *work(void *argument) {
  ns_worker *me = argument;
  ns_pool *p = me->pool;
  for (unsigned seen = 0;; seen++) {
    for (int spins = 0; atomic_load_explicit(&p->turn, memory_order_acquire) == seen; spins++) {
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
    if (atomic_load(&p->stop)) return NULL;
    p->job(p->argument, me->id);
    ns_pool_meet(p);
  }
}

void ns_pool_run(ns_pool *p, void (*job)(void *, int), void *argument) {
  p->job = job;
  p->argument = argument;
  atomic_fetch_add(&p->turn, 1);
  if (atomic_load(&p->asleep)) {
    pthread_mutex_lock(&p->lock);
    pthread_cond_broadcast(&p->wake);
    pthread_mutex_unlock(&p->lock);
  }
  job(argument, 0);
  ns_pool_meet(p);
}

int ns_pool_open(ns_pool *p, int threads) {
  atomic_init(&p->turn, 0);
  atomic_init(&p->arrived, 0);
  atomic_init(&p->phase, 0);
  atomic_init(&p->stop, 0);
  atomic_init(&p->asleep, 0);
  p->threads = threads;
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
