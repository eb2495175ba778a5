#pragma once

#include "common/ops/sibling_grpo_loss.h"
#include "torch/glue.h"

namespace vstar {

template <class Device>
Outputs<3> sibling_grpo_loss(
    const Tensor& logp, const OptionalTensor& old_logp, const OptionalTensor& ref_logp, const Tensor& advantage,
    const Tensor& valid, const Tensor& count, const Tensor& group_advantage, const OptionalTensor& mask,
    const OptionalTensor& depth_weight, double global_weight, double sibling_weight, double kl_weight, double clip_low,
    double clip_high, int64_t kl, bool by_node, int64_t loss_type) {
  const Device device(logp);
  SiblingGRPOLossArgs a{};
  a.logp = logp;
  a.old_logp = old_logp;
  a.ref_logp = ref_logp;
  a.advantage = advantage;
  a.valid = valid;
  a.mask = mask;
  a.count = count;
  a.group_advantage = group_advantage;
  a.depth_weight = depth_weight;
  a.global_weight = global_weight;
  a.sibling_weight = sibling_weight;
  a.kl_weight = kl_weight;
  a.low = float(1 - clip_low);
  a.high = float(1 + clip_high);
  a.divergence = kl;
  a.by_node = by_node;
  a.loss_type = loss_type;
  a.batch = logp.size(0);
  a.group = logp.size(1);
  a.length = logp.size(2);
  Outputs<3> out;
  out.create(device, {}, a.loss);
  out.create(device, {kNumLossSums}, a.terms);
  out.create(device, {a.batch, a.group, a.length}, a.gradient);
  run(device, a);
  return out;
}

}  // namespace vstar
