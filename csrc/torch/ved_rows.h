#pragma once

#include "common/ops/ved_rows.h"
#include "torch/glue.h"

namespace vstar {

// Views that take int64 too.
template <class... View>
void must_be_int32(const View&... view) {
  STD_TORCH_CHECK((!view.wide && ...), "nodes and parents must be int32");
}

template <class Device>
void ved_inputs(Call<Device>& call) {
  VedInputsArgs a{};
  call.inputs(
      sized(a.tree_slot, &a.batch, &a.capacity), a.token, sized(a.parent, &a.batch, &a.rows),
      sized(a.node, &a.batch, &a.rows));
  call.output(a.out_slot, {a.batch, a.rows});
  call.output(a.out_token, {a.batch, a.rows});
  call.output(a.out_unused, {a.batch, a.rows});
  run(call.device(), a);
}

template <class Device>
void ved_evaluate(Call<Device>& call) {
  VedEvaluateArgs a{};
  double temperature;
  const auto by_row = [&](auto& array) { return sized(array, &a.batch, &a.rows); };
  const auto by_column = [&](auto& array) { return sized(array, &a.batch, &a.rows, &a.columns); };
  call.inputs(
      by_column(a.logits), a.trie, optional(a.only_leaf), by_row(a.node), by_row(a.logp), optional(by_row(a.value)),
      optional(by_column(a.child_value)), sized(a.seed, &a.batch), a.children, a.leaves, a.value_weight, a.child_weight,
      a.logp_weight, temperature, a.vocab, a.max_children, a.first_closed, a.first_leaf, a.expand_root);
  must_be_int32(a.node);
  a.inv_temperature = inverse_of(temperature);
  call.output(a.out_value, {a.batch, a.rows});
  call.output(a.out_entropy, {a.batch, a.rows});
  call.output(a.num_children, {a.batch, a.rows});
  call.output(a.child_node, {a.batch, a.rows, a.children});
  call.output(a.child_logp, {a.batch, a.rows, a.children});
  call.output(a.leaf_node, {a.batch, a.rows, a.leaves});
  call.output(a.leaf_logp, {a.batch, a.rows, a.leaves});
  call.output(a.leaf_score, {a.batch, a.rows, a.leaves});
  call.output(a.num_leaves, {a.batch, a.rows});
  run(call.device(), a);
}

template <class Device>
void ved_beams(Call<Device>& call) {
  VedBeamsArgs a{};
  const auto list = [&](auto& array, BeamList& its) { return sized(array, &a.batch, &its.size); };
  call.inputs(
      list(a.first.node, a.first), list(a.first.parent, a.first), list(a.first.logp, a.first), a.num_first,
      optional(list(a.others.node, a.others)), optional(list(a.others.parent, a.others)),
      optional(list(a.others.logp, a.others)), optional(a.only_leaf), sized(a.above, &a.batch, &a.rows),
      sized(a.tree_size, &a.batch), a.width);
  must_be_int32(a.first.node, a.first.parent, a.others.node, a.others.parent, a.above);
  STD_TORCH_CHECK(
      a.batch * a.others.size == 0 || (a.others.node && a.others.parent && a.others.logp),
      "further beams must have nodes, parents and log-probabilities");
  call.output(a.out_node, {a.batch, a.width});
  call.output(a.out_parent, {a.batch, a.width});
  call.output(a.out_logp, {a.batch, a.width});
  run(call.device(), a);
}

}  // namespace vstar
