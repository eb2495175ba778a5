// What the kernels share: views of tensors, sums over warps and blocks, launching. No torch.
//
// Sums run over fixed trees of shuffles, so a result depends on nothing but its inputs. Multiplications and
// additions are never fused by the compiler (-fmad=false): launches that compute a score twice get the same bits,
// and the host compiler, which runs this code in the tests, gets them too.
#pragma once

#include <cmath>

#include "common/floats.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>

// The dynamic shared memory of a block.
#define VSTAR_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#else
#define VSTAR_SHARED(name) unsigned char* const name = reinterpret_cast<unsigned char*>(emulator::shared)
#endif

namespace vstar {
namespace cuda {

constexpr unsigned kAll = 0xFFFFFFFFu;  // lanes
constexpr float kInf = INFINITY;
constexpr float kFloatMax = 3.4028234663852886e38f;

// Shared memory that a block may have on every GPU from sm_80 on; scratch that does not fit lies in a workspace.
constexpr int64_t kMostShared = 96 * 1024;

// Elements of float32, bfloat16 or float16; the dtype is the same for all threads, so the branch costs little.
struct FloatView {
  const void* data;
  FloatType type;
  int64_t stride[3];

  __device__ __forceinline__ float at(int64_t position) const {
    if (type == FloatType::kFloat32) return __ldg(static_cast<const float*>(data) + position);
    const uint16_t bits = __ldg(static_cast<const uint16_t*>(data) + position);
    return type == FloatType::kBFloat16 ? to_float(BFloat16{bits}) : to_float(Float16{bits});
  }
  __device__ __forceinline__ float at(int64_t i, int64_t j) const { return at(i * stride[0] + j * stride[1]); }
  __device__ __forceinline__ float at(int64_t i, int64_t j, int64_t l) const {
    return at(i * stride[0] + j * stride[1] + l * stride[2]);
  }
};

// Integers of 32 or 64 bits.
struct IntView {
  const void* data;
  bool wide;
  int64_t stride[3];

  __device__ __forceinline__ int64_t at(int64_t position) const {
    if (wide) return __ldg(static_cast<const long long*>(data) + position);
    return __ldg(static_cast<const int32_t*>(data) + position);
  }
  __device__ __forceinline__ int64_t at(int64_t i, int64_t j) const { return at(i * stride[0] + j * stride[1]); }
  __device__ __forceinline__ int64_t at(int64_t i, int64_t j, int64_t l) const {
    return at(i * stride[0] + j * stride[1] + l * stride[2]);
  }
};

// A bool array, such as which candidates are there; all true without one.
struct MaskView {
  const unsigned char* data;
  int64_t stride[3];

  __device__ __forceinline__ bool at(int64_t position) const { return data == nullptr || __ldg(data + position) != 0; }
  __device__ __forceinline__ bool at(int64_t i, int64_t j) const { return at(i * stride[0] + j * stride[1]); }
  __device__ __forceinline__ bool at(int64_t i, int64_t j, int64_t l) const {
    return at(i * stride[0] + j * stride[1] + l * stride[2]);
  }
};

__device__ __forceinline__ int lane() { return int(threadIdx.x % 32); }
__device__ __forceinline__ int warp() { return int(threadIdx.x / 32); }

// The same bits in all lanes: every step adds the same two numbers on both sides.
template <class T>
__device__ __forceinline__ T warp_sum(T x) {
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(kAll, x, step);
  return x;
}

template <class T>
__device__ __forceinline__ T warp_max(T x) {
  for (int step = 16; step > 0; step /= 2) {
    const T other = __shfl_xor_sync(kAll, x, step);
    x = other > x ? other : x;
  }
  return x;
}

template <class T>
__device__ __forceinline__ T warp_min(T x) {
  for (int step = 16; step > 0; step /= 2) {
    const T other = __shfl_xor_sync(kAll, x, step);
    x = other < x ? other : x;
  }
  return x;
}

// Sums over a block of kWarps warps, in all threads. `scratch` holds kNumbers * kWarps numbers, free to be used again
// at once.
template <int kWarps, int kNumbers, class T>
__device__ __forceinline__ void block_sums(T (&x)[kNumbers], T* scratch) {
  for (int n = 0; n < kNumbers; ++n) x[n] = warp_sum(x[n]);
  if (kWarps == 1) return;
  if (lane() == 0) {
    for (int n = 0; n < kNumbers; ++n) scratch[n * kWarps + warp()] = x[n];
  }
  __syncthreads();
  for (int n = 0; n < kNumbers; ++n) {
    x[n] = 0;
    for (int i = 0; i < kWarps; ++i) x[n] += scratch[n * kWarps + i];
  }
  __syncthreads();
}

// Sum of the lanes before this one.
__device__ __forceinline__ int warp_sum_before(int x) {
  int sum = x;
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(kAll, sum, step);
    if (lane() >= step) sum += other;
  }
  return sum - x;
}

// Sum of the threads before this one in the block, and of all of them. `scratch` holds 33 numbers, free to be
// used again at once.
struct BlockSum {
  int before, total;
};
__device__ __forceinline__ BlockSum block_sum_before(int x, int* scratch) {
  const int within = warp_sum_before(x), warps = int(blockDim.x / 32);
  if (lane() == 31) scratch[warp()] = within + x;
  __syncthreads();
  if (warp() == 0) {
    const int mine = lane() < warps ? scratch[lane()] : 0;
    const int before = warp_sum_before(mine);
    __syncwarp();
    scratch[lane()] = before;
    if (lane() == 31) scratch[32] = before + mine;
  }
  __syncthreads();
  const BlockSum result{scratch[warp()] + within, scratch[32]};
  __syncthreads();
  return result;
}

inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }
inline int64_t next_power_of_2(int64_t x) {
  int64_t p = 1;
  while (p < x) p *= 2;
  return p;
}

// Where and how kernels are launched.
struct Launcher {
#if defined(__CUDACC__)
  cudaStream_t stream;

  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), dim3 grid, int threads, int64_t shared, const Arguments&... arguments) const {
    if (shared > 48 * 1024) check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)));
    kernel<<<grid, dim3(unsigned(threads)), size_t(shared), stream>>>(arguments...);
    check(cudaGetLastError());
  }

  static void check(cudaError_t error);
#else
  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), dim3 grid, int threads, int64_t shared, const Arguments&... arguments) const {
    emulator::launch(kernel, grid, unsigned(threads), size_t(shared), arguments...);
  }
#endif
};

}  // namespace cuda
}  // namespace vstar
