/* Operators that look at one element at a time, int8 and float. Outputs may be written over an input. */
#include "ns_int.h"

NS_HOT void ns_add(const ns_add_params *p, const int8_t *a, const int8_t *b, int8_t *y) {
  for (int32_t i = 0; i < p->n0; i++) {
    for (int32_t j = 0; j < p->n1; j++) {
      for (int32_t k = 0; k < p->n2; k++, a += p->n3, y += p->n3) {
        const int8_t *from = b + i * p->s0 + j * p->s1 + k * p->s2;
        for (int32_t l = 0; l < p->n3; l++) {
          const int32_t total = a[l] * p->ma + from[l * p->s3] * p->mb + p->offset;
          y[l] = (int8_t)ns_clip(total >> p->shift, p->low, p->high);
        }
      }
    }
  }
}

NS_HOT void ns_mul(const ns_mul_params *p, const int8_t *a, const int8_t *b, int8_t *y) {
  for (int32_t i = 0; i < p->n0; i++) {
    for (int32_t j = 0; j < p->n1; j++) {
      for (int32_t k = 0; k < p->n2; k++, a += p->n3, y += p->n3) {
        const int8_t *from = b + i * p->s0 + j * p->s1 + k * p->s2;
        for (int32_t l = 0; l < p->n3; l++) {
          const int32_t product = (a[l] - p->za) * (from[l * p->s3] - p->zb);
          y[l] = ns_requant(product, p->m, p->shift, p->zy, p->low, p->high);
        }
      }
    }
  }
}

NS_INLINE float clip_float(float v, float low, float high) { return v < low ? low : v > high ? high : v; }

NS_HOT void ns_add_f32(const ns_add_f32_params *p, const float *a, const float *b, float *y) {
  for (int32_t i = 0; i < p->n0; i++) {
    for (int32_t j = 0; j < p->n1; j++) {
      for (int32_t k = 0; k < p->n2; k++, a += p->n3, y += p->n3) {
        const float *from = b + i * p->s0 + j * p->s1 + k * p->s2;
        for (int32_t l = 0; l < p->n3; l++) y[l] = clip_float(a[l] + from[l * p->s3], p->low, p->high);
      }
    }
  }
}

NS_HOT void ns_mul_f32(const ns_mul_f32_params *p, const float *a, const float *b, float *y) {
  for (int32_t i = 0; i < p->n0; i++) {
    for (int32_t j = 0; j < p->n1; j++) {
      for (int32_t k = 0; k < p->n2; k++, a += p->n3, y += p->n3) {
        const float *from = b + i * p->s0 + j * p->s1 + k * p->s2;
        for (int32_t l = 0; l < p->n3; l++) y[l] = clip_float(a[l] * from[l * p->s3], p->low, p->high);
      }
    }
  }
}

void ns_lut(const ns_lut_params *p, const int8_t *x, const int8_t *table, int8_t *y) {
  for (int32_t i = 0; i < p->n; i++) y[i] = table[x[i] + 128];
}

/* Adding 1.5 * 2^23 rounds to an integer, half to even, and leaves it in the low bits: no call, the same everywhere. */
NS_HOT void ns_quantize(const ns_quantize_params *p, const float *x, int8_t *y) {
  const float magic = 12582912.0f, low = (float)(-128 - p->zero), high = (float)(127 - p->zero);
  for (int32_t i = 0; i < p->n; i++) {
    const float v = x[i] * p->inverse, r = (v < low ? low : v > high ? high : v) + magic;
    int32_t bits;
    memcpy(&bits, &r, sizeof bits);
    y[i] = (int8_t)(bits - 0x4b400000 + p->zero);
  }
}

NS_HOT void ns_dequantize(const ns_dequantize_params *p, const int8_t *x, float *y) {
  for (int32_t i = 0; i < p->n; i++) y[i] = (float)(x[i] - p->zero) * p->scale;
}
