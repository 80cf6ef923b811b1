/* A small JSON reader for hostile text: no recursion without bound, no allocation but one array of nodes. */
#ifndef NS_JSON_H
#define NS_JSON_H

#include <stddef.h>
#include <stdint.h>

typedef enum { JSON_NULL, JSON_FALSE, JSON_TRUE, JSON_NUMBER, JSON_STRING, JSON_ARRAY, JSON_OBJECT } json_type;

typedef struct {
  json_type type;
  const char *text; /* of strings without quotes, of numbers as written */
  size_t size;      /* bytes of text; number of children */
  const char *key;  /* in an object; escapes are kept as written, so such a key equals no name */
  size_t key_size;
  uint32_t child, next; /* index of the first child and of the next sibling; 0: none */
} json_node;

typedef struct {
  json_node *nodes; /* nodes[0] is the root */
  uint32_t count;
} json;

/* 0, or -1 for text that is no JSON, deeper than 32 levels, or out of memory. Free with json_free. */
int json_parse(json *out, const char *text, size_t size);
void json_free(json *doc);

/* The member called `name`, or NULL. */
const json_node *json_get(const json *doc, const json_node *object, const char *name);
const json_node *json_child(const json *doc, const json_node *node); /* first child or NULL */
const json_node *json_next(const json *doc, const json_node *node);
int json_is(const json_node *node, const char *text); /* a string equal to text */
/* 1 and the value, or 0 for anything but an integer within [low, high] / a finite number. */
int json_int(const json_node *node, int64_t low, int64_t high, int64_t *value);
int json_double(const json_node *node, double *value);

#endif
