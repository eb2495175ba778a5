#pragma once

#include "common/ops/prefix_returns.h"
#include "torch/candidates.h"

namespace vstar {

template <class Device>
Outputs<4> prefix_returns(
    const Tensor& tokens, const Tensor& embedding, const Tensor& target, const Tensor& target_embedding,
    const OptionalTensor& mask, const Tensor& weights) {
  const Device device(tokens);
  PrefixReturnsArgs a{};
  set_candidates(a, tokens, mask);
  a.embedding = embedding;
  a.target = target;
  a.target_embedding = target_embedding;
  STD_TORCH_CHECK(
      weights.dtype() == dtype_of<double>() && weights.dim() == 1 && weights.size(0) == a.length && weights.contiguous(),
      "weights must be contiguous float64 [L]");
  a.weight = weights;
  a.width = embedding.size(2);
  Outputs<4> out;
  out.create(device, {a.batch, a.group, a.length}, a.returns);
  out.create(device, {a.batch, a.group, a.length}, a.similarity);
  out.create(device, {a.batch, a.group, a.length}, a.node);
  out.create(device, {a.batch, a.group, a.length}, a.count);
  run(device, a);
  return out;
}

}  // namespace vstar
