#pragma once

#include "common/ops/sibling_grpo_loss.h"
#include "torch/glue.h"

namespace vstar {

template <class Device>
void sibling_grpo_loss(Call<Device>& call) {
  SiblingGRPOLossArgs a{};
  double clip_low, clip_high;
  std::string choices;
  call.inputs(
      sized(a.logp, &a.batch, &a.group, &a.length), optional(a.old_logp), optional(a.ref_logp), a.advantage, a.valid,
      a.count, a.group_advantage, optional(a.mask), optional(a.depth_weight), optional(a.normalizer), a.global_weight,
      a.sibling_weight, a.kl_weight, clip_low, clip_high, a.cap, a.log_bound, a.horizon, choices);
  a.low = 1 - clip_low;
  a.high = 1 + clip_high;
  const auto chosen = [&](const char* word) { return choices.find(word) != std::string::npos; };
  a.divergence = chosen("k1") ? kK1 : chosen("k2") ? kK2 : kK3;
  a.loss_type = chosen("dr_grpo") ? kDrGrpo : chosen("bnpo") ? kBnpo : kGrpo;
  a.by_node = chosen("node");
  a.by_sequence = chosen("sequence");
  a.joint = chosen("joint");
  call.output(a.loss, {});
  call.output(a.terms, {kNumLossTerms});
  call.output(a.gradient, {a.batch, a.group, a.length});
  run(call.device(), a);
}

}  // namespace vstar
