#pragma once

#include "common/ops/sibling_advantage.h"
#include "torch/glue.h"

namespace vstar {

inline Baseline parse_baseline(const std::string& name) {
  if (name == "sibling") return Baseline::kSibling;
  if (name == "parent") return Baseline::kParent;
  STD_TORCH_CHECK(name == "leave_one_out", "baseline must be sibling, parent or leave_one_out, got ", name);
  return Baseline::kLeaveOneOut;
}

inline Scale parse_scale(const std::string& name) {
  if (name == "siblings") return Scale::kSiblings;
  if (name == "group") return Scale::kGroup;
  STD_TORCH_CHECK(name == "none", "scale must be siblings, group or none, got ", name);
  return Scale::kNone;
}

template <class Device>
void sibling_advantage(Call<Device>& call) {
  SiblingAdvantageArgs a{};
  std::string baseline, scale;
  call.inputs(
      sized(a.token, &a.batch, &a.group, &a.length), a.reward, optional(a.mask), a.eps, a.ddof, a.std_floor,
      a.min_siblings, baseline, scale);
  a.baseline = parse_baseline(baseline);
  a.scale = parse_scale(scale);
  const Sizes tokens{a.batch, a.group, a.length};
  call.output(a.advantage, tokens);
  call.output(a.valid, tokens);
  call.output(a.node, tokens);
  call.output(a.count, tokens);
  run(call.device(), a);
}

}  // namespace vstar
