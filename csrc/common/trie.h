// A view of vstar_ops.Trie: node n has the edges offset[n] .. offset[n + 1] - 1, edge e carries token[e]
// and leads to node e + 1. A filter has a bit per node: bit n % 32 of word n / 32 is set while node n is alive.
#pragma once

#include "macros.h"

namespace vstar {

struct EdgeRange {
  int64_t begin;
  int64_t end;
};

// Which nodes are alive for a request; without bits all are. The node that an edge leads to is known by where its token is.
struct AliveNodes {
  const int32_t* bits;
  const int32_t* token;  // of edge 0

  VSTAR_INLINE_MEMBER explicit operator bool() const { return bits != nullptr; }
  VSTAR_INLINE_MEMBER int64_t child(const int32_t* its_token) const { return its_token - token + 1; }
  VSTAR_INLINE_MEMBER bool has(int64_t node) const { return bits[node >> 5] >> (node & 31) & 1; }
};

struct TrieView {
  const int32_t* offset;
  const int32_t* token;
  int64_t num_nodes;
  int64_t num_edges;
  const int32_t* alive;    // [R, words], or null: all nodes are
  int64_t alive_stride;   // words, or 0 where requests share the bits

  // Empty for whatever is not a node. Clamped, so that even a damaged trie is never read out of bounds.
  VSTAR_INLINE_MEMBER EdgeRange edges(int64_t node) const {
    if (node < 0 || node >= num_nodes) return {0, 0};
    const int64_t begin = offset[node], end = offset[node + 1];
    if (begin < 0 || end > num_edges || begin > end) return {0, 0};
    return {begin, end};
  }

  // The bits end with a word more than the nodes need.
  VSTAR_INLINE_MEMBER AliveNodes alive_of(int64_t request) const {
    return {alive ? alive + request * alive_stride : nullptr, token};
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
