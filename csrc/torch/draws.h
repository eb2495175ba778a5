#pragma once

#include "common/ops/draws.h"
#include "torch/glue.h"

namespace vstar {

template <class Device>
void draw_children(Call<Device>& call) {
  DrawChildrenArgs a{};
  call.inputs(
      sized(a.list_logp, &a.rows, &a.children), a.list_token, a.list_node,
      sized(a.sequence, &a.batch, &a.candidates, &a.length), optional(a.row), optional(a.prefix), optional(a.cum_logp),
      optional(a.seed), a.base_seed, a.pack);
  call.output(a.out_sequence, {a.batch, a.candidates, a.length + 1});
  call.output(a.out_node, {a.batch, a.candidates});
  call.output(a.out_logp, {a.batch, a.candidates});
  call.output(a.num_valid, {a.batch});
  run(call.device(), a);
}

template <class Device>
void distinct_rows(Call<Device>& call) {
  DistinctRowsArgs a{};
  call.inputs(sized(a.node, &a.batch, &a.candidates), a.token, sized(a.slot, &a.rows), optional(a.row));
  call.output(a.out_row, {a.batch, a.candidates});
  call.output(a.out_parent, {a.total()});
  call.output(a.out_token, {a.total()});
  call.output(a.out_node, {a.total()});
  call.output(a.num_rows, {1});
  call.output(a.num_tokens, {a.batch});
  run(call.device(), a);
}

}  // namespace vstar
