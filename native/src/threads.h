/* A pool whose threads share out the work of one function, phase after phase.
 *
 * A phase is over when its units are done, not when every thread has come by: a thread that the system has put aside holds
 * nobody up unless it was in the middle of a unit, and skips what was done without it when it comes back. Threads that wait
 * spin for a while, since a decoder has hundreds of phases per token and waking a thread costs more than most of them. */
#ifndef NS_THREADS_H
#define NS_THREADS_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>

enum { NS_MOST_THREADS = 64 };

typedef struct ns_pool ns_pool;
typedef struct { /* where one thread is in the present job */
  ns_pool *pool;
  int id;
  uint64_t place; /* job and phase, as in the ticket */
} ns_turn;
typedef void (*ns_job)(void *argument, ns_turn *turn);
typedef struct {
  ns_pool *pool;
  int id;
} ns_worker;

struct ns_pool {
  int threads, started;
  ns_job job;
  void *argument;
  /* a cache line each: they are written by different threads at different times */
  _Alignas(64) _Atomic uint64_t ticket; /* job (24 bits), phase (16), next unit (24) */
  _Alignas(64) _Atomic uint64_t place;  /* job and phase alone: those who wait must not disturb those who draw */
  _Alignas(64) atomic_int done;         /* units of the phase that are finished */
  _Alignas(64) atomic_uint turn;        /* grows with every job */
  atomic_int stop, asleep;
  pthread_mutex_t lock;
  pthread_cond_t wake;
  pthread_t thread[NS_MOST_THREADS];
  ns_worker worker[NS_MOST_THREADS];
};

int ns_pool_open(ns_pool *pool, int threads); /* 0, or -1 when the system gives no threads */
void ns_pool_close(ns_pool *pool);
/* The caller is thread 0 and returns when all phases are over. What `argument` points to may change before and after, but a
 * late thread may still read it then: what decides about phases has to be atomic. */
void ns_pool_run(ns_pool *pool, ns_job job, void *argument);

/* One phase: all threads call ns_draw with the same `total` until it returns 0, do the `n` units from `*from`, report them with
 * ns_done, and call ns_pass. A draw is a share of what is left, at least `least` and at most `most` units: few draws at first,
 * small ones at the end. */
int ns_draw(ns_turn *turn, int total, int least, int most, int *from);
void ns_done(ns_turn *turn, int n, int total);
void ns_pass(ns_turn *turn, int total);

/* The units `u` that fall to this thread, one after the other; ns_pass has to follow. */
#define NS_SHARES(turn, total, least, most, u)                                                                  \
  for (int from_ = 0, n_ = 0; (n_ = ns_draw(turn, total, least, most, &from_)) != 0; ns_done(turn, n_, total)) \
    for (int u = from_; u < from_ + n_; u++)
#define NS_UNITS(turn, total, chunk, u) NS_SHARES(turn, total, chunk, chunk, u)

#endif
