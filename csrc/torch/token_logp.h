#pragma once

#include "common/ops/token_logp.h"
#include "torch/trie.h"

namespace vstar {

template <class Device>
void set_rows(
    LogitRows& a, const Tensor& logits, const Tensor& targets, const OptionalTensor& offset, const OptionalTensor& token,
    const OptionalTensor& node, double temperature, int64_t max_children) {
  a.logits = logits;
  a.target = targets;
  if (node) a.trie = view_trie(offset, token);
  a.node = node;
  a.temperature = temperature;
  a.inv_temperature = inverse_temperature<Device>(temperature);
  a.width = logits.size(1);
  a.columns = logits.size(2);
  a.targets = targets.size(2);
  a.rows = logits.size(0) * a.width;
  a.max_children = max_children;
  STD_TORCH_CHECK(
      a.columns < Device::kMaxGrid && a.rows < Device::kMaxGrid,
      "logits must have fewer than 2^31 columns and rows, got V = ", a.columns, " and ", a.rows, " rows");
}

template <class Device>
Outputs<4> token_logp(
    const Tensor& logits, const Tensor& targets, const OptionalTensor& offset, const OptionalTensor& token,
    const OptionalTensor& node, double temperature, int64_t max_children) {
  const Device device(logits);
  TokenLogpArgs a{};
  set_rows<Device>(a, logits, targets, offset, token, node, temperature, max_children);
  const int64_t batch = logits.size(0);
  Outputs<4> out;
  out.create(device, {batch, a.width, a.targets}, a.logp);
  out.create(device, {batch, a.width}, a.entropy);
  out.create(device, {batch, a.width}, a.top);
  out.create(device, {batch, a.width}, a.log_mass);
  run(device, a);
  return out;
}

template <class Device>
Outputs<1> token_logp_backward(
    const OptionalTensor& grad_logp, const OptionalTensor& grad_entropy, const Tensor& logits, const Tensor& targets,
    const OptionalTensor& offset, const OptionalTensor& token, const OptionalTensor& node, const Tensor& logp,
    const Tensor& entropy, const Tensor& top, const Tensor& log_mass, double temperature, int64_t max_children) {
  const Device device(logits);
  TokenLogpBackwardArgs a{};
  set_rows<Device>(a, logits, targets, offset, token, node, temperature, max_children);
  a.logp = logp;
  a.entropy = entropy;
  a.top = top;
  a.log_mass = log_mass;
  a.grad_logp = grad_logp;
  a.grad_entropy = grad_entropy;
  Outputs<1> out;
  const int64_t batch = logits.size(0);
  a.gradient = node ? out.add(device.zeros({batch, a.width, a.columns}, logits.dtype()))
                    : out.create(device, {batch, a.width, a.columns}, logits.dtype());
  run(device, a);
  return out;
}

}  // namespace vstar
