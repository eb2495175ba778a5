// expand_topk on the CPU, in one pass over the legal logits.
//
// A task is a request, or a block of a request's prefixes when there are fewer requests than threads would
// like. Its prefixes are scored in batches of a few thousand children, which stay in the cache: gather the
// legal logits, reduce maximum, mass and entropy, write the scores one row after the other. A first threshold
// comes from the maxima of k classes of the batch; what beats it goes to the selector, which keeps at least
// the k best and raises the threshold whenever it is full. Keys carry the enumeration order, so the
// selection follows the total order whatever the partition.

#include <algorithm>
#include <cmath>
#include <memory>
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
    if (int64_t(keys_.size()) < capacity_ + 16) {  // rank_keys works on whole vectors
      keys_.resize(capacity_ + 16);
      candidates_.resize(capacity_);
      renumbered_.assign(capacity_, kDropped);
    }
  }

  int64_t k() const { return k_; }
  int64_t size() const { return size_; }
  // Scores at or below it cannot win any more: later candidates lose ties.
  float threshold() const { return threshold_; }
  // Make the threshold as high as what was pushed allows.
  void tighten() {
    if (size_ > k_) shrink();
  }

  void push(float score, const Candidate& candidate) {
    if (size_ == capacity_) shrink();
    if (!(score > threshold_)) return;
    keys_[size_] = candidate_key(score, uint32_t(size_));
    candidates_[size_] = candidate;
    ++size_;
  }

  // Call visit(rank, score, candidate) for each winner, in any order; returns how many there are.
  template <class Visit>
  int64_t finish(const Visit& visit) {
    const int64_t count = std::min(size_, k_);
    const auto first = keys_.begin();
    if (size_ <= kSmall) {
      simd().rank_keys(keys_.data(), size_, rank_.data());
      for (int64_t i = 0; i < size_; ++i) {
        if (rank_[i] < count) visit(rank_[i], key_score(keys_[i]), candidates_[key_sequence(keys_[i])]);
      }
      return count;
    }
    if (size_ > k_) std::nth_element(first, first + k_ - 1, first + size_, std::greater<>());
    std::sort(first, first + count, std::greater<>());
    for (int64_t i = 0; i < count; ++i) visit(i, key_score(keys_[i]), candidates_[key_sequence(keys_[i])]);
    return count;
  }

 private:
  static constexpr uint32_t kDropped = ~0u;
  static constexpr int64_t kSmall = 96;

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
  std::vector<int32_t> rank_ = std::vector<int32_t>(kSmall + 16);
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
  float at(const char* row, int64_t column) const {
    const int64_t i = column * stride;
    switch (type) {
      case FloatType::kFloat32: return clean(reinterpret_cast<const float*>(row)[i]);
      case FloatType::kBFloat16: return clean(to_float(reinterpret_cast<const BFloat16*>(row)[i]));
      default: return clean(to_float(reinterpret_cast<const Float16*>(row)[i]));
    }
  }
  const TypedLoops& loops() const { return simd().typed[int(type)]; }
};

struct Scratch {
  std::vector<EdgeRange> ranges, next_ranges;
  std::vector<Row> rows;
  std::vector<float> d, extra, score;
  std::vector<int32_t> index;
  Selector selector;

  void reserve(int64_t children) {
    const size_t size = size_t(children) + 16;  // loops work on whole vectors
    if (score.size() >= size) return;
    d.resize(size);
    extra.resize(size);
    score.resize(size);
    index.resize(size);
  }
};

class Expansion {
 public:
  Expansion(
      const Tensor& logits, const Tensor& offset, const Tensor& token, const Tensor& node,
      const std::optional<Tensor>& cum_logp, const std::optional<Tensor>& value,
      const std::optional<Tensor>& bonus, const std::optional<Tensor>& child_value,
      const std::optional<Tensor>& seed, double logp_weight, double value_weight, double entropy_weight,
      double temperature, bool vocab)
      : columns_(logits.size(2)),
        trie_{data<int32_t>(offset), data<int32_t>(token), offset.numel() - 1, token.numel()},
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

  // Look up the children of the prefixes [begin, end) of request b and start to fetch their logits.
  void prepare(int64_t b, int64_t begin, int64_t end, std::vector<EdgeRange>& ranges) const {
    ranges.resize(end - begin);
    for (int64_t w = begin; w < end; ++w) {
      const EdgeRange range = trie_.edges_within(node_at(b, w), columns_);
      ranges[w - begin] = range;
      prefetch(b, w, range);
    }
  }

  // Leave the k best children of the prefixes, prepared as scratch.ranges, in the scratch's selector.
  void run(int64_t b, int64_t begin, int64_t k, Scratch& scratch, float* entropy) const {
    int64_t total = 0, widest = 0;
    for (const EdgeRange& range : scratch.ranges) {
      total += range.end - range.begin;
      widest = std::max(widest, range.end - range.begin);
    }
    // At most `total` children can win, however large k is: this bounds the buffers.
    Selector& selector = scratch.selector;
    selector.reset(std::min(k, std::max<int64_t>(total, 1)));
    scratch.reserve(std::min(total, kBatch + widest));
    const int64_t width = int64_t(scratch.ranges.size());
    if (int64_t(scratch.rows.size()) < width) scratch.rows.resize(width);
    int64_t batched = 0, rows = 0;
    for (int64_t i = 0; i < width; ++i) {
      const int64_t w = begin + i, n = scratch.ranges[i].end - scratch.ranges[i].begin;
      entropy[i] = 0.0f;
      if (n > 0) {
        Row& row = scratch.rows[rows++];  // filled in place: a copy would wait for these stores
        row.logits = logits_.row(b, w);
        row.ahead = n > kShort && i + 1 < width ? logits_.row(b, w + 1) : nullptr;
        row.token = trie_.token + scratch.ranges[i].begin;
        row.children = n;
        row.position = batched;
        row.parent = int32_t(w);
        row.cum_logp = cum_logp_.at(b, w);
        row.log_mass = 0;
        batched += n;
      }
      if (batched < kBatch && i + 1 < width) continue;
      if (score(b, rows, scratch, entropy - begin)) select(batched, rows, scratch);
      if (i + 1 < width) selector.tighten();
      batched = rows = 0;
    }
  }

  const TrieView& trie() const { return trie_; }

 private:
  static constexpr int64_t kBatch = 4096;  // children
  static constexpr int64_t kShort = 512;   // children; longer rows are fetched by the hardware and `ahead`

  int64_t node_at(int64_t b, int64_t w) const { return node_.at(b * node_batch_ + w * node_width_); }

  // Start to fetch the logits of a short row. Rows lie far apart, so each begins with a cache miss.
  void prefetch(int64_t b, int64_t w, EdgeRange range) const {
    if (range.begin == range.end) return;
    const int64_t size = element_size(logits_.type) * logits_.stride;
    const char* row = logits_.row(b, w);
    const char* first = row + trie_.token[range.begin] * size;
    __builtin_prefetch(first);
    if (range.end - range.begin == 1) return;
    const char* last = row + trie_.token[range.end - 1] * size;
    if (last < first || last - first > 4 * kShort) return;
    for (const char* line = first + 64; line <= last; line += 64) __builtin_prefetch(line);
  }

  // Entropies (by w) of the batched prefixes and scores of their children; false if none of them can win.
  bool score(int64_t b, int64_t count, Scratch& scratch, float* entropies) const {
    const SimdLoops& loops = simd();
    Row* const rows = scratch.rows.data();
    float* d = scratch.d.data();
    logits_.loops().legal_softmaxes(rows, count, logits_.stride, inverse_temperature_, d);
    const bool has_extra = child_value_ || seed_;
    const float threshold = scratch.selector.threshold();
    bool alive = false;
    for (int64_t r = 0; r < count; ++r) {
      Row& row = rows[r];
      const int64_t w = row.parent;
      float entropy = 0;
      if (row.children > 1) {
        const double log_sum = std::log(row.sums.mass);
        row.log_mass = float(log_sum);
        entropies[w] = entropy = float(std::max(0.0, log_sum - row.sums.weighted / row.sums.mass));
      }
      if (vocab_ && row.children < columns_ && row.sums.top > -kInf) {
        const SoftmaxSums all =
            logits_.loops().vocab_softmax(row.logits, logits_.stride, columns_, inverse_temperature_);
        row.log_mass = float(std::log(all.mass) + (double(all.top) - row.sums.top) * inverse_temperature_);
      }
      row.constant = value_weight_ * value_.at(b, w) + bonus_.at(b, w);
      if (entropy_weight_ != 0) row.constant += entropy_weight_ * entropy;
      alive = alive || has_extra || logp_weight_ < 0 || !(best_score(row, logp_weight_) <= threshold);
    }
    if (!alive) return false;
    float* scores = scratch.score.data();
    if (has_extra) {
      for (int64_t r = 0; r < count; ++r) {
        loops.score_rows(rows + r, 1, d, extras(b, rows[r], scratch), logp_weight_, threshold, scores);
      }
    } else {
      loops.score_rows(rows, count, d, nullptr, logp_weight_, threshold, scores);
    }
    return true;
  }

  // Action values and noise of one prefix's children.
  const float* extras(int64_t b, const Row& row, Scratch& scratch) const {
    float* extra = scratch.extra.data();
    const int64_t w = row.parent;
    if (child_value_) {
      child_value_->loops().gather_scaled(
          child_value_->row(b, w), child_value_->stride, row.token, row.children, value_weight_, extra);
    } else {
      std::fill_n(extra, row.children, 0.0f);
    }
    if (seed_) {
      const uint64_t seed = uint64_t(seed_[b * seed_stride_]);
      simd().add_noise(extra, row.token, row.children, seed, uint32_t(node_at(b, w)));
    }
    return extra;
  }

  // Push what can win of the batch.
  void select(int64_t batched, int64_t rows, Scratch& scratch) const {
    Selector& selector = scratch.selector;
    const float* score = scratch.score.data();
    float threshold = selector.threshold();
    if (threshold == -kInf) {
      const float reached = simd().reached_by(score, batched, selector.k());
      if (reached > -kInf) threshold = std::nextafter(reached, -kInf);  // ties with it may win
    }
    const int64_t found = simd().filter(score, batched, threshold, scratch.index.data());
    int64_t r = 0;
    for (int64_t i = 0; i < found; ++i) {
      const int64_t position = scratch.index[i];
      while (r + 1 < rows && scratch.rows[r + 1].position <= position) ++r;
      const Row& row = scratch.rows[r];
      const float logp = row.cum_logp + (scratch.d[position] - row.log_mass);
      const int64_t edge = row.token - trie_.token + (position - row.position);
      selector.push(score[position], {logp, row.parent, int32_t(edge)});
    }
  }

  int64_t columns_;
  TrieView trie_;
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
    const int64_t base = b * k;
    const int64_t found = selector.finish([&](int64_t rank, float its_score, const Candidate& candidate) {
      score[base + rank] = its_score;
      logp[base + rank] = candidate.logp;
      parent[base + rank] = candidate.parent;
      token[base + rank] = trie.token[candidate.edge];
      node[base + rank] = candidate.edge + 1;
    });
    std::fill(score + base + found, score + base + k, -kInf);
    std::fill(logp + base + found, logp + base + k, -kInf);
    for (int32_t* slots : {parent, token, node}) std::fill(slots + base + found, slots + base + k, -1);
    count[b] = int32_t(found);
  }
};

// Behind a pointer, because the address of a thread-local object is looked up at every use.
Scratch& scratch() {
  static thread_local std::unique_ptr<Scratch> buffers;
  if (!buffers) buffers = std::make_unique<Scratch>();
  return *buffers;
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
  const int64_t row_work = vocab ? logits.size(2) : std::min<int64_t>(max_children, 32);
  const int64_t grain = std::max<int64_t>(1, 2048 / std::max<int64_t>(1, row_work * block_width));

  if (blocks == 1) {
    torch::stable::parallel_for(0, batch, grain, [&](int64_t first, int64_t last) {
      Scratch& mine = scratch();
      expansion.prepare(first, 0, width, mine.next_ranges);
      for (int64_t b = first; b < last; ++b) {
        mine.ranges.swap(mine.next_ranges);
        if (b + 1 < last) expansion.prepare(b + 1, 0, width, mine.next_ranges);
        expansion.run(b, 0, k, mine, entropies + b * width);
        out.write(b, k, mine.selector, expansion.trie());
      }
    });
  } else {
    struct Winner {
      float score;
      Candidate candidate;
    };
    std::vector<std::vector<Winner>> winners(batch * blocks);
    torch::stable::parallel_for(0, batch * blocks, grain, [&](int64_t first, int64_t last) {
      Scratch& mine = scratch();
      for (int64_t task = first; task < last; ++task) {
        const int64_t b = task / blocks, begin = std::min(width, task % blocks * block_width);
        const int64_t end = std::min(width, begin + block_width);
        expansion.prepare(b, begin, end, mine.ranges);
        expansion.run(b, begin, k, mine, entropies + b * width + begin);
        std::vector<Winner>& mine_sorted = winners[task];
        mine_sorted.resize(std::min(k, mine.selector.size()));
        mine.selector.finish([&](int64_t rank, float its_score, const Candidate& candidate) {
          mine_sorted[rank] = {its_score, candidate};
        });
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
      out.write(b, k, selector, expansion.trie());
    }
  }
  return {score, logp, parent, chosen, child, count, entropy};
}

std::string simd_level_op() { return simd_level(); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vstar_ops, CPU, m) { m.impl("expand_topk", TORCH_BOX(&expand_topk)); }
STABLE_TORCH_LIBRARY_IMPL(vstar_ops, CompositeExplicitAutograd, m) { m.impl("simd_level", TORCH_BOX(&simd_level_op)); }

}  // namespace vstar
