// What surrounds the model's forward in a round of value-guided decoding, on the CPU. A row is evaluated by itself, as
// expand_topk does it: both of its lists rank the same log-probabilities.

#include "torch/ved_rows.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/prefix_row.h"
#include "cpu/selector.h"
#include "torch/cpu.h"

namespace vstar {
namespace {

constexpr float kInf = INFINITY;
constexpr int64_t kWork = 2048;  // logits that are worth another thread: a few microseconds

class Lists {
 public:
  explicit Lists(const VedEvaluateArgs& args) : a(args) {}

  void evaluate(int64_t b, int64_t p) {
    const int64_t node = a.node.at(b, p), r = b * a.rows + p;
    const float value = a.out_value[r] = a.own_value(b, p);
    edges_ = a.trie.edges_within(node, a.columns);
    row_ = PrefixRow{};
    row_.children = edges_.end - edges_.begin;
    float entropy = 0;
    if (row_.children > 0) {
      reserve();
      row_.logits = a.logits.address(b, p);
      row_.token = a.trie.token + edges_.begin;
      row_.cum_logp = a.logp.at(b, p);
      loops_of(a.logits).legal_softmaxes(
          &row_, 1, a.logits.stride[2], a.inv_temperature, a.trie.alive_of(b), d_.data());
      entropy = finish_row(row_, a.logits, a.columns, a.vocab, a.trie.alive, a.inv_temperature);
    }
    a.out_entropy[r] = entropy;

    int64_t found = 0;
    if (row_.children > 0 && a.is_open(node)) {
      float* const noise = extra_.data();
      std::fill_n(noise, row_.children, 0.0f);
      simd().add_noise(noise, row_.token, row_.children, uint64_t(a.seed.at(b)), uint32_t(node));
      found = best(noise, false, a.children, [&](int64_t i, int64_t child, float logp, float) {
        a.store_child(r, i, child, logp);
      });
    }
    a.num_children[r] = int32_t(found);
    for (; found < a.children; ++found) a.clear_child(r, found);

    found = 0;
    if (row_.children > 0 && a.has_leaves(edges_)) {
      float* const extra = a.child_value ? extra_.data() : nullptr;
      if (extra) {
        loops_of(a.child_value).gather_scaled(
            a.child_value.address(b, p), a.child_value.stride[2], row_.token, row_.children, a.child_weight, extra);
      }
      found = best(extra, true, a.leaves, [&](int64_t i, int64_t child, float logp, float rank) {
        a.store_leaf(r, i, child, logp, rank, value);
      });
    }
    a.num_leaves[r] = int32_t(found);
    for (; found < a.leaves; ++found) a.clear_leaf(r, found);
  }

 private:
  void reserve() {
    const size_t size = size_t(row_.children) + 16;  // loops work on whole vectors
    if (score_.size() >= size) return;
    for (std::vector<float>* x : {&d_, &extra_, &score_}) x->resize(size);
    index_.resize(size);
  }

  // Store the k best of the row's children that belong to a list; returns how many there are.
  template <class Store>
  int64_t best(const float* extra, bool among_leaves, int64_t k, const Store& store) {
    const int64_t n = row_.children;
    float* const score = score_.data();
    simd().score_rows(&row_, 1, d_.data(), extra, a.rank_weight(among_leaves), -kInf, score);
    for (int64_t i = 0; i < n; ++i) {
      if (!a.listed(edges_.begin + i + 1, among_leaves)) score[i] = -kInf;
    }
    selector_.reset(std::min(k, n));
    const float threshold = just_below(simd().reached_by(score, n, selector_.k()));  // ties may win
    const int64_t found = simd().filter(score, n, threshold, index_.data());
    for (int64_t j = 0; j < found; ++j) {
      const int64_t i = index_[j];
      const float logp = row_.cum_logp + (d_[i] - row_.log_mass);
      selector_.push(score[i], {logp, 0, int32_t(edges_.begin + i)});
    }
    return selector_.finish([&](int64_t rank, float its_score, const Candidate& candidate) {
      store(rank, int64_t(candidate.edge) + 1, candidate.logp, its_score);
    });
  }

  const VedEvaluateArgs& a;
  EdgeRange edges_;
  PrefixRow row_;
  std::vector<float> d_, extra_, score_;
  std::vector<int32_t> index_;
  Selector selector_;
};

void next_beams(const VedBeamsArgs& a, int64_t b) {
  int64_t start = a.tree_size[b], n = 0;
  for (int64_t p = 0; p < a.rows; ++p) start -= a.above.at(b, p) >= 0;
  for (int64_t i = 0; i < a.first.size && n < std::min(a.num_first, a.width); ++i) {
    if (a.beam(a.first, b, i) >= 0) a.store(a.first, b, i, n++, start);
  }
  const int32_t *const taken = a.out_node + b * a.width, *const end = taken + n;
  for (int64_t i = 0; i < a.others.size && n < a.width; ++i) {
    const int32_t node = a.beam(a.others, b, i);
    if (node >= 0 && std::find(taken, end, node) == end) a.store(a.others, b, i, n++, start);
  }
  for (; n < a.width; ++n) a.clear(b, n);
}

}  // namespace

void run(const Cpu&, const VedInputsArgs& a) {
  for (int64_t b = 0; b < a.batch; ++b) {
    for (int64_t p = 0; p < a.rows; ++p) a.fill(b, p);
  }
}

void run(const Cpu& device, const VedEvaluateArgs& a) {
  const int64_t row_work = a.vocab ? a.columns : std::min<int64_t>(a.max_children, 32);
  device.parallel_for(a.batch * a.rows, kWork, row_work, [&](int64_t first, int64_t last) {
    Lists lists(a);
    for (int64_t r = first; r < last; ++r) lists.evaluate(r / a.rows, r % a.rows);
  });
}

void run(const Cpu& device, const VedBeamsArgs& a) {
  device.parallel_for(a.batch, 64, 1, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) next_beams(a, b);
  });
}

}  // namespace vstar

VSTAR_REGISTER(Cpu, ved_inputs);
VSTAR_REGISTER(Cpu, ved_evaluate);
VSTAR_REGISTER(Cpu, ved_beams);
