#pragma once

#include "common/ops/ved.h"
#include "torch/glue.h"

namespace vstar {

template <class Device>
void ved_select(Call<Device>& call) {
  VedSelectArgs a{};
  call.inputs(
      sized(a.node, &a.batch, &a.capacity), a.parent, a.priority, a.visits, a.next_child, a.num_children,
      sized(a.child_node, nullptr, nullptr, &a.children), a.child_logp, a.size, a.budget, a.depth, a.depth_sum,
      a.depth_count, a.levels, a.exploration, a.paths, a.max_idle);
  call.output(a.row_parent, {a.batch, a.rows()});
  call.output(a.row_node, {a.batch, a.rows()});
  call.output(a.row_logp, {a.batch, a.rows()});
  run(call.device(), a);
}

template <class Device>
void ved_insert(Call<Device>& call) {
  VedInsertArgs a{};
  call.inputs(
      sized(a.node.to, &a.batch, &a.capacity), a.parent.to, a.logp.to, a.value, a.entropy.to, a.priority, a.visits,
      a.next_child, a.num_children.to, sized(a.child_node.to, nullptr, nullptr, &a.children), a.child_logp.to,
      sized(a.leaf_node.to, nullptr, nullptr, &a.leaves), a.leaf_logp.to, a.leaf_score.to, a.num_leaves.to, a.slot.to,
      a.size, a.depth, sized(a.depth_sum, nullptr, &a.depths), a.depth_count,
      // the rows
      a.parent.from, sized(a.node.from, nullptr, &a.rows), a.logp.from, a.slot.from, a.row_value, a.entropy.from,
      a.num_children.from, a.child_node.from, a.child_logp.from, a.leaf_node.from, a.leaf_logp.from, a.leaf_score.from,
      a.num_leaves.from, a.logp_weight, a.entropy_weight);
  run(call.device(), a);
}

template <class Device>
void ved_candidates(Call<Device>& call) {
  VedCandidatesArgs a{};
  call.inputs(
      sized(a.node, &a.batch, &a.capacity), a.logp, a.value, a.size, a.depth,
      sized(a.leaf_node, nullptr, nullptr, &a.slots), a.leaf_logp, a.leaf_score, a.num_leaves, a.length, a.k,
      a.logp_weight);
  call.output(a.out_node, {a.batch, a.k});
  call.output(a.out_logp, {a.batch, a.k});
  call.output(a.out_score, {a.batch, a.k});
  call.output(a.out_count, {a.batch});
  run(call.device(), a);
}

}  // namespace vstar
