#pragma once

#include "common/moments.h"
#include "common/ops/candidates.h"

namespace vstar {

enum class Baseline { kSibling, kParent, kLeaveOneOut };
enum class Scale { kSiblings, kGroup, kNone };

struct SiblingAdvantageArgs : CandidateArgs {
  FloatView reward;  // [B, G]
  double eps, std_floor;
  int64_t ddof, min_siblings;
  Baseline baseline;
  Scale scale;
  float* advantage;  // [B, G, L], as all results
  bool* valid;
  int32_t *node, *count;

  VSTAR_INLINE_MEMBER void store(
      int64_t at, float its_advantage, bool is_valid, int64_t its_node, int64_t its_count) const {
    advantage[at] = its_advantage;
    valid[at] = is_valid;
    node[at] = int32_t(its_node);
    count[at] = int32_t(its_count);
  }

  // The results of a token that the mask leaves out.
  VSTAR_INLINE_MEMBER void clear(int64_t at) const { store(at, 0.0f, false, -1, 0); }
};

// (mean - base) * scale is the advantage of a child; a scale of 0 means no signal.
struct SiblingScale {
  double base, scale, total;
};

// What all advantages of a request of n candidates are multiplied by; siblings find a number of their own.
template <class SumOfSquares>
VSTAR_INLINE double request_scale(const SiblingAdvantageArgs& a, int64_t n, const SumOfSquares& sum_of_squares) {
  if (a.scale != Scale::kGroup || n < 2) return 1;
  return standardizing_scale(sum_of_squares(), double(n - a.ddof), a.std_floor, a.eps);
}

// What the advantages of the children of one parent are multiplied by.
VSTAR_INLINE double siblings_scale(
    const SiblingAdvantageArgs& a, int64_t siblings, double request_scale, double sum_of_squares) {
  if (a.scale != Scale::kSiblings) return request_scale;
  return standardizing_scale(sum_of_squares, double(siblings - a.ddof), a.std_floor, a.eps);
}

// Of the children of one parent, which compare: by their number, the mean of their mean rewards, and that of all candidates.
template <class ParentMean>
VSTAR_INLINE SiblingScale sibling_scale_of(
    const SiblingAdvantageArgs& a, int64_t siblings, double mean, double scale, const ParentMean& parent_mean) {
  const bool from_parent = a.baseline == Baseline::kParent && mean == mean;
  return {from_parent ? parent_mean() : mean, scale, mean * double(siblings)};
}

// The same by the children: mean(i) is the i-th child's mean reward, count(i) its number of candidates.
template <class Mean, class Count>
VSTAR_INLINE SiblingScale sibling_scale(
    const SiblingAdvantageArgs& a, int64_t siblings, double request_scale, const Mean& mean, const Count& count) {
  if (siblings < a.min_siblings) return {0, 0, 0};
  const Moments m = moments(siblings, mean);
  if (m.equal) return {0, 0, 0};
  const double scale = siblings_scale(a, siblings, request_scale, m.sum_of_squares);
  return sibling_scale_of(a, siblings, m.mean, scale, [&] {
    double sum = 0;
    int32_t candidates = 0;
    for (int64_t i = 0; i < siblings; ++i) {
      sum += mean(i) * double(count(i));
      candidates += int32_t(count(i));
    }
    return sum / double(candidates);
  });
}

VSTAR_INLINE float sibling_advantage_of(
    const SiblingAdvantageArgs& a, const SiblingScale& s, double mean, int64_t siblings) {
  const bool leave_one_out = a.baseline == Baseline::kLeaveOneOut;
  const double base = leave_one_out ? (s.total - mean) / double(siblings - 1) : s.base;
  return s.scale == 0 ? 0.0f : float((mean - base) * s.scale);
}

}  // namespace vstar
