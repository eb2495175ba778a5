// group_advantage: one block per request, one warp for the usual groups and eight for large ones. Threads stride over
// the group three times: sum and extremes, squares, result. The rewards come from the caches after the first time. At
// 1,024 requests of 64 rewards the launch itself is most of the time, so nothing is kept in registers.
#pragma once

#include "common/moments.h"
#include "common/ops/group_advantage.h"
#include "cuda/device.cuh"

namespace vstar {

template <int kWarps>
__global__ void __launch_bounds__(32 * kWarps, kWarps == 1 ? 16 : 4) group_advantage_kernel(GroupAdvantageArgs a) {
  VSTAR_SHARED(memory);
  double* const scratch = reinterpret_cast<double*>(memory);
  const int64_t b = blockIdx.x;
  double totals[2] = {0, 0};  // of the rewards, and how many there are
  float top = -kInf, bottom = kInf;
  bool finite = true;
  for (int64_t g = threadIdx.x; g < a.group; g += 32 * kWarps) {
    if (!a.mask.at(b, g)) continue;
    const float x = a.reward.at(b, g);
    totals[0] += double(x);
    totals[1] += 1;
    top = x > top ? x : top;
    bottom = x < bottom ? x : bottom;
    finite = finite && x - x == 0;
  }
  block_sums<kWarps>(totals, scratch);
  const double count = totals[1];
  // Whether some rewards differ: the extremes of all threads, and whether all are finite.
  top = warp_max(top);
  bottom = warp_min(bottom);
  bool equal = __all_sync(kAll, finite) != 0;
  if (kWarps > 1) {
    float* const extremes = reinterpret_cast<float*>(scratch);
    if (lane() == 0) {
      extremes[2 * warp()] = equal ? top : kInf;
      extremes[2 * warp() + 1] = equal ? bottom : -kInf;
    }
    __syncthreads();
    for (int i = 0; i < kWarps; ++i) {
      top = extremes[2 * i] > top ? extremes[2 * i] : top;
      bottom = extremes[2 * i + 1] < bottom ? extremes[2 * i + 1] : bottom;
    }
    __syncthreads();
  }
  equal = equal && top == bottom;

  // NaN unless all are finite, whatever a finite reward and an infinite sum give.
  const double mean = totals[0] - totals[0] == 0 ? totals[0] / count : double(NAN);
  double squares[1] = {0};
  for (int64_t g = threadIdx.x; g < a.group; g += 32 * kWarps) {
    if (!a.mask.at(b, g)) continue;
    const double off = double(a.reward.at(b, g)) - mean;
    squares[0] += off * off;
  }
  block_sums<kWarps>(squares, scratch);
  const bool signal = count >= 2 && !equal;
  const double scale =
      a.scaled ? standardizing_scale(squares[0], count - double(a.ddof), a.std_floor, a.eps) : 1.0;
  for (int64_t g = threadIdx.x; g < a.group; g += 32 * kWarps) {
    const bool valid = signal && a.mask.at(b, g);
    a.advantage[b * a.group + g] = valid ? float((double(a.reward.at(b, g)) - mean) * scale) : 0.0f;
  }
}

inline void run(const Gpu& gpu, const GroupAdvantageArgs& a) {
  if (a.batch == 0 || a.group == 0) return;
  const dim3 grid{unsigned(a.batch)};
  if (a.group <= 1024) {
    gpu.launch(group_advantage_kernel<1>, grid, 32, 0, a);
  } else {
    gpu.launch(group_advantage_kernel<8>, grid, 256, 2 * 8 * 8, a);
  }
}

}  // namespace vstar
