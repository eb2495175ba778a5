#include "cuda/prefix_returns.cuh"

#include <tuple>

#include "cuda/torch_glue.cuh"

namespace vstar {
namespace cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> prefix_returns_op(
    Tensor tokens, Tensor embedding, Tensor target, Tensor target_embedding, std::optional<Tensor> mask,
    Tensor weights) {
  const OnDeviceOf guard(tokens);
  const int64_t batch = tokens.size(0), group = tokens.size(1), length = tokens.size(2);
  STD_TORCH_CHECK(weights.scalar_type() == ScalarType::Double && weights.dim() == 1 && weights.size(0) == length &&
                      (length < 2 || weights.stride(0) == 1),
                  "weights must be contiguous float64 [L]");
  Tensor returns = new_tensor<float>(tokens, {batch, group, length});
  Tensor similarity = new_tensor<float>(tokens, {batch, group, length});
  Tensor node = new_tensor<int32_t>(tokens, {batch, group, length});
  Tensor count = new_tensor<int32_t>(tokens, {batch, group, length});
  const Workspace workspace(tokens, request_workspace(batch, prefix_returns_scratch(group, length)));
  PrefixReturns a{};
  a.token = view_ints(tokens);
  a.embedding = view_floats(embedding);
  a.target = view_ints(target);
  a.wanted = view_floats(target_embedding);
  a.mask = view_mask(mask);
  a.weight = data<double>(weights);
  a.returns = data<float>(returns);
  a.similarity = data<float>(similarity);
  a.node = data<int32_t>(node);
  a.count = data<int32_t>(count);
  a.batch = batch;
  a.group = group;
  a.length = length;
  a.width = embedding.size(2);
  prefix_returns(a, workspace.data(), guard.launcher());
  return {returns, similarity, node, count};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vstar_ops_cuda, VSTAR_DISPATCH_KEY, m) {
  m.impl("prefix_returns", TORCH_BOX(&prefix_returns_op));
}

}  // namespace cuda
}  // namespace vstar
