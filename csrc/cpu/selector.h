// The selection of expand_topk.
#pragma once

#include <algorithm>
#include <functional>
#include <vector>

#include "common/order.h"
#include "cpu/simd.h"

namespace vstar {

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
    threshold_ = -__builtin_inff();
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
  float threshold_ = -__builtin_inff();
};

}  // namespace vstar
