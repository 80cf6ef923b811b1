#include "json.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { DEPTH = 32 };

typedef struct {
  const char *at, *end;
  json *doc;
  uint32_t room;
} reader;

static void space(reader *r) {
  while (r->at < r->end && (*r->at == ' ' || *r->at == '\n' || *r->at == '\t' || *r->at == '\r')) r->at++;
}

static int add(reader *r, uint32_t *index) {
  json *doc = r->doc;
  if (doc->count == r->room) {
    if (r->room > (1u << 26)) return -1;
    uint32_t room = r->room * 2;
    json_node *grown = realloc(doc->nodes, (size_t)room * sizeof *grown);
    if (!grown) return -1;
    doc->nodes = grown;
    r->room = room;
  }
  *index = doc->count++;
  memset(&doc->nodes[*index], 0, sizeof(json_node));
  return 0;
}

static int string(reader *r, const char **text, size_t *size) {
  if (r->at >= r->end || *r->at != '"') return -1;
  const char *start = ++r->at;
  while (r->at < r->end && *r->at != '"') {
    if ((unsigned char)*r->at < 0x20) return -1;
    if (*r->at == '\\' && ++r->at >= r->end) return -1;
    r->at++;
  }
  if (r->at >= r->end) return -1;
  *text = start;
  *size = (size_t)(r->at - start);
  r->at++;
  return 0;
}

static int word(reader *r, const char *text) {
  size_t n = strlen(text);
  if ((size_t)(r->end - r->at) < n || memcmp(r->at, text, n)) return -1;
  r->at += n;
  return 0;
}

static int value(reader *r, uint32_t index, int depth) {
  space(r);
  if (r->at >= r->end || depth > DEPTH) return -1;
  char c = *r->at;
  json_node *node = &r->doc->nodes[index];
  if (c == '"') {
    node->type = JSON_STRING;
    return string(r, &node->text, &node->size);
  }
  if (c == 'n' || c == 't' || c == 'f') {
    node->type = c == 'n' ? JSON_NULL : c == 't' ? JSON_TRUE : JSON_FALSE;
    return word(r, c == 'n' ? "null" : c == 't' ? "true" : "false");
  }
  if (c == '-' || (c >= '0' && c <= '9')) {
    node->type = JSON_NUMBER;
    node->text = r->at;
    while (r->at < r->end && (strchr("+-.eE", *r->at) ? *r->at != 0 : *r->at >= '0' && *r->at <= '9')) r->at++;
    node->size = (size_t)(r->at - node->text);
    return 0;
  }
  if (c != '{' && c != '[') return -1;
  char close = c == '{' ? '}' : ']';
  node->type = c == '{' ? JSON_OBJECT : JSON_ARRAY;
  r->at++;
  space(r);
  if (r->at < r->end && *r->at == close) {
    r->at++;
    return 0;
  }
  for (uint32_t last = 0, child;;) {
    if (add(r, &child)) return -1;
    if (last) r->doc->nodes[last].next = child;
    else r->doc->nodes[index].child = child;
    last = child;
    r->doc->nodes[index].size++;
    if (close == '}') {
      const char *key;
      size_t size;
      space(r);
      if (string(r, &key, &size)) return -1;
      r->doc->nodes[child].key = key;
      r->doc->nodes[child].key_size = size;
      space(r);
      if (r->at >= r->end || *r->at++ != ':') return -1;
    }
    if (value(r, child, depth + 1)) return -1;
    space(r);
    if (r->at >= r->end) return -1;
    c = *r->at++;
    if (c == close) return 0;
    if (c != ',') return -1;
  }
}

int json_parse(json *doc, const char *text, size_t size) {
  reader r = {text, text + size, doc, 256};
  uint32_t root;
  doc->count = 0;
  doc->nodes = malloc(r.room * sizeof(json_node));
  if (!doc->nodes) return -1;
  if (!add(&r, &root) && !value(&r, root, 0)) {
    space(&r);
    if (r.at == r.end) return 0;
  }
  json_free(doc);
  return -1;
}

void json_free(json *doc) {
  free(doc->nodes);
  doc->nodes = NULL;
  doc->count = 0;
}

const json_node *json_child(const json *doc, const json_node *node) {
  return node && node->child ? &doc->nodes[node->child] : NULL;
}

const json_node *json_next(const json *doc, const json_node *node) { return node->next ? &doc->nodes[node->next] : NULL; }

const json_node *json_get(const json *doc, const json_node *object, const char *name) {
  size_t n = strlen(name);
  if (!object || object->type != JSON_OBJECT) return NULL;
  for (const json_node *m = json_child(doc, object); m; m = json_next(doc, m))
    if (m->key_size == n && !memcmp(m->key, name, n)) return m;
  return NULL;
}

int json_is(const json_node *node, const char *text) {
  return node && node->type == JSON_STRING && node->size == strlen(text) && !memcmp(node->text, text, node->size);
}

int json_double(const json_node *node, double *out) {
  char copy[64], *end;
  if (!node || node->type != JSON_NUMBER || node->size >= sizeof copy) return 0;
  memcpy(copy, node->text, node->size);
  copy[node->size] = 0;
  double v = strtod(copy, &end);
  if (end != copy + node->size || !isfinite(v)) return 0;
  *out = v;
  return 1;
}

int json_int(const json_node *node, int64_t low, int64_t high, int64_t *out) {
  double v;
  if (!json_double(node, &v) || v != floor(v) || fabs(v) > 9007199254740992.0) return 0;
  if (v < (double)low || v > (double)high) return 0;
  *out = (int64_t)v;
  return 1;
}
