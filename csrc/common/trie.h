// A view of vstar_ops.Trie: node n has the edges offset[n] .. offset[n + 1] - 1, edge e carries token[e]
// and leads to node e + 1. A filter has a bit per node: bit n % 32 of word n / 32 is set while node n is alive.
#pragma once

#include "views.h"

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
  const int32_t* alive;    // [R, words], or null: all nodes are
  int64_t alive_stride;  // words, or 0 where requests share the bits

  // Empty for whatever is not a node. Clamped, so that even a damaged trie is never read out of bounds.
  VSTAR_INLINE_MEMBER EdgeRange edges(int64_t node) const {
    if (node < 0 || node >= num_nodes) return {0, 0};
    const int64_t begin = offset[node], end = offset[node + 1];
    if (begin < 0 || end > num_edges || begin > end) return {0, 0};
    return {begin, end};
  }

  // The bits of a request, null if there is no filter. A word more than the nodes need follows them.
  VSTAR_INLINE_MEMBER const int32_t* alive_of(int64_t request) const { return alive ? alive + request * alive_stride : nullptr; }

  // The edges of a node whose tokens are columns of logits with `columns` columns.
  VSTAR_INLINE_MEMBER EdgeRange edges_within(int64_t node, int64_t columns) const {
    EdgeRange range = edges(node);
    while (range.begin < range.end && token[range.begin] < 0) ++range.begin;
    while (range.begin < range.end && token[range.end - 1] >= columns) --range.end;
    return range;
  }
};

}  // namespace vstar
