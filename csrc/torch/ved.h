#pragma once

#include "common/ops/ved.h"
#include "torch/glue.h"

namespace vstar {

template <class Device>
Outputs<3> ved_select(
    const Tensor& node, const Tensor& parent, const Tensor& priority, const Tensor& visits, const Tensor& next_child,
    const Tensor& num_children, const Tensor& child_node, const Tensor& child_logp, const Tensor& size,
    const Tensor& budget, const Tensor& depth, const Tensor& depth_sum, const Tensor& depth_count, int64_t levels,
    double exploration, int64_t paths, int64_t max_idle) {
  const Device device(node);
  VedSelectArgs a{};
  a.node = node;
  a.parent = parent;
  a.priority = priority;
  a.visits = visits;
  a.next_child = next_child;
  a.num_children = num_children;
  a.child_node = child_node;
  a.child_logp = child_logp;
  a.size = size;
  a.budget = budget;
  a.depth = depth;
  a.depth_sum = depth_sum;
  a.depth_count = depth_count;
  a.batch = node.size(0);
  a.capacity = node.size(1);
  a.children = child_node.size(2);
  a.levels = levels;
  a.exploration = exploration;
  a.paths = paths;
  a.max_idle = max_idle;
  Outputs<3> out;
  out.create(device, {a.batch, a.rows()}, a.row_parent);
  out.create(device, {a.batch, a.rows()}, a.row_node);
  out.create(device, {a.batch, a.rows()}, a.row_logp);
  run(device, a);
  return out;
}

template <class T>
EntryCopy<T> entry_copy(const Tensor& tree, const Tensor& row) {
  return {tree, row, tree.dim() > 2 ? tree.size(2) : 1};
}

template <class Device>
Outputs<0> ved_insert(
    const Tensor& node, const Tensor& parent, const Tensor& logp, const Tensor& value, const Tensor& entropy,
    const Tensor& priority, const Tensor& visits, const Tensor& next_child, const Tensor& num_children,
    const Tensor& child_node, const Tensor& child_logp, const Tensor& leaf_node, const Tensor& leaf_logp,
    const Tensor& leaf_score, const Tensor& num_leaves, const Tensor& slot, const Tensor& size, const Tensor& depth,
    const Tensor& depth_sum, const Tensor& depth_count, const Tensor& row_parent, const Tensor& row_node,
    const Tensor& row_logp, const Tensor& row_slot, const Tensor& row_value, const Tensor& row_entropy,
    const Tensor& row_num_children, const Tensor& row_child_node, const Tensor& row_child_logp,
    const Tensor& row_leaf_node, const Tensor& row_leaf_logp, const Tensor& row_leaf_score,
    const Tensor& row_num_leaves, double logp_weight, double entropy_weight) {
  const Device device(node);
  VedInsertArgs a{};
  a.ints[0] = entry_copy<int32_t>(node, row_node);
  a.ints[1] = entry_copy<int32_t>(parent, row_parent);
  a.ints[2] = entry_copy<int32_t>(num_children, row_num_children);
  a.ints[3] = entry_copy<int32_t>(child_node, row_child_node);
  a.ints[4] = entry_copy<int32_t>(leaf_node, row_leaf_node);
  a.ints[5] = entry_copy<int32_t>(num_leaves, row_num_leaves);
  a.floats[0] = entry_copy<float>(logp, row_logp);
  a.floats[1] = entry_copy<float>(entropy, row_entropy);
  a.floats[2] = entry_copy<float>(child_logp, row_child_logp);
  a.floats[3] = entry_copy<float>(leaf_logp, row_leaf_logp);
  a.floats[4] = entry_copy<float>(leaf_score, row_leaf_score);
  a.slot = entry_copy<int64_t>(slot, row_slot);
  a.row_node = a.ints[0].from;
  a.row_parent = a.ints[1].from;
  a.row_logp = a.floats[0].from;
  a.row_entropy = a.floats[1].from;
  a.row_value = row_value;
  a.value = value;
  a.priority = priority;
  a.visits = visits;
  a.next_child = next_child;
  a.size = size;
  a.depth = depth;
  a.depth_sum = depth_sum;
  a.depth_count = depth_count;
  a.batch = node.size(0);
  a.capacity = node.size(1);
  a.rows = row_node.size(1);
  a.depths = depth_sum.size(1);
  a.logp_weight = logp_weight;
  a.entropy_weight = entropy_weight;
  run(device, a);
  return {};
}

template <class Device>
Outputs<4> ved_candidates(
    const Tensor& node, const Tensor& logp, const Tensor& value, const Tensor& size, const Tensor& depth,
    const Tensor& leaf_node, const Tensor& leaf_logp, const Tensor& leaf_score, const Tensor& num_leaves,
    int64_t length, int64_t k, double logp_weight, bool forced_first) {
  const Device device(node);
  VedCandidatesArgs a{};
  a.node = node;
  a.logp = logp;
  a.value = value;
  a.size = size;
  a.depth = depth;
  a.leaf_node = leaf_node;
  a.leaf_logp = leaf_logp;
  a.leaf_score = leaf_score;
  a.num_leaves = num_leaves;
  a.batch = node.size(0);
  a.capacity = node.size(1);
  a.slots = leaf_node.size(2);
  a.length = length;
  a.k = k;
  a.logp_weight = logp_weight;
  a.forced_first = forced_first;
  Outputs<4> out;
  out.create(device, {a.batch, k}, a.out_node);
  out.create(device, {a.batch, k}, a.out_logp);
  out.create(device, {a.batch, k}, a.out_score);
  out.create(device, {a.batch}, a.out_count);
  run(device, a);
  return out;
}

}  // namespace vstar
