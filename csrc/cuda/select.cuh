// The k best of a block's candidates. A candidate is a 32-bit key, larger is better, 0 is none; among equal keys the
// lower number is better.
//
// find_cut looks for the k-th largest key as a radix select does, but over the range of the keys that exist: 2,048
// counters divide it evenly, so scores that lie close together still spread over them, and mostly two or three rounds
// settle all 32 bits. Counts are integers, so neither the order of the atomics nor that of the threads shows.
#pragma once

#include "common/order.h"
#include "cuda/device.cuh"

namespace vstar {

constexpr int kCounters = 2048;

struct SelectScratch {
  uint32_t counter[kCounters];
  uint32_t low[32], high[32];
  int32_t sums[33];
  int32_t found, number;  // what one thread tells the others
  uint32_t ahead;
};

// All keys above `key` win, and the first `ties` of those equal to it, which may be all of them.
struct Cut {
  uint32_t key, ties;
  bool all_ties;
};

// The cut that leaves the k best of n candidates, or all of them if fewer exist. Ends with a barrier.
template <class Key>
VSTAR_DEVICE Cut find_cut(const Key& key, int64_t n, uint32_t k, SelectScratch& s) {
  const int threads = int(blockDim.x), thread = int(threadIdx.x), warps = threads / 32;
  uint32_t low = ~0u, high = 0, exist = 0;
  for (int64_t i = thread; i < n; i += threads) {
    const uint32_t x = key(i);
    if (x == 0) continue;
    low = x < low ? x : low;
    high = x > high ? x : high;
    ++exist;
  }
  low = warp_min(low);
  high = warp_max(high);
  exist = warp_sum(exist);
  if (lane() == 0) {
    s.low[warp()] = low;
    s.high[warp()] = high;
    s.sums[warp()] = int32_t(exist);
  }
  __syncthreads();
  exist = 0;
  for (int i = 0; i < warps; ++i) {
    low = s.low[i] < low ? s.low[i] : low;
    high = s.high[i] > high ? s.high[i] : high;
    exist += uint32_t(s.sums[i]);
  }
  __syncthreads();
  if (exist <= k) return {exist > 0 ? low : ~0u, exist, true};

  uint32_t equal = exist;  // of the keys in [low, high]
  while (low < high) {  // the k-th largest of the keys in [low, high] is looked for
    const int bits = 32 - __clz(int(high - low)), shift = bits > 11 ? bits - 11 : 0;
    for (int i = thread; i < kCounters; i += threads) s.counter[i] = 0;
    __syncthreads();
    for (int64_t i = thread; i < n; i += threads) {
      const uint32_t x = key(i);
      if (x >= low && x <= high) atomicAdd(&s.counter[(x - low) >> shift], 1u);
    }
    __syncthreads();
    // From the highest counter down, in as many runs as there are threads.
    const int run = kCounters / threads, first = kCounters - 1 - thread * run;
    uint32_t mine = 0;
    for (int i = 0; i < run; ++i) mine += s.counter[first - i];
    uint32_t ahead = uint32_t(block_sum_before(int(mine), s.sums).before);
    if (ahead < k && k <= ahead + mine) {
      int i = first;
      while (ahead + s.counter[i] < k) ahead += s.counter[i--];
      s.number = i;
      s.ahead = ahead;
    }
    __syncthreads();
    const uint32_t start = low + (uint32_t(s.number) << shift);
    const uint32_t last = start + ((1u << shift) - 1);
    k -= s.ahead;
    equal = s.counter[s.number];
    low = start;
    high = last < start || last > high ? high : last;
    __syncthreads();
  }
  return {low, k, k == equal};
}

// Hand every winner to take(slot, i); slots are 0, 1, ... in no particular order. Returns how many there are. Ends
// with a barrier.
template <class Key, class Take>
VSTAR_DEVICE int take_winners(
    const Key& key, int64_t n, const Cut& cut, SelectScratch& s, const Take& take) {
  const int threads = int(blockDim.x), thread = int(threadIdx.x);
  if (thread == 0) s.found = 0;
  __syncthreads();
  uint32_t ties = 0;  // before the threads' stretch
  for (int64_t first = 0; first < n; first += threads) {
    const int64_t i = first + thread;
    const uint32_t x = i < n ? key(i) : 0;
    bool wins = x > cut.key;
    if (cut.all_ties) {
      wins = wins || (x == cut.key && x != 0);
    } else {  // which of the ties come first must be counted
      const bool tied = x == cut.key;
      const BlockSum sum = block_sum_before(tied, s.sums);
      wins = wins || (tied && ties + uint32_t(sum.before) < cut.ties);
      ties += uint32_t(sum.total);
    }
    if (wins) take(atomicAdd(&s.found, 1), i);
  }
  __syncthreads();
  const int found = s.found;
  __syncthreads();
  return found;
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
