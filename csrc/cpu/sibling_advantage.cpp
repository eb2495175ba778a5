// sibling_advantage on the CPU: sort each request's candidates once, then every prefix is a run of the
// sorted order and every sibling group a run of runs.
//
// Per depth one sweep over the order finds nodes, means, group statistics and writes the result.

#include <algorithm>
#include <cmath>
#include <string>
#include <tuple>
#include <vector>

#include "common/segment.h"
#include "cpu/candidates.h"
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

struct Child {
  double mean;
  int64_t count;
  int64_t end;  // one past its last position in the sorted order
};

struct Request : SortedCandidates {
  std::vector<double> reward;  // [n]
  std::vector<Child> children;
};

struct Options {
  double eps, std_floor;
  int64_t ddof, min_siblings;
  Baseline baseline;
};

// advantage = (mean - base) * scale for the children of one parent, which may depend on the child.
struct Standardizer {
  double base = 0, scale = 0, total = 0;
  int64_t siblings = 0;
  bool valid = false, leave_one_out = false;

  Standardizer(const std::vector<Child>& children, const Options& options) {
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
  const CandidateTokens candidates(tokens, mask);
  const Floats reward(rewards);
  const int64_t reward_strides[] = {rewards.stride(0), rewards.stride(1)};

  const int64_t grain = std::max<int64_t>(1, 1024 / std::max<int64_t>(1, group * length));
  torch::stable::parallel_for(0, batch, grain, [&](int64_t first, int64_t last) {
    Request r;
    for (int64_t b = first; b < last; ++b) {
      const int64_t base = b * group * length;
      const int64_t n = candidates.sort(b, r, [&](int64_t g) {
        std::fill_n(advantages + base + g * length, length, 0.0f);
        std::fill_n(valids + base + g * length, length, false);
        std::fill_n(nodes + base + g * length, length, -1);
        std::fill_n(counts + base + g * length, length, 0);
      });
      r.reward.resize(n);
      for (int64_t i = 0; i < n; ++i) r.reward[i] = reward.at(b * reward_strides[0] + r.candidate[i] * reward_strides[1]);

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

          const Standardizer standardize(r.children, options);
          int64_t position = begin;
          for (const Child& child : r.children) {
            const float a = standardize(child.mean);
            ++id;
            for (; position < child.end; ++position) {
              const int64_t slot = base + r.candidate[r.order[position]] * length + depth - 1;
              advantages[slot] = a;
              valids[slot] = standardize.valid;
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
