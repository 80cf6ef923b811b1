/* The netsuke engine: a Llama-family decoder that runs a carved model from its artifact folder, in C11.
 *
 * Weights stay where the file is mapped; everything else lies in one block whose size `ns_plan` tells beforehand. All
 * functions return 0, or -1 and a sentence in `ns_error`. An engine serves one caller at a time.
 *
 * The result of a row does not depend on the rows beside it: every sum is taken in the same order whether a token comes
 * alone, in a batch or inside a prompt.
 */
#ifndef NETSUKE_H
#define NETSUKE_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct ns_engine ns_engine;

typedef struct {
  char found[320];   /* what is wrong */
  char allowed[160]; /* what would be right */
} ns_error;

enum { NS_KV_F16 = 0, NS_KV_INT8 = 1 };

typedef struct {
  int context;    /* tokens a sequence can hold; 0: the model's own */
  int slots;      /* sequences held at once */
  int rows;       /* most tokens per forward */
  int logit_rows; /* most rows whose logits are asked for at once; 0: slots */
  int threads;    /* 0: one per core */
  int kv;         /* NS_KV_F16 or NS_KV_INT8 */
  const char *isa; /* "avx512", "avx2", "neon", "scalar"; NULL: the best this processor has */
} ns_options;

typedef struct { /* bytes */
  uint64_t weights;     /* mapped from the file */
  uint64_t kv_cache;
  uint64_t activations; /* of one forward of `rows` tokens, logits among them */
  uint64_t scratch;     /* of the threads */
  uint64_t tables;      /* norms, biases, rotary tables, descriptions of layers */
  uint64_t allocated;   /* kv_cache + activations + scratch + tables: what the engine allocates */
} ns_memory;

typedef struct {
  int vocab, width, layers, heads, kv_heads, head_dim, context, slots, rows, logit_rows, threads;
  const char *isa;
} ns_facts;

/* What an engine would take. `manifest` is the artifact's manifest.json; no weights are looked at. */
int ns_plan(const char *manifest, size_t length, const ns_options *options, ns_memory *memory, ns_error *error);

/* Opens an artifact folder (manifest.json, weights.safetensors). */
int ns_open(ns_engine **engine, const char *folder, const ns_options *options, ns_error *error);
/* The same from memory; `weights` (a safetensors file, aligned to 64 bytes) must outlive the engine. */
int ns_open_memory(ns_engine **engine, const char *manifest, size_t length, const void *weights, size_t size,
                   const ns_options *options, ns_error *error);
void ns_close(ns_engine *engine);

ns_facts ns_describe(const ns_engine *engine);
ns_memory ns_memory_of(const ns_engine *engine);

/* Appends `count` tokens: row i continues the sequence in slots[i]. Rows of one slot are adjacent. bit 0 of want[i] asks for the
 * logits of row i, bit 1 lets sparse maps leave channels out for it (a generated token, not a prompt); logits are in ns_logits, (wanted, vocab), until the next call. On an error no sequence has grown. */
int ns_forward(ns_engine *engine, int count, const int32_t *tokens, const int32_t *slots, const uint8_t *want,
               ns_error *error);
const float *ns_logits(const ns_engine *engine);

int ns_length(const ns_engine *engine, int slot);                        /* tokens held, -1 for no such slot */
int ns_truncate(ns_engine *engine, int slot, int length, ns_error *error); /* forgets what lies beyond */
int ns_copy(ns_engine *engine, int target, int source, int length, ns_error *error);

/* Sampling from one row of logits. Temperature 0 is greedy. State is a seed that moves on. */
typedef struct {
  float temperature, top_p, min_p;
  int top_k;
  uint64_t state;
} ns_sampler;
/* `scratch` holds 2 * vocab floats. Returns the token, -1 when the logits hold no finite number. */
int ns_sample(ns_sampler *sampler, const float *logits, int vocab, float *scratch);

/* The two limits of this machine, measured: bytes/s read by `threads` from memory of `bytes`, and int8 multiply-accumulates/s of
 * the best kernel from registers. */
double ns_read_rate(size_t bytes, int threads, double seconds);
double ns_int8_rate(int threads, double seconds);
/* Seconds of one matrix-vector product, dense (0) and input-sparse with `share` of the channels (1): medians of alternating runs.
 * bits: 32 and 16 for floats, 8 to 2 for codes in groups of 64; ins a multiple of 64. */
int ns_sparse_trial(int outs, int ins, int bits, double share, int threads, int rounds, double seconds[2]);

#ifdef __cplusplus
}
#endif
#endif
