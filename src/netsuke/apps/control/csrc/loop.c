/* A closed loop for measuring: the controller steers a network along path.bin, on an emulated board or on the host.
 *
 * path.bin: float32, outputs at rest, then what is wanted after every tick. Writes controls.bin and outputs.bin (float32)
 * and counts.bin (uint32: instructions of the controller in every tick). NAME: the controller's prefix. */
#include <string.h>

#include "board.h"
#include "ns_dense.h"

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
void JOIN(NAME, _reset)(const float *y);
float JOIN(NAME, _step)(const float *y, const float *sensors, const float *reference, float *u);

extern const ns_dense plant_network;
extern const int plant_shape[5];

enum { WIDE = 256, ROWS = 64 };

static float moving[WIDE], inputs[WIDE], values[WIDE], sums[WIDE], ahead[WIDE], last[WIDE];

/* Puts n floats on top of a history of `rows` rows, newest first. */
static void push(float *block, int rows, int n, const float *from) {
  memmove(block + n, block, (size_t)((rows - 1) * n) * sizeof *block);
  memcpy(block, from, (size_t)n * sizeof *block);
}

int main(void) {
  const int m = plant_shape[0], p = plant_shape[1], nd = plant_shape[2], dd = plant_shape[3];
  float u[ROWS], y[ROWS];
  const int path = ns_open("path.bin", "rb"), to = ns_open("controls.bin", "wb");
  const int outputs = ns_open("outputs.bin", "wb"), counts = ns_open("counts.bin", "wb");
  const size_t bytes = (size_t)p * sizeof *y;
  if (path < 0 || nd * m + dd * p > WIDE || plant_shape[4] > WIDE || HORIZON * p > WIDE || m > ROWS || p > ROWS) return 2;
  if (ns_read(path, y, bytes) != bytes) return 2;
  memset(moving, 0, sizeof moving);
  for (int d = 0; d < dd; d++) memcpy(moving + nd * m + d * p, y, bytes);
  memset(sums, 0, sizeof sums);
  JOIN(NAME, _reset)(y);
  int known = 0; /* rows in `ahead` */
  while (known < HORIZON && ns_read(path, ahead + known * p, bytes) == bytes) known++;
  if (!known) return 2;
  for (int end = known; end;) {
    for (int j = known; j < HORIZON; j++) memcpy(ahead + j * p, ahead + (j - 1) * p, bytes); /* the last row is held */
    const uint64_t begin = ns_instructions();
    JOIN(NAME, _step)(y, 0, ahead, u);
    const uint32_t spent = (uint32_t)(ns_instructions() - begin);
    push(moving, nd, m, u);
    memcpy(inputs, moving, sizeof inputs);
    const float *now = ns_dense_forward(&plant_network, 0, nd * m + dd * p, inputs, sums, values);
    push(moving + nd * m, dd, p, now);
    memcpy(y, now, bytes);
    ns_write(to, u, (size_t)m * sizeof *u);
    ns_write(outputs, y, bytes);
    ns_write(counts, &spent, sizeof spent);
    memmove(ahead, ahead + p, (size_t)(known - 1) * bytes);
    if (ns_read(path, last, bytes) == bytes) {
      memcpy(ahead + (known - 1) * p, last, bytes);
    } else {
      end = --known;
    }
  }
  ns_close(path), ns_close(to), ns_close(outputs), ns_close(counts);
  return 0;
}
