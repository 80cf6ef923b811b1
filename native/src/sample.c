/* Choosing a token: greedy, or by temperature, top-k, min-p and nucleus sampling (Holtzman et al. 2020), in float64. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "netsuke.h"

static double uniform(uint64_t *state) { /* SplitMix64 (Steele et al. 2014) */
  uint64_t z = (*state += 0x9e3779b97f4a7c15u);
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return (double)((z ^ z >> 31) >> 11) * 0x1p-53;
}

typedef struct {
  float logit;
  int32_t token;
} candidate;

static int falling(const void *a, const void *b) {
  const candidate *x = a, *y = b;
  if (x->logit != y->logit) return x->logit < y->logit ? 1 : -1;
  return x->token < y->token ? -1 : 1;
}

int ns_sample(ns_sampler *s, const float *logits, int vocab, float *scratch) {
  int best = -1;
  for (int i = 0; i < vocab; i++)
    if (isfinite(logits[i]) && (best < 0 || logits[i] > logits[best])) best = i;
  if (best < 0 || !(s->temperature > 0)) return best;
  /* Candidates below e^-40 of the best cannot matter in float64 sums; sorting only the others keeps this quick. */
  candidate *c = (candidate *)(void *)scratch;
  float floor = logits[best] - 40.0f * s->temperature;
  if (s->min_p > 0) floor = fmaxf(floor, logits[best] + logf(s->min_p) * s->temperature);
  int count = 0;
  for (int i = 0; i < vocab; i++)
    if (logits[i] >= floor) c[count++] = (candidate){logits[i], i};
  qsort(c, (size_t)count, sizeof *c, falling);
  if (s->top_k > 0 && s->top_k < count) count = s->top_k;
  double total = 0, sum = 0;
  for (int i = 0; i < count; i++) total += exp((c[i].logit - logits[best]) / (double)s->temperature);
  int kept = 0;
  while (kept < count && sum < s->top_p * total) sum += exp((c[kept++].logit - logits[best]) / (double)s->temperature);
  double draw = uniform(&s->state) * sum, seen = 0;
  for (int i = 0; i < kept; i++)
    if ((seen += exp((c[i].logit - logits[best]) / (double)s->temperature)) > draw) return c[i].token;
  return c[kept ? kept - 1 : 0].token;
}
