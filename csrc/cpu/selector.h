// The selection of expand_topk.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

#include "common/order.h"
#include "cpu/simd.h"

namespace vstar {

struct Candidate {
  float logp;
  int32_t parent;
  int32_t edge;
};

// A threshold that a score passes; of -inf itself. No denormal number, which is 0 to a processor under torch.set_flush_denormal.
inline float just_below(float score) {
  const float below = std::nextafter(score, -__builtin_inff());
  return std::abs(below) < std::numeric_limits<float>::min() ? -std::numeric_limits<float>::min() : below;
}

// The k best candidates pushed, in the total order.
class Selector {
 public:
  void reset(int64_t k) {
    k_ = k;
    capacity_ = k + std::max<int64_t>(k, 64);
    size_ = 0;
    threshold_ = -__builtin_inff();
    if (int64_t(candidates_.size()) >= capacity_) return;
    scores_.resize(capacity_ + 16);  // rank() reads whole vectors
    keys_.resize(capacity_);
    candidates_.resize(capacity_);
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
    scores_[size_] = score;
    candidates_[size_] = candidate;
    ++size_;
  }

  // Call visit(rank, score, candidate) for each winner in their order, a score of -0 as 0; returns how many there are.
  template <class Visit>
  int64_t finish(const Visit& visit) {
    const int64_t count = std::min(size_, k_);
    if (size_ <= kMostRanked) {
      int32_t order[kMostRanked];
      simd().rank(scores_.data(), size_, order);
      for (int64_t i = 0; i < count; ++i) visit(i, scores_[order[i]] + 0.0f, candidates_[order[i]]);
      return count;
    }
    if (size_ > k_) {
      partition();
    } else {
      make_keys();
    }
    std::sort(keys_.begin(), keys_.begin() + count, std::greater<>());
    for (int64_t i = 0; i < count; ++i) visit(i, key_score(keys_[i]), candidates_[key_sequence(keys_[i])]);
    return count;
  }

 private:
  void make_keys() {
    for (int64_t i = 0; i < size_; ++i) keys_[i] = candidate_key(scores_[i], uint32_t(i));
  }
  // Bring the keys of the k best to the front; returns the least of them.
  uint64_t partition() {
    make_keys();
    std::nth_element(keys_.begin(), keys_.begin() + k_ - 1, keys_.begin() + size_, std::greater<>());
    return keys_[k_ - 1];
  }

  // Keep the k best, in enumeration order.
  void shrink() {
    const uint64_t last = partition();
    threshold_ = key_score(last);
    int64_t next = 0;
    for (int64_t i = 0; next < k_; ++i) {
      const bool kept = candidate_key(scores_[i], uint32_t(i)) >= last;
      scores_[next] = scores_[i];
      candidates_[next] = candidates_[i];
      next += kept;
    }
    size_ = k_;
  }

  std::vector<float> scores_;  // in enumeration order, as the candidates
  std::vector<Candidate> candidates_;
  std::vector<uint64_t> keys_;
  int64_t k_ = 0, capacity_ = 0, size_ = 0;
  float threshold_ = -__builtin_inff();
};

}  // namespace vstar
