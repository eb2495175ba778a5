#pragma once

#include "common/ops/beams.h"
#include "torch/glue.h"

namespace vstar {

template <class Device>
void advance_beams(Call<Device>& call) {
  AdvanceBeamsArgs a{};
  call.inputs(
      sized(a.parent, &a.batch, &a.beams), sized(a.token, &a.batch, &a.beams), sized(a.node, &a.batch, &a.beams),
      sized(a.sequence, &a.batch, &a.width, &a.length), sized(a.slot, &a.batch, &a.width),
      optional(sized(a.evaluated, &a.batch, &a.width)), optional(sized(a.row, &a.batch, &a.width)),
      optional(sized(a.row_slot, &a.rows)));
  call.output(a.out_sequence, {a.batch, a.beams, a.length + 1});
  call.output(a.out_slot, {a.batch, a.beams});
  call.output(a.out_token, {a.batch, a.beams});
  call.output(a.out_evaluated, {a.batch, a.beams});
  run(call.device(), a);
}

template <class Device>
void rows_to_run(Call<Device>& call) {
  RowsToRunArgs a{};
  call.inputs(
      sized(a.offset, &a.num_nodes), sized(a.node, &a.batch, &a.width), sized(a.sequence, &a.batch, &a.width, &a.length),
      sized(a.slot, &a.batch, &a.width), sized(a.evaluated, &a.batch, &a.width));
  --a.num_nodes;  // offsets are one more
  call.output(a.row, {a.batch, a.width});
  call.output(a.parent, {a.beams()});
  call.output(a.token, {a.length, a.beams()});
  call.output(a.place, {a.length, a.beams()});
  call.output(a.num_rows, {a.length});
  call.output(a.num_tokens, {a.batch});
  run(call.device(), a);
}

}  // namespace vstar
