#include "cuda/prefix_tree.cuh"

#include <tuple>

#include "cuda/torch_glue.cuh"

namespace vstar {
namespace cuda {
namespace {

using Result = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Result prefix_tree_op(Tensor tokens, std::optional<Tensor> mask) {
  const OnDeviceOf guard(tokens);
  const int64_t batch = tokens.size(0), group = tokens.size(1), length = tokens.size(2), capacity = group * length;
  PrefixTree a{};
  a.token = view_ints(tokens);
  Tensor parent = new_tensor<int32_t>(tokens, {batch, capacity});
  Tensor token = a.token.wide ? new_tensor<int64_t>(tokens, {batch, capacity}) : new_tensor<int32_t>(tokens, {batch, capacity});
  Tensor depth = new_tensor<int32_t>(tokens, {batch, capacity}), first = new_tensor<int32_t>(tokens, {batch, capacity});
  Tensor count = new_tensor<int32_t>(tokens, {batch, capacity});
  Tensor node = new_tensor<int32_t>(tokens, {batch, group, length}), size = new_tensor<int32_t>(tokens, {batch});
  const Workspace workspace(tokens, request_workspace(batch, prefix_tree_scratch(group, length)));
  a.mask = view_mask(mask);
  a.parent = data<int32_t>(parent);
  a.depth = data<int32_t>(depth);
  a.first = data<int32_t>(first);
  a.count = data<int32_t>(count);
  a.node_token = token.mutable_data_ptr();
  a.node = data<int32_t>(node);
  a.size = data<int32_t>(size);
  a.batch = batch;
  a.group = group;
  a.length = length;
  prefix_tree(a, workspace.data(), guard.launcher());
  return {parent, token, depth, first, count, node, size};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vstar_ops_cuda, VSTAR_DISPATCH_KEY, m) {
  m.impl("prefix_tree", TORCH_BOX(&prefix_tree_op));
}

}  // namespace cuda
}  // namespace vstar
