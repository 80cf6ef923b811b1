/* A statically quantized decoder in integers only: what runtime/integer.py computes, bit for bit, as plain C for any processor.
 *
 * No float occurs in this file. Codes are int8 and int16 (kept as int16 between operators), sums int32, rescaled sums int64.
 * Constants come from runtime/integer_native.py. A few rows of weights are used for all tokens of a call before the next are
 * read. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX512VNNI__
#include <immintrin.h>
#endif

typedef struct { /* q = ((total * m + bias) >> shift) + zero, clipped; bias holds the half */
  int64_t bias;
  int32_t m, second, shift, zero, low, high; /* second: multiplier of the second term of a sum */
} nsi_scale;

typedef struct {
  const uint8_t *w;    /* (outs, ins) int8, or (outs, (ins + 1) / 2) pairs of codes w + 8, the first in the low half */
  const int32_t *m;    /* outs */
  const int64_t *bias; /* outs: bias, half, and what the zero points of both sides add */
  int32_t outs, ins, bits, shift, zero, low, high, unused;
} nsi_linear;

typedef struct {
  const int32_t *m;
  int64_t eps;
  int32_t shift, spare, zero, low, high, unused;
} nsi_norm;

typedef struct {
  const int64_t *cosine, *sine; /* (tables, context, pairs), times the multiplier of the rescaling */
  nsi_scale scale;              /* m unused */
} nsi_turn;

typedef struct {
  nsi_linear q, k, v, o, gate, up, down;
  nsi_norm attn_norm, mlp_norm;
  nsi_turn q_turn, k_turn;
  nsi_scale score, mix, gated, middle, joint; /* middle, joint: sums of two grids */
  const int64_t *coarse, *fine;               /* 257 and 256 entries of 2^-31 */
  const int16_t *silu;                        /* code of silu for every code of gate, from -128 on */
  int64_t steps;
  int32_t tables, pairs, value_dim, hidden;
  int32_t prob_zero, prob_low, prob_high, q_zero, k_zero, v_zero, q_rot_zero, k_rot_zero, heads_zero;
  int32_t stream_zero, o_zero, middle_zero, down_zero, silu_zero, up_zero, unused;
} nsi_block;

typedef struct {
  const nsi_block *blocks;
  const uint8_t *table, *head;           /* (vocab, width) codes */
  const uint8_t *table_zeros, *head_zeros; /* vocab */
  const int32_t *entry;                  /* multipliers of the table's rows */
  const int64_t *head_m;
  nsi_scale entered, left;               /* left: the stream behind the last block, in int32 */
  nsi_norm norm;
  int32_t count, width, vocab, context, heads, kv_heads, window, head_shift, widest, unused;
} nsi_model;

typedef struct { /* one pass; row i is token ids[i] at place at[i] of the sequence slots[i], whose rows come in order */
  const int32_t *ids, *slots, *at;
  const uint8_t *want; /* 1: its logits */
  int8_t *cache;       /* of every sequence and block keys (kv_heads, context, 2R), then values (kv_heads, context, D) */
  int64_t *logits;     /* (wanted, vocab) */
  uint64_t stride;     /* bytes of one sequence in `cache` */
  int32_t rows, unused;
} nsi_call;

static int32_t clip(int64_t x, int32_t low, int32_t high) { return x < low ? low : x > high ? high : (int32_t)x; }

static int32_t scaled(const nsi_scale *s, int64_t total) {
  return clip(((total * s->m + s->bias) >> s->shift) + s->zero, s->low, s->high);
}

static int32_t summed(const nsi_scale *s, int64_t a, int64_t b) {
  return clip(((a * s->m + b * s->second + s->bias) >> s->shift) + s->zero, s->low, s->high);
}

/* How the codes of x are laid out for the weights of a map, `n` bytes a token:
 *   8 bits  x + 128, unsigned, beside signed weights: the constant is taken out in `bias`
 *   4 bits  those of even places, then those of odd ones, signed, beside codes 0 … 15: 8 · sum(x) is taken out per token */
static int laid_out(const nsi_linear *l, const int16_t *x, uint8_t *bytes, int32_t *eights, int T) {
  int n = l->ins, half = (n + 1) / 2;
  if (l->bits == 8) {
    for (int64_t i = 0; i < (int64_t)T * n; i++) bytes[i] = (uint8_t)(x[i] + 128);
    memset(eights, 0, sizeof *eights * (size_t)T);
    return n;
  }
  for (int t = 0; t < T; t++, x += n, bytes += 2 * half) {
    int32_t sum = 0;
    for (int i = 0; i < n; i++) sum += x[i];
    for (int i = 0; i < n / 2; i++) bytes[i] = (uint8_t)x[2 * i], bytes[half + i] = (uint8_t)x[2 * i + 1];
    if (n % 2) bytes[half - 1] = (uint8_t)x[n - 1], bytes[2 * half - 1] = 0;
    eights[t] = 8 * sum;
  }
  return 2 * half;
}

static int32_t dot(const uint8_t *restrict x, const uint8_t *restrict w, int n, int bits) {
  int32_t sum = 0;
  if (bits == 8)
    for (int i = 0; i < n; i++) sum += x[i] * (int8_t)w[i];
  else
    for (int i = 0; i < n / 2; i++) sum += (int8_t)x[i] * (w[i] & 15) + (int8_t)x[n / 2 + i] * (w[i] >> 4);
  return sum;
}

enum { ROWS = 4, TOKENS = 4 };

#ifdef __AVX512VNNI__
/* sums[r * tokens + t] of ROWS rows of weights and `tokens` (1 or TOKENS) tokens of n bytes; the last two are known where this is
 * inlined. The rows after these are fetched ahead: the weights of a token come from memory. */
static inline __attribute__((always_inline)) void tile(const uint8_t *x, const uint8_t *w, int n, int32_t *sums, int tokens,
                                                       int bits) {
  __m512i acc[ROWS * TOKENS], fifteen = _mm512_set1_epi8(15);
  int width = bits == 8 ? n : n / 2;
  for (int i = 0; i < ROWS * tokens; i++) acc[i] = _mm512_setzero_si512();
  for (int i = 0; i < width; i += 64) {
    __mmask64 here = width - i >= 64 ? ~0ull : (1ull << (width - i)) - 1;
    __m512i rows[ROWS];
    for (int r = 0; r < ROWS; r++) {
      rows[r] = _mm512_maskz_loadu_epi8(here, w + (size_t)r * width + i);
      if (tokens == 1) _mm_prefetch((const char *)(w + (size_t)(ROWS + r) * width + i), _MM_HINT_T0);
    }
    for (int t = 0; t < tokens; t++) {
      __m512i first = _mm512_maskz_loadu_epi8(here, x + (size_t)t * n + i);
      if (bits == 8) {
        for (int r = 0; r < ROWS; r++) acc[r * tokens + t] = _mm512_dpbusd_epi32(acc[r * tokens + t], first, rows[r]);
      } else {
        __m512i second = _mm512_maskz_loadu_epi8(here, x + (size_t)t * n + width + i);
        for (int r = 0; r < ROWS; r++) {
          __m512i low = _mm512_and_si512(rows[r], fifteen), high = _mm512_and_si512(_mm512_srli_epi16(rows[r], 4), fifteen);
          acc[r * tokens + t] = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(acc[r * tokens + t], low, first), high, second);
        }
      }
    }
  }
  for (int i = 0; i < ROWS * tokens; i += 4) { /* four sums across at once */
    __m256i half[4];
    for (int j = 0; j < 4; j++)
      half[j] = _mm256_add_epi32(_mm512_castsi512_si256(acc[i + j]), _mm512_extracti64x4_epi64(acc[i + j], 1));
    __m256i four = _mm256_hadd_epi32(_mm256_hadd_epi32(half[0], half[1]), _mm256_hadd_epi32(half[2], half[3]));
    _mm_storeu_si128((void *)(sums + i), _mm_add_epi32(_mm256_castsi256_si128(four), _mm256_extracti128_si256(four, 1)));
  }
}
#endif

/* Codes of row o for tokens t … from their sums. */
static void stored(const nsi_linear *l, int o, int t, int tokens, const int32_t *sums, const int32_t *eights, int16_t *y) {
  for (int i = 0; i < tokens; i++) {
    int64_t total = (int64_t)(sums[i] - eights[t + i]) * l->m[o] + l->bias[o];
    y[(size_t)(t + i) * l->outs + o] = (int16_t)clip((total >> l->shift) + l->zero, l->low, l->high);
  }
}

/* y (T, outs) of x (T, ins), codes; `bytes` room for x laid out, `eights` for T */
static void linear(const nsi_linear *l, const int16_t *x, int16_t *y, int T, uint8_t *bytes, int32_t *eights) {
  int n = laid_out(l, x, bytes, eights, T);
  size_t width = (size_t)(l->bits == 8 ? n : n / 2);
  for (int o = 0; o < l->outs; o += ROWS) {
    int rows = l->outs - o < ROWS ? l->outs - o : ROWS, t = 0;
    const uint8_t *w = l->w + (size_t)o * width;
    int32_t sums[ROWS * TOKENS];
#ifdef __AVX512VNNI__
    for (; rows == ROWS && t < T; t += T - t >= TOKENS ? TOKENS : 1) {
      const uint8_t *from = bytes + (size_t)t * n;
      int tokens = T - t >= TOKENS ? TOKENS : 1;
      if (tokens == 1 && l->bits == 8) tile(from, w, n, sums, 1, 8);
      else if (tokens == 1) tile(from, w, n, sums, 1, 4);
      else if (l->bits == 8) tile(from, w, n, sums, TOKENS, 8);
      else tile(from, w, n, sums, TOKENS, 4);
      for (int r = 0; r < ROWS; r++) stored(l, o + r, t, tokens, sums + r * tokens, eights, y);
    }
#endif
    for (; t < T; t++)
      for (int r = 0; r < rows; r++) {
        sums[0] = dot(bytes + (size_t)t * n, w + (size_t)r * width, n, l->bits);
        stored(l, o + r, t, 1, sums, eights, y);
      }
  }
}

/* The sum of (256 high + low) w over n numbers: high has 14 bits, low 8, w 8. 256 products of 22 bits stay below 2^31. */
static int64_t long_dot(const int16_t *high, const int16_t *low, const uint8_t *w, int n) {
  int64_t sum = 0;
  for (int at = 0; at < n; at += 256) {
    int32_t upper = 0, lower = 0;
    int end = n - at < 256 ? n : at + 256;
    for (int i = at; i < end; i++) {
      upper += high[i] * (int16_t)w[i];
      lower += low[i] * (int16_t)w[i];
    }
    sum += (int64_t)upper * 256 + lower;
  }
  return sum;
}

static int64_t root(int64_t n) { /* floor of the square root, n >= 1 */
  int64_t r = (int64_t)1 << 31, better;
  while ((better = (r + n / r) >> 1) < r) r = better;
  return r;
}

static void norm(const nsi_norm *l, const int32_t *x, int32_t *y, int C) {
  int64_t total = l->eps;
  for (int i = 0; i < C; i++) total += (int64_t)x[i] * x[i];
  if (total < 1) total = 1;
  int k = (62 - (64 - __builtin_clzll((uint64_t)total))) >> 1;
  int64_t inverse = ((int64_t)1 << 62) / root(total << (2 * k));
  int shift = clip(l->shift + 62 - k - l->spare, 1, 62);
  int64_t half = (int64_t)1 << (shift - 1), part = (int64_t)1 << (l->spare - 1);
  for (int i = 0; i < C; i++) {
    int64_t u = (x[i] * inverse + part) >> l->spare;
    y[i] = clip(((u * l->m[i] + half) >> shift) + l->zero, l->low, l->high);
  }
}

static void norm_rows(const nsi_norm *l, const int16_t *x, int zero, int16_t *y, int32_t *in, int32_t *out, int T, int C) {
  for (int t = 0; t < T; t++) {
    for (int i = 0; i < C; i++) in[i] = x[(size_t)t * C + i] - zero;
    norm(l, in, out, C);
    for (int i = 0; i < C; i++) y[(size_t)t * C + i] = (int16_t)out[i];
  }
}

/* one head of one token: codes of 2R dimensions, turned in place */
static void turn(const nsi_turn *l, int16_t *x, int table, int position, int context, int R, int zero) {
  const int64_t *c = l->cosine + ((size_t)table * context + position) * R, *s = l->sine + ((size_t)table * context + position) * R;
  const nsi_scale *r = &l->scale;
  for (int i = 0; i < R; i++) {
    int64_t a = x[i] - zero, b = x[i + R] - zero;
    x[i] = (int16_t)clip(((a * c[i] - b * s[i] + r->bias) >> r->shift) + r->zero, r->low, r->high);
    x[i + R] = (int16_t)clip(((b * c[i] + a * s[i] + r->bias) >> r->shift) + r->zero, r->low, r->high);
  }
}

/* Attention of one head of one token over keys first … last. */
static void attend(const nsi_block *b, const int16_t *q, const int8_t *keys, const int8_t *values, int16_t *out, int first, int last,
                   int16_t *scores, int64_t *weights, int32_t *sums) {
  int width = 2 * b->pairs, D = b->value_dim, top = -32768;
  for (int s = first; s <= last; s++) {
    const int8_t *key = keys + (size_t)s * width;
    int32_t sum = 0;
    for (int i = 0; i < width; i++) sum += (q[i] - b->q_rot_zero) * (key[i] - b->k_rot_zero);
    scores[s] = (int16_t)scaled(&b->score, sum);
    top = scores[s] > top ? scores[s] : top;
  }
  int64_t total = 0;
  for (int s = first; s <= last; s++) {
    int d = top - scores[s];
    weights[s] = (b->coarse[d >> 8] * b->fine[d & 255]) >> 31;
    total += weights[s];
  }
  memset(sums, 0, sizeof *sums * (size_t)D);
  for (int s = first; s <= last; s++) {
    int32_t p = clip((2 * weights[s] * b->steps + total) / (2 * total) + b->prob_zero, b->prob_low, b->prob_high) - b->prob_zero;
    const int8_t *value = values + (size_t)s * D;
    for (int i = 0; i < D; i++) sums[i] += p * (value[i] - b->v_zero);
  }
  for (int i = 0; i < D; i++) out[i] = (int16_t)scaled(&b->mix, sums[i]);
}

static uint64_t taken(uint8_t **at, uint64_t count, uint64_t size) { /* the place in *at, which moves on */
  uint64_t here = (uint64_t)(uintptr_t)*at;
  *at += (count * size + 63) / 64 * 64;
  return here;
}

/* Bytes that a pass over T rows takes beside the cache and the logits. widest: of all activations of a token. */
uint64_t nsi_room(int32_t widest, int32_t context, int32_t T) {
  uint64_t wide = (uint64_t)widest * (uint64_t)T;
  return 13 * wide + 5 * (uint64_t)T + 12 * (uint64_t)widest + 10 * (uint64_t)context + 64 * 13;
}

/* The logits of the wanted rows, and all rows in the cache. What a row gives does not depend on those of other sequences.
 * 0, or -1 without memory. */
int nsi_forward(const nsi_model *m, const nsi_call *call) {
  int C = m->width, T = call->rows, group = m->heads / m->kv_heads;
  const int32_t *ids = call->ids;
  uint64_t wide = (uint64_t)m->widest * (uint64_t)T, passed = 0; /* passed: bytes of a sequence's cache before this block */
  uint8_t *memory = malloc(nsi_room(m->widest, m->context, T)), *at = memory;
  if (!memory) return -1;
  int16_t *x = (void *)(uintptr_t)taken(&at, wide, 2), *n = (void *)(uintptr_t)taken(&at, wide, 2);
  int16_t *q = (void *)(uintptr_t)taken(&at, wide, 2), *k = (void *)(uintptr_t)taken(&at, wide, 2);
  int16_t *v = (void *)(uintptr_t)taken(&at, wide, 2), *y = (void *)(uintptr_t)taken(&at, wide, 2);
  uint8_t *bytes = (void *)(uintptr_t)taken(&at, wide + T, 1);
  int32_t *eights = (void *)(uintptr_t)taken(&at, (uint64_t)T, 4);
  int32_t *in = (void *)(uintptr_t)taken(&at, (uint64_t)m->widest, 4), *out = (void *)(uintptr_t)taken(&at, (uint64_t)m->widest, 4);
  int32_t *sums = (void *)(uintptr_t)taken(&at, (uint64_t)m->widest, 4);
  int16_t *scores = (void *)(uintptr_t)taken(&at, (uint64_t)m->context, 2);
  int64_t *weights = (void *)(uintptr_t)taken(&at, (uint64_t)m->context, 8);

  for (int t = 0; t < T; t++)
    for (int i = 0; i < C; i++) {
      nsi_scale s = m->entered;
      s.m = m->entry[ids[t]];
      x[(size_t)t * C + i] = (int16_t)scaled(&s, m->table[(size_t)ids[t] * C + i] - m->table_zeros[ids[t]]);
    }
  for (int l = 0; l < m->count; l++) {
    const nsi_block *b = &m->blocks[l];
    int R = b->pairs, D = b->value_dim, F = b->hidden, H = m->heads, K = m->kv_heads;
    int8_t *keys = call->cache + passed, *values = keys + (size_t)K * m->context * 2 * R;
    passed += (uint64_t)K * m->context * (2 * R + D);
    norm_rows(&b->attn_norm, x, b->stream_zero, n, in, out, T, C);
    linear(&b->q, n, q, T, bytes, eights);
    linear(&b->k, n, k, T, bytes, eights);
    linear(&b->v, n, v, T, bytes, eights);
    for (int t = 0; t < T; t++) {
      size_t own = call->stride * (size_t)call->slots[t], place = (size_t)call->at[t];
      for (int h = 0; h < K; h++) {
        int16_t *key = k + ((size_t)t * K + h) * 2 * R, *value = v + ((size_t)t * K + h) * D;
        turn(&b->k_turn, key, b->tables > 1 ? h : 0, call->at[t], m->context, R, b->k_zero);
        for (int i = 0; i < 2 * R; i++) keys[own + ((size_t)h * m->context + place) * 2 * R + i] = (int8_t)key[i];
        for (int i = 0; i < D; i++) values[own + ((size_t)h * m->context + place) * D + i] = (int8_t)value[i];
      }
    }
    for (int t = 0; t < T; t++) {
      size_t own = call->stride * (size_t)call->slots[t];
      int last = call->at[t], first = m->window && last >= m->window ? last - m->window + 1 : 0;
      for (int h = 0; h < H; h++) {
        int16_t *query = q + ((size_t)t * H + h) * 2 * R;
        turn(&b->q_turn, query, b->tables > 1 ? h / group : 0, last, m->context, R, b->q_zero);
        attend(b, query, keys + own + (size_t)(h / group) * m->context * 2 * R,
               values + own + (size_t)(h / group) * m->context * D, n + ((size_t)t * H + h) * D, first, last, scores, weights,
               sums);
      }
    }
    linear(&b->o, n, y, T, bytes, eights);
    for (int64_t i = 0; i < (int64_t)T * C; i++) x[i] = (int16_t)summed(&b->middle, x[i] - b->stream_zero, y[i] - b->o_zero);
    norm_rows(&b->mlp_norm, x, b->middle_zero, n, in, out, T, C);
    linear(&b->gate, n, q, T, bytes, eights);
    linear(&b->up, n, k, T, bytes, eights);
    for (int64_t i = 0; i < (int64_t)T * F; i++)
      n[i] = (int16_t)scaled(&b->gated, (b->silu[q[i] + 128] - b->silu_zero) * (int64_t)(k[i] - b->up_zero));
    linear(&b->down, n, y, T, bytes, eights);
    if (l + 1 < m->count)
      for (int64_t i = 0; i < (int64_t)T * C; i++) x[i] = (int16_t)summed(&b->joint, x[i] - b->middle_zero, y[i] - b->down_zero);
  }
  const nsi_block *end = &m->blocks[m->count - 1];
  int64_t *line = call->logits;
  for (int t = 0; t < T; t++) {
    if (!call->want[t]) continue;
    for (int i = 0; i < C; i++)
      in[i] = summed(&m->left, x[(size_t)t * C + i] - end->middle_zero, y[(size_t)t * C + i] - end->down_zero);
    norm(&m->norm, in, out, C);
    int64_t all = 0;
    for (int i = 0; i < C; i++) {
      all += out[i];
      q[i] = (int16_t)(out[i] >> 8); /* 22 bits in two parts, for products of 16 bits; q and k are done with */
      k[i] = (int16_t)(out[i] & 255);
    }
    for (int o = 0; o < m->vocab; o++) {
      int64_t sum = long_dot(q, k, m->head + (size_t)o * C, C);
      line[o] = ((sum - all * m->head_zeros[o]) * m->head_m[o] + ((int64_t)1 << (m->head_shift - 1))) >> m->head_shift;
    }
    line += m->vocab;
  }
  free(memory);
  return 0;
}

/* Bytes of the structures, for a caller that lays them out itself. Returns how many there are. */
int nsi_sizes(int32_t sizes[7]) {
  const size_t all[7] = {sizeof(nsi_scale), sizeof(nsi_linear), sizeof(nsi_norm), sizeof(nsi_turn),
                         sizeof(nsi_block), sizeof(nsi_model),  sizeof(nsi_call)};
  for (int i = 0; i < 7; i++) sizes[i] = (int32_t)all[i];
  return 7;
}
