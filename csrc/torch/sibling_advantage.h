#pragma once

#include <string>

#include "common/ops/sibling_advantage.h"
#include "torch/candidates.h"

namespace vstar {

inline Baseline parse_baseline(const std::string& name) {
  if (name == "sibling") return Baseline::kSibling;
  if (name == "parent") return Baseline::kParent;
  STD_TORCH_CHECK(name == "leave_one_out", "baseline must be sibling, parent or leave_one_out, got ", name);
  return Baseline::kLeaveOneOut;
}

template <class Device>
Outputs<4> sibling_advantage(
    const Tensor& tokens, const Tensor& rewards, const OptionalTensor& mask, double eps, int64_t ddof, double std_floor,
    int64_t min_siblings, const std::string& baseline) {
  const Device device(tokens);
  SiblingAdvantageArgs a{};
  set_candidates(a, tokens, mask);
  a.reward = rewards;
  a.eps = eps;
  a.std_floor = std_floor;
  a.ddof = ddof;
  a.min_siblings = min_siblings;
  a.baseline = parse_baseline(baseline);
  Outputs<4> out;
  out.create(device, {a.batch, a.group, a.length}, a.advantage);
  out.create(device, {a.batch, a.group, a.length}, a.valid);
  out.create(device, {a.batch, a.group, a.length}, a.node);
  out.create(device, {a.batch, a.group, a.length}, a.count);
  run(device, a);
  return out;
}

}  // namespace vstar
