// sibling_advantage on the CPU: sort each request's candidates once, then every prefix is a run of the
// sorted order and every sibling group a run of runs.
//
// Candidates are sorted as packed 64-bit keys (the tokens, each in as many bits as its range in the request
// needs, and the candidate's number) where they fit, else by comparing tokens; both orders are exact and
// the same. Per depth one sweep over the order finds nodes, means, group statistics and writes the result.

#include <algorithm>
#include <cmath>
#include <string>
#include <tuple>
#include <vector>

#include "common/segment.h"
#include "cpu/torch_glue.h"

namespace vstar {
namespace {

enum class Baseline { kSibling, kParent, kLeaveOneOut };

Baseline parse_baseline(const std::string& name) {
  if (name == "sibling") return Baseline::kSibling;
  if (name == "parent") return Baseline::kParent;
  STD_TORCH_CHECK(name == "leave_one_out", "baseline must be sibling, parent or leave_one_out, got ", name);
  return Baseline::kLeaveOneOut;
}

int bit_length(uint64_t x) { return x ? 64 - __builtin_clzll(x) : 0; }

struct Child {
  double mean;
  int64_t count;
  int64_t end;  // one past its last position in the sorted order
};

struct Request {
  std::vector<int64_t> column;     // [L, n] tokens, the present candidates packed together
  std::vector<int32_t> candidate;  // [n] their numbers
  std::vector<double> reward;      // [n]
  std::vector<uint64_t> key;       // [n]
  std::vector<int32_t> order;      // [n] sorted position -> packed position
  std::vector<int32_t> shared;     // [n] leading tokens shared with the previous one in sorted order
  std::vector<Child> children;
};

// Fill order and shared.
void sort_candidates(Request& r, int64_t n, int64_t length) {
  r.order.resize(n);
  r.shared.resize(n);
  const int index_bits = bit_length(uint64_t(n - 1));
  int width[64], bits = index_bits;
  int64_t low[64];
  bool packed = length <= 64;
  for (int64_t d = 0; packed && d < length; ++d) {
    const int64_t* tokens = r.column.data() + d * n;
    const auto range = std::minmax_element(tokens, tokens + n);
    low[d] = *range.first;
    width[d] = bit_length(uint64_t(*range.second) - uint64_t(*range.first));
    bits += width[d];
    packed = bits <= 64;
  }
  if (packed) {
    r.key.resize(n);
    for (int64_t i = 0; i < n; ++i) r.key[i] = 0;
    for (int64_t d = 0; d < length; ++d) {
      const int64_t* tokens = r.column.data() + d * n;
      if (width[d] == 0) continue;  // also keeps every shift below 64
      for (int64_t i = 0; i < n; ++i) r.key[i] = (width[d] < 64 ? r.key[i] << width[d] : 0) | (uint64_t(tokens[i]) - uint64_t(low[d]));
    }
    for (int64_t i = 0; i < n; ++i) r.key[i] = (r.key[i] << index_bits) | uint64_t(i);
    std::sort(r.key.begin(), r.key.begin() + n);
    const uint64_t index_mask = (uint64_t(1) << index_bits) - 1;
    for (int64_t i = 0; i < n; ++i) r.order[i] = int32_t(r.key[i] & index_mask);
  } else {
    for (int64_t i = 0; i < n; ++i) r.order[i] = int32_t(i);
    std::sort(r.order.begin(), r.order.end(), [&](int32_t a, int32_t b) {
      for (int64_t d = 0; d < length; ++d) {
        const int64_t x = r.column[d * n + a], y = r.column[d * n + b];
        if (x != y) return x < y;
      }
      return a < b;
    });
  }
  for (int64_t i = 0; i < n; ++i) {
    int32_t common = 0;
    if (i == 0) {
      common = -1;  // the first candidate begins every prefix, the empty one too
    } else {
      const int64_t a = r.order[i - 1], b = r.order[i];
      while (common < length && r.column[common * n + a] == r.column[common * n + b]) ++common;
    }
    r.shared[i] = common;
  }
}

struct Options {
  double eps, std_floor;
  int64_t ddof, min_siblings;
  Baseline baseline;
};

// advantage = (mean - base) * scale for the children of one parent, which may depend on the child.
struct Standardiser {
  double base = 0, scale = 0, total = 0;
  int64_t siblings = 0;
  bool valid = false, leave_one_out = false;

  Standardiser(const std::vector<Child>& children, const Options& options) {
    siblings = int64_t(children.size());
    valid = siblings >= options.min_siblings;
    if (!valid) return;
    const Moments m = moments(siblings, [&](int64_t i) { return children[i].mean; });
    if (m.equal) return;
    scale = 1.0 / (std::max(std::sqrt(m.sum_of_squares / double(siblings - options.ddof)), options.std_floor) + options.eps);
    base = m.mean;
    total = m.mean * double(siblings);
    leave_one_out = options.baseline == Baseline::kLeaveOneOut;
    if (options.baseline == Baseline::kParent) {
      double sum = 0;
      int64_t count = 0;
      for (const Child& child : children) {
        sum += child.mean * double(child.count);
        count += child.count;
      }
      base = sum / double(count);
    }
  }

  float operator()(double mean) const {
    const double b = leave_one_out ? (total - mean) / double(siblings - 1) : base;
    return scale == 0 ? 0.0f : float((mean - b) * scale);
  }
};

using Result = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Result sibling_advantage(
    Tensor tokens, Tensor rewards, std::optional<Tensor> mask, double eps, int64_t ddof, double std_floor,
    int64_t min_siblings, std::string baseline) {
  const int64_t batch = tokens.size(0), group = tokens.size(1), length = tokens.size(2);
  const Options options{eps, std_floor, ddof, min_siblings, parse_baseline(baseline)};
  Tensor advantage = new_tensor<float>({batch, group, length}), valid = new_tensor<bool>({batch, group, length});
  Tensor node = new_tensor<int32_t>({batch, group, length}), count = new_tensor<int32_t>({batch, group, length});
  float* advantages = data<float>(advantage);
  bool* valids = data<bool>(valid);
  int32_t* nodes = data<int32_t>(node);
  int32_t* counts = data<int32_t>(count);
  const Integers token(tokens);
  const Floats reward(rewards);
  const bool* present = mask ? data<bool>(*mask) : nullptr;
  const int64_t token_strides[] = {tokens.stride(0), tokens.stride(1), tokens.stride(2)};
  const int64_t reward_strides[] = {rewards.stride(0), rewards.stride(1)};
  const int64_t mask_strides[] = {mask ? mask->stride(0) : 0, mask ? mask->stride(1) : 0};

  const int64_t grain = std::max<int64_t>(1, 1024 / std::max<int64_t>(1, group * length));
  torch::stable::parallel_for(0, batch, grain, [&](int64_t first, int64_t last) {
    Request r;
    for (int64_t b = first; b < last; ++b) {
      const int64_t base = b * group * length;
      r.candidate.clear();
      r.reward.clear();
      for (int64_t g = 0; g < group; ++g) {
        if (present && !present[b * mask_strides[0] + g * mask_strides[1]]) {
          std::fill_n(advantages + base + g * length, length, 0.0f);
          std::fill_n(valids + base + g * length, length, false);
          std::fill_n(nodes + base + g * length, length, -1);
          std::fill_n(counts + base + g * length, length, 0);
          continue;
        }
        r.candidate.push_back(int32_t(g));
        r.reward.push_back(reward.at(b * reward_strides[0] + g * reward_strides[1]));
      }
      const int64_t n = int64_t(r.candidate.size());
      if (n == 0) continue;
      r.column.resize(n * length);
      for (int64_t i = 0; i < n; ++i) {
        const int64_t from = b * token_strides[0] + r.candidate[i] * token_strides[1];
        for (int64_t d = 0; d < length; ++d) r.column[d * n + i] = token.at(from + d * token_strides[2]);
      }
      sort_candidates(r, n, length);

      int32_t id = -1;
      for (int64_t depth = 1; depth <= length; ++depth) {
        for (int64_t begin = 0; begin < n;) {  // one parent prefix of depth - 1 tokens
          r.children.clear();
          int64_t i = begin;
          do {
            double sum = 0;
            const int64_t start = i;
            do {
              sum += r.reward[r.order[i++]];
            } while (i < n && r.shared[i] >= depth);
            r.children.push_back({sum / double(i - start), i - start, i});
          } while (i < n && r.shared[i] >= depth - 1);

          const Standardiser standardise(r.children, options);
          int64_t position = begin;
          for (const Child& child : r.children) {
            const float a = standardise(child.mean);
            ++id;
            for (; position < child.end; ++position) {
              const int64_t slot = base + r.candidate[r.order[position]] * length + depth - 1;
              advantages[slot] = a;
              valids[slot] = standardise.valid;
              nodes[slot] = id;
              counts[slot] = int32_t(child.count);
            }
          }
          begin = i;
        }
      }
    }
  });
  return {advantage, valid, node, count};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vstar_ops, CPU, m) { m.impl("sibling_advantage", TORCH_BOX(&sibling_advantage)); }

}  // namespace vstar
