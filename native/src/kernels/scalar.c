/* Portable kernels: what every other instruction set is tested against. */
#include "float.inc.h"
#include "int.inc.h"

static double int8_burst(long steps) {
  uint8_t a[64];
  int8_t b[64];
  int32_t sum = 0;
  for (int i = 0; i < 64; i++) a[i] = (uint8_t)i, b[i] = (int8_t)(i - 32);
  for (long s = 0; s < steps; s++) {
    sum += dot_block(a, b, 64, 0);
    a[s & 63] ^= (uint8_t)sum;
  }
  return (double)steps * 64 + (sum == 12345 ? 1e-9 : 0);
}

static void few(const ns_linear *l, int row, int rows, const ns_act *x, int M, float *out, void *scratch) {
  (void)scratch;
  quant_few(l, row, rows, x, M, out);
}

#ifndef NS_TABLE
#define NS_TABLE ns_scalar
#define NS_NAME "scalar"
#endif
const ns_kernels NS_TABLE = {NS_NAME, few,     quant_pack, quant_many, dense,    sparse_dense, sparse_quant, quantize,
                             rmsnorm, silu_mul, rotate,    kv_store,   attend, row,          sweep, int8_burst};
