// The steps of value-guided decoding. A round, select and insert, takes one warp per tree: the lanes lie along the
// tree's nodes (a few dozen to a few thousand), so that looking for the best child of a node, or for a node of a name,
// is a scan and a reduction in the warp, and nothing waits for other warps. The arrays stay in global memory; a tree's
// part of them is a few KB and in the cache of its multiprocessor after the first look. Lane 0 writes.
//
// The candidates at the end take one block per tree: every leaf gets two integers that order as the op says, and the
// best after the last is taken k times.
#pragma once

#include "common/ops/ved.h"
#include "cuda/device.cuh"

namespace vstar {

constexpr int kTreesPerBlock = 4;

// ---------------------------------------------------------------- select

// Whether a node of this name is in the tree. The same answer in all lanes.
VSTAR_DEVICE bool is_in_tree(const int32_t* node, int64_t size, int32_t name) {
  for (int64_t first = 0; first < size; first += 32) {
    const int64_t s = first + lane();
    if (__any_sync(kAll, s < size && node[s] == name)) return true;
  }
  return false;
}

__global__ void __launch_bounds__(32 * kTreesPerBlock, 4) ved_select_kernel(VedSelectArgs a) {
  const int64_t b = int64_t(blockIdx.x) * kTreesPerBlock + warp();
  if (b >= a.batch) return;  // a whole warp, and no barriers of the block follow
  const int64_t base = b * a.capacity, rows = a.rows();
  const int32_t *node = a.node + base, *parent = a.parent + base;
  const int32_t* depth = a.depth + base;
  const float* priority = a.priority + base;
  int32_t *visits = a.visits + base, *next_child = a.next_child + base;
  const int32_t* child_node = a.child_node + base * a.children;

  for (int64_t r = lane(); r < rows; r += 32) a.clear(b * rows + r);
  __syncwarp();
  const int64_t size = tree_size(a.size[b], a.capacity);
  if (size == 0) return;
  const int64_t allowed = a.budget[b];
  int64_t left = allowed - size;

  // Passes the gate and has entries left in its list.
  const auto may_open = [&](int64_t s) {
    const int64_t level = depth[s];
    if (level < 0 || level > a.levels) return false;
    return double(priority[s]) >= a.gate(b, level) && next_child[s] >= 0 && next_child[s] < a.listed(base + s);
  };
  // Whether it has an unexpanded child; moves its pointer past those that the initial beam search has put into the tree.
  const auto open = [&](int64_t s) {
    if (!may_open(s)) return false;
    const int64_t count = a.listed(base + s);
    int32_t next = next_child[s];
    while (next < count && is_in_tree(node, size, child_node[s * a.children + next])) ++next;
    __syncwarp();  // all lanes have read it
    if (lane() == 0) next_child[s] = next;
    __syncwarp();
    return next < count;
  };
  const auto expandable = [&] {
    for (int64_t first = 0; first < size; first += 32) {
      const int64_t s = first + lane();
      unsigned some = __ballot_sync(kAll, s < size && may_open(s));
      while (some != 0) {
        if (open(first + __ffs(int(some)) - 1)) return true;
        some &= some - 1;
      }
    }
    return false;
  };

  for (int64_t path = 0; path < a.paths; ++path) {
    bool expanded = false;
    for (int64_t idle = 0; !expanded; ++idle) {
      if (left <= 0 || !expandable()) return;
      if (idle > a.max_idle) {
        __syncwarp();  // all lanes have read the budget
        if (lane() == 0) a.budget[b] = int32_t(allowed - left);
        return;
      }
      // From the root always to the child of largest bound, ties to the lower token, until there is no child. Visits
      // rise on the way: a bound looks at those of nodes further down.
      const double log_total = log1p(double(visits[0]));
      __syncwarp();
      int64_t current = 0;
      for (int64_t level = 0;; ++level) {
        if (lane() == 0) ++visits[current];
        if (level == a.levels) break;
        if (left > 0 && open(current)) {
          if (lane() == 0) a.take(b, b * rows + path * a.levels + level, current);
          expanded = true;
          --left;
        }
        int64_t best = -1;
        int32_t name = 0;
        double bound = 0;
        const auto offer = [&](int64_t s, int32_t its_name, double its_bound) {
          if (s < 0) return;
          const bool better = its_bound > bound || (its_bound == bound && (its_name < name || (its_name == name && s < best)));
          if (best < 0 || better) best = s, name = its_name, bound = its_bound;
        };
        for (int64_t s = 1 + lane(); s < size; s += 32) {
          if (parent[s] == current) offer(s, node[s], tree_bound(priority[s], visits[s], log_total, a.exploration));
        }
        for (int step = 16; step > 0; step /= 2) {
          const int64_t s = __shfl_xor_sync(kAll, best, step);
          const int32_t its_name = __shfl_xor_sync(kAll, name, step);
          const double its_bound = __shfl_xor_sync(kAll, bound, step);
          offer(s, its_name, its_bound);
        }
        if (best < 0) break;
        current = best;
      }
      __syncwarp();
    }
  }
}

inline dim3 ved_grid(int64_t batch) { return dim3{unsigned((batch + kTreesPerBlock - 1) / kTreesPerBlock)}; }

inline void run(const Gpu& gpu, const VedSelectArgs& a) {
  if (a.batch > 0) gpu.launch(ved_select_kernel, ved_grid(a.batch), 32 * kTreesPerBlock, 0, a);
}

// ---------------------------------------------------------------- insert

__global__ void __launch_bounds__(32 * kTreesPerBlock, 8) ved_insert_kernel(VedInsertArgs a) {
  const int64_t b = int64_t(blockIdx.x) * kTreesPerBlock + warp();
  if (b >= a.batch) return;  // a whole warp, and no barriers of the block follow
  int32_t size = a.size[b];
  for (int64_t row = b * a.rows; row < (b + 1) * a.rows; ++row) {
    const int64_t level = a.level(b, row, size);
    if (level < 0) continue;
    const int64_t to = b * a.capacity + size++;
    a.copy_entries(to, row, lane(), 32);
    if (lane() == 0) a.set_up(b, to, row, level);
    __syncwarp();  // the next row may lie below this one
  }
  __syncwarp();  // all lanes have read the size, if no row was taken
  if (lane() == 0) a.size[b] = size;
}

inline void run(const Gpu& gpu, const VedInsertArgs& a) {
  if (a.batch > 0 && a.rows > 0) gpu.launch(ved_insert_kernel, ved_grid(a.batch), 32 * kTreesPerBlock, 0, a);
}

// ---------------------------------------------------------------- candidates

struct VedCandidatesLaunch : VedCandidatesArgs {
  LeafKey* key;  // [B, T * (1 + slots)]
};

constexpr int kCandidateThreads = 128;

__global__ void __launch_bounds__(kCandidateThreads, 8) ved_candidates_kernel(VedCandidatesLaunch a) {
  VSTAR_SHARED(memory);
  constexpr int kWarps = kCandidateThreads / 32;
  LeafKey* const warp_key = reinterpret_cast<LeafKey*>(memory);       // [kWarps]
  int64_t* const warp_place = reinterpret_cast<int64_t*>(warp_key + kWarps);  // [kWarps]
  const int64_t b = blockIdx.x, base = b * a.capacity, width = a.width(), size = tree_size(a.size[b], a.capacity);
  LeafKey* const key = a.key + base * width;
  const int32_t *node = a.node + base, *depth = a.depth + base;

  const int64_t entries = size * width;
  for (int64_t i = threadIdx.x; i < entries; i += kCandidateThreads) {
    const int64_t s = i / width, slot = i % width - 1;
    LeafKey mine{0, 0};
    if (slot < 0) {
      if (depth[s] == a.length) mine = a.evaluated_key(base + s);
    } else if (slot < a.num_leaves[base + s]) {
      const int32_t leaf = a.leaf_node[(base + s) * a.slots + slot];
      bool evaluated = false;
      for (int64_t t = 0; t < size && !evaluated; ++t) evaluated = depth[t] == a.length && node[t] == leaf;
      if (!evaluated) mine = a.completion_key(base + s, slot);
    }
    key[i] = mine;
  }
  __syncthreads();

  LeafKey last{~uint64_t(0), ~uint64_t(0)};
  int64_t place = -1, count = 0;
  for (; count < a.k; ++count) {
    LeafKey best{0, 0};
    int64_t found = entries;
    for (int64_t i = threadIdx.x; i < entries; i += kCandidateThreads) {
      if (better_leaf(last, place, key[i], i) && better_leaf(key[i], i, best, found)) best = key[i], found = i;
    }
    const auto take_better = [&](const LeafKey& other, int64_t its_place) {
      if (better_leaf(other, its_place, best, found)) best = other, found = its_place;
    };
    for (int step = 16; step > 0; step /= 2) {
      const uint64_t first = __shfl_xor_sync(kAll, best.first, step), second = __shfl_xor_sync(kAll, best.second, step);
      take_better({first, second}, __shfl_xor_sync(kAll, found, step));
    }
    if (lane() == 0) {
      warp_key[warp()] = best;
      warp_place[warp()] = found;
    }
    __syncthreads();
    for (int i = 0; i < kWarps; ++i) take_better(warp_key[i], warp_place[i]);
    __syncthreads();
    if (best.first == 0) break;
    last = best;
    place = found;
    if (threadIdx.x == 0) a.store(b, count, found);
  }
  for (int64_t i = count + threadIdx.x; i < a.k; i += kCandidateThreads) a.store(b, i, -1);
  if (threadIdx.x == 0) a.out_count[b] = int32_t(count);
}

inline void run(const Gpu& gpu, const VedCandidatesArgs& a) {
  if (a.batch == 0) return;
  constexpr int64_t shared = kCandidateThreads / 32 * (sizeof(LeafKey) + 8);
  unsigned char* const keys = gpu.workspace(int64_t(sizeof(LeafKey)) * a.batch * a.capacity * a.width());
  const VedCandidatesLaunch with_keys{a, reinterpret_cast<LeafKey*>(keys)};
  gpu.launch(ved_candidates_kernel, dim3{unsigned(a.batch)}, kCandidateThreads, shared, with_keys);
}

}  // namespace vstar
