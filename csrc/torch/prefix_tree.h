#pragma once

#include "common/ops/prefix_tree.h"
#include "torch/glue.h"

namespace vstar {

template <class Device>
void prefix_tree(Call<Device>& call) {
  PrefixTreeArgs a{};
  call.inputs(sized(a.token, &a.batch, &a.group, &a.length), optional(a.mask));
  const Sizes nodes{a.batch, a.group * a.length};
  call.output(a.parent, nodes);
  call.output(a.node_token, nodes, a.token.wide ? dtype_of<int64_t>() : dtype_of<int32_t>());
  call.output(a.depth, nodes);
  call.output(a.first, nodes);
  call.output(a.count, nodes);
  call.output(a.node, {a.batch, a.group, a.length});
  call.output(a.size, {a.batch});
  run(call.device(), a);
}

}  // namespace vstar
