// Arguments and arithmetic of sibling_grpo_loss. Sums are double over float32 data.
#pragma once

#include <cmath>

#include "common/views.h"

namespace vstar {

enum LossType { kGrpo, kBnpo, kDrGrpo };
enum Divergence { kK1, kK2, kK3 };

struct SiblingGRPOLossArgs {
  FloatView logp, old_logp, ref_logp;  // [B, G, L]; the last two may be absent
  StridedView<float> advantage;        // [B, G, L], as valid, mask and count
  MaskView valid, mask;
  StridedView<int32_t> count;
  FloatView group_advantage;        // [B, G]
  StridedView<float> depth_weight;  // [L]
  double global_weight, sibling_weight, kl_weight;
  float low, high;  // bounds of the ratio
  int64_t divergence;
  bool by_node;
  int64_t loss_type;
  int64_t batch, group, length;
  float *loss, *terms, *gradient;  // [], [7], [B, G, L]
};

// What is summed over all tokens; the first three are terms of the loss.
enum LossSum { kGlobal, kSibling, kKl, kRatio, kGlobalClipped, kSiblingClipped, kValid, kNumLossSums };

// How many tokens, and sequences with a token, the mask leaves.
struct TokenCounts {
  int64_t tokens, sequences;
};

VSTAR_INLINE double reciprocal(int64_t n) { return 1.0 / double(n > 1 ? n : 1); }

// The weight of a token of a sequence with so many tokens.
VSTAR_INLINE double token_weight(const SiblingGRPOLossArgs& a, int64_t tokens, const TokenCounts& all) {
  if (a.loss_type == kGrpo) return reciprocal(tokens) * reciprocal(all.sequences);
  return reciprocal(a.loss_type == kBnpo ? all.tokens : a.batch * a.group * a.length);
}

// The weight of a node of a request with so many sequences.
VSTAR_INLINE double node_weight(const SiblingGRPOLossArgs& a, int64_t sequences, const TokenCounts& all) {
  if (a.loss_type == kGrpo) return reciprocal(sequences) * reciprocal(a.batch);
  return reciprocal(a.loss_type == kBnpo ? all.sequences : a.batch * a.group);
}

// PPO's bound of ratio * advantage, and its derivative by the log-probability. NaN is kept.
struct Surrogate {
  float value, slope;
  bool clipped;
};

VSTAR_INLINE Surrogate surrogate(const SiblingGRPOLossArgs& a, float ratio, float advantage) {
  const float raised = ratio < a.low ? a.low : ratio, bounded = a.high < raised ? a.high : raised;
  if (bounded * advantage < ratio * advantage) return {bounded * advantage, 0, true};
  return {ratio * advantage, ratio * advantage, false};
}

// An estimate of the divergence from the reference, and its derivative by the log-probability.
struct Kl {
  double value, dkl;
};

// Of difference = ref_logp - logp; exp_difference() is its exponential.
template <class Exp>
VSTAR_INLINE Kl kl_estimate(int64_t divergence, float difference, const Exp& exp_difference) {
  const double d = difference;
  if (divergence == kK1) return {-d, 1};
  if (divergence == kK2) return {0.5 * d * d, -d};
  // e^d - 1 - d of a small d has no digits left in float; its series has them all.
  const double series = difference * difference * (0.5 + d * (1 / 6.0 + d / 24.0));
  if (fabsf(difference) < 0.03f) return {series, -(d + series)};
  const double rise = double(exp_difference()) - 1.0;
  return {rise - d, -rise};
}

// What a token adds to the sums, before weights, and its gradient.
struct TokenTerms {
  Surrogate global, sibling;
  double node_weight, kl;
  bool valid;
  float gradient;
};

template <class Exp>
VSTAR_INLINE TokenTerms token_terms(
    const SiblingGRPOLossArgs& a, int64_t b, int64_t g, int64_t d, float group_advantage, float ratio, float difference,
    const Exp& exp_difference, double token_weight, double node_weight) {
  TokenTerms t{};
  t.global = surrogate(a, ratio, group_advantage);
  double grad = a.global_weight * token_weight * t.global.slope;
  t.valid = a.valid.at(b, g, d);
  if (t.valid) {
    t.node_weight = node_weight * a.depth_weight.at_or(1.0f, d);
    if (a.by_node) t.node_weight *= reciprocal(a.count.at(b, g, d));
    t.sibling = surrogate(a, ratio, a.advantage.at(b, g, d));
    grad += a.sibling_weight * t.node_weight * t.sibling.slope;
  }
  if (a.ref_logp) {
    const Kl kl = kl_estimate(a.divergence, difference, exp_difference);
    t.kl = kl.value;
    grad -= a.kl_weight * token_weight * kl.dkl;
  }
  t.gradient = float(0 - grad);
  return t;
}

VSTAR_INLINE void store_loss(const SiblingGRPOLossArgs& a, const double* sum, int64_t tokens) {
  *a.loss = float(a.kl_weight * sum[kKl] - a.global_weight * sum[kGlobal] - a.sibling_weight * sum[kSibling]);
  for (int i = kGlobal; i <= kKl; ++i) a.terms[i] = float(sum[i]);
  for (int i = kRatio; i <= kValid; ++i) {
    a.terms[i] = float(sum[i] * reciprocal(i == kSiblingClipped ? int64_t(sum[kValid]) : tokens));
  }
}

}  // namespace vstar
