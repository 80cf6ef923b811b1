/* Quantized products in portable C, compiled once for each instruction set; the compiler vectorizes the inner sums.
 * Sums over a block of inputs are exact integers, so no instruction set can differ. Include after vec.h. */

/* Codes first … first+count-1 of a packed row, one byte each. */
INLINE void unpack_codes(const uint8_t *row, int bits, int first, int count, uint8_t *to) {
  if (bits == 8) {
    memcpy(to, row + first, (size_t)count);
  } else if (bits == 4 && first % 2 == 0) {
    const uint8_t *p = row + first / 2;
    for (int i = 0; i < count / 2; i++) to[2 * i] = p[i] & 15, to[2 * i + 1] = p[i] >> 4;
    if (count % 2) to[count - 1] = p[count / 2] & 15;
  } else if (bits == 2 && first % 4 == 0) {
    const uint8_t *p = row + first / 4;
    for (int i = 0; i < count; i++) to[i] = p[i / 4] >> (2 * (i % 4)) & 3;
  } else {
    for (int i = 0; i < count; i++) to[i] = (uint8_t)ns_code(row, bits, first + i);
  }
}

#ifdef NS_NEON
/* The dot product of signed bytes, with code - 128 for the code: 128 times the sum of q comes back at the end, exactly. */
INLINE int32_t dot_block(const uint8_t *codes, const int8_t *q, int count, uint8_t flip) {
  int32x4_t dots = vdupq_n_s32(0), sums = vdupq_n_s32(0);
  int i = 0;
  for (; i + 16 <= count; i += 16) {
    int8x16_t c = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(codes + i), vdupq_n_u8(128)));
    int8x16_t v = vreinterpretq_s8_u8(veorq_u8(vld1q_u8((const uint8_t *)q + i), vdupq_n_u8(flip)));
    dots = vdotq_s32(dots, c, v);
    sums = vdotq_s32(sums, vdupq_n_s8(1), v);
  }
  int32_t sum = vaddvq_s32(dots) + 128 * vaddvq_s32(sums);
  for (; i < count; i++) sum += (int32_t)codes[i] * (int32_t)(int8_t)((uint8_t)q[i] ^ flip);
  return sum;
}
#else
INLINE int32_t dot_block(const uint8_t *codes, const int8_t *q, int count, uint8_t flip) {
  int32_t sum = 0;
  for (int i = 0; i < count; i++) sum += (int32_t)codes[i] * (int32_t)(int8_t)((uint8_t)q[i] ^ flip);
  return sum;
}
#endif

/* y = sum over blocks of (scale of w * scale of x) * (sum of (code - zero) * q), a float addition per block */
static void quant_few(const ns_linear *l, int row, int rows, const ns_act *x, int M, float *out) {
  memset(out, 0, (size_t)M * NS_PANEL * sizeof(float));
  for (int r = 0; r < rows; r++) {
    const uint8_t *codes = l->codes + (size_t)(row + r) * l->row_bytes;
    const uint16_t *scales = l->scales + (size_t)(row + r) * (size_t)l->groups;
    const uint8_t *zeros = l->zeros + (size_t)(row + r) * (size_t)l->groups;
    for (int b = 0; b < x->blocks; b++) {
      uint8_t block[64];
      int first = b * x->block, count = l->ins - first < x->block ? l->ins - first : x->block, g = first / l->group;
      unpack_codes(codes, l->bits, first, count, block);
      float scale = ns_half_to_float(scales[g]);
      for (int m = 0; m < M; m++) {
        size_t at = (size_t)m * (size_t)x->blocks + (size_t)b;
        int32_t dot = dot_block(block, x->natural + (size_t)m * (size_t)x->stride + first, count, x->flip) - zeros[g] * x->sum[at];
        out[m * NS_PANEL + r] += (float)dot * (scale * x->scale[at]);
      }
    }
  }
}

/* A tile of portable code is a reference to the rows: they are unpacked again for every eight tokens. */
typedef struct {
  int row, rows;
} row_span;

static void quant_pack(const ns_linear *l, int row, int rows, void *tile) {
  (void)l;
  *(row_span *)tile = (row_span){row, rows};
}

static void quant_many(const ns_linear *l, const void *tile, const ns_act *x, int M, float *out) {
  row_span span = *(const row_span *)tile;
  for (int m = 0; m < M; m += NS_FEW) {
    int n = M - m < NS_FEW ? M - m : NS_FEW;
    size_t skip = (size_t)m * (size_t)x->blocks;
    ns_act part = *x;
    part.natural += (size_t)m * (size_t)x->stride;
    part.scale += skip;
    part.sum += skip;
    for (int p = 0; p < span.rows; p += NS_PANEL) {
      float few[NS_FEW * NS_PANEL];
      int rows = span.rows - p < NS_PANEL ? span.rows - p : NS_PANEL;
      quant_few(l, span.row + p, rows, &part, n, few);
      for (int i = 0; i < n; i++) memcpy(out + (size_t)(m + i) * 32 + p, few + i * NS_PANEL, NS_PANEL * sizeof(float));
    }
  }
}

/* Transposed weights. The channels of one block are summed as integers for outputs row … row+width-1, then scaled. */
static void sparse_quant(const ns_linear *l, int row, int width, const ns_picked *x, int M, float *out, int32_t *sums) {
  uint8_t codes[64];
  memset(out, 0, (size_t)M * (size_t)width * sizeof(float));
  for (int b = 0; b < x->blocks; b++) {
    if (x->start[b] == x->start[b + 1]) continue;
    size_t g = (size_t)(b * x->block / l->group) * (size_t)l->outs + (size_t)row;
    for (int j = 0; j < width; j += 64) {
      int count = width - j < 64 ? width - j : 64;
      for (int m = 0; m < M; m++) {
        size_t at = (size_t)m * (size_t)x->blocks + (size_t)b;
        memset(sums, 0, 64 * sizeof *sums);
        for (int c = x->start[b]; c < x->start[b + 1]; c++) {
          int q = x->q[(size_t)m * (size_t)x->stride + (size_t)c];
          if (!q) continue;
          unpack_codes(l->codes + (size_t)x->channels[c] * l->row_bytes, l->bits, row + j, count, codes);
          for (int i = 0; i < count; i++) sums[i] += q * codes[i];
        }
        float *y = out + (size_t)m * (size_t)width + j;
        for (int i = 0; i < count; i++)
          y[i] += (float)(sums[i] - l->zeros[g + (size_t)(j + i)] * x->sum[at]) *
                  (ns_half_to_float(l->scales[g + (size_t)(j + i)]) * x->scale[at]);
      }
    }
  }
}

static void quantize(const float *x, int ins, const ns_act *to, int m, int first, int last) {
  for (int b = first; b < last; b++) {
    int count = ins - b * to->block < to->block ? ins - b * to->block : to->block;
    size_t base = (size_t)m * (size_t)to->stride + (size_t)(b * to->block), at = (size_t)m * (size_t)to->blocks + (size_t)b;
    const float *v = x + b * to->block;
    int8_t *q = to->natural + base;
    float most = 0;
    for (int i = 0; i < count; i++) most = fabsf(v[i]) > most ? fabsf(v[i]) : most;
    float inverse = most > 0 ? 127 / most : 0;
    int32_t sum = 0;
    for (int i = 0; i < count; i++) {
      float t = v[i] * inverse + 12582912.0f; /* rounds to nearest even; the low byte of t is the integer */
      uint32_t u;
      memcpy(&u, &t, 4);
      q[i] = (int8_t)(uint8_t)(u & 255);
      sum += q[i];
    }
    memset(q + count, 0, (size_t)(to->block - count));
    if (to->flip)
      for (int i = 0; i < to->block; i++) q[i] = (int8_t)((uint8_t)q[i] ^ to->flip);
    to->scale[at] = most / 127;
    to->sum[at] = sum;
    if (to->block % 4) continue;
    int quarter = to->block / 4;
    if (to->split)
      for (int i = 0; i < to->block; i++) to->split[(size_t)m * (size_t)to->stride + ns_split_at(to->block, b * to->block + i)] = q[i];
    if (to->split2)
      for (int i = 0; i < quarter; i++)
        for (int p = 0; p < 4; p++) to->split2[base + (size_t)(p * quarter + i)] = q[4 * i + p];
  }
}
