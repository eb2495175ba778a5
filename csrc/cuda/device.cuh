// What the kernels share: sums over warps and blocks, launching. No torch.
//
// Sums run over fixed trees of shuffles, so a result depends on nothing but its inputs. Multiplications and
// additions are never fused by the compiler (-fmad=false): launches that compute a score twice get the same bits,
// and the host compiler, which runs this code in the tests, gets them too.
#pragma once

#include <cmath>

#include "common/views.h"

#define VSTAR_DEVICE __device__ __forceinline__

#if defined(__CUDACC__)
#include <cuda_runtime.h>

#include <mutex>
#include <set>
#include <utility>

// The dynamic shared memory of a block.
#define VSTAR_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#else
#define VSTAR_SHARED(name) unsigned char* const name = reinterpret_cast<unsigned char*>(emulator::shared)
#endif

namespace vstar {

constexpr unsigned kAll = 0xFFFFFFFFu;  // lanes
constexpr float kInf = INFINITY;

// The most shared memory that a launch asks for; a block may have it on every GPU from sm_80 on. Scratch that does
// not fit lies in a workspace.
constexpr int64_t kMostShared = 96 * 1024;

VSTAR_DEVICE int lane() { return int(threadIdx.x % 32); }
VSTAR_DEVICE int warp() { return int(threadIdx.x / 32); }

// The same bits in all lanes: every step adds the same two numbers on both sides.
template <class T>
VSTAR_DEVICE T warp_sum(T x) {
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(kAll, x, step);
  return x;
}

template <class T>
VSTAR_DEVICE T warp_max(T x) {
  for (int step = 16; step > 0; step /= 2) {
    const T other = __shfl_xor_sync(kAll, x, step);
    x = other > x ? other : x;
  }
  return x;
}

template <class T>
VSTAR_DEVICE T warp_min(T x) {
  for (int step = 16; step > 0; step /= 2) {
    const T other = __shfl_xor_sync(kAll, x, step);
    x = other < x ? other : x;
  }
  return x;
}

VSTAR_DEVICE uint32_t warp_or(uint32_t x) {
#if defined(__CUDA_ARCH__)
  return __reduce_or_sync(kAll, x);
#else
  for (int step = 16; step > 0; step /= 2) x |= __shfl_xor_sync(kAll, x, step);
  return x;
#endif
}

#if defined(__CUDA_ARCH__)  // in one instruction
VSTAR_DEVICE uint32_t warp_sum(uint32_t x) { return __reduce_add_sync(kAll, x); }
VSTAR_DEVICE uint32_t warp_max(uint32_t x) { return __reduce_max_sync(kAll, x); }
VSTAR_DEVICE uint32_t warp_min(uint32_t x) { return __reduce_min_sync(kAll, x); }
#endif

// Sums over a block of kWarps warps, in all threads. `scratch` holds kNumbers * kWarps numbers, free to be used again
// at once.
template <int kWarps, int kNumbers, class T>
VSTAR_DEVICE void block_sums(T (&x)[kNumbers], T* scratch) {
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
VSTAR_DEVICE int warp_sum_before(int x) {
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
VSTAR_DEVICE BlockSum block_sum_before(int x, int* scratch) {
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
  template <class... Parameters, class... Arguments>
  void operator()(
      void (*kernel)(Parameters...), dim3 grid, int threads, int64_t shared, const Arguments&... arguments) const {
#if defined(__CUDACC__)
    if (shared > 48 * 1024) allow_most_shared(reinterpret_cast<const void*>(kernel));
    kernel<<<grid, dim3(unsigned(threads)), size_t(shared), stream>>>(arguments...);
    check(cudaGetLastError());
#else
    emulator::launch(kernel, grid, unsigned(threads), size_t(shared), arguments...);
#endif
  }

#if defined(__CUDACC__)
  cudaStream_t stream;

  static void check(cudaError_t error);

 private:
  // Once per kernel and device, to the most that any launch asks for: threads that raised it to what they need
  // themselves could lower it for each other.
  static void allow_most_shared(const void* kernel) {
    static std::mutex mutex;
    static std::set<std::pair<const void*, int>> done;
    int device = 0;
    check(cudaGetDevice(&device));
    const std::lock_guard<std::mutex> lock(mutex);
    if (done.count({kernel, device})) return;
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(kMostShared)));
    done.insert({kernel, device});
  }
#endif
};

// What a launch plan asks for.
class Gpu {
 public:
  explicit Gpu(const Launcher& launcher) : launch(launcher) {}
  // Scratch for the launches of this call; null for no bytes.
  virtual unsigned char* workspace(int64_t bytes) const = 0;

  const Launcher launch;

 protected:
  ~Gpu() = default;
};

}  // namespace vstar
