// prefix_tree: one launch, one block per request. The block sorts the request's candidates (candidates.cuh), so that
// every prefix is a run of them; then, level by level, one thread per prefix writes it, and one per candidate its node.
// The numbering is that of sibling_advantage. Scratch that does not fit into shared memory lies in a workspace.
#pragma once

#include "common/ops/prefix_tree.h"
#include "cuda/candidates.cuh"

namespace vstar {

__global__ void __launch_bounds__(256, 4) prefix_tree_kernel(WithScratch<PrefixTreeArgs> a) {
  VSTAR_SHARED(memory);
  const int64_t b = blockIdx.x, capacity = a.group * a.length, base = b * capacity;
  const int group = int(a.group), threads = int(blockDim.x), thread = int(threadIdx.x);
  Candidates c = lay_out_candidates(a.scratch(b, memory), a);
  Level here = Level::lay_out(c.sums + 33, group);

  sort_candidates(c, a, b);
  Candidates now = lay_out_kept(here.end(group), c, a);  // the candidates whose token of the level is there
  int id = 0;
  for (int64_t depth = 1; depth <= a.length; ++depth) {
    if (a.by_token()) keep_level(now, c, a, b, depth - 1);
    find_level(here, now, depth);
    for (int i = thread; i < here.size; i += threads) {
      const int begin = here.begin[i], end = here.begin[i + 1];
      const int some = c.candidate[now.order[begin]];
      int first = some;
      for (int p = begin + 1; p < end; ++p) {
        const int other = c.candidate[now.order[p]];
        first = other < first ? other : first;
      }
      const int64_t token = c.token[(depth - 1) * group + now.order[begin]];
      const int32_t parent = depth > 1 ? a.node[a.slot(b, some) + depth - 2] : -1;
      a.store(base + id + i, parent, token, depth, first, end - begin);
    }
    for (int p = thread; p < now.n; p += threads) {
      a.node[a.slot(b, c.candidate[now.order[p]]) + depth - 1] = id + here.number[p];
    }
    id += here.size;
    __syncthreads();  // the next level overwrites what this one has just read
  }
  for (int64_t at = base + id + thread; at < base + capacity; at += threads) a.store_unused(at);
  if (thread == 0) a.size[b] = id;
}

inline void run(const Gpu& gpu, const PrefixTreeArgs& a) {
  const int64_t bytes = Candidates::bytes(a.group, a.length) + round_up(level_bytes(a.group) + kept_bytes(a), 16);
  launch_requests(gpu, prefix_tree_kernel, a, bytes, candidate_threads(a.group));
}

}  // namespace vstar
