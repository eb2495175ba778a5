// The arithmetic of value-guided tree search (V-STAR, Eqs. 10-14), in double over float32 data so that every
// backend takes the same branch.
#pragma once

#include <cmath>

#include "macros.h"

namespace vstar {

// G(s) = V(s) + lambda H(s) (+ w_p log pi(s)), a finite float32.
VSTAR_INLINE float tree_priority(float value, float entropy, float logp, double entropy_weight, double logp_weight) {
  double g = double(value) + entropy_weight * double(entropy);
  if (logp_weight != 0) g += logp_weight * double(logp);
  const double limit = 3.4028234663852886e38;
  if (!(g >= -limit)) g = -limit;  // NaN too
  return float(g > limit ? limit : g);
}

// U(s) = G(s) + beta sqrt(ln(N_root + 1) / (N(s) + 1)), with log_total = ln(N_root + 1).
VSTAR_INLINE double tree_bound(float priority, int32_t visits, double log_total, double exploration) {
  return double(priority) + exploration * sqrt(log_total / double(visits + 1));
}

// What a leaf is ranked by: V (+ w_p log pi).
VSTAR_INLINE float leaf_rank(float value, float logp, double logp_weight) {
  double score = double(value);
  if (logp_weight != 0) score += logp_weight * double(logp);
  return float(score);
}

}  // namespace vstar
