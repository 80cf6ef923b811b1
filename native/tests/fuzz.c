/* Spoils small artifacts and opens them; a crash, a hang or a sanitizer's report is a fault of the engine.
 *
 *   fuzz SEED COUNT [FIRST]
 *
 * Mutation i depends on SEED and i alone, so `fuzz SEED 1 i` repeats it. Manifest, header and tensors are changed: bits,
 * cuts, repeated and foreign parts, numbers at the edges of their types, names exchanged. The weights end (or begin) beside a
 * page that may not be touched. What opens is run: a prompt, single tokens, truncation, a copy, sampling; and its plan must
 * be what it took. Exit status 0, 1 (a broken promise, which is printed) or that of the sanitizer. */
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include "kernels/kernels.h"
#include "netsuke.h"

enum { ROOM = 1 << 16, SECONDS = 20 };

const char *__asan_default_options(void); /* sizes that no machine has are answered with NULL, as libc does */
const char *__asan_default_options(void) { return "allocator_may_return_null=1:quarantine_size_mb=8"; }

static uint64_t state, seed;
static volatile long *current; /* shared with the process that waits */

static uint64_t draw(void) { /* SplitMix64 */
  uint64_t z = (state += 0x9e3779b97f4a7c15u);
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return z ^ z >> 31;
}
static size_t below(size_t n) { return n ? (size_t)(draw() % n) : 0; }

static void broken(const char *what) {
  fprintf(stderr, "%s\n", what);
  exit(1);
}

/* Artifacts */

typedef struct {
  size_t size;
  uint8_t at[ROOM];
} bytes;

typedef struct {
  bytes manifest, header, data;
} artifact;

static void put(bytes *b, const char *format, ...) {
  va_list args;
  va_start(args, format);
  int n = vsnprintf((char *)b->at + b->size, ROOM - b->size, format, args);
  va_end(args);
  if (n < 0 || b->size + (size_t)n >= ROOM) broken("an artifact is larger than its room");
  b->size += (size_t)n;
}

static void tensor(artifact *a, const char *name, const char *type, int rows, int cols, int limit) {
  int width = !strcmp(type, "F32") ? 4 : !strcmp(type, "U8") ? 1 : 2, count = rows * (cols ? cols : 1);
  size_t from = a->data.size;
  if (from + (size_t)(count * width) + 64 > ROOM) broken("an artifact is larger than its room");
  for (int i = 0; i < count; i++) {
    float f = (float)(draw() >> 40) * 0x1p-25f - 0.25f;
    uint32_t u;
    memcpy(&u, &f, 4);
    uint16_t h = type[0] == 'B' ? (uint16_t)(u >> 16) : ns_float_to_half(f);
    uint8_t c = (uint8_t)below((size_t)limit);
    memcpy(a->data.at + a->data.size, width == 4 ? (void *)&f : width == 2 ? (void *)&h : (void *)&c, (size_t)width);
    a->data.size += (size_t)width;
  }
  put(&a->header, "%s\"%s\":{\"dtype\":\"%s\",\"shape\":[%d", a->header.size > 1 ? "," : "", name, type, rows);
  if (cols) put(&a->header, ",%d", cols);
  put(&a->header, "],\"data_offsets\":[%zu,%zu]}", from, a->data.size);
  while (a->data.size % 16) a->data.at[a->data.size++] = 0;
}

static const char *leaf(char out[96], const char *name, const char *part) {
  snprintf(out, 96, "%s.%s", name, part);
  return out;
}

/* One map; kinds: f h b floats, 2 3 4 8 codes, l L low-rank pairs of floats and codes, s S T input-sparse floats, codes, and codes
 * with a pair. */
static void map(artifact *a, const char *name, char kind, int outs, int ins, int bias) {
  char full[96];
  int sparse = kind == 's' || kind == 'S' || kind == 'T', low = kind == 'l' || kind == 'L' || kind == 'T', rank = 3;
  const char *type = kind == 'h' ? "F16" : kind == 'b' ? "BF16" : "F32";
  const char *word = kind == 'h' ? "float16" : kind == 'b' ? "bfloat16" : "float32";
  int bits = kind >= '0' && kind <= '9' ? kind - '0' : kind == 'S' ? 4 : kind == 'T' ? 8 : 0;
  int group = bits == 2 ? 32 : bits == 3 ? 7 : bits == 4 ? 8 : 64, groups = (ins + group - 1) / group;
  put(&a->manifest, "{\"kind\":\"%s\"", sparse ? "sparse" : low ? "lowrank" : bits ? "quant" : "dense");
  if (bits) {
    int rows = sparse ? ins : outs, cols = sparse ? outs : ins;
    put(&a->manifest, ",\"bits\":%d,\"group\":%d", bits, group);
    tensor(a, leaf(full, name, "codes"), "U8", rows, (cols * bits + 7) / 8, 256);
    tensor(a, leaf(full, name, "scales"), "F16", sparse ? groups : outs, sparse ? outs : groups, 1);
    tensor(a, leaf(full, name, "zeros"), "U8", sparse ? groups : outs, sparse ? outs : groups, 1 << bits);
  } else if (!low) {
    put(&a->manifest, ",\"dtype\":\"%s\"", word);
    tensor(a, leaf(full, name, "weight"), type, sparse ? ins : outs, sparse ? outs : ins, 1);
  }
  if (sparse) {
    put(&a->manifest, ",\"threshold\":0.2");
    tensor(a, leaf(full, name, "norms"), "F32", ins, 0, 1);
  }
  if (low) {
    char inner[96];
    put(&a->manifest, ",\"rank\":%d,\"first\":", rank);
    map(a, leaf(inner, name, "first"), kind == 'l' ? 'f' : '4', rank, ins, 0);
    put(&a->manifest, ",\"second\":");
    map(a, leaf(inner, name, "second"), kind == 'l' ? 'h' : '8', outs, rank, bias && !sparse);
  }
  if (bias && (!low || sparse)) tensor(a, leaf(full, name, "bias"), "F32", outs, 0, 1);
  put(&a->manifest, "}");
}

enum { VOCAB = 19, WIDTH = 24, HEADS = 4, KEY_HEADS = 2, HEAD = 8, BASES = 8 };

/* `kinds`: of embed, q, k, v, o, gate, up, down, head ("-": tied) */
static void build(artifact *a, const char *kinds, int bias, int norms, int cut) {
  char name[96], full[96];
  const char *leaves[] = {"q", "k", "v", "o", "gate", "up", "down"};
  put(&a->header, "{");
  put(&a->manifest, "{\"format\":\"netsuke\",\"version\":1,\"family\":\"llama\",\"config\":{\"vocab\":%d,\"width\":%d,\"heads\":%d,"
      "\"kv_heads\":%d,\"head_dim\":%d,\"context\":40,\"norm_eps\":1e-5,\"rope_theta\":10000.0,\"tied\":%s,\"window\":%s,"
      "\"qkv_bias\":%s,\"out_bias\":%s,\"mlp_bias\":%s,\"qk_norm\":%s,\"rope_scaling\":%s,\"blocks\":[", VOCAB, WIDTH, HEADS,
      KEY_HEADS, HEAD, kinds[8] == '-' ? "true" : "false", cut ? "9" : "null", bias ? "true" : "false", bias ? "true" : "false",
      bias ? "true" : "false", norms ? "true" : "false",
      cut ? "{\"kind\":\"yarn\",\"factor\":4.0,\"original_context\":16}" : norms ? "{\"kind\":\"llama3\",\"factor\":8.0}" : "null");
  int hidden[] = {20, 33}, value[] = {cut ? 7 : 8, 8}, pairs[] = {cut ? 2 : HEAD / 2, HEAD / 2};
  for (int i = 0; i < 2; i++) {
    put(&a->manifest, "%s{\"hidden\":%d,\"value_dim\":%d,\"pairs\":", i ? "," : "", hidden[i], value[i]);
    put(&a->manifest, pairs[i] < HEAD / 2 ? "[[0,3],[1,2]]}" : "null}");
  }
  put(&a->manifest, "]},\"layers\":{\"embed\":");
  map(a, "embed", kinds[0], VOCAB, WIDTH, 0);
  for (int i = 0; i < 2; i++) {
    int qk = 2 * pairs[i];
    int outs[] = {HEADS * qk, KEY_HEADS * qk, KEY_HEADS * value[i], WIDTH, hidden[i], hidden[i], WIDTH};
    int ins[] = {WIDTH, WIDTH, WIDTH, HEADS * value[i], WIDTH, WIDTH, hidden[i]};
    for (int j = 0; j < 7; j++) {
      snprintf(name, sizeof name, "blocks.%d.%s", i, leaves[j]);
      put(&a->manifest, ",\"%s\":", name);
      map(a, name, kinds[1 + j], outs[j], ins[j], bias);
    }
    snprintf(name, sizeof name, "blocks.%d", i);
    tensor(a, leaf(full, name, "attn_norm.weight"), "F32", WIDTH, 0, 1);
    tensor(a, leaf(full, name, "mlp_norm.weight"), i ? "BF16" : "F32", WIDTH, 0, 1);
    if (norms) tensor(a, leaf(full, name, "q_norm.weight"), "F32", HEAD, 0, 1);
    if (norms) tensor(a, leaf(full, name, "k_norm.weight"), "F32", HEAD, 0, 1);
  }
  tensor(a, "norm.weight", "F32", WIDTH, 0, 1);
  if (kinds[8] != '-') {
    put(&a->manifest, ",\"head\":");
    map(a, "head", kinds[8], VOCAB, WIDTH, 0);
  }
  put(&a->manifest, "}}");
  put(&a->header, "}");
}

/* Mutations */

static void replace(bytes *b, size_t at, size_t gone, const void *with, size_t size) {
  if (at + gone > b->size || b->size - gone + size > ROOM) return;
  memmove(b->at + at + size, b->at + at + gone, b->size - at - gone);
  memcpy(b->at + at, with, size);
  b->size += size - gone;
}

/* A random stretch that starts with one of `first` and goes on over `more`; 0 when there is none. */
static size_t find(const bytes *b, const char *first, const char *more, size_t *at) {
  size_t start = below(b->size);
  for (size_t i = 0; i < b->size; i++) {
    size_t p = (start + i) % b->size, n = 0;
    if (!memchr(first, b->at[p], strlen(first)) || (p && memchr(more, b->at[p - 1], strlen(more)))) continue;
    while (p + n < b->size && memchr(more, b->at[p + n], strlen(more))) n++;
    *at = p;
    return n;
  }
  return 0;
}

/* An object or array that starts at a random place; its length, or 0. */
static size_t part(const bytes *b, size_t *at) {
  size_t start = below(b->size), p = 0, i = 0;
  for (; i < b->size; i++) {
    p = (start + i) % b->size;
    if (b->at[p] == '{' || b->at[p] == '[') break;
  }
  int depth = 0;
  for (size_t n = p; i < b->size && n < b->size; n++) {
    depth += (b->at[n] == '{' || b->at[n] == '[') - (b->at[n] == '}' || b->at[n] == ']');
    if (depth == 0) return *at = p, n + 1 - p;
  }
  return 0;
}

static const char DIGITS[] = "0123456789", NUMBER[] = "0123456789.eE+-";
static const char NAME[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_0123456789.";

static void mutate_text(bytes *b, const bytes *other) {
  static const char *const numbers[] = {
      "0", "1", "-1", "2", "3", "7", "8", "63", "64", "65", "255", "256", "4096", "4097", "65536", "1048576", "16777216", "16777217",
      "268435456", "268435457", "1073741824", "2147483647", "2147483648", "4294967295", "4294967296", "9007199254740992",
      "9223372036854775807", "18446744073709551615", "1e308", "1e309", "1e-320", "-0", "0.5", "null", "true", "[]", "{}", "\"x\"",
      "[[0,1],[2,3]]", "[0]", "1.0", "1e1", "--1", "0x10", "", "16", "24", "48", "128"};
  uint8_t copy[4096];
  size_t at, n, to, m;
  if (!b->size) return;
  switch (below(14)) {
    case 0: b->at[below(b->size)] ^= (uint8_t)(1u << below(8)); break;
    case 1: b->at[below(b->size)] = (uint8_t)draw(); break;
    case 2: at = below(b->size), replace(b, at, below(b->size - at < 40 ? b->size - at : 40), "", 0); break;
    case 3: b->size = below(b->size); break;
    case 4: /* a part again, here or elsewhere */
    case 5: /* or a part of another artifact */
      if (below(2)) other = b;
      if (!other->size) break;
      at = below(other->size), n = below(other->size - at < sizeof copy ? other->size - at : sizeof copy);
      memcpy(copy, other->at + at, n);
      at = below(b->size), replace(b, at, below(2) ? 0 : below(b->size - at), copy, n);
      break;
    case 6: /* two names exchanged */
      n = find(b, NAME, NAME, &at), m = find(b, NAME, NAME, &to);
      if (!n || !m || n > sizeof copy || m > sizeof copy || at == to) break;
      if (at > to) { size_t t = at; at = to, to = t, t = n, n = m, m = t; }
      memcpy(copy, b->at + at, n);
      uint8_t second[4096];
      memcpy(second, b->at + to, m);
      replace(b, to, m, copy, n), replace(b, at, n, second, m);
      break;
    case 7: /* one name in the place of another */
      n = find(b, NAME, NAME, &at), m = find(other, NAME, NAME, &to);
      if (n && m) replace(b, at, n, other->at + to, m);
      break;
    case 8: /* one object or list in the place of another */
      if (below(2)) other = b;
      n = part(b, &at), m = part(other, &to);
      if (!n || !m || m > sizeof copy) break;
      memcpy(copy, other->at + to, m);
      replace(b, at, n, copy, m);
      break;
    case 9: /* a number a little larger or smaller */
      n = find(b, DIGITS, DIGITS, &at);
      if (n) b->at[at + n - 1] = (uint8_t)('0' + below(10));
      break;
    default: /* another number */
      n = find(b, DIGITS, NUMBER, &at);
      const char *with = numbers[below(sizeof numbers / sizeof *numbers)];
      if (n) replace(b, at, n, with, strlen(with));
  }
}

static void mutate_data(bytes *b) {
  static const uint8_t fills[] = {0, 255, 0x7f, 0x80, 0x7c};
  if (!b->size) return;
  size_t at = below(b->size), n = below(b->size - at < 200 ? b->size - at : 200);
  switch (below(5)) {
    case 0: b->at[at] ^= (uint8_t)(1u << below(8)); break;
    case 1: memset(b->at + at, fills[below(5)], n); break;
    case 2: b->size = at; break;
    case 3: b->size -= n < 16 ? n : 16; break;
    default:
      for (size_t i = 0; i < n; i++) b->at[at + i] = (uint8_t)draw();
  }
}

/* One run */

static long opened, refused;

static void use(ns_engine *e) {
  ns_error error;
  ns_facts f = ns_describe(e);
  int32_t tokens[12], slots[12] = {0};
  uint8_t want[12] = {0};
  for (int i = 0; i < 12; i++) tokens[i] = i % (f.vocab < 19 ? f.vocab : 19);
  want[11] = 1, want[4] = 1;
  int held = f.context < 12 ? f.context : 12, logits = -1;
  if (held == 12) logits = ns_forward(e, 12, tokens, slots, want, &error);
  slots[1] = 1;
  want[0] = want[1] = 3;
  if (f.context > 12) logits &= ns_forward(e, 2, tokens, slots, want, &error);
  ns_truncate(e, 0, ns_length(e, 0) / 2, &error);
  ns_copy(e, 1, 0, ns_length(e, 0), &error);
  if (ns_length(e, 1) != ns_length(e, 0)) broken("a copy has another length");
  if (ns_length(e, 1) < f.context && !ns_forward(e, 1, tokens, slots + 1, want, &error)) {
    float *scratch = malloc((size_t)f.vocab * 2 * sizeof(float));
    ns_sampler s = {0.8f, 0.9f, 0.01f, 12, state};
    int token = scratch ? ns_sample(&s, ns_logits(e), f.vocab, scratch) : 0;
    if (token < 0 || token >= f.vocab) broken("finite logits, and no token");
    free(scratch);
  }
  if (!ns_forward(e, 1, (int32_t[]){f.vocab}, slots, want, &error)) broken("a token beyond the vocabulary was taken");
}

static void try(const artifact *a, uint8_t *pages, size_t span, int spoil) {
  size_t size = 8 + a->header.size + a->data.size, length = a->header.size;
  if (spoil && !below(30)) size = below(size);
  if (spoil && !below(30)) length = below(3) ? below(2 * length + 1) : (size_t)draw();
  /* the last byte before the page that may not be touched, or the first after the other one */
  uint8_t *at = size % 64 && below(2) ? pages : pages + span - size, *file = malloc(size + a->header.size + 8);
  if (!file) broken("no memory");
  for (int i = 0; i < 8; i++) file[i] = (uint8_t)((uint64_t)length >> 8 * i);
  memcpy(file + 8, a->header.at, a->header.size);
  if (size > 8 + a->header.size) memcpy(file + 8 + a->header.size, a->data.at, size - 8 - a->header.size);
  memcpy(at, file, size);
  free(file);
  char *manifest = malloc(a->manifest.size); /* of exactly this size */
  memcpy(manifest, a->manifest.at, a->manifest.size);
  const ns_kernels *k;
  int sets = 0;
  while (ns_kernels_list(sets)) sets++;
  k = ns_kernels_list((int)below((size_t)sets));
  ns_options o = {.context = below(3) ? 0 : 30, .slots = 2, .rows = 12, .logit_rows = 2, .threads = below(50) ? 1 : 2,
                  .kv = (int)below(2), .isa = k->name};
  ns_error error, second;
  ns_memory planned;
  ns_engine *e;
  memset(&error, 0, sizeof error);
  int plan = ns_plan(manifest, a->manifest.size, &o, &planned, &second);
  if (ns_open_memory(&e, manifest, a->manifest.size, at, size, &o, &error)) {
    refused++;
    if (!spoil) broken(error.found);
    if (!error.found[0] || !error.allowed[0]) broken("a refusal without a sentence");
  } else {
    opened++;
    if (plan || planned.allocated != ns_memory_of(e).allocated) broken("the plan is not what was taken");
    use(e);
    ns_close(e);
  }
  free(manifest);
}

static int spoil(long first, long total) {
  static artifact base[BASES], work;
  static const char *const kinds[BASES] = {"fffffffff", "hbhfbhhb-", "444444444", "38332483-",
                                           "flLlLlLlL", "fsSTsSTSs", "8TlL43Ts4", "222288222"};
  size_t page = (size_t)sysconf(_SC_PAGESIZE), span = (3 * ROOM / page + 1) * page;
  uint8_t *pages = mmap(NULL, span + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (pages == MAP_FAILED || mprotect(pages + page, span, PROT_READ | PROT_WRITE)) return perror("mmap"), 2;
  state = 1;
  for (int i = 0; i < BASES; i++) {
    build(&base[i], kinds[i], i % 2, i % 3 == 0 && i != 3, i % 3 == 1 || i == 3);
    while ((8 + base[i].header.size) % 64) put(&base[i].header, " ");
    while (base[i].data.size % 64) base[i].data.at[base[i].data.size++] = 0;
    try(&base[i], pages + page, span, 0);
  }
  opened = 0;
  for (long i = first; i < first + total; i++) {
    *current = i;
    state = seed * 0x2545f4914f6cdd1du + (uint64_t)i * 0x9e3779b97f4a7c15u;
    draw();
    const artifact *from = &base[below(BASES)], *other = &base[below(BASES)];
    work = *from;
    for (size_t n = 1 + below(3) * below(2); n; n--) switch (below(6)) {
        case 0:
        case 1: mutate_text(&work.manifest, &other->manifest); break;
        case 2:
        case 3: mutate_text(&work.header, &other->header); break;
        default: mutate_data(&work.data);
      }
    alarm(SECONDS); /* a mutation that takes longer ends the process */
    try(&work, pages + page, span, 1);
  }
  struct rusage usage;
  getrusage(RUSAGE_SELF, &usage);
  printf("%ld mutations from seed %llu: %ld opened and ran, %ld refused with a sentence; at most %ld MB resident\n", total,
         (unsigned long long)seed, opened, refused, (long)usage.ru_maxrss / 1024);
  return 0;
}

int main(int count, char **argument) {
  if (count < 3) return fprintf(stderr, "fuzz SEED COUNT [FIRST]\n"), 2;
  seed = strtoull(argument[1], NULL, 10);
  current = mmap(NULL, sizeof *current, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (current == MAP_FAILED) return perror("mmap"), 2;
  pid_t child = fork(); /* another process works, so that this one can say where it ended, however it did */
  if (child < 0) return perror("fork"), 2;
  if (!child) exit(spoil(count > 3 ? atol(argument[3]) : 0, atol(argument[2])));
  int status;
  if (waitpid(child, &status, 0) < 0) return perror("waitpid"), 2;
  if (!status) return 0;
  if (WIFSIGNALED(status)) fprintf(stderr, "ended by signal %d (%d: it took more than %d seconds)\n", WTERMSIG(status), SIGALRM, SECONDS);
  fprintf(stderr, "repeat with: fuzz %llu 1 %ld\n", (unsigned long long)seed, *current);
  return WIFEXITED(status) ? WEXITSTATUS(status) : 1;
}
