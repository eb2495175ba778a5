// group_advantage: a block a request, one warp for the usual groups and eight for large ones. Threads stride over the
// group three times: sum and extremes, squares, result. The rewards come from the caches after the first time. At
// 1,024 requests of 64 rewards the launch itself is most of the time, so nothing is kept in registers.
#pragma once

#include "cuda/device.cuh"

namespace vstar {
namespace cuda {

struct GroupAdvantage {
  FloatView reward;  // [B, G]
  MaskView mask;
  float* out;
  int64_t batch, group, ddof;
  double eps, std_floor;
};

// The sum over a block of kWarps warps, in all threads. `scratch` holds kWarps numbers.
template <int kWarps>
__device__ __forceinline__ double block_sum(double x, double* scratch) {
  x = warp_sum(x);
  if (kWarps == 1) return x;
  if (lane() == 0) scratch[warp()] = x;
  __syncthreads();
  double sum = 0;
  for (int i = 0; i < kWarps; ++i) sum += scratch[i];
  __syncthreads();
  return sum;
}

template <int kWarps>
__global__ void __launch_bounds__(32 * kWarps, kWarps == 1 ? 16 : 4) group_advantage_kernel(GroupAdvantage a) {
  VSTAR_SHARED(memory);
  double* const scratch = reinterpret_cast<double*>(memory);
  const int64_t b = blockIdx.x;
  double sum = 0, count = 0;
  float top = -kInf, bottom = kInf;
  bool ordinary = true;
  for (int64_t g = threadIdx.x; g < a.group; g += 32 * kWarps) {
    if (!a.mask.at(b, g)) continue;
    const float x = a.reward.at(b, g);
    sum += double(x);
    count += 1;
    top = x > top ? x : top;
    bottom = x < bottom ? x : bottom;
    ordinary = ordinary && x == x;
  }
  sum = block_sum<kWarps>(sum, scratch);
  count = block_sum<kWarps>(count, scratch);
  // Whether some rewards differ: from the first one's side, extremes and NaN of all threads.
  top = warp_max(top);
  bottom = warp_min(bottom);
  bool equal = __all_sync(kAll, ordinary) != 0;
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

  const double mean = sum / count;
  double squares = 0;
  for (int64_t g = threadIdx.x; g < a.group; g += 32 * kWarps) {
    if (!a.mask.at(b, g)) continue;
    const double off = double(a.reward.at(b, g)) - mean;
    squares += off * off;
  }
  squares = block_sum<kWarps>(squares, scratch);
  const bool signal = count > double(a.ddof) && !equal;
  const double std = sqrt(squares / (count - double(a.ddof)));
  const double scale = 1.0 / ((std > a.std_floor || std != std ? std : a.std_floor) + a.eps);
  for (int64_t g = threadIdx.x; g < a.group; g += 32 * kWarps) {
    const bool there = signal && a.mask.at(b, g);
    a.out[b * a.group + g] = there ? float((double(a.reward.at(b, g)) - mean) * scale) : 0.0f;
  }
}

// One launch, no workspace.
inline void group_advantage(const GroupAdvantage& a, const Launcher& launch) {
  if (a.batch == 0 || a.group == 0) return;
  const dim3 grid{unsigned(a.batch)};
  if (a.group <= 1024) {
    launch(group_advantage_kernel<1>, grid, 32, 0, a);
  } else {
    launch(group_advantage_kernel<8>, grid, 256, 8 * 8, a);
  }
}

}  // namespace cuda
}  // namespace vstar
