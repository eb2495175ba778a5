// The steps of beam search between two forwards, each one launch. advance_beams takes one thread per token of the new
// beams: a beam's tokens lie together, and the thread of its last one writes what else it has. rows_to_run numbers the
// rows of all requests, so it takes one block: a thread counts those of neighboring beams, and finds out how many there
// are before its own.
#pragma once

#include "common/ops/beams.h"
#include "cuda/device.cuh"

namespace vstar {

constexpr int kBeamThreads = 256, kRowThreads = 1024;

__global__ void __launch_bounds__(kBeamThreads, 8) advance_beams_kernel(AdvanceBeamsArgs a) {
  const int64_t at = int64_t(blockIdx.x) * kBeamThreads + threadIdx.x, beam = at / (a.length + 1);
  if (beam >= a.batch * a.beams) return;
  const int64_t b = beam / a.beams, k = beam % a.beams, i = at % (a.length + 1), w = a.above(b, k);
  a.store_token(b, k, w, i);
  if (i == a.length) a.store_state(b, k, w);
}

inline void run(const Gpu& gpu, const AdvanceBeamsArgs& a) {
  const int64_t tokens = a.batch * a.beams * (a.length + 1);
  const dim3 grid{unsigned((tokens + kBeamThreads - 1) / kBeamThreads)};
  if (tokens > 0) gpu.launch(advance_beams_kernel, grid, kBeamThreads, 0, a);
}

__global__ void __launch_bounds__(kRowThreads, 1) rows_to_run_kernel(RowsToRunArgs a) {
  VSTAR_SHARED(memory);
  int* const sums = reinterpret_cast<int*>(memory);
  const int64_t beams = a.beams(), threads = blockDim.x, thread = threadIdx.x;
  // First the row holds the length that is missing.
  for (int64_t i = thread; i < beams; i += threads) a.row[i] = int32_t(a.missing(i / a.width, i % a.width));
  __syncthreads();
  for (int64_t b = thread; b < a.batch; b += threads) {
    int32_t tokens = 0;
    for (int64_t w = 0; w < a.width; ++w) tokens += int32_t(a.length) - a.row[b * a.width + w];
    a.num_tokens[b] = tokens;
  }
  const int64_t each = (beams + threads - 1) / threads;
  const int64_t begin = thread * each < beams ? thread * each : beams, end = begin + each < beams ? begin + each : beams;
  // A beam that lacks a length lacks all later ones: its row is its number among those that lack the last.
  int rows = 0;
  for (int64_t i = begin; i < end; ++i) rows += a.row[i] < a.length;
  const int first = block_sum_before(rows, sums).before;
  for (int64_t s = 0; s < a.length; ++s) {
    int missing = 0;
    for (int64_t i = begin; i < end; ++i) missing += a.row[i] <= s;
    const BlockSum sum = block_sum_before(missing, sums);
    int64_t at = sum.before;
    int row = first;
    for (int64_t i = begin; i < end; ++i) {
      if (a.row[i] <= s) a.store(i / a.width, i % a.width, s, at++, row);
      row += a.row[i] < a.length;
    }
    for (int64_t i = sum.total + thread; i < beams; i += threads) a.clear(s, i);
    if (thread == 0) a.num_rows[s] = sum.total;
  }
  const int total = block_sum_before(rows, sums).total;  // all have read what the rows held
  int row = first;
  for (int64_t i = begin; i < end; ++i) {
    const bool there = a.row[i] < a.length;
    if (there) a.parent[row] = a.slot.at(i / a.width, i % a.width);
    a.row[i] = there ? row++ : -1;
  }
  for (int64_t i = total + thread; i < beams; i += threads) a.parent[i] = -1;
}

inline void run(const Gpu& gpu, const RowsToRunArgs& a) {
  const int64_t beams = a.beams() < a.batch ? a.batch : a.beams();
  const int threads = int(beams < kRowThreads ? round_up(beams < 1 ? 1 : beams, 32) : kRowThreads);
  gpu.launch(rows_to_run_kernel, dim3{1}, threads, 4 * 33, a);
}

}  // namespace vstar
