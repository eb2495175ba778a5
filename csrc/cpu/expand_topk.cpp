// expand_topk on the CPU, in one pass over the legal logits.
//
// A task is a request, or a block of a request's prefixes when there are fewer requests than threads would
// like. For each prefix: gather the legal logits into a buffer that stays in the first-level cache, reduce
// maximum, mass and entropy, then score the children and append those that beat the running threshold to a
// buffer of candidates. When the buffer is full only its k best stay and the k-th becomes the threshold.
// Keys carry the enumeration order, so the selection follows the total order whatever the partition.

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "common/order.h"
#include "common/trie.h"
#include "cpu/torch_glue.h"

namespace vstar {
namespace {

constexpr float kInf = INFINITY;

struct Candidate {
  float logp;
  int32_t parent;
  int32_t edge;
};

// The k best candidates pushed, in the total order.
class Selector {
 public:
  void reset(int64_t k) {
    k_ = k;
    capacity_ = k + std::max<int64_t>(k, 64);
    size_ = 0;
    threshold_ = -kInf;
    if (int64_t(keys_.size()) < capacity_) {
      keys_.resize(capacity_);
      candidates_.resize(capacity_);
      renumbered_.assign(capacity_, kDropped);
    }
  }

  // Scores at or below it cannot win any more: later candidates lose ties.
  float threshold() const { return threshold_; }

  void push(float score, const Candidate& candidate) {
    if (size_ == capacity_) shrink();
    if (!(score > threshold_)) return;
    keys_[size_] = candidate_key(score, uint32_t(size_));
    candidates_[size_] = candidate;
    ++size_;
  }

  // Sort what won; returns how many there are.
  int64_t finish() {
    const int64_t count = std::min(size_, k_);
    const auto first = keys_.begin();
    if (size_ > k_) std::nth_element(first, first + k_ - 1, first + size_, std::greater<>());
    std::sort(first, first + count, std::greater<>());
    return count;
  }
  float score(int64_t rank) const { return key_score(keys_[rank]); }
  const Candidate& candidate(int64_t rank) const { return candidates_[key_sequence(keys_[rank])]; }

 private:
  static constexpr uint32_t kDropped = ~0u;

  // Keep the k best and renumber them in enumeration order, so that numbers stay below the capacity.
  void shrink() {
    const auto first = keys_.begin();
    std::nth_element(first, first + k_ - 1, first + size_, std::greater<>());
    threshold_ = key_score(keys_[k_ - 1]);
    for (int64_t i = 0; i < k_; ++i) renumbered_[key_sequence(keys_[i])] = 0;
    uint32_t next = 0;
    for (int64_t i = 0; i < size_; ++i) {
      if (renumbered_[i] == kDropped) continue;
      candidates_[next] = candidates_[i];
      renumbered_[i] = next++;
    }
    for (int64_t i = 0; i < k_; ++i) {
      const uint32_t old = key_sequence(keys_[i]);
      keys_[i] = candidate_key(key_score(keys_[i]), renumbered_[old]);
    }
    std::fill_n(renumbered_.begin(), size_, kDropped);
    size_ = k_;
  }

  std::vector<uint64_t> keys_;
  std::vector<Candidate> candidates_;
  std::vector<uint32_t> renumbered_;
  int64_t k_ = 0, capacity_ = 0, size_ = 0;
  float threshold_ = -kInf;
};

// A [B, W, V] tensor of floats, addressed by rows.
struct Rows {
  const char* data;
  FloatType type;
  int64_t batch_stride, width_stride, stride;  // batch and width in bytes, the last in elements

  explicit Rows(const Tensor& tensor)
      : data(static_cast<const char*>(tensor.const_data_ptr())),
        type(float_type(tensor)),
        batch_stride(tensor.stride(0) * element_size(type)),
        width_stride(tensor.stride(1) * element_size(type)),
        stride(tensor.stride(2)) {}
  const char* row(int64_t b, int64_t w) const { return data + b * batch_stride + w * width_stride; }
  const TypedLoops& loops() const { return simd().typed[int(type)]; }
};

struct Scratch {
  std::vector<float> z, extra;
  std::vector<int32_t> index;
  Selector selector;
};

class Expansion {
 public:
  Expansion(
      const Tensor& logits, const Tensor& offset, const Tensor& token, const Tensor& node,
      const std::optional<Tensor>& cum_logp, const std::optional<Tensor>& value,
      const std::optional<Tensor>& bonus, const std::optional<Tensor>& child_value,
      const std::optional<Tensor>& seed, double logp_weight, double value_weight, double entropy_weight,
      double temperature, bool vocab)
      : columns(logits.size(2)),
        trie{data<int32_t>(offset), data<int32_t>(token), offset.numel() - 1, token.numel()},
        logits_(logits),
        node_(node),
        node_batch_(node.stride(0)),
        node_width_(node.stride(1)),
        cum_logp_(cum_logp),
        value_(value_weight != 0 ? value : std::nullopt),
        bonus_(bonus),
        seed_(seed ? data<int64_t>(*seed) : nullptr),
        seed_stride_(seed ? seed->stride(0) : 0),
        logp_weight_(float(logp_weight)),
        value_weight_(float(value_weight)),
        entropy_weight_(float(entropy_weight)),
        inverse_temperature_(float(std::min(1.0 / temperature, 3e38))),
        vocab_(vocab) {
    if (child_value && value_weight != 0) child_value_.emplace(*child_value);
  }

  EdgeRange edges(int64_t b, int64_t w) const {
    return trie.edges_within(node_.at(b * node_batch_ + w * node_width_), columns);
  }

  // Push the winners among the children of prefix w; returns its entropy.
  float expand(int64_t b, int64_t w, Scratch& scratch) const {
    const EdgeRange range = edges(b, w);
    const int64_t n = range.end - range.begin;
    if (n == 0) return 0.0f;
    const int32_t* token = trie.token + range.begin;
    const float cum_logp = cum_logp_.at(b, w);
    const bool has_extra = child_value_ || seed_;
    Selector& selector = scratch.selector;

    if (int64_t(scratch.z.size()) < n + 16) {
      scratch.z.resize(n + 16);
      scratch.extra.resize(n + 16);
      scratch.index.resize(n + 16);
    }
    float* z = scratch.z.data();
    const char* row = logits_.row(b, w);
    const float top = logits_.loops().gather(row, logits_.stride, token, n, z);
    if (top == -kInf) return 0.0f;

    float log_mass = 0, entropy = 0;
    if (n == 1) {
      z[0] = 0;  // certain under the legal children: no softmax to take
    } else {
      const SoftmaxSums sums = simd().softmax_sums(z, n, top, inverse_temperature_);
      const double log_sum = std::log(sums.mass);
      log_mass = float(log_sum);
      entropy = float(std::max(0.0, log_sum - sums.weighted / sums.mass));
    }
    if (vocab_ && n < columns) {
      const float row_top = logits_.loops().row_max(row, logits_.stride, columns);
      const double mass = logits_.loops().row_mass(row, logits_.stride, columns, row_top, inverse_temperature_);
      log_mass = float(std::log(mass) + (double(row_top) - top) * inverse_temperature_);
    }

    float constant = value_weight_ * value_.at(b, w) + bonus_.at(b, w);
    if (entropy_weight_ != 0) constant += entropy_weight_ * entropy;
    const RowTerms terms{cum_logp, log_mass, logp_weight_, constant, has_extra};
    float* extra = scratch.extra.data();
    if (has_extra) {
      if (child_value_) {
        child_value_->loops().gather_scaled(
            child_value_->row(b, w), child_value_->stride, token, n, value_weight_, extra);
      } else {
        std::fill_n(extra, n, 0.0f);
      }
      if (seed_) {
        simd().add_noise(extra, token, n, uint64_t(seed_[b * seed_stride_]), node_at(b, w));
      }
    } else if (logp_weight_ >= 0) {
      const float best = constant + logp_weight_ * (cum_logp + (0.0f - log_mass));
      if (best <= selector.threshold()) return entropy;  // the row's best child cannot win
    }
    int32_t* index = scratch.index.data();
    const int64_t found = simd().score_and_filter(z, extra, n, terms, selector.threshold(), index);
    for (int64_t i = 0; i < found; ++i) {
      const int32_t child = index[i];
      selector.push(extra[child], {z[child], int32_t(w), int32_t(range.begin + child)});
    }
    return entropy;
  }

  const int64_t columns;
  const TrieView trie;

 private:
  uint32_t node_at(int64_t b, int64_t w) const {
    return uint32_t(node_.at(b * node_batch_ + w * node_width_));
  }

  Rows logits_;
  Integers node_;
  int64_t node_batch_, node_width_;
  OptionalMatrix cum_logp_, value_, bonus_;
  std::optional<Rows> child_value_;
  const int64_t* seed_;
  int64_t seed_stride_;
  float logp_weight_, value_weight_, entropy_weight_, inverse_temperature_;
  bool vocab_;
};

struct Outputs {
  float *score, *logp;
  int32_t *parent, *token, *node, *count;

  void write(int64_t b, int64_t k, Selector& selector, const TrieView& trie) const {
    const int64_t found = selector.finish(), base = b * k;
    for (int64_t i = 0; i < found; ++i) {
      const Candidate& candidate = selector.candidate(i);
      score[base + i] = selector.score(i);
      logp[base + i] = candidate.logp;
      parent[base + i] = candidate.parent;
      token[base + i] = trie.token[candidate.edge];
      node[base + i] = candidate.edge + 1;
    }
    std::fill(score + base + found, score + base + k, -kInf);
    std::fill(logp + base + found, logp + base + k, -kInf);
    for (int32_t* slots : {parent, token, node}) std::fill(slots + base + found, slots + base + k, -1);
    count[b] = int32_t(found);
  }
};

Scratch& scratch() {
  static thread_local Scratch buffers;
  return buffers;
}

using Result = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Result expand_topk(
    Tensor logits, Tensor offset, Tensor token, Tensor node, int64_t k, std::optional<Tensor> cum_logp,
    std::optional<Tensor> value, std::optional<Tensor> bonus, std::optional<Tensor> child_value,
    std::optional<Tensor> seed, double logp_weight, double value_weight, double entropy_weight,
    double temperature, bool vocab, int64_t max_children) {
  const int64_t batch = logits.size(0), width = logits.size(1);
  const Expansion expansion(
      logits, offset, token, node, cum_logp, value, bonus, child_value, seed, logp_weight, value_weight,
      entropy_weight, temperature, vocab);

  Tensor score = new_tensor<float>({batch, k}), logp = new_tensor<float>({batch, k});
  Tensor parent = new_tensor<int32_t>({batch, k}), chosen = new_tensor<int32_t>({batch, k});
  Tensor child = new_tensor<int32_t>({batch, k}), count = new_tensor<int32_t>({batch});
  Tensor entropy = new_tensor<float>({batch, width});
  const Outputs out{data<float>(score),    data<float>(logp),    data<int32_t>(parent),
                    data<int32_t>(chosen), data<int32_t>(child), data<int32_t>(count)};
  float* entropies = data<float>(entropy);

  const int64_t threads = torch::stable::get_num_threads();
  int64_t blocks = 1;
  if (threads > 1 && batch > 0 && batch < 4 * threads) blocks = std::min(width, (4 * threads + batch - 1) / batch);
  blocks = std::max<int64_t>(blocks, 1);
  const int64_t block_width = (width + blocks - 1) / blocks;
  // Wake another thread only for a few microseconds of work.
  const int64_t row_work = vocab ? expansion.columns : std::min<int64_t>(max_children, 32);
  const int64_t grain = std::max<int64_t>(1, 2048 / std::max<int64_t>(1, row_work * block_width));

  // At most `limit` children can win, however large k is: this bounds the buffers.
  auto run = [&](int64_t b, int64_t begin, int64_t end, Selector& selector) {
    int64_t limit = 0;
    for (int64_t w = begin; w < end; ++w) {
      const EdgeRange range = expansion.edges(b, w);
      limit += range.end - range.begin;
    }
    selector.reset(std::min(k, std::max<int64_t>(limit, 1)));
    for (int64_t w = begin; w < end; ++w) entropies[b * width + w] = expansion.expand(b, w, scratch());
  };

  if (blocks == 1) {
    torch::stable::parallel_for(0, batch, grain, [&](int64_t first, int64_t last) {
      for (int64_t b = first; b < last; ++b) {
        run(b, 0, width, scratch().selector);
        out.write(b, k, scratch().selector, expansion.trie);
      }
    });
  } else {
    struct Winner {
      float score;
      Candidate candidate;
    };
    std::vector<std::vector<Winner>> winners(batch * blocks);
    torch::stable::parallel_for(0, batch * blocks, grain, [&](int64_t first, int64_t last) {
      for (int64_t task = first; task < last; ++task) {
        const int64_t b = task / blocks, begin = std::min(width, task % blocks * block_width);
        Selector& selector = scratch().selector;
        run(b, begin, std::min(width, begin + block_width), selector);
        const int64_t found = selector.finish();
        for (int64_t i = 0; i < found; ++i) winners[task].push_back({selector.score(i), selector.candidate(i)});
      }
    });
    for (int64_t b = 0; b < batch; ++b) {
      // Blocks in order of w, each sorted with its ties in enumeration order: pushing them one after the
      // other leaves equal scores in enumeration order again.
      int64_t limit = 1;
      for (int64_t i = 0; i < blocks; ++i) limit += int64_t(winners[b * blocks + i].size());
      Selector& selector = scratch().selector;
      selector.reset(std::min(k, limit));
      for (int64_t i = 0; i < blocks; ++i) {
        for (const Winner& winner : winners[b * blocks + i]) selector.push(winner.score, winner.candidate);
      }
      out.write(b, k, selector, expansion.trie);
    }
  }
  return {score, logp, parent, chosen, child, count, entropy};
}

std::string simd_level_op() { return simd_level(); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vstar_ops, CPU, m) { m.impl("expand_topk", TORCH_BOX(&expand_topk)); }
STABLE_TORCH_LIBRARY_IMPL(vstar_ops, CompositeExplicitAutograd, m) { m.impl("simd_level", TORCH_BOX(&simd_level_op)); }

}  // namespace vstar
