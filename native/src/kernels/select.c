/* Which kernels this processor can run. */
#include "kernels.h"

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#ifndef HWCAP_ASIMDDP
#define HWCAP_ASIMDDP (1 << 20)
#endif
#endif

extern const ns_kernels ns_scalar;
#if defined(__x86_64__) || defined(__i386__)
extern const ns_kernels ns_avx2;
#ifdef __x86_64__
extern const ns_kernels ns_avx512;
#endif
#elif defined(__aarch64__)
extern const ns_kernels ns_neon;
#endif

const ns_kernels *ns_kernels_list(int index) {
  const ns_kernels *list[4] = {0};
  int n = 0;
#if defined(__x86_64__) || defined(__i386__)
  __builtin_cpu_init();
#ifdef __x86_64__
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi"))
    list[n++] = &ns_avx512;
#endif
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) list[n++] = &ns_avx2;
#elif defined(__aarch64__)
#ifdef __linux__
  if (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) list[n++] = &ns_neon;
#else
  list[n++] = &ns_neon; /* every Apple processor has it */
#endif
#endif
  list[n++] = &ns_scalar;
  return index >= 0 && index < n ? list[index] : NULL;
}

const ns_kernels *ns_kernels_named(const char *isa) {
  for (int i = 0; ns_kernels_list(i); i++)
    if (!isa || !strcmp(isa, ns_kernels_list(i)->name)) return ns_kernels_list(i);
  return NULL;
}

static size_t blocks_of(const ns_linear *w) { return ((size_t)w->ins + (size_t)w->block - 1) / (size_t)w->block; }

size_t ns_tile_bytes(const ns_linear *w) {
  /* 32 rows of bytes padded to 64 inputs a block, and per block and row a scale, a correction and a zero point */
  return w->bits ? blocks_of(w) * 32 * (64 + 12) + 64 : 0;
}

size_t ns_panel_scratch(const ns_linear *w) {
  /* scales and zero points of a panel, transposed, in whole sets of 16 groups; or the products of 16 blocks, 16 rows and 4
   * tokens for every 1024 inputs */
  size_t facts = ((size_t)w->groups + 15) / 16 * 16 * NS_PANEL * 8, products = (size_t)w->ins / 1024 * 4 * 16 * 16 * sizeof(float);
  return w->bits == 0 ? 0 : facts > products ? facts : products;
}

int ns_block_dividing(int group) {
  int best = 1;
  for (int d = 1; d <= 64 && d <= group; d++)
    if (group % d == 0) best = d;
  return best;
}
