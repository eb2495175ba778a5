#pragma once

#include "common/ops/sibling_grpo_loss.h"
#include "torch/glue.h"

namespace vstar {

template <class Device>
void sibling_grpo_loss(Call<Device>& call) {
  SiblingGRPOLossArgs a{};
  double clip_low, clip_high;
  call.inputs(
      sized(a.logp, &a.batch, &a.group, &a.length), optional(a.old_logp), optional(a.ref_logp), a.advantage, a.valid,
      a.count, a.group_advantage, optional(a.mask), optional(a.depth_weight), optional(a.normalizer), a.global_weight,
      a.sibling_weight, a.kl_weight, clip_low, clip_high, a.cap, a.log_bound, a.divergence, a.by_node, a.by_sequence,
      a.joint, a.loss_type, a.horizon);
  a.low = 1 - clip_low;
  a.high = 1 + clip_high;
  call.output(a.loss, {});
  call.output(a.terms, {kNumLossTerms});
  call.output(a.gradient, {a.batch, a.group, a.length});
  run(call.device(), a);
}

}  // namespace vstar
