/* A pool whose threads run one function side by side and meet at barriers. Waiting threads spin for a while: a decoder meets
 * hundreds of times per token, and waking a thread costs more than most of its phases. */
#ifndef NS_THREADS_H
#define NS_THREADS_H

#include <pthread.h>
#include <stdatomic.h>

enum { NS_MOST_THREADS = 64 };

typedef struct ns_pool ns_pool;
typedef struct {
  ns_pool *pool;
  int id;
} ns_worker;

struct ns_pool {
  int threads, started;
  void (*job)(void *, int);
  void *argument;
  atomic_uint turn;           /* grows with every job */
  atomic_int arrived;
  atomic_uint phase;
  atomic_int stop, asleep;
  pthread_mutex_t lock;
  pthread_cond_t wake;
  pthread_t thread[NS_MOST_THREADS];
  ns_worker worker[NS_MOST_THREADS];
};

int ns_pool_open(ns_pool *pool, int threads); /* 0, or -1 when the system gives no threads */
void ns_pool_close(ns_pool *pool);
void ns_pool_run(ns_pool *pool, void (*job)(void *, int), void *argument); /* the caller is thread 0 */
void ns_pool_meet(ns_pool *pool);                                          /* all threads of the job wait for one another */

#endif
