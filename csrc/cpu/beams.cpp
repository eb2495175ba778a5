// The steps of beam search between two forwards, on the CPU: beam by beam.

#include "torch/beams.h"

#include <algorithm>

#include "torch/cpu.h"

namespace vstar {

void run(const Cpu& device, const AdvanceBeamsArgs& a) {
  device.parallel_for(a.batch, 4096, a.beams, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      for (int64_t k = 0; k < a.beams; ++k) {
        const int64_t w = a.above(b, k);
        for (int64_t i = 0; i <= a.length; ++i) a.store_token(b, k, w, i);
        a.store_state(b, k, w);
      }
    }
  });
}

void run(const Cpu&, const RowsToRunArgs& a) {
  std::fill_n(a.num_rows, a.length, 0);
  int32_t rows = 0;
  for (int64_t b = 0; b < a.batch; ++b) {
    a.num_tokens[b] = 0;
    for (int64_t w = 0; w < a.width; ++w) {
      const int64_t first = a.missing(b, w), at = b * a.width + w;
      a.row[at] = first < a.length ? rows : -1;
      if (first == a.length) continue;
      a.parent[rows] = a.slot.at(b, w);
      a.num_tokens[b] += int32_t(a.length - first);
      for (int64_t s = first; s < a.length; ++s) a.store(b, w, s, a.num_rows[s]++, rows);
      ++rows;
    }
  }
  std::fill(a.parent + rows, a.parent + a.beams(), -1);
  for (int64_t s = 0; s < a.length; ++s) {
    for (int64_t i = a.num_rows[s]; i < a.beams(); ++i) a.clear(s, i);
  }
}

}  // namespace vstar

VSTAR_REGISTER(Cpu, advance_beams);
VSTAR_REGISTER(Cpu, rows_to_run);
