// The steps of value-guided decoding. A round, select and insert, is one warp a tree: the lanes lie along the tree's
// nodes (a few dozen to a few thousand), so that looking for the best child of a node, or for a node of a name, is a
// scan and a reduction in the warp, and nothing waits for other warps. The arrays stay in global memory; a tree's
// part of them is a few KB and in the cache of its multiprocessor after the first look. Lane 0 writes.
//
// The candidates at the end are a block a tree: every leaf gets two integers that order as the op says, and the best
// after the last is taken k times.
#pragma once

#include "common/order.h"
#include "common/tree.h"
#include "cuda/device.cuh"

namespace vstar {
namespace cuda {

constexpr int kTreesPerBlock = 4;

// ---------------------------------------------------------------- select

struct VedSelect {
  // [B, T], [B, T, C] for children, [B, levels + 1] for depths
  const int32_t *node, *parent, *num_children, *child_node, *depth, *depth_count;
  const float *priority, *child_logp;
  const double* depth_sum;
  int32_t *visits, *next_child, *budget;
  const int32_t* size;
  int32_t *row_parent, *row_node;
  float* row_logp;
  int64_t batch, capacity, children, levels, paths, max_idle;
  double exploration;
};

// Whether a node of this name is in the tree. The same answer in all lanes.
__device__ __forceinline__ bool is_in_tree(const int32_t* node, int64_t size, int32_t name) {
  for (int64_t first = 0; first < size; first += 32) {
    const int64_t s = first + lane();
    if (__any_sync(kAll, s < size && node[s] == name)) return true;
  }
  return false;
}

__global__ void __launch_bounds__(32 * kTreesPerBlock, 4) ved_select_kernel(VedSelect a) {
  const int64_t b = int64_t(blockIdx.x) * kTreesPerBlock + warp();
  if (b >= a.batch) return;  // a whole warp, and no barriers of the block follow
  const int64_t base = b * a.capacity, rows = a.paths * a.levels;
  const int32_t *node = a.node + base, *parent = a.parent + base, *num_children = a.num_children + base;
  const int32_t* depth = a.depth + base;
  const float* priority = a.priority + base;
  int32_t *visits = a.visits + base, *next_child = a.next_child + base;
  const int32_t* child_node = a.child_node + base * a.children;

  for (int64_t r = lane(); r < rows; r += 32) {
    a.row_parent[b * rows + r] = -1;
    a.row_node[b * rows + r] = -1;
    a.row_logp[b * rows + r] = -kInf;
  }
  __syncwarp();
  int64_t size = a.size[b] > 0 ? a.size[b] : 0;
  if (size > a.capacity) size = a.capacity;
  if (size == 0) return;
  const int64_t allowed = a.budget[b];
  int64_t left = allowed - size;

  // Passes the gate and has entries left in its list.
  const auto may_open = [&](int64_t s) {
    const int64_t level = depth[s];
    if (level < 0 || level > a.levels) return false;
    const int64_t at = b * (a.levels + 1) + level;
    const int32_t number = a.depth_count[at] > 1 ? a.depth_count[at] : 1;
    const int64_t count = num_children[s] < a.children ? num_children[s] : a.children;
    return double(priority[s]) >= a.depth_sum[at] / double(number) && next_child[s] >= 0 && next_child[s] < count;
  };
  // Whether it has an unexpanded child; moves its pointer past those that the initial beam search has put into the tree.
  const auto open = [&](int64_t s) {
    if (!may_open(s)) return false;
    const int64_t count = num_children[s] < a.children ? num_children[s] : a.children;
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
          if (lane() == 0) {
            const int64_t row = b * rows + path * a.levels + level, child = current * a.children + next_child[current];
            a.row_parent[row] = int32_t(current);
            a.row_node[row] = child_node[child];
            a.row_logp[row] = a.child_logp[base * a.children + child];
            ++next_child[current];
          }
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

// One launch, no workspace.
inline void ved_select(const VedSelect& a, const Launcher& launch) {
  if (a.batch > 0) launch(ved_select_kernel, ved_grid(a.batch), 32 * kTreesPerBlock, 0, a);
}

// ---------------------------------------------------------------- insert

// The arrays of a node that are copied as they are.
struct VedEntries {
  int32_t *node, *parent, *num_children, *num_leaves, *child_node, *leaf_node;
  float *logp, *entropy, *child_logp, *leaf_logp, *leaf_score;
  int64_t* slot;
};

struct VedInsert {
  VedEntries tree, row;  // [B, T], [B, rows]; or with [.., C], [.., D]
  float *value, *priority;
  const float* row_value;
  int32_t *visits, *next_child, *depth, *size, *depth_count;
  double* depth_sum;
  int64_t batch, capacity, rows, children, leaves, depths;
  double logp_weight, entropy_weight;
};

template <class T>
__device__ __forceinline__ void copy_entry(T* to, const T* from, int64_t target, int64_t source, int64_t width) {
  for (int64_t i = lane(); i < width; i += 32) to[target * width + i] = from[source * width + i];
}

__global__ void __launch_bounds__(32 * kTreesPerBlock, 8) ved_insert_kernel(VedInsert a) {
  const int64_t b = int64_t(blockIdx.x) * kTreesPerBlock + warp();
  if (b >= a.batch) return;  // a whole warp, and no barriers of the block follow
  int32_t size = a.size[b];
  for (int64_t r = 0; r < a.rows; ++r) {
    const int64_t from = b * a.rows + r;
    if (a.row.node[from] < 0 || size < 0 || size >= a.capacity) continue;
    const int64_t above = a.row.parent[from];
    const int64_t level = above >= 0 && above < size ? a.depth[b * a.capacity + above] + 1 : 0;
    if (level >= a.depths) continue;
    const int64_t to = b * a.capacity + size++;
    copy_entry(a.tree.child_node, a.row.child_node, to, from, a.children);
    copy_entry(a.tree.child_logp, a.row.child_logp, to, from, a.children);
    copy_entry(a.tree.leaf_node, a.row.leaf_node, to, from, a.leaves);
    copy_entry(a.tree.leaf_logp, a.row.leaf_logp, to, from, a.leaves);
    copy_entry(a.tree.leaf_score, a.row.leaf_score, to, from, a.leaves);
    if (lane() == 0) {
      a.tree.node[to] = a.row.node[from];
      a.tree.parent[to] = int32_t(above);
      a.tree.num_children[to] = a.row.num_children[from];
      a.tree.num_leaves[to] = a.row.num_leaves[from];
      a.tree.logp[to] = a.row.logp[from];
      a.tree.entropy[to] = a.row.entropy[from];
      a.tree.slot[to] = a.row.slot[from];
      float v = a.row_value[from];
      if (!(v >= -kFloatMax)) v = -kFloatMax;  // NaN too
      if (v > kFloatMax) v = kFloatMax;
      const float g = tree_priority(v, a.row.entropy[from], a.row.logp[from], a.entropy_weight, a.logp_weight);
      a.value[to] = v;
      a.priority[to] = g;
      a.visits[to] = 0;
      a.next_child[to] = 0;
      a.depth[to] = int32_t(level);
      a.depth_sum[b * a.depths + level] += double(g);
      ++a.depth_count[b * a.depths + level];
    }
    __syncwarp();  // the next row may lie below this one
  }
  if (lane() == 0) a.size[b] = size;
}

// One launch, no workspace.
inline void ved_insert(const VedInsert& a, const Launcher& launch) {
  if (a.batch > 0 && a.rows > 0) launch(ved_insert_kernel, ved_grid(a.batch), 32 * kTreesPerBlock, 0, a);
}

// ---------------------------------------------------------------- candidates

// Order of a leaf; the larger is the better, {0, 0} is none.
struct LeafKey {
  uint64_t first;   // tier, score, prefix
  uint64_t second;  // log-probability among the completions of a prefix, then node
};

struct VedCandidates {
  const int32_t *node, *size, *depth, *leaf_node, *num_leaves;
  const float *logp, *value, *leaf_logp, *leaf_score;
  int32_t *out_node, *out_count;
  float *out_logp, *out_score;
  int64_t batch, capacity, slots, length, k;
  double logp_weight;
  bool forced_first;
  LeafKey* key;  // [B, T * (1 + slots)]
};

__device__ __forceinline__ LeafKey leaf_key(bool completion, float score, int32_t prefix, float logp, int32_t node) {
  const uint64_t body = (uint64_t(ordered_bits(score)) << 31) | (0x7FFFFFFFu - uint32_t(prefix));
  const uint64_t of_logp = completion ? ordered_bits(logp) : 0;
  return {completion ? body : body | uint64_t(1) << 63, (of_logp << 32) | (0x7FFFFFFFu - uint32_t(node))};
}

constexpr int kCandidateThreads = 128;

// Whether key x at place i comes before key y at place j.
__device__ __forceinline__ bool better_leaf(const LeafKey& x, int64_t i, const LeafKey& y, int64_t j) {
  if (x.first != y.first) return x.first > y.first;
  if (x.second != y.second) return x.second > y.second;
  return i < j;
}

__global__ void __launch_bounds__(kCandidateThreads, 8) ved_candidates_kernel(VedCandidates a) {
  VSTAR_SHARED(memory);
  constexpr int kWarps = kCandidateThreads / 32;
  LeafKey* const warp_key = reinterpret_cast<LeafKey*>(memory);       // [kWarps]
  int64_t* const warp_place = reinterpret_cast<int64_t*>(warp_key + kWarps);  // [kWarps]
  const int64_t b = blockIdx.x, base = b * a.capacity, width = 1 + a.slots;
  LeafKey* const key = a.key + base * width;
  int64_t size = a.size[b] > 0 ? a.size[b] : 0;
  if (size > a.capacity) size = a.capacity;
  const int32_t *node = a.node + base, *depth = a.depth + base;

  // Of a node the leaf that it is itself, if it is one, and those listed below it.
  const int64_t entries = size * width;
  for (int64_t i = threadIdx.x; i < entries; i += kCandidateThreads) {
    const int64_t s = i / width, slot = i % width - 1, at = (base + s) * a.slots + slot;
    LeafKey mine{0, 0};
    if (slot < 0) {
      if (depth[s] == a.length) {
        const float logp = a.logp[base + s];
        mine = leaf_key(false, leaf_rank(a.value[base + s], logp, a.logp_weight), node[s], logp, node[s]);
      }
    } else if (slot < a.num_leaves[base + s]) {
      const int32_t leaf = a.leaf_node[at];
      bool evaluated = false;
      for (int64_t t = 0; t < size && !evaluated; ++t) evaluated = depth[t] == a.length && node[t] == leaf;
      const bool forced = a.forced_first && a.num_leaves[base + s] == 1;
      if (!evaluated) mine = leaf_key(!forced, a.leaf_score[at], forced ? leaf : node[s], a.leaf_logp[at], leaf);
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
    if (threadIdx.x == 0) {
      const int64_t s = found / width, slot = found % width - 1, at = (base + s) * a.slots + slot, to = b * a.k + count;
      const float logp = slot < 0 ? a.logp[base + s] : a.leaf_logp[at];
      a.out_node[to] = slot < 0 ? node[s] : a.leaf_node[at];
      a.out_logp[to] = logp;
      a.out_score[to] = slot < 0 ? leaf_rank(a.value[base + s], logp, a.logp_weight) : a.leaf_score[at];
    }
  }
  for (int64_t i = count + threadIdx.x; i < a.k; i += kCandidateThreads) {
    a.out_node[b * a.k + i] = -1;
    a.out_logp[b * a.k + i] = -kInf;
    a.out_score[b * a.k + i] = -kInf;
  }
  if (threadIdx.x == 0) a.out_count[b] = int32_t(count);
}

inline int64_t ved_candidates_workspace(int64_t batch, int64_t capacity, int64_t slots) {
  return int64_t(sizeof(LeafKey)) * batch * capacity * (1 + slots);
}

// One launch.
inline void ved_candidates(const VedCandidates& a, const Launcher& launch) {
  constexpr int64_t shared = kCandidateThreads / 32 * (sizeof(LeafKey) + 8);
  if (a.batch > 0) launch(ved_candidates_kernel, dim3{unsigned(a.batch)}, kCandidateThreads, shared, a);
}

}  // namespace cuda
}  // namespace vstar
