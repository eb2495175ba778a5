#pragma once

#include "common/ops/prefix_returns.h"
#include "torch/glue.h"

namespace vstar {

template <class Device>
void prefix_returns(Call<Device>& call) {
  PrefixReturnsArgs a{};
  int64_t levels;
  call.inputs(
      sized(a.token, &a.batch, &a.group, &a.length), sized(a.embedding, nullptr, nullptr, &a.width), a.target,
      a.target_embedding, optional(a.mask), sized(a.weight, &levels));
  STD_TORCH_CHECK(levels == a.length, "weights must have the shape [L] = [", a.length, "], got [", levels, "]");
  const Sizes tokens{a.batch, a.group, a.length};
  call.output(a.returns, tokens);
  call.output(a.similarity, tokens);
  call.output(a.node, tokens);
  call.output(a.count, tokens);
  run(call.device(), a);
}

}  // namespace vstar
