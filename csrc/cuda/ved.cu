#include "cuda/ved.cuh"

#include <tuple>

#include "cuda/torch_glue.cuh"

namespace vstar {
namespace cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor> ved_select_op(
    Tensor node, Tensor parent, Tensor priority, Tensor visits, Tensor next_child, Tensor num_children,
    Tensor child_node, Tensor child_logp, Tensor size, Tensor budget, Tensor depth, Tensor depth_sum,
    Tensor depth_count, int64_t levels, double exploration, int64_t paths, int64_t max_idle) {
  const OnDeviceOf guard(node);
  const int64_t batch = node.size(0), rows = paths * levels;
  Tensor row_parent = new_tensor<int32_t>(node, {batch, rows}), row_node = new_tensor<int32_t>(node, {batch, rows});
  Tensor row_logp = new_tensor<float>(node, {batch, rows});
  VedSelect a{};
  a.node = data<int32_t>(node);
  a.parent = data<int32_t>(parent);
  a.num_children = data<int32_t>(num_children);
  a.child_node = data<int32_t>(child_node);
  a.depth = data<int32_t>(depth);
  a.depth_count = data<int32_t>(depth_count);
  a.priority = data<float>(priority);
  a.child_logp = data<float>(child_logp);
  a.depth_sum = data<double>(depth_sum);
  a.visits = data<int32_t>(visits);
  a.next_child = data<int32_t>(next_child);
  a.budget = data<int32_t>(budget);
  a.size = data<int32_t>(size);
  a.row_parent = data<int32_t>(row_parent);
  a.row_node = data<int32_t>(row_node);
  a.row_logp = data<float>(row_logp);
  a.batch = batch;
  a.capacity = node.size(1);
  a.children = child_node.size(2);
  a.levels = levels;
  a.paths = paths;
  a.max_idle = max_idle;
  a.exploration = exploration;
  ved_select(a, guard.launcher());
  return {row_parent, row_node, row_logp};
}

void ved_insert_op(
    Tensor node, Tensor parent, Tensor logp, Tensor value, Tensor entropy, Tensor priority, Tensor visits,
    Tensor next_child, Tensor num_children, Tensor child_node, Tensor child_logp, Tensor leaf_node, Tensor leaf_logp,
    Tensor leaf_score, Tensor num_leaves, Tensor slot, Tensor size, Tensor depth, Tensor depth_sum,
    Tensor depth_count, Tensor row_parent, Tensor row_node, Tensor row_logp, Tensor row_slot, Tensor row_value,
    Tensor row_entropy, Tensor row_num_children, Tensor row_child_node, Tensor row_child_logp, Tensor row_leaf_node,
    Tensor row_leaf_logp, Tensor row_leaf_score, Tensor row_num_leaves, double logp_weight, double entropy_weight) {
  const OnDeviceOf guard(node);
  VedInsert a{};
  a.tree = {data<int32_t>(node),       data<int32_t>(parent),     data<int32_t>(num_children), data<int32_t>(num_leaves),
            data<int32_t>(child_node), data<int32_t>(leaf_node),  data<float>(logp),           data<float>(entropy),
            data<float>(child_logp),   data<float>(leaf_logp),    data<float>(leaf_score),     data<int64_t>(slot)};
  a.row = {data<int32_t>(row_node),       data<int32_t>(row_parent),    data<int32_t>(row_num_children),
           data<int32_t>(row_num_leaves), data<int32_t>(row_child_node), data<int32_t>(row_leaf_node),
           data<float>(row_logp),         data<float>(row_entropy),     data<float>(row_child_logp),
           data<float>(row_leaf_logp),    data<float>(row_leaf_score),  data<int64_t>(row_slot)};
  a.value = data<float>(value);
  a.priority = data<float>(priority);
  a.row_value = data<float>(row_value);
  a.visits = data<int32_t>(visits);
  a.next_child = data<int32_t>(next_child);
  a.depth = data<int32_t>(depth);
  a.size = data<int32_t>(size);
  a.depth_count = data<int32_t>(depth_count);
  a.depth_sum = data<double>(depth_sum);
  a.batch = node.size(0);
  a.capacity = node.size(1);
  a.rows = row_node.size(1);
  a.children = child_node.size(2);
  a.leaves = leaf_node.size(2);
  a.depths = depth_sum.size(1);
  a.logp_weight = logp_weight;
  a.entropy_weight = entropy_weight;
  ved_insert(a, guard.launcher());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> ved_candidates_op(
    Tensor node, Tensor logp, Tensor value, Tensor size, Tensor depth, Tensor leaf_node, Tensor leaf_logp,
    Tensor leaf_score, Tensor num_leaves, int64_t length, int64_t k, double logp_weight, bool forced_first) {
  const OnDeviceOf guard(node);
  const int64_t batch = node.size(0), capacity = node.size(1), slots = leaf_node.size(2);
  Tensor out_node = new_tensor<int32_t>(node, {batch, k}), out_count = new_tensor<int32_t>(node, {batch});
  Tensor out_logp = new_tensor<float>(node, {batch, k}), out_score = new_tensor<float>(node, {batch, k});
  Tensor workspace = new_tensor<uint8_t>(node, {ved_candidates_workspace(batch, capacity, slots)});
  VedCandidates a{};
  a.node = data<int32_t>(node);
  a.size = data<int32_t>(size);
  a.depth = data<int32_t>(depth);
  a.leaf_node = data<int32_t>(leaf_node);
  a.num_leaves = data<int32_t>(num_leaves);
  a.logp = data<float>(logp);
  a.value = data<float>(value);
  a.leaf_logp = data<float>(leaf_logp);
  a.leaf_score = data<float>(leaf_score);
  a.out_node = data<int32_t>(out_node);
  a.out_count = data<int32_t>(out_count);
  a.out_logp = data<float>(out_logp);
  a.out_score = data<float>(out_score);
  a.batch = batch;
  a.capacity = capacity;
  a.slots = slots;
  a.length = length;
  a.k = k;
  a.logp_weight = logp_weight;
  a.forced_first = forced_first;
  a.key = data<LeafKey>(workspace);
  ved_candidates(a, guard.launcher());
  return {out_node, out_logp, out_score, out_count};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vstar_ops_cuda, VSTAR_DISPATCH_KEY, m) {
  m.impl("ved_select", TORCH_BOX(&ved_select_op));
  m.impl("ved_insert", TORCH_BOX(&ved_insert_op));
  m.impl("ved_candidates", TORCH_BOX(&ved_candidates_op));
}

}  // namespace cuda
}  // namespace vstar
