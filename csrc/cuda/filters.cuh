// filter_items: one launch for the items, then one per level from the leaves up, so that a level is finished before the
// next one reads it. One thread takes a listed item, and in the launch of a level the node above it; without a list one
// warp takes the 32 nodes of a word. Bits are set and cleared by atomics on integers: threads that change the same bit
// agree on it, and other bits of its word belong to other threads.
#pragma once

#include "common/ops/filters.h"
#include "cuda/device.cuh"

namespace vstar {

constexpr int kFilterThreads = 256;
constexpr int64_t kFilterBlocks = 1024;  // per request, where warps take several words

// A word that other threads may be changing, in bits that the reader does not look at.
struct ReadShared {
  VSTAR_DEVICE uint32_t operator()(const int32_t* word) const {
#if defined(VSTAR_EMULATED)
    return uint32_t(__atomic_load_n(word, __ATOMIC_RELAXED));
#else
    return uint32_t(*reinterpret_cast<const volatile int32_t*>(word));
#endif
  }
};

// Make the bits of `mask` in a word those of `value`.
VSTAR_DEVICE void change_bits(int32_t* word, uint32_t mask, uint32_t value) {
  const uint32_t differ = (ReadShared{}(word) ^ value) & mask;
  if (differ & value) atomicOr(reinterpret_cast<unsigned*>(word), differ & value);
  if (differ & ~value) atomicAnd(reinterpret_cast<unsigned*>(word), ~(differ & ~value));
}
VSTAR_DEVICE void change_bit(int32_t* bits, int64_t i, bool value) {
  const uint32_t mask = uint32_t(1) << (i & 31);
  change_bits(bits + (i >> 5), mask, value ? mask : 0);
}

__global__ void __launch_bounds__(kFilterThreads, 4) filter_items_kernel(FilterItemsArgs a) {
  const int64_t at = int64_t(blockIdx.x) * kFilterThreads + threadIdx.x;
  if (at >= a.requests * a.rows) return;
  const int64_t r = at / a.rows, item = a.item(r, at % a.rows);
  if (item >= 0) change_bit(a.allowed_of(r), item, a.allow);
}

// Of the leaves of the listed items, or of what stands so many levels above them.
__global__ void __launch_bounds__(kFilterThreads, 4) filter_nodes_kernel(FilterItemsArgs a, int up) {
  const int64_t at = int64_t(blockIdx.x) * kFilterThreads + threadIdx.x;
  if (at >= a.requests * a.rows) return;
  const int64_t r = at / a.rows, item = a.item(r, at % a.rows);
  int64_t node = item >= 0 ? a.leaf_of(item) : -1;
  for (int i = 0; i < up && node >= 0; ++i) node = a.above(node);
  if (node >= 0) change_bit(a.alive_of(r), node, a.lives(r, node, ReadShared{}));
}

__global__ void __launch_bounds__(kFilterThreads, 4) filter_level_kernel(FilterItemsArgs a, int64_t level) {
  const int64_t first = a.level_offset[level], end = a.level_offset[level + 1], r = blockIdx.y;
  const int64_t warps = int64_t(gridDim.x) * (kFilterThreads / 32);
  const int64_t limit = level + 1 == a.levels ? a.words * 32 : end;  // bits past the last node are cleared
  for (int64_t w = (first >> 5) + int64_t(blockIdx.x) * (kFilterThreads / 32) + warp(); w << 5 < limit; w += warps) {
    const int64_t node = (w << 5) + lane();
    const bool mine = node >= first && node < limit;
    const unsigned mask = __ballot_sync(kAll, mine);
    const unsigned value = __ballot_sync(kAll, mine && node < a.nodes && a.lives(r, node, ReadShared{}));
    if (lane() == 0) change_bits(a.alive_of(r) + w, mask, value);
  }
}

inline void run(const Gpu& gpu, const FilterItemsArgs& a) {
  if (a.row) {
    const dim3 grid{unsigned((a.requests * a.rows + kFilterThreads - 1) / kFilterThreads)};
    if (grid.x == 0) return;
    gpu.launch(filter_items_kernel, grid, kFilterThreads, 0, a);
    for (int up = 0; up < a.levels; ++up) gpu.launch(filter_nodes_kernel, grid, kFilterThreads, 0, a, up);
    return;
  }
  const int64_t blocks = (a.words * 32 + kFilterThreads - 1) / kFilterThreads, most = 65'535;
  for (int64_t first = 0; first < a.requests; first += most) {  // of a grid's second dimension
    FilterItemsArgs part = a;
    part.alive = a.alive_of(first), part.allowed = a.allowed_of(first);
    const int64_t requests = a.requests - first < most ? a.requests - first : most;
    const dim3 grid{unsigned(blocks < kFilterBlocks ? blocks : kFilterBlocks), unsigned(requests)};
    for (int64_t level = a.levels - 1; level >= 0; --level) {
      gpu.launch(filter_level_kernel, grid, kFilterThreads, 0, part, level);
    }
  }
}

}  // namespace vstar
