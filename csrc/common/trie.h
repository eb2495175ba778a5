// A view of vstar_ops.Trie: node n has the edges offset[n] .. offset[n + 1] - 1, edge e carries token[e]
// and leads to node e + 1.
#pragma once

#include "macros.h"

namespace vstar {

struct EdgeRange {
  int64_t begin;
  int64_t end;
};

struct TrieView {
  const int32_t* offset;
  const int32_t* token;
  int64_t num_nodes;
  int64_t num_edges;

  // Empty for whatever is not a node. Clamped, so that even a damaged trie is never read out of bounds.
  VSTAR_INLINE_MEMBER EdgeRange edges(int64_t node) const {
    if (node < 0 || node >= num_nodes) return {0, 0};
    const int64_t begin = offset[node], end = offset[node + 1];
    if (begin < 0 || end > num_edges || begin > end) return {0, 0};
    return {begin, end};
  }

  // The edges of a node whose tokens are columns of logits with `columns` columns.
  VSTAR_INLINE_MEMBER EdgeRange edges_within(int64_t node, int64_t columns) const {
    EdgeRange range = edges(node);
    while (range.begin < range.end && token[range.begin] < 0) ++range.begin;
    while (range.begin < range.end && token[range.end - 1] >= columns) --range.end;
    return range;
  }
};

}  // namespace vstar
