/* Gradients and updates. One image at a time; every sum in the fixed order of graph/ops/train.py. */
#include "train.h"

#include "ns_int.h"

#define LARGEST_CHANGE 16777216.0f

void ns_clip_mask(const ns_clip_mask_params *p, const int8_t *x, uint8_t *bits) {
  for (int32_t i = 0; i < p->n; i += 8) {
    const int32_t end = ns_min(8, p->n - i);
    uint32_t byte = 0;
    for (int32_t k = 0; k < end; k++) byte |= (uint32_t)(x[i + k] > p->low && x[i + k] < p->high) << k;
    bits[i >> 3] = (uint8_t)byte;
  }
}

void ns_pick_channels(const ns_pick_channels_params *p, const int8_t *x, const int32_t *channels, int8_t *y) {
  for (int32_t r = 0; r < p->rows; r++, x += p->c)
    for (int32_t k = 0; k < p->kept; k++) *y++ = x[channels[k]];
}

void ns_loss_gradient(const ns_loss_gradient_params *p, const int8_t *x, const int32_t *label, const float *exps, float *g,
                      float *chance) {
  const int32_t hit = *label;
  int32_t top = x[0];
  for (int32_t k = 1; k < p->n; k++) top = ns_max(top, x[k]);
  float total = 0;
  for (int32_t k = 0; k < p->n; k++) total += exps[top - x[k]];
  float found = 0;
  for (int32_t k = 0; k < p->n; k++) {
    const float likely = exps[top - x[k]] / total;
    if (k == hit) found = likely;
    g[k] = (k == hit ? likely - 1.0f : likely) * p->scale;
  }
  *chance = found;
}

void ns_clip_gradient(const ns_clip_gradient_params *p, const float *g, const uint8_t *bits, const float *e, float *y) {
  for (int32_t i = 0, k = 0; i < p->n; i++) {
    const int32_t inside = bits == NULL || ((bits[i >> 3] >> (i & 7)) & 1);
    y[i] = inside ? g[i] * e[k] : 0.0f;
    if (++k == p->c) k = 0;
  }
}

void ns_pool_gradient(const ns_pool_gradient_params *p, const float *g, float *y) {
  for (int32_t r = 0; r < p->rows; r++)
    for (int32_t k = 0; k < p->c; k++) *y++ = g[k] * p->factor;
}

/* a[r * 4 + j] = sum over k < n of g[r * gr + k * gk] * (b[k * bk + j] - zero), r and j < 4: sixteen sums in registers. */
NS_INLINE void tile(float *a, const float *g, int32_t gr, int32_t gk, const int8_t *b, int32_t bk, int32_t zero, int32_t n) {
  float a00 = 0, a01 = 0, a02 = 0, a03 = 0, a10 = 0, a11 = 0, a12 = 0, a13 = 0;
  float a20 = 0, a21 = 0, a22 = 0, a23 = 0, a30 = 0, a31 = 0, a32 = 0, a33 = 0;
  const float *g1 = g + gr, *g2 = g1 + gr, *g3 = g2 + gr;
  for (int32_t k = 0; k < n; k++) {
    const float b0 = (float)(b[0] - zero), b1 = (float)(b[1] - zero), b2 = (float)(b[2] - zero), b3 = (float)(b[3] - zero);
    const float u0 = *g, u1 = *g1, u2 = *g2, u3 = *g3;
    a00 += u0 * b0, a01 += u0 * b1, a02 += u0 * b2, a03 += u0 * b3;
    a10 += u1 * b0, a11 += u1 * b1, a12 += u1 * b2, a13 += u1 * b3;
    a20 += u2 * b0, a21 += u2 * b1, a22 += u2 * b2, a23 += u2 * b3;
    a30 += u3 * b0, a31 += u3 * b1, a32 += u3 * b2, a33 += u3 * b3;
    g += gk, g1 += gk, g2 += gk, g3 += gk, b += bk;
  }
  a[0] = a00, a[1] = a01, a[2] = a02, a[3] = a03, a[4] = a10, a[5] = a11, a[6] = a12, a[7] = a13;
  a[8] = a20, a[9] = a21, a[10] = a22, a[11] = a23, a[12] = a30, a[13] = a31, a[14] = a32, a[15] = a33;
}

/* The same for fewer than four rows or columns. */
NS_INLINE void part(float *a, const float *g, int32_t gr, int32_t gk, const int8_t *b, int32_t bk, int32_t zero, int32_t n,
                    int32_t rows, int32_t columns) {
  for (int32_t r = 0; r < rows; r++)
    for (int32_t j = 0; j < columns; j++) {
      const float *u = g + r * gr;
      const int8_t *v = b + j;
      float sum = 0;
      for (int32_t k = 0; k < n; k++, u += gk, v += bk) sum += *u * (float)(*v - zero);
      a[r * 4 + j] = sum;
    }
}

NS_INLINE void block(float *a, const float *g, int32_t gr, int32_t gk, const int8_t *b, int32_t bk, int32_t zero, int32_t n,
                     int32_t rows, int32_t columns) {
  if (rows == 4 && columns == 4)
    tile(a, g, gr, gk, b, bk, zero, n);
  else
    part(a, g, gr, gk, b, bk, zero, n, rows, columns);
}

/* The outputs of a tap along one axis: input i is output * stride + tap - before. -1 when there is none. */
NS_INLINE int32_t reached(int32_t i, int32_t tap, int32_t before, int32_t stride, int32_t outs) {
  const int32_t at = i + before - tap;
  if (at < 0 || at % stride != 0) return -1;
  return at / stride < outs ? at / stride : -1;
}

void ns_conv_gradient(const ns_conv_gradient_params *p, const float *g, const int8_t *w, float *y) {
  const int32_t c = p->c, o = p->o, pixels = p->h * p->w;
  if (p->kh == 1 && p->kw == 1 && p->sy == 1 && p->sx == 1 && p->top == 0 && p->left == 0) {
    for (int32_t r = 0; r < pixels; r += 4)
      for (int32_t i = 0; i < c; i += 4) {
        const int32_t rows = ns_min(4, pixels - r), columns = ns_min(4, c - i);
        float a[16];
        block(a, g + r * o, o, 1, w + i, c, 0, o, rows, columns);
        for (int32_t k = 0; k < rows; k++)
          for (int32_t j = 0; j < columns; j++) y[(r + k) * c + i + j] = a[k * 4 + j];
      }
    return;
  }
  for (int32_t iy = 0; iy < p->h; iy++)
    for (int32_t ix = 0; ix < p->w; ix++, y += c) {
      for (int32_t i = 0; i < c; i++) y[i] = 0;
      for (int32_t ky = 0; ky < p->kh; ky++) {
        const int32_t oy = reached(iy, ky, p->top, p->sy, p->oh);
        for (int32_t kx = 0; oy >= 0 && kx < p->kw; kx++) {
          const int32_t ox = reached(ix, kx, p->left, p->sx, p->ow);
          const int8_t *v = w + (ky * p->kw + kx) * c;
          for (int32_t k = 0; ox >= 0 && k < o; k++, v += p->kh * p->kw * c) {
            const float u = g[(oy * p->ow + ox) * o + k];
            for (int32_t i = 0; i < c; i++) y[i] += u * (float)v[i];
          }
        }
      }
    }
}

void ns_depthwise_gradient(const ns_depthwise_gradient_params *p, const float *g, const int8_t *w, float *y) {
  const int32_t c = p->c;
  for (int32_t iy = 0; iy < p->h; iy++)
    for (int32_t ix = 0; ix < p->w; ix++, y += c) {
      for (int32_t i = 0; i < c; i++) y[i] = 0;
      for (int32_t ky = 0; ky < p->kh; ky++) {
        const int32_t oy = reached(iy, ky, p->top, p->sy, p->oh);
        for (int32_t kx = 0; oy >= 0 && kx < p->kw; kx++) {
          const int32_t ox = reached(ix, kx, p->left, p->sx, p->ow);
          if (ox < 0) continue;
          const float *u = g + (oy * p->ow + ox) * c;
          const int8_t *v = w + (ky * p->kw + kx) * c;
          for (int32_t i = 0; i < c; i++) y[i] += u[i] * (float)v[i];
        }
      }
    }
}

NS_INLINE uint32_t mix(uint32_t h) {
  h = (h ^ (h >> 16)) * 0x85EBCA6Bu;
  h = (h ^ (h >> 13)) * 0xC2B2AE35u;
  return h ^ (h >> 16);
}

NS_INLINE uint32_t first_number(int32_t key, const uint32_t *step) { return mix((uint32_t)key + *step); }

/* What is subtracted from a code for the scaled gradient v: number i of the update's random numbers rounds it. */
NS_INLINE int32_t change(float v, uint32_t start, uint32_t i, int32_t truncate) {
  if (!(v < LARGEST_CHANGE)) v = LARGEST_CHANGE; /* a NaN as well */
  if (!(v > -LARGEST_CHANGE)) v = -LARGEST_CHANGE;
  if (truncate) return (int32_t)v;
  const float t = v + (float)(mix(start + i) >> 8) * 0x1p-24f;
  const int32_t whole = (int32_t)t;
  return (float)whole > t ? whole - 1 : whole;
}

NS_INLINE int8_t changed(int8_t w, int32_t delta, int32_t truncate) {
  const int32_t v = w - delta;
  return truncate ? (int8_t)(uint8_t)((uint32_t)v & 255u) : (int8_t)ns_clip(v, -127, 127);
}

void ns_conv_update(const ns_conv_update_params *p, const float *g, const int8_t *x, int8_t *w, const float *s,
                    const float *rate, const uint32_t *step) {
  const int32_t c = p->c, o = p->o, taps = p->kh * p->kw, pointwise = taps == 1 && p->sy == 1 && p->sx == 1 && !p->top && !p->left;
  const uint32_t start = first_number(p->key, step);
  for (int32_t k = 0; k < o; k += 4)
    for (int32_t tap = 0; tap < taps; tap++)
      for (int32_t i = 0; i < c; i += 4) {
        const int32_t rows = ns_min(4, o - k), columns = ns_min(4, c - i);
        float a[16] = {0};
        if (pointwise)
          block(a, g + k, 1, o, x + i, c, p->zx, p->h * p->w, rows, columns);
        else
          for (int32_t oy = 0; oy < p->oh; oy++) {
            const int32_t iy = oy * p->sy + tap / p->kw - p->top;
            for (int32_t ox = 0; iy >= 0 && iy < p->h && ox < p->ow; ox++) {
              const int32_t ix = ox * p->sx + tap % p->kw - p->left;
              if (ix < 0 || ix >= p->w) continue;
              const float *u = g + (oy * p->ow + ox) * o + k;
              const int8_t *v = x + (iy * p->w + ix) * c + i;
              for (int32_t r = 0; r < rows; r++)
                for (int32_t j = 0; j < columns; j++) a[r * 4 + j] += u[r] * (float)(v[j] - p->zx);
            }
          }
        for (int32_t r = 0; r < rows; r++) {
          const float scale = *rate * s[k + r];
          for (int32_t j = 0; j < columns; j++) {
            const int32_t at = ((k + r) * taps + tap) * c + i + j;
            w[at] = changed(w[at], change(scale * a[r * 4 + j], start, (uint32_t)at, p->truncate), p->truncate);
          }
        }
      }
}

void ns_depthwise_update(const ns_depthwise_update_params *p, const float *g, const int8_t *x, int8_t *w,
                         const int32_t *channels, const float *s, const float *rate, const uint32_t *step) {
  const uint32_t start = first_number(p->key, step);
  for (int32_t tap = 0; tap < p->kh * p->kw; tap++)
    for (int32_t i = 0; i < p->c; i++) {
      const int32_t at = channels == NULL ? i : channels[i];
      float a = 0;
      for (int32_t oy = 0; oy < p->oh; oy++) {
        const int32_t iy = oy * p->sy + tap / p->kw - p->top;
        for (int32_t ox = 0; iy >= 0 && iy < p->h && ox < p->ow; ox++) {
          const int32_t ix = ox * p->sx + tap % p->kw - p->left;
          if (ix < 0 || ix >= p->w) continue;
          a += g[(oy * p->ow + ox) * p->row + at] * (float)(x[(iy * p->w + ix) * p->c + i] - p->zx);
        }
      }
      int8_t *code = w + tap * p->c + i;
      *code = changed(*code, change(*rate * s[i] * a, start, (uint32_t)(tap * p->c + i), p->truncate), p->truncate);
    }
}

void ns_merge_channels(const ns_merge_channels_params *p, const int8_t *w, const int8_t *trained, const int32_t *channels,
                       int8_t *y) {
  for (int32_t r = 0; r < p->rows; r++, w += p->c, y += p->c) {
    memcpy(y, w, (size_t)p->c);
    for (int32_t k = 0; k < p->kept; k++) y[channels[k]] = *trained++;
  }
}

void ns_bias_update(const ns_bias_update_params *p, const float *g, int32_t *b, const float *s, const float *rate,
                    const uint32_t *step) {
  const uint32_t start = first_number(p->key, step);
  for (int32_t k = 0; k < p->o; k++) {
    float a = 0;
    for (int32_t r = 0; r < p->rows; r++) a += g[r * p->o + k];
    const int32_t delta = change(*rate * s[k] * a, start, (uint32_t)k, p->truncate);
    const int64_t v = (int64_t)b[k] - delta;
    b[k] = p->truncate ? (int32_t)((uint32_t)b[k] - (uint32_t)delta)
                       : (int32_t)(v < -p->room ? -p->room : v > p->room ? p->room : v);
  }
}

void ns_count_step(const ns_count_step_params *p, uint32_t *step) { *step += (uint32_t)p->by; }
