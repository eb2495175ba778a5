#pragma once

#include "common/ops/ved_rows.h"
#include "torch/glue.h"

namespace vstar {

template <class Device>
void ved_inputs(Call<Device>& call) {
  VedInputsArgs a{};
  call.inputs(sized(a.tree_slot, &a.batch, &a.capacity), a.token, a.parent, sized(a.node, nullptr, &a.rows));
  call.output(a.out_slot, {a.batch, a.rows});
  call.output(a.out_token, {a.batch, a.rows});
  call.output(a.out_unused, {a.batch, a.rows});
  run(call.device(), a);
}

template <class Device>
void ved_evaluate(Call<Device>& call) {
  VedEvaluateArgs a{};
  double temperature;
  call.inputs(
      sized(a.logits, &a.batch, &a.rows, &a.columns), a.trie, optional(a.only_leaf), a.node, a.logp, optional(a.value),
      optional(a.child_value), a.seed, a.children, a.leaves, a.value_weight, a.child_weight, a.logp_weight, temperature,
      a.vocab, a.max_children, a.first_closed, a.first_leaf, a.expand_root);
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
  call.inputs(
      sized(a.first.node, nullptr, &a.first.size), a.first.parent, a.first.logp, a.num_first,
      optional(sized(a.others.node, nullptr, &a.others.size)), optional(a.others.parent), optional(a.others.logp),
      optional(a.only_leaf),
      sized(a.above, &a.batch, &a.rows), a.tree_size, a.width);
  call.output(a.out_node, {a.batch, a.width});
  call.output(a.out_parent, {a.batch, a.width});
  call.output(a.out_logp, {a.batch, a.width});
  run(call.device(), a);
}

}  // namespace vstar
