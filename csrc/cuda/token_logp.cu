#include "cuda/token_logp.cuh"

#include <algorithm>
#include <tuple>

#include "cuda/torch_glue.cuh"

namespace vstar {
namespace cuda {
namespace {

TokenLogp arguments(
    const Tensor& logits, const Tensor& targets, const std::optional<Tensor>& offset, const std::optional<Tensor>& token,
    const std::optional<Tensor>& node, double temperature, int64_t max_children) {
  TokenLogp a{};
  a.logits = view_floats(logits);
  a.target = view_ints(targets);
  a.width = logits.size(1);
  a.columns = logits.size(2);
  a.targets = targets.size(2);
  a.rows = logits.size(0) * a.width;
  STD_TORCH_CHECK(
      a.columns < (int64_t(1) << 31) && a.rows < (int64_t(1) << 31),
      "logits must have fewer than 2^31 columns and rows, got V = ", a.columns, " and ", a.rows, " rows");
  if (offset) {
    a.trie = {data<int32_t>(*offset), data<int32_t>(*token), offset->numel() - 1, token->numel()};
    a.node = view_ints(*node);
  }
  a.inverse = float(std::min(1.0 / temperature, 2e38));  // finite in base 2 too
  a.max_children = max_children;
  return a;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> token_logp_op(
    Tensor logits, Tensor targets, std::optional<Tensor> offset, std::optional<Tensor> token, std::optional<Tensor> node,
    double temperature, int64_t max_children) {
  const OnDeviceOf guard(logits);
  const int64_t batch = logits.size(0), width = logits.size(1);
  TokenLogp a = arguments(logits, targets, offset, token, node, temperature, max_children);
  Tensor logp = new_tensor<float>(logits, {batch, width, a.targets}), entropy = new_tensor<float>(logits, {batch, width});
  Tensor top = new_tensor<float>(logits, {batch, width}), log_mass = new_tensor<float>(logits, {batch, width});
  a.logp = data<float>(logp);
  a.entropy = data<float>(entropy);
  a.top = data<float>(top);
  a.log_mass = data<float>(log_mass);
  token_logp(a, guard.launcher());
  return {logp, entropy, top, log_mass};
}

Tensor token_logp_backward_op(
    std::optional<Tensor> grad_logp, std::optional<Tensor> grad_entropy, Tensor logits, Tensor targets,
    std::optional<Tensor> offset, std::optional<Tensor> token, std::optional<Tensor> node, Tensor logp, Tensor entropy,
    Tensor top, Tensor log_mass, double temperature, int64_t max_children) {
  const OnDeviceOf guard(logits);
  TokenLogp a = arguments(logits, targets, offset, token, node, temperature, max_children);
  const std::initializer_list<int64_t> shape{logits.size(0), a.width, a.columns};
  Tensor gradient = a.logits.type == FloatType::kFloat32    ? new_tensor<float>(logits, shape)
                    : a.logits.type == FloatType::kBFloat16 ? new_tensor<BFloat16>(logits, shape)
                                                            : new_tensor<Float16>(logits, shape);
  a.logp = data<float>(logp);
  a.entropy = data<float>(entropy);
  a.top = data<float>(top);
  a.log_mass = data<float>(log_mass);
  a.grad_logp = view_floats(grad_logp);
  a.grad_entropy = view_floats(grad_entropy);
  a.gradient = gradient.mutable_data_ptr();
  token_logp_backward(a, guard.launcher());
  return gradient;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vstar_ops_cuda, VSTAR_DISPATCH_KEY, m) {
  m.impl("token_logp", TORCH_BOX(&token_logp_op));
  m.impl("token_logp_backward", TORCH_BOX(&token_logp_backward_op));
}

}  // namespace cuda
}  // namespace vstar
