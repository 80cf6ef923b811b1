/* The inner loops, one table of functions per instruction set, chosen at run time.
 *
 * Quantized products are exact integers per block of inputs, scaled and added in order of the blocks; so every instruction set
 * gives the same bits. Float products add in 16 lanes; instruction sets with fused multiply-add differ in the last bits. */
#ifndef NS_KERNELS_H
#define NS_KERNELS_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "../model.h"

enum {
  NS_PANEL = 16,     /* rows of a weight that are handled together */
  NS_FEW = 8,        /* up to so many tokens weights are unpacked straight into registers; beyond, a tile is packed first */
  NS_KEYS = 64,      /* keys per step of attention */
  NS_QUERIES = 4,    /* queries per step of attention */
};

/* Activations of M tokens as int8 with one scale per block of inputs: x[i] = q[i] * scale[i / block].
 * Rows are `stride` bytes, a multiple of 128, the rest of the last block zero. */
typedef struct {
  int block, blocks, stride;
  uint8_t flip;     /* 0, or 128 for many tokens: natural then holds q + 128, unsigned */
  int8_t *natural;  /* (M, stride) in order, q ^ flip */
  int8_t *split;    /* for weights of 4 bits: even inputs before odd ones, see ns_split_at; or NULL */
  int8_t *split2;   /* for 2 bits: the inputs = 0 mod 4, then = 1, 2, 3; or NULL */
  float *scale;     /* (M, blocks) */
  int32_t *sum;     /* (M, blocks): sum of q */
} ns_act;


/* A slot's keys and values of one key head of one block.
 * Keys in tiles of 16 tokens, (tile, qk, 16), values (token, vd16) where vd16 is the value width rounded up to 16. */
typedef struct {
  int kind; /* NS_KV_F16, NS_KV_INT8 */
  int qk, vd, vd16;
  void *keys, *values;
  float *key_scale, *value_scale; /* per token, int8 only */
} ns_kv;

/* The channels that a transposed weight is asked for, in order: `count` of them, the same for M tokens, whose left-out channels
 * have q or x zero. start[b] … start[b + 1] - 1 are those of block b of the inputs. */
typedef struct {
  int count, stride, block, blocks;
  const int32_t *channels, *start;
  const float *x;     /* (M, stride), dense weights */
  const int8_t *q;    /* (M, stride), quantized weights, and scale and sum (M, blocks) as in ns_act; sums of the chosen */
  const float *scale;
  const int32_t *sum;
} ns_picked;

typedef struct {
  const char *name;
  /* y of the 16 rows of a panel (at the end `rows` of them) for M <= NS_FEW tokens; out (M, 16) */
  void (*quant_few)(const ns_linear *w, int row, int rows, const ns_act *x, int M, float *out, void *scratch);
  /* Unpacks two panels (32 rows) into a tile, and multiplies it with M tokens: out (M, 32). */
  void (*quant_pack)(const ns_linear *w, int row, int rows, void *tile);
  void (*quant_many)(const ns_linear *w, const void *tile, const ns_act *x, int M, float *out);
  /* x (M, xstride), zero beyond ins up to a multiple of 16; out (M, 16) */
  void (*dense)(const ns_linear *w, int row, int rows, const float *x, size_t xstride, int M, float *out);
  /* Outputs row … row+width-1 of a transposed weight from the chosen channels; out (M, width) */
  void (*sparse_dense)(const ns_linear *w, int row, int width, const ns_picked *x, int M, float *out);
  /* sums: (M, width rounded up to 64) integers of scratch */
  void (*sparse_quant)(const ns_linear *w, int row, int width, const ns_picked *x, int M, float *out, int32_t *sums);
  void (*quantize)(const float *x, int ins, const ns_act *to, int m, int first, int last); /* blocks first … last-1 of token m */
  void (*rmsnorm)(const float *x, const float *weight, float eps, int width, int from, int to, float *out);
  void (*silu_mul)(float *gate, const float *up, int count); /* gate = silu(gate) * up */
  void (*rotate)(float *x, const float *cosine, const float *sine, int half);
  void (*kv_store)(const ns_kv *kv, int position, const float *key, const float *value);
  /* n <= NS_QUERIES queries (n, qk) of one key head; query i sees tokens from[i] … to[i]-1; out (n, vd16) */
  void (*attend)(const ns_kv *kv, int n, const float *q, const int *from, const int *to, float scale, float *out, float *scratch);
  void (*row)(const ns_linear *w, int row, float *out); /* one row of a dense or quantized weight */
  float (*sweep)(const float *data, size_t count);      /* reads `count` floats, a multiple of 64; the largest */
  double (*int8_burst)(long steps);                     /* multiply-accumulates done from registers in so many steps */
} ns_kernels;

const ns_kernels *ns_kernels_named(const char *isa); /* NULL: unknown, or not on this processor; isa NULL: the best */
const ns_kernels *ns_kernels_list(int index);        /* those of this processor, NULL at the end; the last is scalar */

/* Bytes of a tile and of quant_few's scratch; the same for all instruction sets, so that a plan holds on every processor. */
size_t ns_tile_bytes(const ns_linear *w);
size_t ns_panel_scratch(const ns_linear *w);
int ns_block_dividing(int group); /* the largest divisor of `group` up to 64 */

static inline float ns_half_to_float(uint16_t h) {
  /* exact for all finite values: the exponent is moved by a multiplication, which also handles subnormals */
  uint32_t u = ((uint32_t)h & 0x7fff) << 13, sign = ((uint32_t)h & 0x8000) << 16;
  float f;
  memcpy(&f, &u, 4);
  f *= 0x1p112f;
  memcpy(&u, &f, 4);
  if ((h & 0x7c00) == 0x7c00) u |= 0x7f800000;
  u |= sign;
  memcpy(&f, &u, 4);
  return f;
}

static inline uint16_t ns_float_to_half(float f) { /* round to nearest even; beyond the range: infinity */
  uint32_t u, sign;
  memcpy(&u, &f, 4);
  sign = u >> 16 & 0x8000;
  u &= 0x7fffffff;
  if (u >= 0x7f800000) return (uint16_t)(sign | (u > 0x7f800000 ? 0x7e00 : 0x7c00));
  if (u >= 0x477ff000) return (uint16_t)(sign | 0x7c00);
  if (u < 0x38800000) { /* subnormal: let the adder round */
    float g;
    memcpy(&g, &u, 4);
    g += 0.5f;
    memcpy(&u, &g, 4);
    return (uint16_t)(sign | (u - 0x3f000000));
  }
  u += 0xfff + (u >> 13 & 1) - 0x38000000;
  return (uint16_t)(sign | u >> 13);
}

static inline float ns_bfloat_to_float(uint16_t h) {
  uint32_t u = (uint32_t)h << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}

/* Where input i of a row lies in `split`: evens then odds of a block, of two blocks where they have 64 inputs. */
static inline size_t ns_split_at(int block, int i) {
  if (block == 64) return (size_t)(i / 128 * 128 + i % 2 * 64 + i % 128 / 64 * 32 + i % 64 / 2);
  return (size_t)(i / block * block + i % 2 * (block / 2) + i % block / 2);
}

/* Code i of a packed row; little-endian bit stream, as layers/packing.py writes it. */
static inline int ns_code(const uint8_t *row, int bits, int i) {
  size_t bit = (size_t)i * (size_t)bits;
  int low = row[bit >> 3] >> (bit & 7), have = 8 - (int)(bit & 7);
  if (have < bits) low |= row[(bit >> 3) + 1] << have;
  return low & ((1 << bits) - 1);
}

#endif
