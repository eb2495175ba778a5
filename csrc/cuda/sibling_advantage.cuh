// sibling_advantage: one launch, one block per request. The block sorts the request's candidates (candidates.cuh);
// then, level by level, one thread per prefix sums up its rewards, one per parent takes the statistics of its children,
// and one per candidate writes its results. Prefixes and children are contiguous runs, so threads walk short stretches
// of shared memory in a fixed order, and no result depends on how many threads there are.
//
// A block has a thread for each candidate, up to 256; further candidates are taken in turns. 1,024 requests of 64
// candidates keep all of an H100's multiprocessors busy at once. Groups whose scratch does not fit into shared
// memory (above about 1,000 candidates of 3 tokens) have it in a workspace instead.
#pragma once

#include "common/ops/sibling_advantage.h"
#include "cuda/candidates.cuh"

namespace vstar {

__global__ void __launch_bounds__(256, 3) sibling_advantage_kernel(WithScratch<SiblingAdvantageArgs> a) {
  VSTAR_SHARED(memory);
  const int64_t b = blockIdx.x;
  const int group = int(a.group), threads = int(blockDim.x), thread = int(threadIdx.x);
  SiblingScale* const scale = reinterpret_cast<SiblingScale*>(a.scratch(b, memory));  // [G] by parent
  double* const mean = reinterpret_cast<double*>(scale + group);                      // [G] by prefix
  double* const reward = mean + group;                                                // [G] by packed number
  Candidates c = lay_out_candidates(reinterpret_cast<unsigned char*>(reward + group), a);
  Level above = Level::lay_out(c.sums + 33, group), here = Level::lay_out(above.end(group), group);

  sort_candidates(c, a, b);
  for (int i = thread; i < c.n; i += threads) reward[i] = double(a.reward.at(b, c.candidate[i]));
  Candidates now = lay_out_kept(here.end(group), c, a);  // the candidates whose token of the level is there
  find_level(above, c, 0);
  const double of_request = request_scale(a, c.n, [&](int64_t i) { return reward[i]; });
  // The children of the i-th parent: their number, and the first.
  const auto first_child = [&](int i) { return here.number[above.begin[i]]; };
  const auto siblings_below = [&](int i) {
    const int end = above.begin[i + 1];
    return (end < now.n ? here.number[end] : here.size) - first_child(i);
  };

  int id = 0;
  for (int64_t depth = 1; depth <= a.length; ++depth) {
    if (a.by_token()) {
      keep_level(now, c, a, b, depth - 1);
      find_level(above, now, depth - 1);
    }
    find_level(here, now, depth);
    for (int i = thread; i < here.size; i += threads) {
      const int begin = here.begin[i], end = here.begin[i + 1];
      double sum = 0;
      for (int p = begin; p < end; ++p) sum += reward[now.order[p]];
      mean[i] = sum / double(end - begin);
    }
    __syncthreads();
    for (int i = thread; i < above.size; i += threads) {
      const int first = first_child(i);
      scale[i] = sibling_scale(
          a, siblings_below(i), of_request, [&](int64_t j) { return mean[first + j]; },
          [&](int64_t j) { return here.begin[first + j + 1] - here.begin[first + j]; });
    }
    __syncthreads();
    for (int p = thread; p < now.n; p += threads) {
      const int i = here.number[p], parent = above.number[p], siblings = siblings_below(parent);
      const float advantage = sibling_advantage_of(a, scale[parent], mean[i], siblings);
      const int64_t at = a.slot(b, c.candidate[now.order[p]]) + depth - 1;
      a.store(at, advantage, siblings >= a.min_siblings, id + i, here.begin[i + 1] - here.begin[i]);
    }
    id += here.size;
    swap_levels(above, here);
    __syncthreads();  // the next level overwrites what this one has just read
  }
}

inline void run(const Gpu& gpu, const SiblingAdvantageArgs& a) {
  if (a.group == 0 || a.length == 0) return;
  const int64_t numbers = int64_t(sizeof(SiblingScale) + 2 * sizeof(double)) * a.group;
  const int64_t bytes = Candidates::bytes(a.group, a.length) + round_up(numbers + 2 * level_bytes(a.group) + kept_bytes(a), 16);
  launch_requests(gpu, sibling_advantage_kernel, a, bytes, candidate_threads(a.group));
}

}  // namespace vstar
