// What the ops that score a prefix's legal children have in common.
#pragma once

#include <algorithm>
#include <cmath>

#include "common/views.h"
#include "cpu/simd.h"

namespace vstar {

inline const TypedLoops& loops_of(const FloatView& view) { return simd().typed[int(view.type)]; }

// Complete a row whose sums over the legal logits are there: what its log-probabilities are normalized by. Returns its
// entropy.
inline float finish_row(
    PrefixRow& row, const FloatView& logits, int64_t columns, bool vocab, bool filtered, InverseTemperature inv_temperature) {
  float entropy = 0;
  if (row.children > 1) {
    const double log_sum = std::log(row.sums.mass);
    row.log_mass = float(log_sum);
    entropy = float(std::max(0.0, log_sum - row.sums.weighted / row.sums.mass));
  }
  if (vocab && (filtered || row.children < columns) && row.sums.top > -__builtin_inff()) {
    const SoftmaxSums all = row.logits ? loops_of(logits).vocab_softmax(row.logits, logits.stride[2], columns, inv_temperature)
                                       : SoftmaxSums{0, double(columns), 0};
    row.log_mass = float(std::log(all.mass) + (double(all.top) - row.sums.top) * inv_temperature);
  }
  return entropy;
}

}  // namespace vstar
