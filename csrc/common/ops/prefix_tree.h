#pragma once

#include "common/ops/candidates.h"

namespace vstar {

struct PrefixTreeArgs : CandidateArgs {
  int32_t *parent, *depth, *first, *count;  // [B, G * L]
  void* node_token;                         // [B, G * L], as wide as the tokens
  int32_t *node, *size;                     // [B, G, L], [B]

  VSTAR_INLINE_MEMBER void store(
      int64_t at, int32_t its_parent, int64_t its_token, int64_t its_depth, int32_t its_first, int64_t its_count) const {
    parent[at] = its_parent;
    depth[at] = int32_t(its_depth);
    first[at] = its_first;
    count[at] = int32_t(its_count);
    if (token.wide) {
      static_cast<int64_t*>(node_token)[at] = its_token;
    } else {
      static_cast<int32_t*>(node_token)[at] = int32_t(its_token);
    }
  }
  VSTAR_INLINE_MEMBER void store_unused(int64_t at) const { store(at, -1, -1, 0, -1, 0); }

  // The result of a token that the mask leaves out.
  VSTAR_INLINE_MEMBER void clear(int64_t at) const { node[at] = -1; }
};

}  // namespace vstar
