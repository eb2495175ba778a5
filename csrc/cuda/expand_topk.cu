#include "cuda/expand_topk.cuh"

#include <algorithm>
#include <tuple>

#include "cuda/torch_glue.cuh"

namespace vstar {
namespace cuda {
namespace {

using Result = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Result expand_topk_op(
    Tensor logits, Tensor offset, Tensor token, Tensor node, int64_t k, std::optional<Tensor> cum_logp,
    std::optional<Tensor> value, std::optional<Tensor> bonus, std::optional<Tensor> child_value,
    std::optional<Tensor> seed, double logp_weight, double value_weight, double entropy_weight,
    double temperature, bool vocab, int64_t max_children) {
  const OnDeviceOf guard(logits);
  const int64_t batch = logits.size(0), width = logits.size(1), columns = logits.size(2);
  const ExpandPlan plan = plan_expand_topk(batch, width, columns, k, max_children, vocab);
  STD_TORCH_CHECK(
      plan.possible, "logits must have fewer than 2^32 legal children a request and 2^31 columns, got W = ", width,
      ", V = ", columns, " and up to ", max_children, " children a prefix");
  Tensor score = new_tensor<float>(logits, {batch, k}), logp = new_tensor<float>(logits, {batch, k});
  Tensor parent = new_tensor<int32_t>(logits, {batch, k}), chosen = new_tensor<int32_t>(logits, {batch, k});
  Tensor child = new_tensor<int32_t>(logits, {batch, k}), count = new_tensor<int32_t>(logits, {batch});
  Tensor entropy = new_tensor<float>(logits, {batch, width});
  Tensor workspace = new_tensor<uint8_t>(logits, {plan.bytes()});

  ExpandTopK a{};
  a.logits = view_floats(logits);
  a.trie = {data<int32_t>(offset), data<int32_t>(token), offset.numel() - 1, token.numel()};
  a.node = view_ints(node);
  a.cum_logp = view_floats(cum_logp);
  a.bonus = view_floats(bonus);
  if (value_weight != 0) {
    a.value = view_floats(value);
    a.child_value = view_floats(child_value);
  }
  a.seed = seed ? data<int64_t>(*seed) : nullptr;
  a.seed_stride = seed ? seed->stride(0) : 0;
  a.logp_weight = float(logp_weight);
  a.value_weight = float(value_weight);
  a.entropy_weight = float(entropy_weight);
  a.inverse = float(std::min(1.0 / temperature, 2e38));  // finite in base 2 too
  a.vocab = vocab;
  a.batch = batch;
  a.width = width;
  a.columns = columns;
  a.k = k;
  a.max_children = max_children;
  a.score = data<float>(score);
  a.logp = data<float>(logp);
  a.entropy = data<float>(entropy);
  a.parent = data<int32_t>(parent);
  a.token = data<int32_t>(chosen);
  a.child = data<int32_t>(child);
  a.count = data<int32_t>(count);
  expand_topk(a, plan, workspace.mutable_data_ptr(), guard.launcher());
  return {score, logp, parent, chosen, child, count, entropy};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vstar_ops_cuda, VSTAR_DISPATCH_KEY, m) {
  m.impl("expand_topk", TORCH_BOX(&expand_topk_op));
}

}  // namespace cuda
}  // namespace vstar
