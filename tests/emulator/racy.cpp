// Kernels with one race each, and the same without it. Run with the name of a fault and "race" or "sound"; built with
// ThreadSanitizer, whose reports are counted per launch.
#include <cstdio>
#include <set>

#include "cuda/device.cuh"

using namespace vstar;

namespace {

constexpr int kThreads = 64, kBlocks = 2, kLaunches = 10;
int reports = 0;

VSTAR_DEVICE int* shared_ints(unsigned char* memory) { return reinterpret_cast<int*>(memory); }

// Each thread reads what its neighbor has written to shared memory.
__global__ void syncthreads(int* out, bool race) {
  VSTAR_SHARED(memory);
  int* const mine = shared_ints(memory);
  const int i = int(threadIdx.x);
  mine[i] = i;
  if (!race) __syncthreads();
  out[blockIdx.x * kThreads + i] = mine[(i + 1) % kThreads];
}

// The second barrier of a loop: shared memory is written again while others may still read it.
__global__ void syncthreads_in_loop(int* out, bool race) {
  VSTAR_SHARED(memory);
  int* const mine = shared_ints(memory);
  const int i = int(threadIdx.x);
  for (int round = 0; round < 3; ++round) {
    mine[i] = i + round;
    __syncthreads();
    out[blockIdx.x * kThreads + i] = mine[(i + 1) % kThreads];
    if (!race) __syncthreads();
  }
}

// Within a warp, whose lanes run in step on old GPUs only.
__global__ void syncwarp(int* out, bool race) {
  VSTAR_SHARED(memory);
  int* const mine = shared_ints(memory);
  const int i = int(threadIdx.x), next = i / 32 * 32 + (i + 1) % 32;
  mine[i] = i;
  if (!race) __syncwarp();
  out[blockIdx.x * kThreads + i] = mine[next];
}

// Lane 0 writes what the others have just read.
__global__ void syncwarp_after_read(int* out, bool race) {
  VSTAR_SHARED(memory);
  int* const word = shared_ints(memory) + threadIdx.x / 32;
  if (threadIdx.x % 32 == 0) *word = 1;
  __syncwarp();
  out[blockIdx.x * kThreads + threadIdx.x] = *word;
  if (!race) __syncwarp();
  if (threadIdx.x % 32 == 0) *word = 2;
}

// A barrier of the warp does not order what other warps do.
__global__ void syncwarp_for_block(int* out, bool race) {
  VSTAR_SHARED(memory);
  int* const mine = shared_ints(memory);
  const int i = int(threadIdx.x);
  mine[i] = i;
  if (race) {
    __syncwarp();
  } else {
    __syncthreads();
  }
  out[blockIdx.x * kThreads + i] = mine[(i + 32) % kThreads];
}

// Half of the lanes meet, and then the other half: the halves have not met.
__global__ void half_a_warp(int* out, bool race) {
  VSTAR_SHARED(memory);
  int* const mine = shared_ints(memory);
  const int i = int(threadIdx.x);
  mine[i] = i;
  __syncwarp(!race ? kAll : i % 32 < 16 ? 0xFFFFu : 0xFFFF0000u);
  out[blockIdx.x * kThreads + i] = mine[i ^ 16];
}

// Shuffles and votes are meetings too.
__global__ void shuffle(int* out, bool race) {
  VSTAR_SHARED(memory);
  int* const mine = shared_ints(memory);
  const int i = int(threadIdx.x);
  int x = race ? __shfl_sync(kAll, i, 0) : 0;
  mine[i] = i;
  x += race ? 0 : __shfl_sync(kAll, i, 0);
  out[blockIdx.x * kThreads + i] = x + mine[i ^ 1];
}

__global__ void vote(int* out, bool race) {
  VSTAR_SHARED(memory);
  int* const mine = shared_ints(memory);
  const int i = int(threadIdx.x);
  int x = race ? __any_sync(kAll, i == 3) : 0;
  mine[i] = i;
  x += race ? 0 : __any_sync(kAll, i == 3);
  out[blockIdx.x * kThreads + i] = x + mine[i ^ 1];
}

// Blocks are never synchronized, though they run one after the other here, each with the same barriers.
__global__ void two_blocks(int* out, bool race) {
  __syncthreads();
  if (threadIdx.x == 0) out[race ? 0 : blockIdx.x] = int(blockIdx.x);
  __syncthreads();
}

// Block 0 writes, and another block reads.
__global__ void block_to_block(int* out, bool race) {
  if (blockIdx.x == 0 && threadIdx.x == 5) out[5] = 1;
  if (blockIdx.x == 1 && threadIdx.x == 5) out[6] = out[race ? 5 : 6];
}

// An atomic orders neither what stands beside it nor a plain access to the same word.
__global__ void atomic_as_flag(int* out, bool race) {
  VSTAR_SHARED(memory);
  int* const data = shared_ints(memory);
  int* const flag = data + 2;
  if (threadIdx.x == 0) *flag = 0;
  __syncthreads();
  if (threadIdx.x == 0) *data = 7;
  atomicAdd(flag, 1);
  if (!race) __syncthreads();
  if (threadIdx.x == 40) out[blockIdx.x] = *data + atomicAdd(flag, 0);
}

__global__ void atomic_and_plain(int* out, bool race) {
  VSTAR_SHARED(memory);
  int* const count = shared_ints(memory);
  if (threadIdx.x == 0) *count = 0;
  __syncthreads();
  if (race && threadIdx.x == 33) {
    *count += 1;
  } else {
    atomicAdd(count, 1);
  }
  __syncthreads();
  out[blockIdx.x * kThreads + threadIdx.x] = *count;
}

struct Fault {
  const char* name;
  void (*kernel)(int*, bool);
};
constexpr Fault kFaults[] = {
    {"syncthreads", syncthreads},
    {"syncthreads_in_loop", syncthreads_in_loop},
    {"syncwarp", syncwarp},
    {"syncwarp_after_read", syncwarp_after_read},
    {"syncwarp_for_block", syncwarp_for_block},
    {"half_a_warp", half_a_warp},
    {"shuffle", shuffle},
    {"vote", vote},
    {"two_blocks", two_blocks},
    {"block_to_block", block_to_block},
    {"atomic_as_flag", atomic_as_flag},
    {"atomic_and_plain", atomic_and_plain},
};

}  // namespace

// ThreadSanitizer calls it for every report, in the thread that made it.
extern "C" __attribute__((no_sanitize("thread"))) void __tsan_on_report(void*) { ++reports; }

// For each fault: in how many launches it was reported where it is there, and where it is not.
int main() {
  std::vector<int> out(kBlocks * kThreads);
  for (const Fault& fault : kFaults) {
    int with[2] = {0, 0};
    for (const bool race : {false, true}) {
      for (int n = 0; n < kLaunches; ++n) {
        reports = 0;
        Launcher()(fault.kernel, dim3{kBlocks}, kThreads, 4 * kThreads, out.data(), race);
        with[race] += reports > 0;
      }
    }
    printf("%s %d %d %d\n", fault.name, kLaunches, with[true], with[false]);
  }
}
