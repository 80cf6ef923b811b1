/* A whole program in one call, for the package's library: a call from Python costs more than a small layer. */
#include "ns_int.h"

#define ARGS 12

typedef struct {
  void (*kernel)(void);
  const void *params;
  void *args[ARGS];
  int32_t count, reserved;
} ns_host_call;

void ns_host_run(const ns_host_call *calls, int32_t n);
int32_t ns_host_vectors(void);

/* The widest build of these sources that this processor runs: 0 any, 1 AVX2, 2 AVX-512 with VNNI. */
int32_t ns_host_vectors(void) {
#if defined(__x86_64__) && defined(__GNUC__)
  if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq")) {
    return 2;
  }
  return __builtin_cpu_supports("avx2") ? 1 : 0;
#else
  return 0;
#endif
}

void ns_host_run(const ns_host_call *calls, int32_t n) {
  typedef const void *P;
  for (const ns_host_call *c = calls; c < calls + n; c++) {
    void *const *a = c->args;
    switch (c->count) {
      case 1: ((void (*)(P, void *))c->kernel)(c->params, a[0]); break;
      case 2: ((void (*)(P, void *, void *))c->kernel)(c->params, a[0], a[1]); break;
      case 3: ((void (*)(P, void *, void *, void *))c->kernel)(c->params, a[0], a[1], a[2]); break;
      case 4: ((void (*)(P, void *, void *, void *, void *))c->kernel)(c->params, a[0], a[1], a[2], a[3]); break;
      case 5:
        ((void (*)(P, void *, void *, void *, void *, void *))c->kernel)(c->params, a[0], a[1], a[2], a[3], a[4]);
        break;
      case 6:
        ((void (*)(P, void *, void *, void *, void *, void *, void *))c->kernel)(c->params, a[0], a[1], a[2], a[3], a[4], a[5]);
        break;
      default:
        ((void (*)(P, void *, void *, void *, void *, void *, void *, void *, void *, void *, void *, void *, void *))c->kernel)(
            c->params, a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11]);
        break;
    }
  }
}
