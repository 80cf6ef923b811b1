/* The safetensors file: a length, a JSON header, tensors. Everything is hostile until checked. */
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "model.h"

enum { LARGEST_HEADER = 64 << 20 };

int ns_fail(ns_error *error, const char *allowed, const char *found, ...) {
  if (error) {
    va_list args;
    va_start(args, found);
    vsnprintf(error->found, sizeof error->found, found, args);
    va_end(args);
    snprintf(error->allowed, sizeof error->allowed, "%s", allowed);
  }
  return -1;
}

void *ns_take(ns_arena *arena, uint64_t count, uint64_t size) {
  uint64_t bytes = (count * size + 63) & ~(uint64_t)63;
  void *at = arena->base && arena->used + bytes <= arena->room ? arena->base + arena->used : NULL;
  arena->used += bytes;
  return at;
}

int ns_weights_open(ns_weights *w, const void *data, size_t size, ns_error *error) {
  memset(w, 0, sizeof *w);
  const uint8_t *bytes = data;
  uint64_t length = 0;
  if (size < 8) return ns_fail(error, "a safetensors file", "the weights have %zu bytes", size);
  for (int i = 7; i >= 0; i--) length = length << 8 | bytes[i];
  if (length > LARGEST_HEADER || length > size - 8)
    return ns_fail(error, "a header inside the file", "the header of the weights claims %llu bytes", (unsigned long long)length);
  if (json_parse(&w->header, (const char *)bytes + 8, (size_t)length))
    return ns_fail(error, "a safetensors file", "the header of the weights is no JSON");
  w->data = bytes;
  w->size = size;
  w->start = 8 + (size_t)length;
  return 0;
}

void ns_weights_close(ns_weights *w) { json_free(&w->header); }
