#pragma once

#include "common/ops/ved.h"
#include "torch/glue.h"

namespace vstar {

template <class Device>
void ved_select(Call<Device>& call) {
  VedSelectArgs a{};
  int64_t depths;
  const auto by_node = [&](auto& array) { return sized(array, &a.batch, &a.capacity); };
  const auto by_child = [&](auto& array) { return sized(array, &a.batch, &a.capacity, &a.children); };
  call.inputs(
      by_node(a.node), by_node(a.parent), by_node(a.priority), by_node(a.visits), by_node(a.next_child),
      by_node(a.num_children), by_child(a.child_node), by_child(a.child_logp), sized(a.size, &a.batch),
      sized(a.budget, &a.batch), by_node(a.depth), sized(a.depth_sum, &a.batch, &depths),
      sized(a.depth_count, &a.batch, &depths), a.levels, a.exploration, a.paths, a.max_idle);
  STD_TORCH_CHECK(depths == a.levels + 1, "trees of ", a.levels, " levels must have sums of one more, got ", depths);
  call.output(a.row_parent, {a.batch, a.rows()});
  call.output(a.row_node, {a.batch, a.rows()});
  call.output(a.row_logp, {a.batch, a.rows()});
  run(call.device(), a);
}

template <class Device>
void ved_insert(Call<Device>& call) {
  VedInsertArgs a{};
  const auto by_node = [&](auto& array) { return sized(array, &a.batch, &a.capacity); };
  const auto by_child = [&](auto& array) { return sized(array, &a.batch, &a.capacity, &a.children); };
  const auto by_leaf = [&](auto& array) { return sized(array, &a.batch, &a.capacity, &a.leaves); };
  const auto by_row = [&](auto& array, auto... width) { return sized(array, &a.batch, &a.rows, width...); };
  call.inputs(
      by_node(a.node.to), by_node(a.parent.to), by_node(a.logp.to), by_node(a.value), by_node(a.entropy.to),
      by_node(a.priority), by_node(a.visits), by_node(a.next_child), by_node(a.num_children.to),
      by_child(a.child_node.to), by_child(a.child_logp.to), by_leaf(a.leaf_node.to), by_leaf(a.leaf_logp.to),
      by_leaf(a.leaf_score.to), by_node(a.num_leaves.to), by_node(a.slot.to), sized(a.size, &a.batch),
      by_node(a.depth), sized(a.depth_sum, &a.batch, &a.depths), sized(a.depth_count, &a.batch, &a.depths),
      // the rows
      by_row(a.parent.from), by_row(a.node.from), by_row(a.logp.from), by_row(a.slot.from), by_row(a.row_value),
      by_row(a.entropy.from), by_row(a.num_children.from), by_row(a.child_node.from, &a.children),
      by_row(a.child_logp.from, &a.children), by_row(a.leaf_node.from, &a.leaves),
      by_row(a.leaf_logp.from, &a.leaves), by_row(a.leaf_score.from, &a.leaves), by_row(a.num_leaves.from),
      a.logp_weight, a.entropy_weight);
  run(call.device(), a);
}

template <class Device>
void ved_candidates(Call<Device>& call) {
  VedCandidatesArgs a{};
  const auto by_node = [&](auto& array) { return sized(array, &a.batch, &a.capacity); };
  const auto by_leaf = [&](auto& array) { return sized(array, &a.batch, &a.capacity, &a.slots); };
  call.inputs(
      by_node(a.node), by_node(a.logp), by_node(a.value), sized(a.size, &a.batch), by_node(a.depth),
      by_leaf(a.leaf_node), by_leaf(a.leaf_logp), by_leaf(a.leaf_score), by_node(a.num_leaves), a.length, a.k,
      a.logp_weight);
  call.output(a.out_node, {a.batch, a.k});
  call.output(a.out_logp, {a.batch, a.k});
  call.output(a.out_score, {a.batch, a.k});
  call.output(a.out_count, {a.batch});
  run(call.device(), a);
}

}  // namespace vstar
