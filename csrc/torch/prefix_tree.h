#pragma once

#include "common/ops/prefix_tree.h"
#include "torch/candidates.h"

namespace vstar {

template <class Device>
Outputs<7> prefix_tree(const Tensor& tokens, const OptionalTensor& mask) {
  const Device device(tokens);
  PrefixTreeArgs a{};
  set_candidates(a, tokens, mask);
  const int64_t capacity = a.group * a.length;
  Outputs<7> out;
  out.create(device, {a.batch, capacity}, a.parent);
  a.node_token = out.create(device, {a.batch, capacity}, tokens.dtype());
  out.create(device, {a.batch, capacity}, a.depth);
  out.create(device, {a.batch, capacity}, a.first);
  out.create(device, {a.batch, capacity}, a.count);
  out.create(device, {a.batch, a.group, a.length}, a.node);
  out.create(device, {a.batch}, a.size);
  run(device, a);
  return out;
}

}  // namespace vstar
