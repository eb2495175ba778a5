#include "cuda/group_advantage.cuh"

#include "cuda/torch_glue.cuh"

namespace vstar {
namespace cuda {
namespace {

Tensor group_advantage_op(Tensor rewards, std::optional<Tensor> mask, double eps, int64_t ddof, double std_floor) {
  const OnDeviceOf guard(rewards);
  const int64_t batch = rewards.size(0), group = rewards.size(1);
  Tensor advantage = new_tensor<float>(rewards, {batch, group});
  group_advantage(
      {view_floats(rewards), view_mask(mask), data<float>(advantage), batch, group, ddof, eps, std_floor},
      guard.launcher());
  return advantage;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vstar_ops_cuda, VSTAR_DISPATCH_KEY, m) {
  m.impl("group_advantage", TORCH_BOX(&group_advantage_op));
}

}  // namespace cuda
}  // namespace vstar
