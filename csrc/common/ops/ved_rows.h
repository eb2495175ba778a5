// Arguments of what surrounds the model's forward in a round of value-guided decoding. [B, rows] by row of the round,
// [B, rows, children] and [B, rows, leaves] by entry of a row's lists.
#pragma once

#include "common/temperature.h"
#include "common/trie.h"
#include "common/views.h"

namespace vstar {

// ---------------------------------------------------------------- inputs

struct VedInputsArgs {
  const int64_t* tree_slot;  // [B, capacity]
  Vector<int32_t> token;     // of the trie's edges
  IntView parent, node;
  int64_t batch, capacity, rows;
  int64_t *out_slot, *out_token;
  bool* out_unused;

  VSTAR_INLINE_MEMBER void fill(int64_t b, int64_t p) const {
    const int64_t its_node = node.at(b, p), above = parent.at(b, p), to = b * rows + p;
    const bool used = its_node >= 0;
    out_slot[to] = used && above >= 0 && above < capacity ? tree_slot[b * capacity + above] : -1;
    out_token[to] = used ? token.at_or(0, its_node - 1) : 0;
    out_unused[to] = !used;
  }
};

// ---------------------------------------------------------------- evaluate

struct VedEvaluateArgs {
  FloatView logits;  // [B, rows, columns]
  TrieView trie;
  Vector<int32_t> only_leaf;  // of the trie's nodes; none: a node stands for no leaf but itself
  IntView node;
  StridedView<float> logp;
  FloatView value, child_value;  // child_value as logits
  StridedView<int64_t> seed;     // [B]
  int64_t children, leaves;
  float value_weight, child_weight, logp_weight;
  InverseTemperature inv_temperature;
  bool vocab, expand_root;
  int64_t max_children, first_closed, first_leaf;
  int64_t batch, rows, columns;
  float *out_value, *out_entropy;
  int32_t *num_children, *child_node;
  float* child_logp;
  int32_t* leaf_node;
  float *leaf_logp, *leaf_score;
  int32_t* num_leaves;

  // Whether a node may be expanded, and whether some of its children may be leaves.
  VSTAR_INLINE_MEMBER bool is_open(int64_t its_node) const { return its_node < first_closed && (expand_root || its_node != 0); }
  VSTAR_INLINE_MEMBER bool has_leaves(const EdgeRange& edges) const { return only_leaf || edges.begin + 1 >= first_leaf; }

  // The leaf that a child stands for; -1: none.
  VSTAR_INLINE_MEMBER int32_t leaf_of(int64_t child) const {
    return child >= first_leaf ? int32_t(child) : only_leaf.at_or(-1, child);
  }
  // Whether a child belongs to the list of leaves, or to that of children.
  VSTAR_INLINE_MEMBER bool listed(int64_t child, bool among_leaves) const {
    return among_leaves ? leaf_of(child) >= 0 : !only_leaf || leaf_of(child) < 0;
  }
  VSTAR_INLINE_MEMBER float own_value(int64_t b, int64_t p) const { return value ? value_weight * value.at(b, p) : 0.0f; }
  // How children are ranked by log-probability; the leaves without child values by this alone.
  VSTAR_INLINE_MEMBER float rank_weight(bool among_leaves) const { return among_leaves && child_value ? logp_weight : 1.0f; }

  // The i-th of row r of all, of a list of `found` entries; a child that leads to nothing behind them.
  VSTAR_INLINE_MEMBER void store_child(int64_t r, int64_t i, int64_t child, float its_logp) const {
    child_node[r * children + i] = int32_t(child);
    child_logp[r * children + i] = its_logp;
  }
  VSTAR_INLINE_MEMBER void store_leaf(
      int64_t r, int64_t i, int64_t child, float its_logp, float its_rank, float its_value) const {
    const int64_t to = r * leaves + i;
    if (!child_value) its_rank = logp_weight != 0 ? logp_weight * its_logp : 0.0f;
    leaf_node[to] = leaf_of(child);
    leaf_logp[to] = its_logp;
    leaf_score[to] = its_value + its_rank;
  }
  // Nothing from entry i on.
  VSTAR_INLINE_MEMBER void clear_child(int64_t r, int64_t i) const { store_child(r, i, -1, -__builtin_inff()); }
  VSTAR_INLINE_MEMBER void clear_leaf(int64_t r, int64_t i) const {
    const int64_t to = r * leaves + i;
    leaf_node[to] = -1;
    leaf_logp[to] = leaf_score[to] = -__builtin_inff();
  }
};

// ---------------------------------------------------------------- beams

// Extensions of the last beams, best first: [B, size].
struct BeamList {
  IntView node, parent;
  StridedView<float> logp;
  int64_t size;
};

struct VedBeamsArgs {
  BeamList first, others;
  Vector<int32_t> only_leaf;
  IntView above;         // [B, rows], the last beams
  const int32_t* tree_size;  // [B]
  int64_t batch, rows, num_first, width;
  int32_t *out_parent, *out_node;
  float* out_logp;

  // The node at a place of a list; -1 if it stands for a leaf.
  VSTAR_INLINE_MEMBER int32_t beam(const BeamList& list, int64_t b, int64_t i) const {
    const int64_t node = list.node.at(b, i);
    return node >= 0 && only_leaf.at_or(-1, node) < 0 ? int32_t(node) : -1;
  }
  // The beam at place i of a list as the j-th of the next ones. The last beams stand in the tree from `start` on.
  VSTAR_INLINE_MEMBER void store(const BeamList& list, int64_t b, int64_t i, int64_t j, int64_t start) const {
    const int64_t to = b * width + j;
    out_node[to] = int32_t(list.node.at(b, i));
    out_parent[to] = int32_t(start + list.parent.at(b, i));
    out_logp[to] = list.logp.at(b, i);
  }
  VSTAR_INLINE_MEMBER void clear(int64_t b, int64_t j) const {
    const int64_t to = b * width + j;
    out_node[to] = out_parent[to] = -1;
    out_logp[to] = -__builtin_inff();
  }
};

}  // namespace vstar
