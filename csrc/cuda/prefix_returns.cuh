// prefix_returns: one launch, one block per request. The block sorts the request's candidates (candidates.cuh), which
// makes every bucket a run; then, level by level, one warp per bucket: its lanes lie along the embedding and add up the
// members in sorted order, so neighboring lanes read neighboring numbers and a sum's order is fixed. Every embedding
// is read once per level, after the first time from the caches.
#pragma once

#include "common/ops/prefix_returns.h"
#include "cuda/candidates.cuh"

namespace vstar {

__global__ void __launch_bounds__(256, 3) prefix_returns_kernel(WithScratch<PrefixReturnsArgs> a) {
  VSTAR_SHARED(memory);
  const int64_t b = blockIdx.x;
  const int group = int(a.group), warps = int(blockDim.x / 32);
  Candidates c = lay_out_candidates(a.scratch(b, memory), a);
  Level level = Level::lay_out(c.sums + 33, group);

  sort_candidates(c, a, b);
  Candidates now = lay_out_kept(level.end(group), c, a);  // the candidates whose token of the level is there
  double target_square = 0;
  for (int64_t e = lane(); e < a.width; e += 32) {
    const double x = double(a.target_embedding.at(b, e));
    target_square += x * x;
  }
  const double target_norm = sqrt(warp_sum(target_square));

  int id = 0;
  for (int64_t depth = 1; depth <= a.length; ++depth) {
    if (a.by_token()) keep_level(now, c, a, b, depth - 1);
    find_level(level, now, depth);
    for (int i = warp(); i < level.size; i += warps) {
      const int begin = level.begin[i], end = level.begin[i + 1];
      double square = 0, dot = 0;
      for (int64_t e = lane(); e < a.width; e += 32) {
        double sum = 0;
        for (int p = begin; p < end; ++p) sum += double(a.embedding.at(b, c.candidate[now.order[p]], e));
        square += sum * sum;
        dot += sum * double(a.target_embedding.at(b, e));
      }
      square = warp_sum(square);
      const float cosine = bucket_cosine(warp_sum(dot), square, target_norm);
      bool matches = true;
      for (int64_t t = lane(); t < depth; t += 32) {
        matches = matches && c.token[t * group + now.order[begin]] == a.target.at(b, t);
      }
      const float value = bucket_return(__all_sync(kAll, matches), a.weight[depth - 1], cosine);
      for (int p = begin + lane(); p < end; p += 32) {
        a.store(a.slot(b, c.candidate[now.order[p]]) + depth - 1, value, cosine, id + i, end - begin);
      }
    }
    id += level.size;
    __syncthreads();  // the next level overwrites this one
  }
}

inline void run(const Gpu& gpu, const PrefixReturnsArgs& a) {
  if (a.group == 0 || a.length == 0) return;
  const int64_t bytes = Candidates::bytes(a.group, a.length) + round_up(level_bytes(a.group) + kept_bytes(a), 16);
  launch_requests(gpu, prefix_returns_kernel, a, bytes, 256);
}

}  // namespace vstar
