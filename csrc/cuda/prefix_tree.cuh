// prefix_tree: a block a request, one launch. The block sorts the request's candidates (candidates.cuh), so that
// every prefix is a run of them; then, level by level, a thread writes a prefix and a thread a candidate's node. The
// numbering is that of sibling_advantage. Scratch that does not fit into shared memory lies in a workspace.
#pragma once

#include "cuda/candidates.cuh"

namespace vstar {
namespace cuda {

struct PrefixTree {
  IntView token;  // [B, G, L]
  MaskView mask;
  int32_t *parent, *depth, *first, *count;  // [B, G * L]
  void* node_token;                         // [B, G * L], as wide as the tokens
  int32_t *node, *size;                     // [B, G, L], [B]
  int64_t batch, group, length;
  RequestScratch scratch;
};

__device__ __forceinline__ void store_token(const PrefixTree& a, int64_t slot, int64_t token) {
  if (a.token.wide) {
    static_cast<int64_t*>(a.node_token)[slot] = token;
  } else {
    static_cast<int32_t*>(a.node_token)[slot] = int32_t(token);
  }
}

__global__ void __launch_bounds__(256, 4) prefix_tree_kernel(PrefixTree a) {
  VSTAR_SHARED(memory);
  const int64_t b = blockIdx.x, capacity = a.group * a.length, base = b * capacity;  // of slots and nodes alike
  const int group = int(a.group), threads = int(blockDim.x), thread = int(threadIdx.x);
  Candidates c = lay_out_candidates(a.scratch.of(b, memory), group, a.length, a.scratch.slots);
  Level above, here;
  above.number = c.sums + 33;
  above.begin = above.number + group;
  here.number = above.begin + group + 1;
  here.begin = here.number + group;

  sort_candidates(c, a.token, a.mask, b, group, a.length, a.scratch.slots, [&](int g) {
    for (int64_t slot = base + g * a.length; slot < base + (g + 1) * a.length; ++slot) a.node[slot] = -1;
  });
  int id = 0, above_id = -1;  // the numbers of the first nodes of both levels; the root's is -1
  find_level(above, c, 0);
  for (int64_t depth = 1; depth <= a.length; ++depth) {
    find_level(here, c, depth);
    for (int i = thread; i < here.size; i += threads) {
      const int begin = here.begin[i], end = here.begin[i + 1];
      int first = c.candidate[c.order[begin]];
      for (int p = begin + 1; p < end; ++p) {
        const int other = c.candidate[c.order[p]];
        first = other < first ? other : first;
      }
      const int64_t slot = base + id + i;
      a.parent[slot] = above_id + above.number[begin];
      a.depth[slot] = int32_t(depth);
      a.first[slot] = first;
      a.count[slot] = end - begin;
      store_token(a, slot, c.token[(depth - 1) * group + c.order[begin]]);
    }
    for (int p = thread; p < c.n; p += threads) {
      a.node[base + c.candidate[c.order[p]] * a.length + depth - 1] = id + here.number[p];
    }
    above_id = id;
    id += here.size;
    const Level swap = above;
    above = here;
    here = swap;
    __syncthreads();  // the next level overwrites what this one has just read
  }
  for (int64_t slot = base + id + thread; slot < base + capacity; slot += threads) {
    a.parent[slot] = a.first[slot] = -1;
    a.depth[slot] = a.count[slot] = 0;
    store_token(a, slot, -1);
  }
  if (thread == 0) a.size[b] = id;
}

inline int64_t prefix_tree_scratch(int64_t group, int64_t length) {
  return Candidates::bytes(group, length) + round_up(4 * (4 * group + 2), 16);
}

// One launch. The workspace has request_workspace() bytes.
inline void prefix_tree(const PrefixTree& a, void* workspace, const Launcher& launch) {
  if (a.batch == 0) return;
  launch_requests(prefix_tree_kernel, a, prefix_tree_scratch(a.group, a.length), candidate_threads(a.group), workspace, launch);
}

}  // namespace cuda
}  // namespace vstar
