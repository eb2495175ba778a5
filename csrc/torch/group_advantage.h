#pragma once

#include "common/ops/group_advantage.h"
#include "torch/glue.h"

namespace vstar {

template <class Device>
void group_advantage(Call<Device>& call) {
  GroupAdvantageArgs a{};
  call.inputs(sized(a.reward, &a.batch, &a.group), optional(a.mask), a.eps, a.ddof, a.std_floor, a.scaled);
  call.output(a.advantage, {a.batch, a.group});
  run(call.device(), a);
}

}  // namespace vstar
