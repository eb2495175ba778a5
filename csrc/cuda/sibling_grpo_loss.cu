#include "cuda/sibling_grpo_loss.cuh"

#include <tuple>

#include "cuda/torch_glue.cuh"

namespace vstar {
namespace cuda {
namespace {

using Result = std::tuple<Tensor, Tensor, Tensor>;

Result sibling_grpo_loss_op(
    Tensor logp, std::optional<Tensor> old_logp, std::optional<Tensor> ref_logp, Tensor advantage, Tensor valid,
    Tensor count, Tensor group_advantage, std::optional<Tensor> mask, std::optional<Tensor> depth_weight,
    double global_weight, double sibling_weight, double kl_weight, double clip_low, double clip_high, int64_t kl, bool by_node,
    int64_t loss_type) {
  const OnDeviceOf guard(logp);
  const int64_t batch = logp.size(0), group = logp.size(1), length = logp.size(2);
  const LossPlan plan = plan_sibling_grpo_loss(batch, group, mask.has_value());
  Tensor loss = new_tensor<float>(logp, {}), terms = new_tensor<float>(logp, {7});
  Tensor gradient = new_tensor<float>(logp, {batch, group, length});
  const Workspace workspace(logp, plan.bytes());

  SiblingGRPOLoss a{};
  a.logp = view_floats(logp);
  a.old_logp = view_floats(old_logp);
  a.ref_logp = view_floats(ref_logp);
  a.advantage = view_floats(advantage);
  a.valid = view_mask(valid);
  a.mask = view_mask(mask);
  a.count = view_ints(count);
  a.group_advantage = view_floats(group_advantage);
  a.depth_weight = view_floats(depth_weight);
  a.global_weight = global_weight;
  a.sibling_weight = sibling_weight;
  a.kl_weight = kl_weight;
  a.low = float(1 - clip_low);
  a.high = float(1 + clip_high);
  a.divergence = kl;
  a.by_node = by_node;
  a.loss_type = loss_type;
  a.batch = batch;
  a.group = group;
  a.length = length;
  a.loss = data<float>(loss);
  a.terms = data<float>(terms);
  a.gradient = data<float>(gradient);
  sibling_grpo_loss(a, plan, workspace.data(), guard.launcher());
  return {loss, terms, gradient};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vstar_ops_cuda, VSTAR_DISPATCH_KEY, m) {
  m.impl("sibling_grpo_loss", TORCH_BOX(&sibling_grpo_loss_op));
}

}  // namespace cuda
}  // namespace vstar
