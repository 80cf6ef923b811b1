/* Average and maximum over windows, int8 and float. Padding takes no part. */
#include <float.h>

#include "ns_int.h"

#define LANES 32

/* The part of a window that lies inside 0…size: from *begin to *end. */
NS_INLINE void inside(int32_t out, int32_t step, int32_t before, int32_t k, int32_t size, int32_t *begin, int32_t *end) {
  *begin = ns_max(out * step - before, 0);
  *end = ns_min(out * step - before + k, size);
}

/* The loops that the four kernels share: BODY sees the window iy0…iy1, ix0…ix1 and channels c0 to c0 + n - 1. */
#define EACH_WINDOW(p, y, BODY)                                          \
  for (int32_t oy = 0; oy < (p)->oh; oy++) {                             \
    for (int32_t ox = 0; ox < (p)->ow; ox++, (y) += (p)->c) {            \
      int32_t iy0, iy1, ix0, ix1;                                        \
      inside(oy, (p)->sy, (p)->top, (p)->kh, (p)->h, &iy0, &iy1);        \
      inside(ox, (p)->sx, (p)->left, (p)->kw, (p)->w, &ix0, &ix1);       \
      for (int32_t c0 = 0; c0 < (p)->c; c0 += LANES) {                   \
        const int32_t n = ns_min(LANES, (p)->c - c0);                    \
        BODY                                                             \
      }                                                                  \
    }                                                                    \
  }

/* To the nearest, halves away from zero. */
NS_INLINE int32_t mean(int32_t total, int32_t count) {
  return (total > 0 ? total + count / 2 : total - count / 2) / count;
}

#define EACH_PIXEL(p, x, BODY)                                           \
  for (int32_t iy = iy0; iy < iy1; iy++) {                               \
    for (int32_t ix = ix0; ix < ix1; ix++) {                             \
      const ptrdiff_t from = ((ptrdiff_t)iy * (p)->w + ix) * (p)->c + c0; \
      for (int32_t i = 0; i < n; i++) BODY                               \
    }                                                                    \
  }

void ns_avgpool2d(const ns_avgpool2d_params *p, const int8_t *x, const int32_t *m, int8_t *y) {
  EACH_WINDOW(p, y, {
    int32_t acc[LANES];
    const int32_t count = (iy1 - iy0) * (ix1 - ix0);
    const int32_t start = p->shift ? -count * p->zx : 0;
    for (int32_t i = 0; i < n; i++) acc[i] = start;
    EACH_PIXEL(p, x, acc[i] += x[from + i];)
    for (int32_t i = 0; i < n; i++) {
      y[c0 + i] = p->shift ? ns_requant(acc[i], m[count - p->first], p->shift, p->zy, p->low, p->high)
                           : (int8_t)ns_clip(mean(acc[i], count), p->low, p->high);
    }
  })
}

void ns_maxpool2d(const ns_maxpool2d_params *p, const int8_t *x, int8_t *y) {
  EACH_WINDOW(p, y, {
    int8_t acc[LANES];
    for (int32_t i = 0; i < n; i++) acc[i] = -128;
    EACH_PIXEL(p, x, acc[i] = x[from + i] > acc[i] ? x[from + i] : acc[i];)
    for (int32_t i = 0; i < n; i++) y[c0 + i] = (int8_t)ns_clip(acc[i], p->low, p->high);
  })
}

void ns_avgpool2d_f32(const ns_avgpool2d_f32_params *p, const float *x, float *y) {
  EACH_WINDOW(p, y, {
    float acc[LANES];
    const float count = (float)((iy1 - iy0) * (ix1 - ix0));
    for (int32_t i = 0; i < n; i++) acc[i] = 0.0f;
    EACH_PIXEL(p, x, acc[i] += x[from + i];)
    for (int32_t i = 0; i < n; i++) {
      const float v = acc[i] / count;
      y[c0 + i] = v < p->low ? p->low : v > p->high ? p->high : v;
    }
  })
}

void ns_maxpool2d_f32(const ns_maxpool2d_f32_params *p, const float *x, float *y) {
  EACH_WINDOW(p, y, {
    float acc[LANES];
    for (int32_t i = 0; i < n; i++) acc[i] = -FLT_MAX;
    EACH_PIXEL(p, x, acc[i] = x[from + i] > acc[i] ? x[from + i] : acc[i];)
    for (int32_t i = 0; i < n; i++) y[c0 + i] = acc[i] < p->low ? p->low : acc[i] > p->high ? p->high : acc[i];
  })
}
