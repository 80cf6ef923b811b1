/* Rows of a depthwise convolution for Cortex-M4 and M7: four outputs at a time from a strip of 16-bit numbers.
 *
 * Two neighbouring inputs are one word, so two taps are one SMLAD where the pair of taps begins at the same input. With
 * stride 1 every second output begins in the middle of a word: there the pairs of taps are shifted by one, (1, 2) instead of
 * (0, 1), and the single tap at an end is a SMLAxy. With w01 for the pair of taps 0 and 1, a row of weights is
 *   stride 1: w01 w12 | w23 w34 | w45 w56        stride 2: w01 w23 | w45 w6   (w2 or w4 alone where the window ends there) */
#ifndef NS_DEPTHWISE_DSP_H
#define NS_DEPTHWISE_DSP_H

#include "ns_dsp.h"

#if NS_DSP

/* What the loop reads, in this order. */
typedef struct {
  int8_t *y;
  int32_t step;        /* from one output to the next */
  int32_t m, addend, shift;
  int32_t rewind;      /* bytes from the last row of one window to the first of the fourth next */
  int32_t first[4];    /* the bias, zero point included, four times */
  int8_t *end;         /* y after the last four of the row */
  const int16_t *x;
  const int32_t *w;
  int32_t stride;      /* bytes from row to row of the strip */
  int8_t *last;        /* y after the last row: rows of y follow each other without a gap */
  int32_t row, skip;   /* bytes of a row of y; from the end of one row of x to the start of the next */
} ns_dw_rows;

#define NS_DW_BEGIN                             \
  "push {r4-r11, lr}\n"                         \
  "ldrd r1, r2, [r0, #44]\n"                    \
  "ldr r3, [r0, #52]\n"                         \
  "1:\n"                                        \
  "ldrd r8, r9, [r0, #24]\n"                    \
  "ldrd r10, r11, [r0, #32]\n"
#define NS_DW_ONE(r)                            \
  "smmla " r ", " r ", r6, r7\n"                \
  "asr " r ", " r ", r12\n"                     \
  "ssat " r ", #8, " r "\n"
#define NS_DW_END                               \
  "ldm r0, {r4-r7, r12, lr}\n"                  \
  NS_DW_ONE("r8") NS_DW_ONE("r9") NS_DW_ONE("r10") NS_DW_ONE("r11") \
  "strb r8, [r4]\n"                             \
  "strb r9, [r4, r5]\n"                         \
  "add r4, r4, r5, lsl #1\n"                    \
  "strb r10, [r4]\n"                            \
  "strb r11, [r4, r5]\n"                        \
  "add r4, r4, r5, lsl #1\n"                    \
  "ldr r5, [r0, #40]\n"                         \
  "str r4, [r0]\n"                              \
  "add r1, r1, lr\n"                            \
  "cmp r4, r5\n"                                \
  "bne 1b\n"                                    \
  "ldrd r5, r6, [r0, #56]\n"                    \
  "ldr r7, [r0, #64]\n"                         \
  "add r1, r1, r7\n"                            \
  "add r6, r6, r4\n"                            \
  "str r6, [r0, #40]\n"                         \
  "cmp r4, r5\n"                                \
  "bne 1b\n"                                    \
  "pop {r4-r11, pc}\n"
#define NS_DW_NEXT "add r1, r1, r3\n"

/* Stride 1. The first pair of words of weights, in a row at byte `at` of the weights. */
#define NS_DW_W(at) "ldrd r12, lr, [r2, #" #at "]\n"
#define NS_DW_HEAD1                             \
  "smlad r8, r4, r12, r8\n"                     \
  "smlatb r9, r4, r12, r9\n"                    \
  "smlad r9, r5, lr, r9\n"                      \
  "smlad r10, r5, r12, r10\n"                   \
  "smlatb r11, r5, r12, r11\n"                  \
  "smlad r11, r6, lr, r11\n"
#define NS_DW_K3S1(at)                          \
  NS_DW_W(at) "ldm r1, {r4-r6}\n" NS_DW_HEAD1   \
  "smlabt r8, r5, lr, r8\n"                     \
  "smlabt r10, r6, lr, r10\n"
#define NS_DW_K5S1(at, next)                    \
  NS_DW_W(at) "ldm r1, {r4-r7}\n" NS_DW_HEAD1   \
  NS_DW_W(next)                                 \
  "smlad r8, r5, r12, r8\n"                     \
  "smlabt r8, r6, lr, r8\n"                     \
  "smlad r9, r6, lr, r9\n"                      \
  "smlad r10, r6, r12, r10\n"                   \
  "smlabt r10, r7, lr, r10\n"                   \
  "smlad r11, r7, lr, r11\n"
#define NS_DW_K7S1(at, next, last)              \
  NS_DW_W(at) "ldm r1, {r4-r7}\n" NS_DW_HEAD1   \
  NS_DW_W(next) "ldr r4, [r1, #16]\n"           \
  "smlad r8, r5, r12, r8\n"                     \
  "smlad r9, r6, lr, r9\n"                      \
  "smlad r10, r6, r12, r10\n"                   \
  "smlad r11, r7, lr, r11\n"                    \
  NS_DW_W(last)                                 \
  "smlad r8, r6, r12, r8\n"                     \
  "smlabt r8, r7, lr, r8\n"                     \
  "smlad r9, r7, lr, r9\n"                      \
  "smlad r10, r7, r12, r10\n"                   \
  "smlabt r10, r4, lr, r10\n"                   \
  "smlad r11, r4, lr, r11\n"

/* Stride 2: word j holds the first inputs of output j. */
#define NS_DW_FOUR(op, a, b, c, d, w)           \
  op " r8, " a ", " w ", r8\n"                  \
  op " r9, " b ", " w ", r9\n"                  \
  op " r10, " c ", " w ", r10\n"                \
  op " r11, " d ", " w ", r11\n"
#define NS_DW_HEAD2(at)                         \
  NS_DW_W(at) "ldm r1, {r4-r7}\n"               \
  NS_DW_FOUR("smlad", "r4", "r5", "r6", "r7", "r12") \
  "ldr r4, [r1, #16]\n"
#define NS_DW_K3S2(at) NS_DW_HEAD2(at) NS_DW_FOUR("smlabb", "r5", "r6", "r7", "r4", "lr")
#define NS_DW_K5S2(at, next)                    \
  NS_DW_HEAD2(at) NS_DW_FOUR("smlad", "r5", "r6", "r7", "r4", "lr") \
  "ldr r5, [r1, #20]\n"                         \
  "ldr r12, [r2, #" #next "]\n"                 \
  NS_DW_FOUR("smlabb", "r6", "r7", "r4", "r5", "r12")
#define NS_DW_K7S2(at, next)                    \
  NS_DW_HEAD2(at) NS_DW_FOUR("smlad", "r5", "r6", "r7", "r4", "lr") \
  "ldr r5, [r1, #20]\n"                         \
  NS_DW_W(next) NS_DW_FOUR("smlad", "r6", "r7", "r4", "r5", "r12") \
  "ldr r6, [r1, #24]\n"                         \
  NS_DW_FOUR("smlabb", "r7", "r4", "r5", "r6", "lr")

NS_NAKED void ns_dw_k3s1(ns_dw_rows *r) {
  __asm__(NS_DW_BEGIN NS_DW_K3S1(0) NS_DW_NEXT NS_DW_K3S1(8) NS_DW_NEXT NS_DW_K3S1(16) NS_DW_END);
  (void)r;
}
NS_NAKED void ns_dw_k3s2(ns_dw_rows *r) {
  __asm__(NS_DW_BEGIN NS_DW_K3S2(0) NS_DW_NEXT NS_DW_K3S2(8) NS_DW_NEXT NS_DW_K3S2(16) NS_DW_END);
  (void)r;
}
NS_NAKED void ns_dw_k5s1(ns_dw_rows *r) {
  __asm__(NS_DW_BEGIN NS_DW_K5S1(0, 8) NS_DW_NEXT NS_DW_K5S1(16, 24) NS_DW_NEXT NS_DW_K5S1(32, 40) NS_DW_NEXT
          NS_DW_K5S1(48, 56) NS_DW_NEXT NS_DW_K5S1(64, 72) NS_DW_END);
  (void)r;
}
NS_NAKED void ns_dw_k5s2(ns_dw_rows *r) {
  __asm__(NS_DW_BEGIN NS_DW_K5S2(0, 8) NS_DW_NEXT NS_DW_K5S2(16, 24) NS_DW_NEXT NS_DW_K5S2(32, 40) NS_DW_NEXT
          NS_DW_K5S2(48, 56) NS_DW_NEXT NS_DW_K5S2(64, 72) NS_DW_END);
  (void)r;
}
NS_NAKED void ns_dw_k7s1(ns_dw_rows *r) {
  __asm__(NS_DW_BEGIN NS_DW_K7S1(0, 8, 16) NS_DW_NEXT NS_DW_K7S1(24, 32, 40) NS_DW_NEXT NS_DW_K7S1(48, 56, 64) NS_DW_NEXT
          NS_DW_K7S1(72, 80, 88) NS_DW_NEXT NS_DW_K7S1(96, 104, 112) NS_DW_NEXT NS_DW_K7S1(120, 128, 136) NS_DW_NEXT
          NS_DW_K7S1(144, 152, 160) NS_DW_END);
  (void)r;
}
NS_NAKED void ns_dw_k7s2(ns_dw_rows *r) {
  __asm__(NS_DW_BEGIN NS_DW_K7S2(0, 8) NS_DW_NEXT NS_DW_K7S2(24, 32) NS_DW_NEXT NS_DW_K7S2(48, 56) NS_DW_NEXT
          NS_DW_K7S2(72, 80) NS_DW_NEXT NS_DW_K7S2(96, 104) NS_DW_NEXT NS_DW_K7S2(120, 128) NS_DW_NEXT
          NS_DW_K7S2(144, 152) NS_DW_END);
  (void)r;
}

#define NS_DW_TAPS 7                            /* of the widest window */
#define NS_DW_WORDS (NS_DW_TAPS * (NS_DW_TAPS - 1)) /* its weights: k - 1 words a row */

typedef void (*ns_dw_loop)(ns_dw_rows *);

/* The loop for a window of k x k at this stride, or NULL. */
NS_INLINE ns_dw_loop ns_dw_of(int32_t k, int32_t stride) {
  if (stride == 1) return k == 3 ? ns_dw_k3s1 : k == 5 ? ns_dw_k5s1 : k == 7 ? ns_dw_k7s1 : NULL;
  if (stride == 2) return k == 3 ? ns_dw_k3s2 : k == 5 ? ns_dw_k5s2 : k == 7 ? ns_dw_k7s2 : NULL;
  return NULL;
}

/* n codes, a multiple of four, that lie c bytes apart, to 16 bits. */
NS_INLINE void ns_dw_widen(const int8_t *x, int32_t c, int32_t n, int16_t *out) {
  int32_t t, u, v;
  __asm__ volatile(
      "1:\n"
      "ldrsb %[t], [%[x]]\n"
      "ldrsb %[u], [%[x], %[c]]\n"
      "pkhbt %[t], %[t], %[u], lsl #16\n"
      "ldrsb %[u], [%[x], %[c], lsl #1]\n"
      "ldrsb %[v], [%[x], %[c3]]\n"
      "str %[t], [%[out]], #4\n"
      "add %[x], %[x], %[c], lsl #2\n"
      "pkhbt %[u], %[u], %[v], lsl #16\n"
      "str %[u], [%[out]], #4\n"
      "cmp %[out], %[end]\n"
      "bne 1b\n"
      : [x] "+r"(x), [out] "+r"(out), [t] "=&r"(t), [u] "=&r"(u), [v] "=&r"(v)
      : [c] "r"(c), [c3] "r"(3 * c), [end] "r"(out + n)
      : "cc", "memory");
}

/* The weights of a channel, which lie `step` bytes apart, as the loops read them, `up` bits up; returns their sum. */
NS_INLINE int32_t ns_dw_weights(int32_t *out, const int8_t *w, int32_t step, int32_t up, const int32_t k, const int32_t stride) {
  const int32_t words = stride == 1 ? k - 1 : (k + 1) / 2;
  int32_t total = 0;
#pragma GCC unroll 1
  for (int32_t y = 0; y < k; y++, out += k - 1) {
    int32_t tap[NS_DW_TAPS + 1];
#pragma GCC unroll 8
    for (int32_t x = 0; x < k; x++, w += step) total += tap[x] = *w * (1 << up);
    tap[k] = 0;
#pragma GCC unroll 8
    for (int32_t x = 0; x < words; x++) {
      const int32_t from = x * stride;
      out[x] = (int32_t)ns_bottoms((uint32_t)tap[from], (uint32_t)tap[from + 1]);
    }
  }
  return total;
}

NS_INLINE int32_t ns_dw_weights_of(int32_t *out, const int8_t *w, int32_t step, int32_t up, int32_t k, int32_t stride) {
  if (stride == 1) {
    return k == 3 ? ns_dw_weights(out, w, step, up, 3, 1) : k == 5 ? ns_dw_weights(out, w, step, up, 5, 1)
                                                               : ns_dw_weights(out, w, step, up, 7, 1);
  }
  return k == 3 ? ns_dw_weights(out, w, step, up, 3, 2) : k == 5 ? ns_dw_weights(out, w, step, up, 5, 2)
                                                             : ns_dw_weights(out, w, step, up, 7, 2);
}

#endif
#endif
