/* Bytes from place to place: what pad, transpose, concat and slice are made of. */
#include "ns_int.h"

NS_INLINE void copy(const ns_copy_params *p, const int8_t *x, int8_t *y, const int32_t size) {
  for (int32_t i = 0; i < p->n0; i++) {
    for (int32_t j = 0; j < p->n1; j++) {
      for (int32_t k = 0; k < p->n2; k++) {
        for (int32_t l = 0; l < p->n3; l++) {
          const int8_t *from = x + ((ptrdiff_t)i * p->a0 + j * p->a1 + k * p->a2 + l * p->a3);
          int8_t *to = y + ((ptrdiff_t)i * p->b0 + j * p->b1 + k * p->b2 + l * p->b3);
          if (p->a4 == size && p->b4 == size) memcpy(to, from, (size_t)(p->n4 * size));
          else
            for (int32_t e = 0; e < p->n4; e++) memcpy(to + e * p->b4, from + e * p->a4, (size_t)size);
        }
      }
    }
  }
}

void ns_copy(const ns_copy_params *p, const void *x, void *y) {
  const int8_t *from = (const int8_t *)x + p->from;
  int8_t *to = (int8_t *)y + p->to;
  switch (p->size) {  /* a known size makes the copy of an element one load and one store */
    case 1: copy(p, from, to, 1); break;
    case 2: copy(p, from, to, 2); break;
    case 4: copy(p, from, to, 4); break;
    default: copy(p, from, to, p->size); break;
  }
}

void ns_fill(const ns_fill_params *p, void *y) {
  if (p->size == 1) {
    memset(y, p->bits, (size_t)p->n);
    return;
  }
  for (int32_t i = 0; i < p->n; i++) memcpy((int8_t *)y + (ptrdiff_t)i * p->size, &p->bits, (size_t)p->size);
}
