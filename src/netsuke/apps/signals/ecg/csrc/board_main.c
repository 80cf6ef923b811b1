/* Firmware for the emulated board: blocks of input.bin, sample by sample; reports to reports.bin, for each block the
 * instructions of pushing and of finishing to counts.bin. Only `ecg` and the report are the device's. */
#include "board.h"
#include "ns_ecg.h"

static ns_ecg ecg;
static ns_ecg_report report;

int main(void) {
  const int in = ns_open("input.bin", "rb"), out = ns_open("reports.bin", "wb"), counts = ns_open("counts.bin", "wb");
  uint32_t spent[2] = {0, 0};
  for (;;) {
    int full = 0;
    spent[0] = 0;
    ns_ecg_start(&ecg);
    while (!full) {
      float part[50];
      const size_t got = ns_read(in, part, sizeof part) / sizeof *part;
      if (!got) break;
      const uint64_t start = ns_instructions();
      for (size_t k = 0; k < got; k++) full = ns_ecg_push(&ecg, part[k]);
      spent[0] += (uint32_t)(ns_instructions() - start);
    }
    if (!full) break;
    const uint64_t start = ns_instructions();
    ns_ecg_finish(&ecg, &report);
    spent[1] = (uint32_t)(ns_instructions() - start);
    ns_write(out, &report, sizeof report);
    ns_write(counts, spent, sizeof spent);
  }
  ns_close(out);
  ns_close(counts);
  return 0;
}
