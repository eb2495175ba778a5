// Arguments and arithmetic of value-guided tree search (V-STAR, Eqs. 10-14), in double over float32 data so that every
// backend takes the same branch. Arrays are contiguous: [B, T] by node, [B, T, C] by child, [B, T, D] by leaf,
// [B, levels + 1] by depth, [B] by tree, [B, rows] by row of a round.
#pragma once

#include <cmath>

#include "common/floats.h"
#include "common/order.h"

namespace vstar {

// G(s) = V(s) + lambda H(s) (+ w_p log pi(s)), a finite float32.
VSTAR_INLINE float tree_priority(float value, float entropy, float logp, double entropy_weight, double logp_weight) {
  double g = double(value) + entropy_weight * double(entropy);
  if (logp_weight != 0) g += logp_weight * double(logp);
  if (!(g >= -double(kFloatMax))) g = -double(kFloatMax);  // NaN too
  return float(g > double(kFloatMax) ? double(kFloatMax) : g);
}

// U(s) = G(s) + beta sqrt(ln(N_root + 1) / (N(s) + 1)), with log_total = ln(N_root + 1).
VSTAR_INLINE double tree_bound(float priority, int32_t visits, double log_total, double exploration) {
  return double(priority) + exploration * sqrt(log_total / double(visits + 1));
}

// The nodes of a tree, whatever its size claims.
VSTAR_INLINE int64_t tree_size(int32_t size, int64_t capacity) {
  if (size < 0) return 0;
  return size < capacity ? size : capacity;
}

// ---------------------------------------------------------------- select

struct VedSelectArgs {
  const int32_t *node, *parent, *num_children, *child_node, *depth, *depth_count, *size;
  const float *priority, *child_logp;
  const double* depth_sum;
  int32_t *visits, *next_child, *budget;
  int64_t batch, capacity, children, levels, paths, max_idle;
  double exploration;
  int32_t *row_parent, *row_node;
  float* row_logp;

  VSTAR_INLINE_MEMBER int64_t rows() const { return paths * levels; }

  // The mean priority of a depth, which a node must reach to be expanded.
  VSTAR_INLINE_MEMBER double gate(int64_t b, int64_t level) const {
    const int64_t at = b * (levels + 1) + level;
    return depth_sum[at] / double(depth_count[at] > 1 ? depth_count[at] : 1);
  }
  // Entries in the list of a node's children; s counts the nodes of all trees.
  VSTAR_INLINE_MEMBER int64_t listed(int64_t s) const { return num_children[s] < children ? num_children[s] : children; }

  VSTAR_INLINE_MEMBER void clear(int64_t row) const {
    row_parent[row] = row_node[row] = -1;
    row_logp[row] = -INFINITY;
  }
  // Give a row the next child of node s of tree b.
  VSTAR_INLINE_MEMBER void take(int64_t b, int64_t row, int64_t s) const {
    const int64_t child = (b * capacity + s) * children + next_child[b * capacity + s]++;
    row_parent[row] = int32_t(s);
    row_node[row] = child_node[child];
    row_logp[row] = child_logp[child];
  }
};

// ---------------------------------------------------------------- insert

// An array of the tree that takes the rows' entries as they are.
template <class T>
struct EntryCopy {
  T* to;
  const T* from;
};

// The same with the number of entries of a row.
template <class T>
struct ListCopy : EntryCopy<T> {
  int64_t width;
};

struct VedInsertArgs {
  EntryCopy<int32_t> node, parent, num_children, num_leaves, child_node, leaf_node;
  EntryCopy<float> logp, entropy, child_logp, leaf_logp, leaf_score;
  EntryCopy<int64_t> slot;
  const float* row_value;
  float *value, *priority;
  int32_t *visits, *next_child, *depth, *size, *depth_count;
  double* depth_sum;
  int64_t batch, capacity, rows, children, leaves, depths;
  double logp_weight, entropy_weight;

  // The depth that a row takes in a tree of this size; -1 if it is not stored.
  VSTAR_INLINE_MEMBER int64_t level(int64_t b, int64_t row, int32_t its_size) const {
    const int32_t its_node = node.from[row];
    const int64_t above = parent.from[row];
    if (its_node < 0 || its_size < 0 || its_size >= capacity) return -1;
    const int64_t level = above >= 0 && above < its_size ? depth[b * capacity + above] + 1 : 0;
    return level < depths ? level : -1;
  }
  // use(list, list, ...) with all arrays.
  template <class Use>
  VSTAR_INLINE_MEMBER void with_lists(const Use& use) const {
    use(ListCopy<int32_t>{node, 1}, ListCopy<int32_t>{parent, 1}, ListCopy<int32_t>{num_children, 1},
        ListCopy<int32_t>{num_leaves, 1}, ListCopy<float>{logp, 1}, ListCopy<float>{entropy, 1}, ListCopy<int64_t>{slot, 1},
        ListCopy<int32_t>{child_node, children}, ListCopy<float>{child_logp, children}, ListCopy<int32_t>{leaf_node, leaves},
        ListCopy<float>{leaf_logp, leaves}, ListCopy<float>{leaf_score, leaves});
  }
  // What a node is given beside its entries.
  VSTAR_INLINE_MEMBER void set_up(int64_t b, int64_t to, int64_t row, int64_t level) const {
    float v = row_value[row];
    if (!(v >= -kFloatMax)) v = -kFloatMax;  // NaN too
    if (v > kFloatMax) v = kFloatMax;
    const float g = tree_priority(v, entropy.from[row], logp.from[row], entropy_weight, logp_weight);
    // All that is read is read before the first write, which a GPU would wait for.
    const double sum = depth_sum[b * depths + level] + double(g);
    const int32_t count = depth_count[b * depths + level] + 1;
    value[to] = v;
    priority[to] = g;
    visits[to] = next_child[to] = 0;
    depth[to] = int32_t(level);
    depth_sum[b * depths + level] = sum;
    depth_count[b * depths + level] = count;
  }
};

// ---------------------------------------------------------------- candidates

// Order of a leaf; the larger is the better, {0, 0} is none.
struct alignas(16) LeafKey {
  uint64_t first;   // whether it was evaluated or is forced, score, prefix
  uint64_t second;  // log-probability among the completions of a prefix, then node
};

VSTAR_INLINE LeafKey leaf_key(bool completion, float score, int32_t prefix, float logp, int32_t node) {
  const uint64_t body = (uint64_t(ordered_bits(score)) << 31) | (0x7FFFFFFFu - uint32_t(prefix));
  const uint64_t of_logp = completion ? ordered_bits(logp) : 0;
  return {completion ? body : body | uint64_t(1) << 63, (of_logp << 32) | (0x7FFFFFFFu - uint32_t(node))};
}

// Whether key x at place i comes before key y at place j.
VSTAR_INLINE bool better_leaf(const LeafKey& x, int64_t i, const LeafKey& y, int64_t j) {
  if (x.first != y.first) return x.first > y.first;
  if (x.second != y.second) return x.second > y.second;
  return i < j;
}

struct VedCandidatesArgs {
  const int32_t *node, *size, *depth, *leaf_node, *num_leaves;
  const float *logp, *value, *leaf_logp, *leaf_score;
  int64_t batch, capacity, slots, length, k;
  double logp_weight;
  int32_t* out_node;
  float *out_logp, *out_score;
  int32_t* out_count;

  // A leaf's place: of a node the leaf that it is itself, if it is one, then those listed below it.
  VSTAR_INLINE_MEMBER int64_t width() const { return 1 + slots; }

  // What an evaluated leaf is ranked by: V (+ w_p log pi). s counts the nodes of all trees.
  VSTAR_INLINE_MEMBER float rank(int64_t s) const {
    double score = double(value[s]);
    if (logp_weight != 0) score += logp_weight * double(logp[s]);
    return float(score);
  }
  VSTAR_INLINE_MEMBER LeafKey evaluated_key(int64_t s) const {
    return leaf_key(false, rank(s), node[s], logp[s], node[s]);
  }
  VSTAR_INLINE_MEMBER LeafKey completion_key(int64_t s, int64_t slot) const {
    const int64_t at = s * slots + slot;
    return leaf_key(true, leaf_score[at], node[s], leaf_logp[at], leaf_node[at]);
  }

  // As the i-th candidate of tree b a leaf of a node s of all trees: the node itself for a slot of -1, else one of its list.
  VSTAR_INLINE_MEMBER void store(int64_t b, int64_t i, int64_t s, int64_t slot) const {
    const int64_t to = b * k + i, at = s * slots + slot;
    out_node[to] = slot < 0 ? node[s] : leaf_node[at];
    out_logp[to] = slot < 0 ? logp[s] : leaf_logp[at];
    out_score[to] = slot < 0 ? rank(s) : leaf_score[at];
  }
  VSTAR_INLINE_MEMBER void store_none(int64_t b, int64_t i) const {
    out_node[b * k + i] = -1;
    out_logp[b * k + i] = out_score[b * k + i] = -INFINITY;
  }
};

}  // namespace vstar
