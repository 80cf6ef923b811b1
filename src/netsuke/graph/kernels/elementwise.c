/* Operators that look at one element at a time, int8 and float. Outputs may be written over an input. */
#include "ns_int.h"

/* A run of n elements; b advances by `step`. whole: the clip is the range of int8. */
NS_INLINE void add_run(const ns_add_params *p, const int8_t *a, const int8_t *b, int8_t *y, int32_t n, const int32_t step,
                       const int32_t whole) {
  const int32_t ma = p->ma, mb = p->mb, offset = p->offset, shift = p->shift, low = p->low, high = p->high;
  NS_UNROLL
  for (int32_t i = 0; i < n; i++) {
    const int32_t q = (a[i] * ma + b[i * step] * mb + offset) >> shift;
    y[i] = whole ? ns_saturate(q) : (int8_t)ns_clip(q, low, high);
  }
}

void ns_add(const ns_add_params *p, const int8_t *a, const int8_t *b, int8_t *y) {
  const int32_t whole = p->low <= -128 && p->high >= 127;
  for (int32_t i = 0; i < p->n0; i++) {
    for (int32_t j = 0; j < p->n1; j++) {
      for (int32_t k = 0; k < p->n2; k++, a += p->n3, y += p->n3) {
        const int8_t *from = b + i * p->s0 + j * p->s1 + k * p->s2;
        if (p->s3 == 1 && whole) add_run(p, a, from, y, p->n3, 1, 1);
        else if (p->s3 == 1) add_run(p, a, from, y, p->n3, 1, 0);
        else add_run(p, a, from, y, p->n3, p->s3, 0);
      }
    }
  }
}

void ns_mul(const ns_mul_params *p, const int8_t *a, const int8_t *b, int8_t *y) {
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

void ns_add_f32(const ns_add_f32_params *p, const float *a, const float *b, float *y) {
  for (int32_t i = 0; i < p->n0; i++) {
    for (int32_t j = 0; j < p->n1; j++) {
      for (int32_t k = 0; k < p->n2; k++, a += p->n3, y += p->n3) {
        const float *from = b + i * p->s0 + j * p->s1 + k * p->s2;
        for (int32_t l = 0; l < p->n3; l++) y[l] = clip_float(a[l] + from[l * p->s3], p->low, p->high);
      }
    }
  }
}

void ns_mul_f32(const ns_mul_f32_params *p, const float *a, const float *b, float *y) {
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
void ns_quantize(const ns_quantize_params *p, const float *x, int8_t *y) {
  const float magic = 12582912.0f, low = (float)(-128 - p->zero), high = (float)(127 - p->zero);
  for (int32_t i = 0; i < p->n; i++) {
    const float v = x[i] * p->inverse, r = (v < low ? low : v > high ? high : v) + magic;
    int32_t bits;
    memcpy(&bits, &r, sizeof bits);
    y[i] = (int8_t)(bits - 0x4b400000 + p->zero);
  }
}

void ns_dequantize(const ns_dequantize_params *p, const int8_t *x, float *y) {
  for (int32_t i = 0; i < p->n; i++) y[i] = (float)(x[i] - p->zero) * p->scale;
}
