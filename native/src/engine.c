/* Opening, closing, and the calls of netsuke.h. */
#include "engine.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { LARGEST_MANIFEST = 64 << 20 };

static int cores(void) {
  long n = sysconf(_SC_NPROCESSORS_ONLN);
  return n < 1 ? 1 : n > NS_MOST_THREADS ? NS_MOST_THREADS : (int)n;
}

static ns_engine *new_engine(void) {
  void *e = NULL;
  if (posix_memalign(&e, 64, sizeof(ns_engine))) return NULL; /* the pool keeps cache lines apart */
  return memset(e, 0, sizeof(ns_engine));
}

/* Options with defaults filled in and checked against the model. */
static int settle(ns_engine *e, const ns_options *o, ns_error *error) {
  e->o = *o;
  if (!e->o.slots) e->o.slots = 1;
  if (!e->o.rows) e->o.rows = 256;
  if (!e->o.threads) e->o.threads = cores();
  if (!e->o.logit_rows) e->o.logit_rows = e->o.slots < e->o.rows ? e->o.slots : e->o.rows;
  if (e->o.slots < 1 || e->o.slots > 4096 || e->o.rows < 1 || e->o.rows > 65536 || e->o.threads < 1 ||
      e->o.threads > NS_MOST_THREADS || e->o.logit_rows < 1 || e->o.logit_rows > e->o.rows || e->o.context < 0 ||
      (e->o.kv != NS_KV_F16 && e->o.kv != NS_KV_INT8))
    return ns_fail(error, "1 to 4096 slots, 1 to 65536 rows, 1 to 64 threads, a cache of float16 or int8",
                   "context %d, slots %d, rows %d, logit rows %d, threads %d", o->context, o->slots, o->rows, o->logit_rows, o->threads);
  e->threads = e->o.threads;
  if (!(e->k = ns_kernels_named(o->isa)))
    return ns_fail(error, "one that this processor has", "the instruction set '%s'", o->isa);
  return 0;
}

static int settle_context(ns_engine *e, ns_error *error) {
  e->context = e->o.context ? e->o.context : e->model.context;
  if (e->context > e->model.context) return ns_fail(error, "at most the model's own", "a context of %d tokens", e->context);
  if ((int64_t)e->o.rows > (int64_t)e->context * e->o.slots) e->o.rows = e->context * e->o.slots; /* no more can ever come */
  if (e->o.logit_rows > e->o.rows) e->o.logit_rows = e->o.rows;
  e->padded = (e->context + NS_KEYS - 1) / NS_KEYS * NS_KEYS;
  return 0;
}

/* Counts, allocates, places. With `only_plan` the block that descriptions of layers need is freed again. */
static int build(ns_engine *e, const json *manifest, const ns_weights *w, int only_plan, ns_error *error) {
  ns_arena count = {0};
  if (ns_model_read(&e->model, &count, manifest, NULL, error) || settle_context(e, error)) return -1;
  /* descriptions are real, all else is counted: */
  ns_arena first = {calloc(1, count.used + 64), 0, count.used};
  if (!first.base) return ns_fail(error, "less context or fewer slots", "no memory for %llu bytes", (unsigned long long)count.used);
  uint8_t *kept = first.base;
  first.base = (uint8_t *)(((uintptr_t)kept + 63) & ~(uintptr_t)63);
  int failed = ns_layout(e, &first, manifest, NULL, error);
  uint64_t bytes = first.used;
  free(kept);
  if (failed || only_plan) return failed;
  if (bytes > SIZE_MAX / 2) return ns_fail(error, "less context or fewer slots", "no memory for %llu bytes", (unsigned long long)bytes);
  void *block = mmap(NULL, (size_t)bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (block == MAP_FAILED) return ns_fail(error, "less context or fewer slots", "no memory for %llu bytes", (unsigned long long)bytes);
  e->arena = block;
  e->arena_bytes = bytes;
  ns_arena arena = {e->arena, 0, bytes};
  if (ns_layout(e, &arena, manifest, w, error)) return -1;
  if (arena.used != bytes) return ns_fail(error, "a sound program", "the plan was %llu bytes, %llu were placed",
                                          (unsigned long long)bytes, (unsigned long long)arena.used);
  return 0;
}

int ns_plan(const char *manifest, size_t length, const ns_options *options, ns_memory *memory, ns_error *error) {
  json doc;
  ns_engine *e = new_engine();
  if (!e) return ns_fail(error, "free memory", "no memory");
  int failed = settle(e, options, error);
  if (!failed && json_parse(&doc, manifest, length)) failed = ns_fail(error, "a manifest as netsuke writes it", "the manifest is no JSON");
  else if (!failed) {
    failed = build(e, &doc, NULL, 1, error);
    json_free(&doc);
  }
  *memory = e->memory;
  free(e);
  return failed;
}

int ns_open_memory(ns_engine **out, const char *manifest, size_t length, const void *data, size_t size, const ns_options *options,
                   ns_error *error) {
  json doc;
  ns_weights w;
  ns_engine *e = new_engine();
  *out = NULL;
  if (!e) return ns_fail(error, "free memory", "no memory");
  int failed = settle(e, options, error);
  if (!failed && json_parse(&doc, manifest, length)) failed = ns_fail(error, "a manifest as netsuke writes it", "the manifest is no JSON");
  else if (!failed) {
    failed = ns_weights_open(&w, data, size, error);
    if (!failed) {
      failed = build(e, &doc, &w, 0, error);
      ns_weights_close(&w);
    }
    json_free(&doc);
  }
  if (!failed && ns_pool_open(&e->pool, e->threads)) failed = ns_fail(error, "fewer threads", "the system gives no %d threads", e->threads);
  if (failed) {
    if (e->arena) munmap(e->arena, (size_t)e->arena_bytes);
    free(e);
    return -1;
  }
  *out = e;
  return 0;
}

/* A whole file, mapped for reading. */
static const void *map_file(const char *folder, const char *name, size_t least, size_t *size, ns_error *error) {
  char path[4096];
  struct stat facts;
  if (snprintf(path, sizeof path, "%s/%s", folder, name) >= (int)sizeof path) {
    ns_fail(error, "a shorter path", "the path is too long");
    return NULL;
  }
  int file = open(path, O_RDONLY | O_CLOEXEC);
  if (file < 0 || fstat(file, &facts)) {
    ns_fail(error, "a netsuke artifact", "%s: %s", name, strerror(errno));
    if (file >= 0) close(file);
    return NULL;
  }
  void *at = MAP_FAILED;
  if (S_ISREG(facts.st_mode) && (uint64_t)facts.st_size >= least && (uint64_t)facts.st_size < SIZE_MAX / 2) {
    *size = (size_t)facts.st_size;
    at = mmap(NULL, *size, PROT_READ, MAP_SHARED, file, 0);
  }
  close(file);
  if (at == MAP_FAILED) {
    ns_fail(error, "a netsuke artifact", "%s cannot be mapped", name);
    return NULL;
  }
  return at;
}

int ns_open(ns_engine **out, const char *folder, const ns_options *options, ns_error *error) {
  size_t length = 0, size = 0;
  *out = NULL;
  const char *manifest = map_file(folder, "manifest.json", 2, &length, error);
  if (!manifest) return -1;
  if (length > LARGEST_MANIFEST) {
    munmap((void *)manifest, length);
    return ns_fail(error, "a manifest as netsuke writes it", "the manifest has %zu bytes", length);
  }
  const void *data = map_file(folder, "weights.safetensors", 8, &size, error);
  int failed = !data || ns_open_memory(out, manifest, length, data, size, options, error);
  munmap((void *)manifest, length);
  if (failed) {
    if (data) munmap((void *)data, size);
    return -1;
  }
  madvise((void *)data, size, MADV_WILLNEED);
  (*out)->map = data;
  (*out)->map_bytes = size;
  return 0;
}

void ns_close(ns_engine *e) {
  if (!e) return;
  ns_pool_close(&e->pool);
  if (e->map_bytes) munmap((void *)e->map, e->map_bytes);
  munmap(e->arena, (size_t)e->arena_bytes);
  free(e);
}

ns_facts ns_describe(const ns_engine *e) {
  const ns_model *m = &e->model;
  return (ns_facts){m->vocab, m->width, m->layers, m->heads, m->kv_heads, m->head_dim, e->context, e->o.slots, e->o.rows,
                    e->o.logit_rows, e->threads, e->k->name};
}

ns_memory ns_memory_of(const ns_engine *e) { return e->memory; }
const float *ns_logits(const ns_engine *e) { return e->logits; }
int ns_length(const ns_engine *e, int slot) { return slot < 0 || slot >= e->o.slots ? -1 : e->length[slot]; }

int ns_truncate(ns_engine *e, int slot, int length, ns_error *error) {
  if (slot < 0 || slot >= e->o.slots || length < 0 || length > e->length[slot])
    return ns_fail(error, "a slot and no more tokens than it holds", "slot %d cut to %d tokens", slot, length);
  e->length[slot] = length;
  return 0;
}

int ns_copy(ns_engine *e, int target, int source, int length, ns_error *error) {
  int slots = e->o.slots;
  if (target < 0 || target >= slots || source < 0 || source >= slots || length < 0 || length > e->length[source])
    return ns_fail(error, "two slots and no more tokens than the source holds", "%d tokens from slot %d to %d", length, source, target);
  for (int layer = 0; layer < e->model.layers && target != source && length; layer++)
    for (int h = 0; h < e->model.kv_heads; h++) {
      ns_kv a = ns_kv_at(e, layer, source, h), b = ns_kv_at(e, layer, target, h);
      size_t each = a.kind == NS_KV_F16 ? 2 : 1, tiles = ((size_t)length + 15) / 16;
      memcpy(b.keys, a.keys, tiles * 16 * (size_t)a.qk * each);
      memcpy(b.values, a.values, (size_t)length * (size_t)a.vd16 * each);
      if (a.kind != NS_KV_INT8) continue;
      memcpy(b.key_scale, a.key_scale, (size_t)length * sizeof(float));
      memcpy(b.value_scale, a.value_scale, (size_t)length * sizeof(float));
    }
  e->length[target] = length;
  return 0;
}

int ns_forward(ns_engine *e, int count, const int32_t *tokens, const int32_t *slots, const uint8_t *want, ns_error *error) {
  if (count < 1 || count > e->o.rows) return ns_fail(error, "1 to the rows that the engine was opened with", "%d tokens at once", count);
  e->runs = e->wanted = 0;
  e->fused = 1;
  for (int i = 0; i < count; i++) {
    int slot = slots[i];
    if (slot < 0 || slot >= e->o.slots) return ns_fail(error, "a slot that the engine has", "slot %d", slot);
    if (tokens[i] < 0 || tokens[i] >= e->model.vocab) return ns_fail(error, "a token of the vocabulary", "token %d", tokens[i]);
    ns_run *run = &e->run[e->runs - 1];
    if (i && slots[i - 1] == slot) {
      run->count++;
      e->fused = 0;
    } else {
      for (int j = 0; j < e->runs; j++)
        if (e->run[j].slot == slot) return ns_fail(error, "the rows of a slot side by side", "slot %d comes twice", slot);
      e->run[e->runs++] = (ns_run){i, 1, slot, e->length[slot]};
    }
    run = &e->run[e->runs - 1];
    if (run->start + run->count > e->context)
      return ns_fail(error, "no more tokens than the context", "slot %d would hold %d of %d tokens", slot, run->start + run->count, e->context);
    e->sparse_row[i] = want[i] >> 1 & 1;
    if (!(want[i] & 1)) continue;
    if (e->wanted == e->o.logit_rows)
      return ns_fail(error, "the rows that the engine was opened for", "logits of more than %d rows", e->wanted);
    e->wanted_row[e->wanted++] = i;
  }
  e->rows = count;
  e->tokens = tokens;
  ns_pool_run(&e->pool, ns_forward_job, e);
  for (int i = 0; i < e->wanted; i++) {
    float sum = 0;
    const float *row = e->logits + (size_t)i * (size_t)e->model.vocab;
    for (int j = 0; j < e->model.vocab; j++) sum += row[j] * 0.0f; /* NaN as soon as one number is not finite */
    if (!(sum == 0)) return ns_fail(error, "finite weights", "the model's answer holds NaN or infinite numbers");
  }
  for (int i = 0; i < e->runs; i++) e->length[e->run[i].slot] += e->run[i].count;
  return 0;
}
