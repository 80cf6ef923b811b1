/* Plain arithmetic on one type, with a second operand that may repeat, and conversions of integers. */
#include "ns_int.h"
#include "ns_signal.h"

enum { ADD, SUB, MUL, DIV, MINIMUM, MAXIMUM };

/* Modulo 2^32. */
NS_INLINE int32_t of_i32(const int32_t function, int32_t a, int32_t b) {
  switch (function) {
    case ADD: return ns_wrap_add(a, b);
    case SUB: return (int32_t)((uint32_t)a - (uint32_t)b);
    case MUL: return ns_wrap_mul(a, b);
    case DIV: return b == -1 ? (int32_t)(0u - (uint32_t)a) : a / b;
    case MINIMUM: return ns_min(a, b);
    default: return ns_max(a, b);
  }
}

/* What is no number stays none, in minimum and maximum too. */
NS_INLINE float of_f32(const int32_t function, float a, float b) {
  switch (function) {
    case ADD: return a + b;
    case SUB: return a - b;
    case MUL: return a * b;
    case DIV: return a / b;
    case MINIMUM: return a < b || a != a ? a : b;
    default: return a > b || a != a ? a : b;
  }
}

void ns_arithmetic_i32(const ns_arithmetic_i32_params *p, const int32_t *a, const int32_t *b, int32_t *y) {
  for (int32_t i = 0; i < p->n0; i++) {
    for (int32_t j = 0; j < p->n1; j++) {
      for (int32_t k = 0; k < p->n2; k++, a += p->n3, y += p->n3) {
        const int32_t *from = b + i * p->s0 + j * p->s1 + k * p->s2;
        for (int32_t l = 0; l < p->n3; l++) y[l] = of_i32(p->function, a[l], from[l * p->s3]);
      }
    }
  }
}

void ns_arithmetic_i8(const ns_arithmetic_i8_params *p, const int8_t *a, const int8_t *b, int8_t *y) {
  for (int32_t i = 0; i < p->n0; i++) {
    for (int32_t j = 0; j < p->n1; j++) {
      for (int32_t k = 0; k < p->n2; k++, a += p->n3, y += p->n3) {
        const int8_t *from = b + i * p->s0 + j * p->s1 + k * p->s2;
        for (int32_t l = 0; l < p->n3; l++) y[l] = (int8_t)of_i32(p->function, a[l], from[l * p->s3]);
      }
    }
  }
}

void ns_arithmetic_f32(const ns_arithmetic_f32_params *p, const float *a, const float *b, float *y) {
  for (int32_t i = 0; i < p->n0; i++) {
    for (int32_t j = 0; j < p->n1; j++) {
      for (int32_t k = 0; k < p->n2; k++, a += p->n3, y += p->n3) {
        const float *from = b + i * p->s0 + j * p->s1 + k * p->s2;
        for (int32_t l = 0; l < p->n3; l++) y[l] = of_f32(p->function, a[l], from[l * p->s3]);
      }
    }
  }
}

/* Element i of `size` bytes, negative when it has a sign, extended to 64 bits. */
NS_INLINE uint64_t extended(const void *x, int32_t i, int32_t size) {
  switch (size) {
    case 1: return ((const uint8_t *)x)[i];
    case 2: return ((const uint16_t *)x)[i];
    case 4: return ((const uint32_t *)x)[i];
    case -1: return (uint64_t)((const int8_t *)x)[i];
    case -2: return (uint64_t)((const int16_t *)x)[i];
    case -4: return (uint64_t)((const int32_t *)x)[i];
    default: break;
  }
  uint64_t v;
  memcpy(&v, (const int8_t *)x + 8 * (ptrdiff_t)i, sizeof v);
  return v;
}

/* The low bytes come first on every processor that this runs on. */
void ns_cast(const ns_cast_params *p, const void *x, void *y) {
  for (int32_t i = 0; i < p->n; i++) {
    const uint64_t v = extended(x, i, p->from);
    if (p->to) memcpy((int8_t *)y + (ptrdiff_t)i * p->to, &v, (size_t)p->to);
    else ((float *)y)[i] = p->from < 0 ? (float)(int64_t)v : (float)v;
  }
}
