// The steps of top-k sampling between two forwards, two launches each. draw_children takes one warp per candidate, whose
// lanes lie along its list; then one block per request places the results. distinct_rows takes one block per request
// twice: to find the first candidate of every prefix, all of them compared with each other, and to number the prefixes
// behind those of the requests before.
#pragma once

#include "common/ops/draws.h"
#include "cuda/device.cuh"

namespace vstar {

constexpr int kDrawThreads = 256;

// Of a block: one for each candidate.
inline int draw_threads(int64_t candidates) {
  return candidates < kDrawThreads ? int(round_up(candidates < 1 ? 1 : candidates, 32)) : kDrawThreads;
}

// ---------------------------------------------------------------- draw

struct DrawChildrenLaunch : DrawChildrenArgs {
  int32_t* choice;  // [B, K], the entry that is drawn
};

__global__ void __launch_bounds__(kDrawThreads, 4) draw_children_kernel(DrawChildrenLaunch a) {
  const int64_t at = int64_t(blockIdx.x) * (kDrawThreads / 32) + warp();
  if (at >= a.batch * a.candidates) return;  // a whole warp, and no barriers of the block follow
  const int64_t b = at / a.candidates, k = at % a.candidates, r = a.list_of(b, k);
  const uint64_t key = a.key(b, k);
  const uint32_t prefix = a.prefix_of(b, k);
  int32_t best = -1;
  double best_score = 0;
  for (int64_t c = r < 0 ? a.children : lane(); c < a.children; c += 32) {
    if (!a.drawable(r, c)) continue;
    const double score = a.perturbed(r, c, key, prefix);
    if (best < 0 || score > best_score) best = int32_t(c), best_score = score;
  }
  for (int step = 16; step > 0; step /= 2) {
    const int32_t other = __shfl_xor_sync(kAll, best, step);
    const double its_score = __shfl_xor_sync(kAll, best_score, step);
    const bool better = best < 0 || its_score > best_score || (its_score == best_score && other < best);
    if (other >= 0 && better) best = other, best_score = its_score;
  }
  if (lane() == 0) a.choice[at] = best;
}

__global__ void __launch_bounds__(kDrawThreads, 4) place_draws_kernel(DrawChildrenLaunch a) {
  VSTAR_SHARED(memory);
  int* const sums = reinterpret_cast<int*>(memory);
  const int64_t b = blockIdx.x, threads = blockDim.x;
  const int32_t* const choice = a.choice + b * a.candidates;
  int valid = 0;
  for (int64_t k = threadIdx.x; k < a.candidates; k += threads) valid += choice[k] >= 0;
  const int64_t all = block_sum_before(valid, sums).total;
  int64_t found = 0;
  for (int64_t first = 0; first < a.candidates; first += threads) {
    const int64_t k = first + threadIdx.x;
    const int32_t c = k < a.candidates ? choice[k] : -1;
    const BlockSum sum = block_sum_before(c >= 0, sums);
    const int64_t before = found + sum.before, packed = c >= 0 ? before : all + k - before;
    if (k < a.candidates) a.store(b, k, c, a.pack ? packed : k);
    found += sum.total;
  }
  if (threadIdx.x == 0) a.num_valid[b] = int32_t(all);
}

inline void run(const Gpu& gpu, const DrawChildrenArgs& a) {
  if (a.batch == 0) return;
  const int64_t draws = a.batch * a.candidates, per_block = kDrawThreads / 32;
  const DrawChildrenLaunch with_choice{a, reinterpret_cast<int32_t*>(gpu.workspace(4 * draws))};
  const dim3 grid{unsigned((draws + per_block - 1) / per_block)};
  if (draws > 0) gpu.launch(draw_children_kernel, grid, kDrawThreads, 0, with_choice);
  gpu.launch(place_draws_kernel, dim3{unsigned(a.batch)}, draw_threads(a.candidates), 4 * 33, with_choice);
}

// ---------------------------------------------------------------- rows

struct DistinctRowsLaunch : DistinctRowsArgs {
  int32_t* first;  // [B, K], whether no earlier candidate has the prefix
};

__global__ void __launch_bounds__(kDrawThreads, 4) first_candidates_kernel(DistinctRowsLaunch a) {
  VSTAR_SHARED(memory);
  const int64_t b = blockIdx.x;
  int distinct = 0;
  for (int64_t k = threadIdx.x; k < a.candidates; k += blockDim.x) {
    const int64_t node = a.node.at(b, k);
    bool first = node >= 0;
    for (int64_t j = 0; j < k && first; ++j) first = a.node.at(b, j) != node;
    a.first[b * a.candidates + k] = first;
    distinct += first;
  }
  const int total = block_sum_before(distinct, reinterpret_cast<int*>(memory)).total;
  if (threadIdx.x == 0) a.num_tokens[b] = total;
}

__global__ void __launch_bounds__(kDrawThreads, 4) distinct_rows_kernel(DistinctRowsLaunch a) {
  VSTAR_SHARED(memory);
  int* const sums = reinterpret_cast<int*>(memory);
  const int64_t b = blockIdx.x;
  const int32_t* const first = a.first + b * a.candidates;
  int earlier = 0, all = 0;
  for (int64_t i = threadIdx.x; i < a.batch; i += blockDim.x) {
    const int number = a.num_tokens[i];
    earlier += i < b ? number : 0;
    all += number;
  }
  const int64_t offset = block_sum_before(earlier, sums).total, rows = block_sum_before(all, sums).total;
  for (int64_t k = b < a.batch ? threadIdx.x : a.candidates; k < a.candidates; k += blockDim.x) {
    const int64_t node = a.node.at(b, k), at = b * a.candidates + k;
    int64_t rank = offset;
    for (int64_t j = 0; j < a.candidates; ++j) rank += first[j] && a.node.at(b, j) < node;
    a.out_row[at] = node >= 0 ? int32_t(rank) : -1;
    if (first[k]) a.store(b, k, rank);
    if (at >= rows) a.clear(at);
  }
  if (b == 0 && threadIdx.x == 0) a.num_rows[0] = int32_t(rows);
}

inline void run(const Gpu& gpu, const DistinctRowsArgs& a) {
  const DistinctRowsLaunch with_first{a, reinterpret_cast<int32_t*>(gpu.workspace(4 * a.total()))};
  const dim3 grid{unsigned(a.batch > 0 ? a.batch : 1)};  // one block writes that there are no rows
  const int threads = draw_threads(a.candidates);
  if (a.batch > 0) gpu.launch(first_candidates_kernel, grid, threads, 4 * 33, with_first);
  gpu.launch(distinct_rows_kernel, grid, threads, 4 * 33, with_first);
}

}  // namespace vstar
