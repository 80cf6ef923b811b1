/* The kernels: what every operator of a static graph calls. C99, no malloc, no state, no double arithmetic.
 *
 * void ns_NAME(const ns_NAME_params *p, pointers...). A structure holds int32_t and float fields only; Python reads the order
 * of the fields, and that one structure is another's, from this header (graph/abi.py).
 *
 * Images are NHWC with N = 1. int8: y = clip(((sum * m + 2^(shift-1)) >> shift) + zy, low, high), m per output channel.
 * room: by how many bits (0 to 8) every such sum, bias included, may be shifted left without overflow.
 * Weights are (O, KH, KW, I), depthwise (KH, KW, C), dense (O, I); every int8 or int4 weight array ends with 4 spare
 * bytes, which may be read. int4 (w4): two codes a byte, low nibble first, every output channel's row on a byte of its own
 * (depthwise: one row of taps per channel). bias may be NULL. scratch: as many bytes as graph/lower.py plans, 4-byte aligned.
 */
#ifndef NS_H
#define NS_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Rows of i numbers times a matrix. A pointwise convolution is one, with a row per pixel. y may be x. */
typedef struct {
  int32_t rows, i, o, zx, zy, shift, room, low, high;
} ns_dense_params;
typedef ns_dense_params ns_dense_w4_params;
void ns_dense(const ns_dense_params *p, const int8_t *x, const int8_t *w, const int32_t *bias, const int32_t *m, int8_t *y,
              void *scratch);
void ns_dense_w4(const ns_dense_w4_params *p, const int8_t *x, const uint8_t *w, const int32_t *bias, const int32_t *m,
                 int8_t *y, void *scratch);

/* h, w, c: input; stride sy, sx; dilation dy, dx; padding before: top, left. */
typedef struct {
  int32_t h, w, c, oh, ow, o, kh, kw, sy, sx, dy, dx, top, left, groups, zx, zy, shift, room, low, high;
} ns_conv2d_params;
typedef ns_conv2d_params ns_conv2d_w4_params;
void ns_conv2d(const ns_conv2d_params *p, const int8_t *x, const int8_t *w, const int32_t *bias, const int32_t *m, int8_t *y,
               void *scratch);
void ns_conv2d_w4(const ns_conv2d_w4_params *p, const int8_t *x, const uint8_t *w, const int32_t *bias, const int32_t *m,
                  int8_t *y, void *scratch);

/* Output channel c * times + k reads channel c. With times = 1 y may be x: a strip of one channel's rows, enough for `rows`
 * output rows, is copied out before that channel's lane is overwritten. */
typedef struct {
  int32_t h, w, c, oh, ow, times, kh, kw, sy, sx, dy, dx, top, left, rows, zx, zy, shift, room, low, high;
} ns_depthwise2d_params;
typedef ns_depthwise2d_params ns_depthwise2d_w4_params;
void ns_depthwise2d(const ns_depthwise2d_params *p, const int8_t *x, const int8_t *w, const int32_t *bias, const int32_t *m,
                    int8_t *y, void *scratch);
void ns_depthwise2d_w4(const ns_depthwise2d_w4_params *p, const int8_t *x, const uint8_t *w, const int32_t *bias,
                       const int32_t *m, int8_t *y, void *scratch);

/* Float activations; weights float, or int8 / int4 codes with a scale per output channel (w8, w4). */
typedef struct {
  int32_t rows, i, o;
  float low, high;
} ns_dense_f32_params;
typedef ns_dense_f32_params ns_dense_f32w8_params;
typedef ns_dense_f32_params ns_dense_f32w4_params;
void ns_dense_f32(const ns_dense_f32_params *p, const float *x, const float *w, const float *bias, float *y);
void ns_dense_f32w8(const ns_dense_f32w8_params *p, const float *x, const int8_t *w, const float *scale, const float *bias,
                    float *y);
void ns_dense_f32w4(const ns_dense_f32w4_params *p, const float *x, const uint8_t *w, const float *scale, const float *bias,
                    float *y);

typedef struct {
  int32_t h, w, c, oh, ow, o, kh, kw, sy, sx, dy, dx, top, left, groups;
  float low, high;
} ns_conv2d_f32_params;
typedef ns_conv2d_f32_params ns_conv2d_f32w8_params;
typedef ns_conv2d_f32_params ns_conv2d_f32w4_params;
void ns_conv2d_f32(const ns_conv2d_f32_params *p, const float *x, const float *w, const float *bias, float *y);
void ns_conv2d_f32w8(const ns_conv2d_f32w8_params *p, const float *x, const int8_t *w, const float *scale, const float *bias,
                     float *y);
void ns_conv2d_f32w4(const ns_conv2d_f32w4_params *p, const float *x, const uint8_t *w, const float *scale, const float *bias,
                     float *y);

typedef struct {
  int32_t h, w, c, oh, ow, times, kh, kw, sy, sx, dy, dx, top, left;
  float low, high;
} ns_depthwise2d_f32_params;
typedef ns_depthwise2d_f32_params ns_depthwise2d_f32w8_params;
typedef ns_depthwise2d_f32_params ns_depthwise2d_f32w4_params;
void ns_depthwise2d_f32(const ns_depthwise2d_f32_params *p, const float *x, const float *w, const float *bias, float *y);
void ns_depthwise2d_f32w8(const ns_depthwise2d_f32w8_params *p, const float *x, const int8_t *w, const float *scale,
                          const float *bias, float *y);
void ns_depthwise2d_f32w4(const ns_depthwise2d_f32w4_params *p, const float *x, const uint8_t *w, const float *scale,
                          const float *bias, float *y);

/* q = clip((a * ma + b * mb + offset) >> shift): rounding and the three zero points are in `offset`. a and y have n0 x n1 x
 * n2 x n3 elements; b advances by s0…s3 elements (0 repeats it). y may be a or b. */
typedef struct {
  int32_t n0, n1, n2, n3, s0, s1, s2, s3, ma, mb, offset, shift, low, high;
} ns_add_params;
void ns_add(const ns_add_params *p, const int8_t *a, const int8_t *b, int8_t *y);

typedef struct {
  int32_t n0, n1, n2, n3, s0, s1, s2, s3, za, zb, zy, m, shift, low, high;
} ns_mul_params;
void ns_mul(const ns_mul_params *p, const int8_t *a, const int8_t *b, int8_t *y);

typedef struct {
  int32_t n0, n1, n2, n3, s0, s1, s2, s3;
  float low, high;
} ns_add_f32_params;
typedef ns_add_f32_params ns_mul_f32_params;
void ns_add_f32(const ns_add_f32_params *p, const float *a, const float *b, float *y);
void ns_mul_f32(const ns_mul_f32_params *p, const float *a, const float *b, float *y);

/* table: the outputs of codes -128…127. y may be x. */
typedef struct {
  int32_t n;
} ns_lut_params;
void ns_lut(const ns_lut_params *p, const int8_t *x, const int8_t *table, int8_t *y);

/* function: the place of a name in graph/lower_ops.py's UNARY. y may be x. */
typedef struct {
  int32_t n, function;
} ns_unary_f32_params;
void ns_unary_f32(const ns_unary_f32_params *p, const float *x, float *y);

/* y = clip(rint(x * inverse) + zero): half to even. y may be x. */
typedef struct {
  int32_t n, zero;
  float inverse;
} ns_quantize_params;
void ns_quantize(const ns_quantize_params *p, const float *x, int8_t *y);

typedef struct {
  int32_t n, zero;
  float scale;
} ns_dequantize_params;
void ns_dequantize(const ns_dequantize_params *p, const int8_t *x, float *y);

/* Over the last axis. exps: 2^20 exp(-scale d) for the distance d = 0…255 from the largest code. y may be x. */
typedef struct {
  int32_t rows, n;
} ns_softmax_params;
void ns_softmax(const ns_softmax_params *p, const int8_t *x, const uint32_t *exps, int8_t *y);

typedef struct {
  int32_t rows, n;
  float beta;
} ns_softmax_f32_params;
void ns_softmax_f32(const ns_softmax_f32_params *p, const float *x, float *y);

/* m: multipliers by number of elements under the window, from `first` elements on. shift = 0: x and y have one scale and zero
 * point, m is not read, and y is the mean of the codes, halves away from zero. */
typedef struct {
  int32_t h, w, c, oh, ow, kh, kw, sy, sx, top, left, first, zx, zy, shift, low, high;
} ns_avgpool2d_params;
void ns_avgpool2d(const ns_avgpool2d_params *p, const int8_t *x, const int32_t *m, int8_t *y);

typedef struct {
  int32_t h, w, c, oh, ow, kh, kw, sy, sx, top, left, low, high;
} ns_maxpool2d_params;
void ns_maxpool2d(const ns_maxpool2d_params *p, const int8_t *x, int8_t *y);

typedef struct {
  int32_t h, w, c, oh, ow, kh, kw, sy, sx, top, left;
  float low, high;
} ns_avgpool2d_f32_params;
typedef ns_avgpool2d_f32_params ns_maxpool2d_f32_params;
void ns_avgpool2d_f32(const ns_avgpool2d_f32_params *p, const float *x, float *y);
void ns_maxpool2d_f32(const ns_maxpool2d_f32_params *p, const float *x, float *y);

/* Moves n0 x … x n4 elements of `size` bytes between two strided places: starts and steps in bytes. */
typedef struct {
  int32_t size, n0, n1, n2, n3, n4, from, a0, a1, a2, a3, a4, to, b0, b1, b2, b3, b4;
} ns_copy_params;
void ns_copy(const ns_copy_params *p, const void *x, void *y);

/* n elements of `size` (1, 2 or 4) bytes with these bits. */
typedef struct {
  int32_t n, size, bits;
} ns_fill_params;
void ns_fill(const ns_fill_params *p, void *y);

#ifdef __cplusplus
}
#endif

#endif
