/* Dense layers and convolutions on float activations, with float, int8 or int4 weights. Sums run in one fixed order. */
#include "ns_int.h"

enum { F32, W8, W4 };

/* Weight k of the row `row` of length `length`. */
NS_INLINE float weight(const void *w, int32_t row, int32_t length, int32_t k, const int32_t type) {
  if (type == F32) return ((const float *)w)[(ptrdiff_t)row * length + k];
  if (type == W8) return (float)((const int8_t *)w)[(ptrdiff_t)row * length + k];
  return (float)ns_nibble((const uint8_t *)w + (ptrdiff_t)row * ((length + 1) / 2), k);
}

NS_INLINE float finish(float total, const float *scale, const float *bias, int32_t o, float low, float high, const int32_t type) {
  const float v = (type == F32 ? total : total * scale[o]) + (bias ? bias[o] : 0.0f);
  return v < low ? low : v > high ? high : v;
}

/* Four outputs at a time: every x is read once for them, and four sums are under way. */
NS_INLINE void dense(const ns_dense_f32_params *p, const float *x, const void *w, const float *scale, const float *bias, float *y,
                     const int32_t type) {
  for (int32_t row = 0; row < p->rows; row++, x += p->i, y += p->o) {
    int32_t o = 0;
    for (; o + 4 <= p->o; o += 4) {
      float s0 = 0.0f, s1 = 0.0f, s2 = 0.0f, s3 = 0.0f;
      for (int32_t k = 0; k < p->i; k++) {
        s0 += x[k] * weight(w, o, p->i, k, type);
        s1 += x[k] * weight(w, o + 1, p->i, k, type);
        s2 += x[k] * weight(w, o + 2, p->i, k, type);
        s3 += x[k] * weight(w, o + 3, p->i, k, type);
      }
      y[o] = finish(s0, scale, bias, o, p->low, p->high, type);
      y[o + 1] = finish(s1, scale, bias, o + 1, p->low, p->high, type);
      y[o + 2] = finish(s2, scale, bias, o + 2, p->low, p->high, type);
      y[o + 3] = finish(s3, scale, bias, o + 3, p->low, p->high, type);
    }
    for (; o < p->o; o++) {
      float s = 0.0f;
      for (int32_t k = 0; k < p->i; k++) s += x[k] * weight(w, o, p->i, k, type);
      y[o] = finish(s, scale, bias, o, p->low, p->high, type);
    }
  }
}

NS_INLINE void conv2d(const ns_conv2d_f32_params *p, const float *x, const void *w, const float *scale, const float *bias,
                      float *y, const int32_t type) {
  const int32_t n = p->c / p->groups, outs = p->o / p->groups, length = p->kh * p->kw * n;
  for (int32_t oy = 0; oy < p->oh; oy++) {
    for (int32_t ox = 0; ox < p->ow; ox++, y += p->o) {
      for (int32_t o = 0; o < p->o; o++) {
        float s = 0.0f;
        for (int32_t ky = 0; ky < p->kh; ky++) {
          const int32_t iy = oy * p->sy - p->top + ky * p->dy;
          if (iy < 0 || iy >= p->h) continue;
          for (int32_t kx = 0; kx < p->kw; kx++) {
            const int32_t ix = ox * p->sx - p->left + kx * p->dx;
            if (ix < 0 || ix >= p->w) continue;
            const float *from = x + ((ptrdiff_t)iy * p->w + ix) * p->c + o / outs * n;
            for (int32_t k = 0; k < n; k++) s += from[k] * weight(w, o, length, (ky * p->kw + kx) * n + k, type);
          }
        }
        y[o] = finish(s, scale, bias, o, p->low, p->high, type);
      }
    }
  }
}

/* Weights lie tap by tap, int4 ones channel by channel. */
NS_INLINE void depthwise2d(const ns_depthwise2d_f32_params *p, const float *x, const void *w, const float *scale,
                           const float *bias, float *y, const int32_t type) {
  const int32_t outs = p->c * p->times, taps = p->kh * p->kw;
  for (int32_t oy = 0; oy < p->oh; oy++) {
    for (int32_t ox = 0; ox < p->ow; ox++, y += outs) {
      for (int32_t o = 0; o < outs; o++) {
        float s = 0.0f;
        for (int32_t ky = 0; ky < p->kh; ky++) {
          const int32_t iy = oy * p->sy - p->top + ky * p->dy;
          if (iy < 0 || iy >= p->h) continue;
          for (int32_t kx = 0; kx < p->kw; kx++) {
            const int32_t ix = ox * p->sx - p->left + kx * p->dx, tap = ky * p->kw + kx;
            if (ix < 0 || ix >= p->w) continue;
            const float v = type == W4 ? weight(w, o, taps, tap, type) : weight(w, tap, outs, o, type);
            s += x[((ptrdiff_t)iy * p->w + ix) * p->c + o / p->times] * v;
          }
        }
        y[o] = finish(s, scale, bias, o, p->low, p->high, type);
      }
    }
  }
}

void ns_dense_f32(const ns_dense_f32_params *p, const float *x, const float *w, const float *bias, float *y) {
  dense(p, x, w, NULL, bias, y, F32);
}

void ns_dense_f32w8(const ns_dense_f32w8_params *p, const float *x, const int8_t *w, const float *scale,
                           const float *bias, float *y) {
  dense(p, x, w, scale, bias, y, W8);
}

void ns_dense_f32w4(const ns_dense_f32w4_params *p, const float *x, const uint8_t *w, const float *scale,
                           const float *bias, float *y) {
  dense(p, x, w, scale, bias, y, W4);
}

void ns_conv2d_f32(const ns_conv2d_f32_params *p, const float *x, const float *w, const float *bias, float *y) {
  conv2d(p, x, w, NULL, bias, y, F32);
}

void ns_conv2d_f32w8(const ns_conv2d_f32w8_params *p, const float *x, const int8_t *w, const float *scale,
                            const float *bias, float *y) {
  conv2d(p, x, w, scale, bias, y, W8);
}

void ns_conv2d_f32w4(const ns_conv2d_f32w4_params *p, const float *x, const uint8_t *w, const float *scale,
                            const float *bias, float *y) {
  conv2d(p, x, w, scale, bias, y, W4);
}

void ns_depthwise2d_f32(const ns_depthwise2d_f32_params *p, const float *x, const float *w, const float *bias, float *y) {
  depthwise2d(p, x, w, NULL, bias, y, F32);
}

void ns_depthwise2d_f32w8(const ns_depthwise2d_f32w8_params *p, const float *x, const int8_t *w, const float *scale,
                                 const float *bias, float *y) {
  depthwise2d(p, x, w, scale, bias, y, W8);
}

void ns_depthwise2d_f32w4(const ns_depthwise2d_f32w4_params *p, const float *x, const uint8_t *w, const float *scale,
                                 const float *bias, float *y) {
  depthwise2d(p, x, w, scale, bias, y, W4);
}
