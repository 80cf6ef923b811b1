/* Dense layers and pointwise convolutions, int8, with int8 or int4 weights. y may begin where x does. */
#include "ns_rows.h"

/* Rows go downwards when the output is longer than the input, so that it overwrites only what has been read. */
NS_INLINE void dense(const ns_dense_params *p, const int8_t *x, const void *w, const int32_t *bias, const int32_t *m, int8_t *y,
                     int16_t *block, const int32_t w4) {
  const ns_rows g = ns_rows_of(p->i, p->o, p->o, p->zx, p->zy, p->shift, p->room, p->low, p->high, w4);
  int32_t packed;
  const int32_t length = ns_run_length(&g, p->rows, x != y, &packed);
  ns_run run;
  for (int32_t o = 0; o < p->o; o += length) {
    ns_run_of(&run, &g, w, bias, m, o, length, packed, w4);
    for (int32_t left = p->rows, n; left > 0; left -= n) {
      n = ns_together(left);
      const int32_t row = p->o > p->i ? left - n : p->rows - left;
      for (int32_t r = 0; r < n; r++) ns_put(&g, block, n, r, 0, x + (ptrdiff_t)(row + r) * p->i, p->i, w4);
      ns_block(&g, &run, block, n, y + (ptrdiff_t)row * p->o + o, w4);
    }
  }
}

void ns_dense(const ns_dense_params *p, const int8_t *x, const int8_t *w, const int32_t *bias, const int32_t *m,
                     int8_t *y, void *scratch) {
  dense(p, x, w, bias, m, y, (int16_t *)scratch, 0);
}

void ns_dense_w4(const ns_dense_w4_params *p, const int8_t *x, const uint8_t *w, const int32_t *bias, const int32_t *m,
                        int8_t *y, void *scratch) {
  dense(p, x, w, bias, m, y, (int16_t *)scratch, 1);
}
