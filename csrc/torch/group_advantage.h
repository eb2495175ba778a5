#pragma once

#include "common/ops/group_advantage.h"
#include "torch/glue.h"

namespace vstar {

template <class Device>
Outputs<1> group_advantage(
    const Tensor& rewards, const OptionalTensor& mask, double eps, int64_t ddof, double std_floor) {
  const Device device(rewards);
  GroupAdvantageArgs a{};
  a.reward = rewards;
  a.mask = mask;
  a.batch = rewards.size(0);
  a.group = rewards.size(1);
  a.ddof = ddof;
  a.eps = eps;
  a.std_floor = std_floor;
  Outputs<1> out;
  out.create(device, {a.batch, a.group}, a.advantage);
  run(device, a);
  return out;
}

}  // namespace vstar
