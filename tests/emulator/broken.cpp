// Kernels with one fault each, and the same without it: the emulator has to tell them apart. Run with the name of a
// fault; built with AddressSanitizer.
#include <cstdio>

#include "cuda/device.cuh"

using namespace vstar;

namespace {

constexpr int kThreads = 64;

// Sums of neighbors in shared memory; out[i] = in[i] + in[i + 1], the last its own.
__global__ void neighbors(const int* in, int* out, int n, bool read_past, bool barrier) {
  VSTAR_SHARED(memory);
  int* const mine = reinterpret_cast<int*>(memory);
  const int i = int(threadIdx.x);
  mine[i] = __ldg(in + i + (read_past ? 1 : 0));
  if (barrier) __syncthreads();
  out[i] = mine[i] + (i + 1 < n ? mine[i + 1] : 0);
}

__global__ void shared_overrun(int* out) {
  VSTAR_SHARED(memory);
  int* const mine = reinterpret_cast<int*>(memory);
  mine[threadIdx.x + 1] = 1;
  __syncthreads();
  out[threadIdx.x] = mine[threadIdx.x];
}

// Every lane gets the next one's number, if all take part.
__global__ void shuffle(int* out, int lanes) {
  if (int(threadIdx.x % 32) < lanes) out[threadIdx.x] = __shfl_sync(kAll, int(threadIdx.x), int(threadIdx.x + 1));
}

__global__ void shuffle_from_outside(int* out) {
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_xor_sync(0xFFFFu, int(threadIdx.x), 16);
}

__global__ void foreign_mask(int* out) { out[threadIdx.x] = __ballot_sync(1u, 1); }

__global__ void different_votes(int* out) {
  out[threadIdx.x] = threadIdx.x % 2 ? int(__ballot_sync(kAll, 1)) : __shfl_sync(kAll, 1, 0);
}

__global__ void barrier_for_some(int* out, int threads) {
  if (int(threadIdx.x) < threads) __syncthreads();
  out[threadIdx.x] = 1;
}

// 0: as it should be; 1: reported, or a wrong result.
int run(const std::string& fault) {
  std::vector<int> in(kThreads), out(kThreads), want(kThreads);
  for (int i = 0; i < kThreads; ++i) in[i] = 3 * i;
  for (int i = 0; i < kThreads; ++i) want[i] = in[i] + (i + 1 < kThreads ? in[i + 1] : 0);
  const Launcher launch;
  const dim3 one{1};
  for (int round = 0; round < 5; ++round) {
    std::fill(out.begin(), out.end(), 0);
    if (fault == "shuffle" || fault == "no shuffle") {
      launch(shuffle, one, kThreads, 0, out.data(), fault == "shuffle" ? 31 : 32);
      continue;
    }
    if (fault == "shuffle from outside") launch(shuffle_from_outside, one, kThreads, 0, out.data());
    if (fault == "foreign mask") launch(foreign_mask, one, kThreads, 0, out.data());
    if (fault == "different operations") launch(different_votes, one, kThreads, 0, out.data());
    if (fault == "barrier for some") launch(barrier_for_some, one, kThreads, 0, out.data(), kThreads - 1);
    if (fault == "shared memory") launch(shared_overrun, one, kThreads, 4 * kThreads, out.data());
    launch(neighbors, one, kThreads, 4 * kThreads, in.data(), out.data(), kThreads, fault == "read", fault != "no barrier");
    if (out != want) {
      fprintf(stderr, "wrong result\n");
      return 1;
    }
  }
  return 0;
}

}  // namespace

int main(int, char** arguments) {
  try {
    return run(arguments[1]);
  } catch (const std::runtime_error& error) {
    fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
