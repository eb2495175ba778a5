// The candidates of a request in lexicographic order: every prefix is a run of them.
//
// They are sorted as packed keys of 62 bits (the tokens, each in as many bits as its range in the request needs,
// and the candidate's number) where they fit, else by comparing tokens; both orders are exact and the same.
#pragma once

#include <algorithm>
#include <vector>

#include "common/ops/candidates.h"
#include "cpu/simd.h"

namespace vstar {

struct SortedCandidates {
  std::vector<int64_t> column;     // [L, n] tokens, the present candidates packed together
  std::vector<int32_t> candidate;  // [n] their numbers
  std::vector<int64_t> key;        // [n], and more
  std::vector<int32_t> order;      // [n] sorted position -> packed position
  std::vector<int32_t> sorted;     // [n] sorted position -> candidate
  std::vector<int32_t> shared;     // [n] leading tokens shared with the previous one in sorted order
};

inline int bit_length(uint64_t x) { return x ? 64 - __builtin_clzll(x) : 0; }

constexpr int kMostKeyBits = 62;

// Fill order and shared: by keys of the tokens, in `width` bits each, from `low` on, and of the packed position.
inline void sort_packed(
    SortedCandidates& r, int64_t n, int64_t length, int index_bits, const int* width, const int64_t* low) {
  r.key.resize(n + 8);
  int64_t* const key = r.key.data();
  std::fill_n(key, n, 0);
  for (int64_t d = 0; d < length; ++d) {
    const int64_t *const tokens = r.column.data() + d * n, first = low[d];
    for (int64_t i = 0; i < n; ++i) key[i] = key[i] << width[d] | (tokens[i] - first);
  }
  for (int64_t i = 0; i < n; ++i) key[i] = key[i] << index_bits | i;
  const bool ranked = n <= simd().most_keys_ranked;
  if (ranked) {
    std::fill_n(key + n, 8, INT64_MAX);
    simd().rank_keys(key, n, r.order.data());
  } else {
    std::sort(key, key + n);
    for (int64_t i = 0; i < n; ++i) r.order[i] = int32_t(key[i] & ((int64_t(1) << index_bits) - 1));
  }
  // The highest bit in which a key differs from the one before tells the level.
  int32_t level[kMostKeyBits + 1];
  int64_t bit = index_bits;
  std::fill_n(level, bit + 1, int32_t(length));
  for (int64_t d = length; d-- > 0; bit += width[d]) std::fill_n(level + bit + 1, width[d], int32_t(d));
  const auto sorted_key = [&](int64_t i) { return key[ranked ? r.order[i] : i]; };
  int64_t previous = sorted_key(0);
  for (int64_t i = 1; i < n; ++i) {
    const int64_t mine = sorted_key(i);
    r.shared[i] = level[bit_length(uint64_t(mine ^ previous))];
    previous = mine;
  }
  r.shared[0] = -1;  // it begins every prefix, the empty one too
}

// The same for tokens of any range.
inline void sort_by_tokens(SortedCandidates& r, int64_t n, int64_t length) {
  for (int64_t i = 0; i < n; ++i) r.order[i] = int32_t(i);
  std::sort(r.order.begin(), r.order.end(), [&](int32_t a, int32_t b) {
    for (int64_t d = 0; d < length; ++d) {
      const int64_t x = r.column[d * n + a], y = r.column[d * n + b];
      if (x != y) return x < y;
    }
    return a < b;
  });
  r.shared[0] = -1;
  for (int64_t i = 1; i < n; ++i) {
    const int64_t a = r.order[i - 1], b = r.order[i];
    int32_t common = 0;
    while (common < length && r.column[common * n + a] == r.column[common * n + b]) ++common;
    r.shared[i] = common;
  }
}

// Fill order, sorted and shared.
inline void sort_columns(SortedCandidates& r, int64_t n, int64_t length) {
  r.order.resize(n);
  r.sorted.resize(n);
  r.shared.resize(n);
  const int index_bits = bit_length(uint64_t(n - 1));
  int width[kMostKeyBits], bits = index_bits;
  int64_t low[kMostKeyBits];
  bool packed = length <= kMostKeyBits;
  for (int64_t d = 0; packed && d < length; ++d) {
    const int64_t* tokens = r.column.data() + d * n;
    int64_t least = tokens[0], most = least;
    for (int64_t i = 1; i < n; ++i) {  // std::minmax_element branches
      least = std::min(least, tokens[i]);
      most = std::max(most, tokens[i]);
    }
    low[d] = least;
    width[d] = bit_length(uint64_t(most) - uint64_t(least));
    bits += width[d];
    packed = bits <= kMostKeyBits;
  }
  if (packed) {
    sort_packed(r, n, length, index_bits, width, low);
  } else {
    sort_by_tokens(r, n, length);
  }
  for (int64_t i = 0; i < n; ++i) r.sorted[i] = r.candidate[r.order[i]];
}

// Sort the candidates of request b; returns how many the mask leaves, and clears the results of what it masks.
template <class Args>
int64_t sort_candidates(const Args& a, int64_t b, SortedCandidates& r) {
  r.candidate.resize(a.group);
  int64_t n = 0;
  for (int64_t g = 0; g < a.group; ++g) {
    r.candidate[n] = int32_t(g);
    bool any = false;
    for (int64_t d = 0; d < a.length; ++d) {
      if (a.mask.at(b, g, d)) {
        any = true;
      } else {
        a.clear(a.slot(b, g) + d);
      }
    }
    n += any;
  }
  const int64_t length = a.length, step = a.token.stride[2];
  r.column.resize(n * length);
  const auto copy_tokens = [&](const auto* tokens) {
    for (int64_t i = 0; i < n; ++i) {
      const auto* const from = tokens + a.token.offset(b, r.candidate[i]);
      for (int64_t d = 0; d < length; ++d) r.column[d * n + i] = from[d * step];
    }
  };
  if (a.token.wide) {
    copy_tokens(static_cast<const int64_t*>(a.token.data));
  } else {
    copy_tokens(static_cast<const int32_t*>(a.token.data));
  }
  if (n > 0) sort_columns(r, n, length);
  return n;
}

// The order of those of the n candidates whose token of level d is there: in `kept`, if the mask tells tokens apart.
// n becomes their number.
template <class Args>
const SortedCandidates& at_level(
    const Args& a, int64_t b, int64_t d, const SortedCandidates& r, int64_t& n, SortedCandidates& kept) {
  if (!a.by_token()) return r;
  kept.order.clear();
  kept.sorted.clear();
  kept.shared.clear();
  int32_t shared = INT32_MAX;
  for (int64_t i = 0; i < n; ++i) {
    shared = std::min(shared, r.shared[i]);
    if (!a.mask.at(b, r.sorted[i], d)) continue;
    kept.order.push_back(r.order[i]);
    kept.sorted.push_back(r.sorted[i]);
    kept.shared.push_back(shared);
    shared = INT32_MAX;
  }
  n = int64_t(kept.order.size());
  return kept;
}

}  // namespace vstar
