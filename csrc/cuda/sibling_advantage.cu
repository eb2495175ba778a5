#include "cuda/sibling_advantage.cuh"

#include <string>
#include <tuple>

#include "cuda/torch_glue.cuh"

namespace vstar {
namespace cuda {
namespace {

Baseline parse_baseline(const std::string& name) {
  if (name == "sibling") return kSibling;
  if (name == "parent") return kParent;
  STD_TORCH_CHECK(name == "leave_one_out", "baseline must be sibling, parent or leave_one_out, got ", name);
  return kLeaveOneOut;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sibling_advantage_op(
    Tensor tokens, Tensor rewards, std::optional<Tensor> mask, double eps, int64_t ddof, double std_floor,
    int64_t min_siblings, std::string baseline) {
  const OnDeviceOf guard(tokens);
  const int64_t batch = tokens.size(0), group = tokens.size(1), length = tokens.size(2);
  Tensor advantage = new_tensor<float>(tokens, {batch, group, length});
  Tensor valid = new_tensor<bool>(tokens, {batch, group, length});
  Tensor node = new_tensor<int32_t>(tokens, {batch, group, length});
  Tensor count = new_tensor<int32_t>(tokens, {batch, group, length});
  const Workspace workspace(tokens, request_workspace(batch, SiblingScratch::bytes(group, length)));
  SiblingAdvantage a{};
  a.token = view_ints(tokens);
  a.reward = view_floats(rewards);
  a.mask = view_mask(mask);
  a.advantage = data<float>(advantage);
  a.valid = data<bool>(valid);
  a.node = data<int32_t>(node);
  a.count = data<int32_t>(count);
  a.batch = batch;
  a.group = group;
  a.length = length;
  a.eps = eps;
  a.std_floor = std_floor;
  a.ddof = ddof;
  a.min_siblings = min_siblings;
  a.baseline = parse_baseline(baseline);
  sibling_advantage(a, workspace.data(), guard.launcher());
  return {advantage, valid, node, count};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vstar_ops_cuda, VSTAR_DISPATCH_KEY, m) {
  m.impl("sibling_advantage", TORCH_BOX(&sibling_advantage_op));
}

}  // namespace cuda
}  // namespace vstar
