/* Kernels of training: gradients in float32, codes updated in place. graph/ops/train.py says what each one computes.
 *
 * Sums are taken one after the other in the order given there, starting from +0. Compile with -ffp-contract=off: the bits are
 * then those of the Python reference, and so are the weights after any number of steps.
 */
#ifndef NS_TRAIN_H
#define NS_TRAIN_H

#include "ns.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Bit i (lowest first): low < x[i] < high. */
typedef struct {
  int32_t n, low, high;
} ns_clip_mask_params;
void ns_clip_mask(const ns_clip_mask_params *p, const int8_t *x, uint8_t *bits);

typedef struct {
  int32_t rows, c, kept;
} ns_pick_channels_params;
void ns_pick_channels(const ns_pick_channels_params *p, const int8_t *x, const int32_t *channels, int8_t *y);

/* exps: e^(-scale d) for d = 0...255. A label outside 0...n-1 names no class. */
typedef struct {
  int32_t n;
  float scale;
} ns_loss_gradient_params;
void ns_loss_gradient(const ns_loss_gradient_params *p, const int8_t *x, const int32_t *label, const float *exps, float *g,
                      float *chance);

/* c: number of factors e, channels or 1. bits may be NULL; y may be g. */
typedef struct {
  int32_t n, c;
} ns_clip_gradient_params;
void ns_clip_gradient(const ns_clip_gradient_params *p, const float *g, const uint8_t *bits, const float *e, float *y);

typedef struct {
  int32_t rows, c;
  float factor;
} ns_pool_gradient_params;
void ns_pool_gradient(const ns_pool_gradient_params *p, const float *g, float *y);

/* g is (oh, ow, o), y the gradient of the layer's input (h, w, c). */
typedef struct {
  int32_t h, w, c, oh, ow, o, kh, kw, sy, sx, top, left;
} ns_conv_gradient_params;
typedef ns_conv_gradient_params ns_depthwise_gradient_params;
void ns_conv_gradient(const ns_conv_gradient_params *p, const float *g, const int8_t *w, float *y);
void ns_depthwise_gradient(const ns_depthwise_gradient_params *p, const float *g, const int8_t *w, float *y);

/* x and w have the c trained channels. key: of the random numbers; truncate: cut toward zero and wrap around. s has a factor per
 * output channel (depthwise: per trained channel), rate and step are single numbers. */
typedef struct {
  int32_t h, w, c, oh, ow, o, kh, kw, sy, sx, top, left, zx, key, truncate;
} ns_conv_update_params;
void ns_conv_update(const ns_conv_update_params *p, const float *g, const int8_t *x, int8_t *w, const float *s,
                    const float *rate, const uint32_t *step);

/* g has `row` channels, of which `channels` (NULL: all) are trained. */
typedef struct {
  int32_t h, w, c, oh, ow, o, kh, kw, sy, sx, top, left, zx, row, key, truncate;
} ns_depthwise_update_params;
void ns_depthwise_update(const ns_depthwise_update_params *p, const float *g, const int8_t *x, int8_t *w,
                         const int32_t *channels, const float *s, const float *rate, const uint32_t *step);

/* y = w, rows of c, with the columns `channels` taken from `trained`, rows of kept. */
typedef struct {
  int32_t rows, c, kept;
} ns_merge_channels_params;
void ns_merge_channels(const ns_merge_channels_params *p, const int8_t *w, const int8_t *trained, const int32_t *channels,
                       int8_t *y);

typedef struct {
  int32_t rows, o, room, key, truncate;
} ns_bias_update_params;
void ns_bias_update(const ns_bias_update_params *p, const float *g, int32_t *b, const float *s, const float *rate,
                    const uint32_t *step);

typedef struct {
  int32_t by;
} ns_count_step_params;
void ns_count_step(const ns_count_step_params *p, uint32_t *step);

#ifdef __cplusplus
}
#endif

#endif
