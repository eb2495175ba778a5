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
  bool ordered = true;
  for (int64_t g = threadIdx.x; g < a.group; g += 32 * kWarps) {
    if (!a.mask.at(b, g)) continue;
    const float x = a.reward.at(b, g);
    totals[0] += double(x);
    totals[1] += 1;
    top = x > top ? x : top;
    bottom = x < bottom ? x : bottom;
    ordered = ordered && x == x;
  }
  block_sums<kWarps>(totals, scratch);
  const double count = totals[1], mean = totals[0] / count;
  // Whether some rewards differ: from the first one's side, extremes and NaN of all threads.
  top = warp_max(top);
  bottom = warp_min(bottom);
  bool equal = __all_sync(kAll, ordered) != 0;
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

  double squares[1] = {0};
  for (int64_t g = threadIdx.x; g < a.group; g += 32 * kWarps) {
    if (!a.mask.at(b, g)) continue;
    const double off = double(a.reward.at(b, g)) - mean;
    squares[0] += off * off;
  }
  block_sums<kWarps>(squares, scratch);
  const bool signal = count > double(a.ddof) && !equal;
  const double scale = standardizing_scale(squares[0], count - double(a.ddof), a.std_floor, a.eps);
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
