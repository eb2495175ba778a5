// The k best of a block's candidates. A candidate is a 64-bit key, larger is better, 0 is none; no two are equal.
//
// find_bound narrows a range of keys down as a radix select does, but begins with that of the keys that exist: 2,048
// counters divide it evenly, so scores that lie close together still spread over them. It does not look for the k-th
// largest key, but for a bound that at least k keys reach and no more than there is room for: mostly one round. Counts
// are integers, so neither the order of the atomics nor that of the threads shows.
#pragma once

#include "common/order.h"
#include "cuda/device.cuh"

namespace vstar {

constexpr int kSelectThreads = 512, kSelectWarps = kSelectThreads / 32, kCounters = 4 * kSelectThreads;

struct SelectScratch {
  uint4 counter[kSelectThreads];
  uint32_t low[kSelectWarps], high[kSelectWarps], sums[kSelectWarps];
  uint32_t found, number, ahead, equal;  // what one thread tells the others
};

// Ends with a barrier.
VSTAR_DEVICE void clear(SelectScratch& s) {
  s.counter[threadIdx.x] = uint4{0, 0, 0, 0};
  if (threadIdx.x == 0) s.found = 0;
  __syncthreads();
}

// The keys in [low, high], of which so many exist.
struct KeyRange {
  uint64_t low, high;
  uint32_t exist;
};

// A key: its upper half is the score, its lower half the complement of a number. A score of 0 is no candidate.
VSTAR_DEVICE uint64_t numbered(uint32_t score, uint32_t number) {
  return score > 0 ? uint64_t(score) << 32 | uint32_t(~number) : 0;
}
// The least of the keys with this score and a number below `numbers`.
VSTAR_DEVICE uint64_t least_key(uint32_t score, uint32_t numbers) { return uint64_t(score) << 32 | uint32_t(~(numbers - 1)); }

// The range of all keys, whose numbers are below `numbers`; each(use) hands those of a thread to `use`.
template <class Each>
VSTAR_DEVICE KeyRange find_range(const Each& each, uint32_t numbers, SelectScratch& s) {
  uint32_t least = ~0u, most = 0, exist = 0;
  each([&](uint64_t key) {
    const uint32_t score = uint32_t(key >> 32);
    if (score == 0) return;
    least = score < least ? score : least;
    most = score > most ? score : most;
    ++exist;
  });
  least = warp_min(least);
  most = warp_max(most);
  exist = warp_sum(exist);
  if (lane() == 0) {
    s.low[warp()] = least;
    s.high[warp()] = most;
    s.sums[warp()] = exist;
  }
  __syncthreads();
  const bool counts = lane() < kSelectWarps;
  least = warp_min(counts ? s.low[lane()] : ~0u);
  most = warp_max(counts ? s.high[lane()] : 0u);
  exist = warp_sum(counts ? s.sums[lane()] : 0u);
  return {least_key(least, numbers), uint64_t(most) << 32 | ~0u, exist};
}

// A bound that at least k and at most `room` of the keys reach, more of which are in the range than there is room for. The
// counters are clear before and after.
template <class Each>
VSTAR_DEVICE uint64_t find_bound(const Each& each, const KeyRange& range, uint32_t k, uint32_t room, SelectScratch& s) {
  uint64_t low = range.low, high = range.high;
  while (true) {
    const int bits = 64 - __clzll(int64_t(high - low)), shift = bits > 11 ? bits - 11 : 0;
    each([&](uint64_t key) {
      if (key < low || key > high) return;
      const uint32_t i = uint32_t((key - low) >> shift);
      atomicAdd(reinterpret_cast<uint32_t*>(s.counter) + i, 1u);
    });
    __syncthreads();
    // From the highest counter down, four per thread.
    uint4& mine = s.counter[kSelectThreads - 1 - int(threadIdx.x)];
    const uint32_t count[4] = {mine.w, mine.z, mine.y, mine.x}, sum = mine.x + mine.y + mine.z + mine.w;
    mine = uint4{0, 0, 0, 0};
    uint32_t ahead = uint32_t(warp_sum_before(int(sum)));
    if (lane() == 31) s.sums[warp()] = ahead + sum;
    __syncthreads();
    ahead += warp_sum(lane() < warp() ? s.sums[lane()] : 0u);
    if (ahead < k && k <= ahead + sum) {
      int i = 0;
      uint32_t equal = count[0];
#pragma unroll
      for (int j = 1; j < 4; ++j) {
        if (ahead + equal < k) ahead += equal, equal = count[j], i = j;
      }
      s.number = uint32_t(kCounters - 1 - 4 * int(threadIdx.x) - i);
      s.ahead = ahead;
      s.equal = equal;
    }
    __syncthreads();
    low += uint64_t(s.number) << shift;
    if (s.ahead + s.equal <= room) return low;
    const uint64_t last = low + ((uint64_t(1) << shift) - 1);
    high = last < high ? last : high;
    k -= s.ahead;
    room -= s.ahead;
  }
}

// How many of n <= kSelectThreads distinct keys are larger than a candidate's: its place among them. A thread's candidate is
// that of number warp() + kSelectWarps * lane(); every warp compares its own with all, four at a time.
VSTAR_DEVICE uint32_t rank_of_own(const uint64_t* keys, uint32_t n) {
  uint32_t rank = 0;
  for (uint32_t first = 0; kSelectWarps * first + warp() < n; first += 4) {
    uint64_t key[4];
    uint32_t ahead[4] = {0, 0, 0, 0};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint32_t i = kSelectWarps * (first + j) + warp();
      key[j] = keys[i < n ? i : 0];
    }
    for (uint32_t i = lane(); i < n; i += 32) {
      const uint64_t other = keys[i];
#pragma unroll
      for (int j = 0; j < 4; ++j) ahead[j] += other > key[j];
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      ahead[j] = warp_sum(ahead[j]);
      if (uint32_t(lane()) == first + j) rank = ahead[j];
    }
  }
  return rank;
}

// Sort 64-bit keys, descending; the room of `keys` is `size`, a power of two, of which n are filled. Ends with a barrier.
VSTAR_DEVICE void sort_descending(uint64_t* keys, int64_t n, int64_t size) {
  const int threads = int(blockDim.x), thread = int(threadIdx.x);
  for (int64_t i = n + thread; i < size; i += threads) keys[i] = 0;
  __syncthreads();
  for (int64_t run = 2; run <= size; run *= 2) {
    for (int64_t step = run / 2; step > 0; step /= 2) {
      for (int64_t i = thread; i < size / 2; i += threads) {
        const int64_t low = 2 * i - (i & (step - 1)), high = low + step;
        const uint64_t x = keys[low], y = keys[high];
        if ((x < y) == ((low & run) == 0)) {
          keys[low] = y;
          keys[high] = x;
        }
      }
      __syncthreads();
    }
  }
}

}  // namespace vstar
