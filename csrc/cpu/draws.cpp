// The steps of top-k sampling between two forwards, on the CPU. The largest of a candidate's perturbed log-probabilities
// is that of double arithmetic: vectorized noise in float32 leaves the few entries that may have it.

#include "torch/draws.h"

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "cpu/simd.h"
#include "torch/cpu.h"

namespace vstar {
namespace {

// A list, its entries that can be drawn.
struct List {
  std::vector<int32_t> token, entry;
  std::vector<float> logp, score;

  void read(const DrawChildrenArgs& a, int64_t r) {
    token.clear();
    entry.clear();
    logp.clear();
    for (int64_t c = 0; r >= 0 && c < a.children; ++c) {
      if (!a.drawable(r, c)) continue;
      token.push_back(int32_t(a.list_token.at(r, c)));
      entry.push_back(int32_t(c));
      logp.push_back(a.list_logp.at(r, c));
    }
  }

  // The entry that candidate k of request b draws; -1 if there is none.
  int32_t draw(const DrawChildrenArgs& a, int64_t b, int64_t k, int64_t r) {
    const int64_t n = int64_t(entry.size());
    if (n == 0) return -1;
    const uint64_t key = a.key(b, k);
    const uint32_t prefix = a.prefix_of(b, k);
    score = logp;
    simd().add_noise(score.data(), token.data(), n, key, prefix);
    const float top = *std::max_element(score.begin(), score.end());
    const float near = top - 1e-4f * (1 + std::fabs(top));  // float32 is off by less than a tenth of that
    int32_t best = -1;
    double best_score = 0;
    for (int64_t i = 0; i < n; ++i) {
      if (score[i] < near) continue;
      const double exact = a.perturbed(r, entry[i], key, prefix);
      if (best < 0 || exact > best_score) best = entry[i], best_score = exact;
    }
    return best;
  }
};

}  // namespace

void run(const Cpu& device, const DrawChildrenArgs& a) {
  device.parallel_for(a.batch, 2048, a.candidates * a.children, [&](int64_t first, int64_t last) {
    List list;
    std::vector<int32_t> choice(a.candidates);
    for (int64_t b = first; b < last; ++b) {
      int64_t valid = 0, read = -1;
      for (int64_t k = 0; k < a.candidates; ++k) {
        const int64_t r = a.list_of(b, k);
        if (r != read || k == 0) list.read(a, r), read = r;
        choice[k] = list.draw(a, b, k, r);
        valid += choice[k] >= 0;
      }
      int64_t found = 0, lost = valid;
      for (int64_t k = 0; k < a.candidates; ++k) {
        const int64_t packed = choice[k] >= 0 ? found++ : lost++;
        a.store(b, k, choice[k], a.pack ? packed : k);
      }
      a.num_valid[b] = int32_t(valid);
    }
  });
}

void run(const Cpu&, const DistinctRowsArgs& a) {
  std::vector<std::pair<int64_t, int64_t>> order(a.candidates);  // node, candidate
  int32_t rows = 0;
  for (int64_t b = 0; b < a.batch; ++b) {
    const int32_t first = rows;
    for (int64_t k = 0; k < a.candidates; ++k) order[k] = {a.node.at(b, k), k};
    std::sort(order.begin(), order.end());
    int64_t before = -1;
    for (const auto& [node, k] : order) {
      if (node >= 0 && node != before) a.store(b, k, rows++);
      a.out_row[b * a.candidates + k] = node >= 0 ? rows - 1 : -1;
      before = node;
    }
    a.num_tokens[b] = rows - first;
  }
  a.num_rows[0] = rows;
  for (int64_t to = rows; to < a.total(); ++to) a.clear(to);
}

}  // namespace vstar

VSTAR_REGISTER(Cpu, draw_children);
VSTAR_REGISTER(Cpu, distinct_rows);
