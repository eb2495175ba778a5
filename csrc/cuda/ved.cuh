// The steps of value-guided decoding. A round, select and insert, takes one warp per tree: the lanes lie along the
// tree's nodes (a few dozen to a few thousand), so that looking for the best child of a node, or for a node of a name,
// is a scan and a reduction in the warp, and nothing waits for other warps. The arrays stay in global memory; a tree's
// part of them is a few KB and in the cache of its multiprocessor after the first look. Lane 0 writes.
//
// The candidates at the end take one block per tree. Evaluated leaves come first, so they are ranked by themselves, each by a
// thread that compares it with all. Where there are fewer than k, the warps find the best score in every node's list; then the
// first warp opens the list whose score is best, and takes leaves from it for as long as no other list can have a better one.
// Two integers order leaves as the op says. A listed leaf that was evaluated is found in a hash table of those that were, but
// only in lists that are opened.
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

// The i-th entry of every list that is so long. All are loaded before the first is stored, since each store might change what
// the next load reads, as far as the compiler knows.
VSTAR_DEVICE void copy_entry(int64_t, int64_t, int64_t) {}
template <class T, class... Lists>
VSTAR_DEVICE void copy_entry(int64_t to, int64_t from, int64_t i, const ListCopy<T>& list, const Lists&... more) {
  const T x = i < list.width ? list.from[from * list.width + i] : T(0);
  copy_entry(to, from, i, more...);
  if (i < list.width) list.to[to * list.width + i] = x;
}

__global__ void __launch_bounds__(32 * kTreesPerBlock, 8) ved_insert_kernel(VedInsertArgs a) {
  const int64_t b = int64_t(blockIdx.x) * kTreesPerBlock + warp();
  if (b >= a.batch) return;  // a whole warp, and no barriers of the block follow
  const int64_t longest = a.children > a.leaves ? a.children : a.leaves;
  int32_t size = a.size[b];
  for (int64_t row = b * a.rows; row < (b + 1) * a.rows; ++row) {
    const int64_t level = a.level(b, row, size);
    if (level < 0) continue;
    const int64_t to = b * a.capacity + size++;
    if (lane() == 0) a.set_up(b, to, row, level);
    for (int64_t i = lane(); i < longest || i < 1; i += 32) {
      a.with_lists([&](const auto&... list) { copy_entry(to, row, i, list...); });
    }
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
  unsigned char* workspace;  // null: scratch is in shared memory
  int64_t bytes;             // of it, per tree
  int32_t words, hash_bits;  // of a node's list; of the table's size

  void plan() {
    words = int32_t((slots + 31) / 32);
    for (hash_bits = 1; int64_t(1) << hash_bits < 2 * capacity;) ++hash_bits;
    const int64_t of_node = int64_t(sizeof(LeafKey)) + 4 + 4 * int64_t(words);
    bytes = round_up(of_node * capacity + (int64_t(4) << hash_bits) + 8 * k + 4, 16);
  }
};

// What a block knows of its tree. A leaf is told by its node and its slot there, which is -1 for the node itself.
struct LeafSpace {
  LeafKey* key;     // [T] a node as a leaf; later no less than any open leaf of its list, once that is opened the best one
  int32_t* opened;  // [T] whether the list is
  uint32_t* open;   // [T, words] bits of an opened list: leaves that are neither evaluated nor taken
  int32_t* table;   // [2^hash_bits] nodes that are evaluated leaves, by the hash of the leaf; -1: none
  int32_t* taken;   // [k, 2] node and slot
  int32_t* count;   // of them; of evaluated leaves it may be more than k

  VSTAR_DEVICE LeafSpace(const VedCandidatesLaunch& a, unsigned char* at) {
    key = reinterpret_cast<LeafKey*>(at);
    opened = reinterpret_cast<int32_t*>(key + a.capacity);
    open = reinterpret_cast<uint32_t*>(opened + a.capacity);
    table = reinterpret_cast<int32_t*>(open + a.capacity * a.words);
    taken = table + (int64_t(1) << a.hash_bits);
    count = taken + 2 * a.k;
  }
};

constexpr int kCandidateThreads = 128;

VSTAR_DEVICE uint32_t leaf_hash(const VedCandidatesLaunch& a, int32_t leaf) {
  return uint32_t(leaf) * 0x9E3779B9u >> (32 - a.hash_bits);
}

// The lane of the best key, of equal ones that of the smallest number. The same answer in all lanes.
VSTAR_DEVICE int best_lane(const LeafKey& key, uint32_t number) {
  unsigned among = kAll;
  const auto narrow = [&](uint32_t x) {
    if ((among & (among - 1)) == 0) return;
    const bool in = among >> lane() & 1;
    const uint32_t top = warp_max(in ? x : 0u);
    among &= __ballot_sync(kAll, in && x == top);
  };
  narrow(uint32_t(key.first >> 32));
  narrow(uint32_t(key.first));
  narrow(uint32_t(key.second >> 32));
  narrow(uint32_t(key.second));
  narrow(~number);
  return __ffs(int(among)) - 1;
}

// A leaf among those that a lane looks at, or a list: its key and its number there.
struct Best {
  LeafKey key;
  int32_t number;

  VSTAR_DEVICE bool beats(const Best& other) const { return better_leaf(key, number, other.key, other.number); }
  // That of the lane which has the best.
  VSTAR_DEVICE Best from(int lane) const {
    return {{__shfl_sync(kAll, key.first, lane), __shfl_sync(kAll, key.second, lane)}, __shfl_sync(kAll, number, lane)};
  }
  VSTAR_DEVICE int lane_of_all() const { return best_lane(key, uint32_t(number)); }
};

// The listed leaves of node s of the tree that begins at `base`.
VSTAR_DEVICE int32_t listed(const VedCandidatesLaunch& a, int64_t s) {
  return a.num_leaves[s] < a.slots ? a.num_leaves[s] : int32_t(a.slots);
}

// By a warp: of a list's `count` leaves a lane's best open one; it looks at every 32nd. The first time, finds out which are
// open.
VSTAR_DEVICE Best best_open(
    const VedCandidatesLaunch& a, int64_t base, int32_t s, int32_t count, bool first_time, const LeafSpace& space) {
  const int32_t *node = a.node + base, *leaf = a.leaf_node + (base + s) * a.slots;
  Best best{{0, 0}, int32_t(a.slots)};
  for (int32_t first = 0; first < count; first += 32) {
    const int32_t slot = first + lane();
    const Best mine{slot < count ? a.completion_key(base + s, slot) : LeafKey{0, 0}, slot};
    uint32_t& word = space.open[int64_t(s) * a.words + first / 32];
    bool open = slot < count;
    if (first_time) {
      for (uint32_t at = open ? leaf_hash(a, leaf[slot]) : 0; open && space.table[at] >= 0;) {
        open = node[space.table[at]] != leaf[slot];
        at = (at + 1) & ((1u << a.hash_bits) - 1);
      }
      const uint32_t bits = __ballot_sync(kAll, open);
      if (lane() == 0) word = bits;
    } else {
      open = open && (word >> lane() & 1);
    }
    if (open && mine.beats(best)) best = mine;
  }
  return best;
}

// By all threads: put the evaluated leaves into the table, and the k best of them in order.
VSTAR_DEVICE void rank_evaluated(const VedCandidatesLaunch& a, int64_t base, int32_t size, const LeafSpace& space) {
  for (int64_t i = threadIdx.x; i < int64_t(1) << a.hash_bits; i += kCandidateThreads) space.table[i] = -1;
  if (threadIdx.x == 0) *space.count = 0;
  __syncthreads();
  const int32_t* const node = a.node + base;
  for (int32_t s = int32_t(threadIdx.x); s < size; s += kCandidateThreads) {
    const bool evaluated = a.depth[base + s] == a.length;
    space.key[s] = evaluated ? a.evaluated_key(base + s) : LeafKey{0, 0};
    if (!evaluated) continue;
    atomicAdd(space.count, 1);
    for (uint32_t at = leaf_hash(a, node[s]);; at = (at + 1) & ((1u << a.hash_bits) - 1)) {
      const int32_t other = atomicCAS(space.table + at, -1, s);
      if (other < 0 || node[other] == node[s]) break;
    }
  }
  __syncthreads();
  for (int32_t s = int32_t(threadIdx.x); s < size; s += kCandidateThreads) {
    const LeafKey mine = space.key[s];
    if (mine.first == 0) continue;
    int64_t rank = 0;
    for (int32_t t = 0; t < size; ++t) rank += better_leaf(space.key[t], t, mine, s);
    if (rank >= a.k) continue;
    space.taken[2 * rank] = s;
    space.taken[2 * rank + 1] = -1;
  }
  __syncthreads();
}

// By all threads: a bound of every list, by its best score.
VSTAR_DEVICE void bound_lists(const VedCandidatesLaunch& a, int64_t base, int32_t size, const LeafSpace& space) {
  for (int32_t s = int32_t(threadIdx.x); s < size; s += kCandidateThreads) {
    space.key[s] = {0, 0};
    space.opened[s] = 0;
  }
  __syncthreads();
  int turn = 0;
  for (int32_t first = 0; first < size; first += 32) {
    const int32_t mine = first + lane();
    unsigned lists = __ballot_sync(kAll, mine < size && a.num_leaves[base + mine] > 0);
    for (; lists != 0; lists &= lists - 1) {
      if (turn++ % (kCandidateThreads / 32) != warp()) continue;
      const int32_t s = first + __ffs(int(lists)) - 1, count = listed(a, base + s);
      uint32_t top = 0;
      for (int32_t slot = lane(); slot < count; slot += 32) {
        const uint32_t score = ordered_bits(a.leaf_score[(base + s) * a.slots + slot]);
        top = score > top ? score : top;
      }
      top = warp_max(top);
      const LeafKey best = leaf_key(true, from_ordered_bits(top), a.node[base + s], 0, 0);
      if (lane() == 0) space.key[s] = {best.first, ~uint64_t(0)};
    }
  }
  __syncthreads();
}

// By a warp: take the best listed leaves until there are k. Each lane knows the best of every 32nd list.
VSTAR_DEVICE void take_listed(const VedCandidatesLaunch& a, int64_t base, int32_t size, const LeafSpace& space) {
  const auto look = [&](int32_t without) {
    Best best{{0, 0}, size};
    for (int32_t s = lane(); s < size; s += 32) {
      const Best other{space.key[s], s};
      if (s != without && other.beats(best)) best = other;
    }
    return best;
  };
  Best mine = look(-1);
  int64_t count = *space.count;
  while (count < a.k) {
    const int owner = mine.lane_of_all();
    const Best list = mine.from(owner);
    if (list.key.first == 0) break;
    const int32_t s = list.number, leaves = listed(a, base + s);
    if (lane() == owner) mine = look(s);
    const Best next = mine.from(mine.lane_of_all());  // of the other lists
    Best leaf = best_open(a, base, s, leaves, space.opened[s] == 0, space);
    bool more = true;
    while (more) {
      // In order, all that a short list has; of a longer one only the best, behind which a lane may have a second one.
      int rank = 0;
      if (leaves <= 32) {
        for (int other = 0; other < 32; ++other) rank += leaf.from(other).beats(leaf);
      } else {
        rank = lane() != leaf.lane_of_all();
      }
      const bool takes = leaf.key.first != 0 && Best{leaf.key, s}.beats(next) && rank < (leaves <= 32 ? a.k - count : 1);
      const unsigned takers = __ballot_sync(kAll, takes);
      if (takers == 0) break;
      const int32_t word = __shfl_sync(kAll, leaf.number, __ffs(int(takers)) - 1) / 32;
      if (lane() == 0) space.open[int64_t(s) * a.words + word] &= ~takers;
      if (takes) {
        space.taken[2 * (count + rank)] = s;
        space.taken[2 * (count + rank) + 1] = leaf.number;
        leaf.key = {0, 0};
      }
      count += __popc(takers);
      more = leaves > 32 && count < a.k;
      __syncwarp();
      if (leaves > 32) leaf = best_open(a, base, s, leaves, false, space);
    }
    const Best rest{leaf.from(leaf.lane_of_all()).key, s};
    if (lane() == owner) {
      space.key[s] = rest.key;
      space.opened[s] = 1;
      if (rest.beats(mine)) mine = rest;
    }
    __syncwarp();
  }
  __syncwarp();  // all lanes have read the count
  if (lane() == 0) *space.count = int32_t(count);
}

__global__ void __launch_bounds__(kCandidateThreads, 8) ved_candidates_kernel(VedCandidatesLaunch a) {
  VSTAR_SHARED(memory);
  const int64_t b = blockIdx.x, base = b * a.capacity;
  const int32_t size = int32_t(tree_size(a.size[b], a.capacity));
  const LeafSpace space(a, a.workspace ? a.workspace + b * a.bytes : memory);
  rank_evaluated(a, base, size, space);
  if (*space.count < a.k) {
    bound_lists(a, base, size, space);
    if (warp() == 0) take_listed(a, base, size, space);
    __syncthreads();
  }
  const int64_t count = *space.count < a.k ? *space.count : a.k;
  for (int64_t i = threadIdx.x; i < a.k; i += kCandidateThreads) {
    if (i < count) a.store(b, i, base + space.taken[2 * i], space.taken[2 * i + 1]); else a.store_none(b, i);
  }
  if (threadIdx.x == 0) a.out_count[b] = int32_t(count);
}

inline void run(const Gpu& gpu, const VedCandidatesArgs& a) {
  if (a.batch == 0) return;
  VedCandidatesLaunch launch{a, nullptr, 0, 0, 0};
  launch.plan();
  const bool fits = launch.bytes <= kMostShared;
  launch.workspace = gpu.workspace(fits ? 0 : a.batch * launch.bytes);
  gpu.launch(ved_candidates_kernel, dim3{unsigned(a.batch)}, kCandidateThreads, fits ? launch.bytes : 0, launch);
}

}  // namespace vstar
