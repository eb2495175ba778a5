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
  FloatView group_advantage;         // [B, G]
  StridedView<float> depth_weight;   // [L]
  StridedView<int64_t> normalizer;   // LossCounts
  double global_weight, sibling_weight, kl_weight;
  double low, high, cap;  // bounds of the ratio; `cap` where the advantage is negative
  double log_bound;       // of both log-ratios
  int64_t horizon;
  Divergence divergence;
  LossType loss_type;
  bool by_node, by_sequence, joint;
  int64_t batch, group, length;
  float *loss, *terms, *gradient;  // [], [7], [B, G, L]

  // Whether a sequence's log-ratios are averaged.
  VSTAR_INLINE_MEMBER bool averages_ratios() const { return by_sequence && old_logp; }
};

// What is summed over all tokens; the first three are terms of the loss. With joint clipping the loss has a sum of
// its own, since its two shares may be infinite and cancel.
enum LossSum { kGlobal, kSibling, kKl, kRatio, kGlobalClipped, kSiblingClipped, kValid, kJoint, kNumLossSums };
constexpr int kNumLossTerms = kJoint;

// How many tokens, and sequences with a token, the mask leaves.
struct TokenCounts {
  int64_t tokens, sequences;
};

// What the means divide by: of this call, or of a window of several.
struct LossCounts {
  int64_t requests, candidates, sequences, tokens;
};

VSTAR_INLINE LossCounts loss_counts(const SiblingGRPOLossArgs& a, const TokenCounts& own) {
  const auto& n = a.normalizer;
  if (n) return {n.at(0), n.at(1), n.at(2), n.at(3)};
  return {a.batch, a.batch * a.group, own.sequences, own.tokens};
}

VSTAR_INLINE double reciprocal(int64_t n) { return 1.0 / double(n > 1 ? n : 1); }

// The weight of a token of a sequence with so many tokens.
VSTAR_INLINE double token_weight(const SiblingGRPOLossArgs& a, int64_t tokens, const LossCounts& all) {
  if (a.loss_type == kGrpo) return reciprocal(tokens) * reciprocal(all.sequences);
  return reciprocal(a.loss_type == kBnpo ? all.tokens : all.candidates * a.horizon);
}

// The weight of a node of a request with so many sequences.
VSTAR_INLINE double node_weight(const SiblingGRPOLossArgs& a, int64_t sequences, const LossCounts& all) {
  if (a.loss_type == kGrpo) return reciprocal(sequences) * reciprocal(all.requests);
  return reciprocal(a.loss_type == kBnpo ? all.sequences : all.candidates);
}

// A weight of 0 turns a term off, even one that is infinite.
VSTAR_INLINE double weighted(double weight, double x) { return weight == 0 ? 0 : weight * x; }

// An advantage of 0 has no term, even if the ratio is infinite.
template <class Real>
VSTAR_INLINE Real times(Real ratio, Real advantage) {
  return advantage == 0 && ratio == ratio ? 0 : ratio * advantage;
}

// The bound of ratio * advantage, its derivative by the log-probability, and the ratio or the bound in its place. NaN
// is kept.
template <class Real>
struct Surrogate {
  Real value, slope, factor;
  bool clipped;
};

template <class Real>
VSTAR_INLINE Surrogate<Real> surrogate(const SiblingGRPOLossArgs& a, Real ratio, Real advantage) {
  const Real low = Real(a.low), high = Real(a.high), cap = Real(a.cap);
  const Real raised = ratio < low ? low : ratio, bound = high < raised ? high : raised;
  const Real plain = times(ratio, advantage), bounded = bound * advantage;
  Surrogate<Real> s{plain, plain, ratio, false};
  if (bounded < plain) s = {bounded, 0, bound, true};
  if (advantage < 0 && s.value < cap * advantage) s = {cap * advantage, 0, cap, true};
  return s;
}

// An estimate of the divergence from the reference, and its derivative by the log-probability.
struct Kl {
  double value, dkl;
};

// Of difference = ref_logp - logp; exp_difference() is its exponential.
template <class Real, class Exp>
VSTAR_INLINE Kl kl_estimate(Divergence divergence, Real difference, const Exp& exp_difference) {
  const double d = difference;
  if (divergence == kK1) return {-d, 1};
  if (divergence == kK2) return {0.5 * d * d, -d};
  // e^d - 1 - d of a small d has no digits left in float; its series has them all.
  const double series = difference * difference * (0.5 + d * (1 / 6.0 + d / 24.0));
  if (d > -0.03f && d < 0.03f) return {series, -(d + series)};
  const double rise = double(exp_difference()) - 1.0;
  return {rise - d, -rise};
}

// A token that is there: its weights, 0 for a node that is not valid, and its advantages.
struct LossToken {
  double weight, node_weight;
  float global, sibling;
  bool valid;
};

VSTAR_INLINE LossToken loss_token(
    const SiblingGRPOLossArgs& a, int64_t b, int64_t g, int64_t d, float group_advantage, double token_weight,
    double node_weight) {
  LossToken t{token_weight, 0, group_advantage, 0, a.valid.at(b, g, d)};
  if (!t.valid) return t;
  t.node_weight = node_weight * a.depth_weight.at_or(1.0f, d);
  if (a.by_node) t.node_weight *= reciprocal(a.count.at(b, g, d));
  t.sibling = a.advantage.at(b, g, d);
  return t;
}

// Of the policies: exp(logp - old_logp) and ref_logp - logp, and whether a bound holds them, so that they do not
// change with logp.
template <class Real>
struct Ratios {
  Real ratio, difference;
  bool ratio_held, difference_held;
};

// Whether log-ratios are within their bounds, and a token's advantages small, so that its exponentials and products are
// far from the limits of float. All others are computed in double, so that every backend overflows where double does.
// Ratios of whole sequences are always.
VSTAR_INLINE double most_log_ratio(const SiblingGRPOLossArgs& a) { return a.log_bound < 80 ? a.log_bound : 80; }
VSTAR_INLINE bool fits_float(const SiblingGRPOLossArgs& a, double log_ratio, double difference) {
  const double most = most_log_ratio(a);
  return !a.averages_ratios() && fabs(log_ratio) <= most && fabs(difference) <= most;
}
VSTAR_INLINE bool fits_float(float advantage) { return fabsf(advantage) <= 1024; }

// Keep x within the bound; whether it was beyond. NaN is kept.
VSTAR_INLINE bool hold(double bound, double& x) {
  const bool beyond = fabs(x) > bound;
  if (beyond) x = x < 0 ? -bound : bound;
  return beyond;
}

VSTAR_INLINE Ratios<double> exact_ratios(const SiblingGRPOLossArgs& a, double log_ratio, double difference) {
  Ratios<double> r{};
  r.ratio_held = hold(a.log_bound, log_ratio);
  r.difference_held = hold(a.log_bound, difference);
  r.ratio = exp(log_ratio);
  r.difference = difference;
  return r;
}

// What a token adds to the sums, `global` and `kl` before its weight, and its gradient.
struct TokenTerms {
  double global, sibling, kl, joint, ratio;
  bool global_clipped, sibling_clipped;
  float gradient;
};

template <class Real, class Exp>
VSTAR_INLINE TokenTerms token_terms(
    const SiblingGRPOLossArgs& a, const LossToken& token, const Ratios<Real>& r, const Exp& exp_difference) {
  TokenTerms t{};
  t.ratio = r.ratio;
  const double global_share = a.global_weight * token.weight;
  const double sibling_share = weighted(a.sibling_weight, token.node_weight);
  double grad = 0;
  if (a.joint) {
    const double sum = weighted(global_share, token.global) + weighted(sibling_share, token.sibling);
    const Surrogate<double> s = surrogate(a, double(r.ratio), sum);
    t.joint = s.value;
    t.global = times(s.factor, double(token.global));
    t.sibling = weighted(token.node_weight, times(s.factor, double(token.sibling)));
    t.global_clipped = s.clipped;
    t.sibling_clipped = s.clipped && token.valid;
    grad = s.slope;
  } else {
    const Surrogate<Real> global = surrogate(a, r.ratio, Real(token.global));
    const Surrogate<Real> sibling = surrogate(a, r.ratio, Real(token.sibling));
    t.global = global.value;
    t.sibling = weighted(token.node_weight, sibling.value);
    t.global_clipped = global.clipped;
    t.sibling_clipped = sibling.clipped;
    grad = weighted(global_share, global.slope);
    grad += weighted(sibling_share, sibling.slope);
  }
  if (r.ratio_held) grad = 0;
  if (a.ref_logp) {
    const Kl kl = kl_estimate(a.divergence, r.difference, exp_difference);
    t.kl = kl.value;
    if (!r.difference_held) grad -= weighted(a.kl_weight * token.weight, kl.dkl);
  }
  t.gradient = float(0 - grad);
  return t;
}

VSTAR_INLINE void store_loss(const SiblingGRPOLossArgs& a, const double* sum, int64_t tokens) {
  const double kl = weighted(a.kl_weight, sum[kKl]);
  *a.loss = float(
      a.joint ? kl - sum[kJoint]
              : kl - weighted(a.global_weight, sum[kGlobal]) - weighted(a.sibling_weight, sum[kSibling]));
  for (int i = kGlobal; i <= kKl; ++i) a.terms[i] = float(sum[i]);
  for (int i = kRatio; i <= kValid; ++i) {
    a.terms[i] = float(sum[i] * reciprocal(i == kSiblingClipped ? int64_t(sum[kValid]) : tokens));
  }
}

}  // namespace vstar
