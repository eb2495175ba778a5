// The candidates of a request in lexicographic order, sorted by a block: every prefix is a run of them, and every
// sibling group a run of runs.
//
// Small groups are ranked by comparing all pairs, one thread per candidate: the reads are the same for a whole warp,
// and nothing waits. Larger ones go through a bitonic network. The scratch lies in shared memory where it fits, else
// in a workspace; the code is the same.
#pragma once

#include "common/ops/candidates.h"
#include "cuda/device.cuh"

namespace vstar {

constexpr int kRanked = 128;  // candidates, from which on they are sorted by exchanges

// An op's arguments, and where a block finds its scratch: in shared memory, or where it does not fit, in a workspace.
template <class Args>
struct WithScratch : Args {
  unsigned char* workspace;  // null: shared memory
  int64_t bytes;             // per request
  int slots;                 // of the order

  VSTAR_DEVICE unsigned char* scratch(int64_t b, unsigned char* shared) const {
    return workspace ? workspace + b * bytes : shared;
  }
};

// A request's scratch. n candidates are present; p is a position in sorted order.
struct Candidates {
  int64_t* token;      // [L, G] of the candidates that are present, packed together
  int32_t* order;      // [2^i >= G] p -> packed number
  int32_t* candidate;  // [G] packed number -> candidate
  int32_t* shared;     // [G] p -> leading tokens shared with p - 1; -1 for the first
  int32_t* sums;       // [33] for block_sum_before
  int n;

  static int64_t bytes(int64_t group, int64_t length) {
    return round_up(8 * group * length + 4 * (next_power_of_2(group) + 2 * group + 33), 16);
  }
};

template <class Args>
VSTAR_DEVICE Candidates lay_out_candidates(unsigned char* memory, const WithScratch<Args>& a) {
  Candidates c;
  c.token = reinterpret_cast<int64_t*>(memory);
  c.order = reinterpret_cast<int32_t*>(c.token + a.group * a.length);
  c.candidate = c.order + a.slots;
  c.shared = c.candidate + a.group;
  c.sums = c.shared + a.group;
  c.n = 0;
  return c;
}

VSTAR_DEVICE bool comes_before(const Candidates& c, int64_t group, int64_t length, int a, int b) {
  for (int64_t d = 0; d < length; ++d) {
    const int64_t x = c.token[d * group + a], y = c.token[d * group + b];
    if (x != y) return x < y;
  }
  return a < b;
}

// Fill c for request b, and clear the results of what the mask leaves out. Ends with a barrier.
template <class Args>
VSTAR_DEVICE void sort_candidates(Candidates& c, const WithScratch<Args>& a, int64_t b) {
  const int group = int(a.group), slots = a.slots, threads = int(blockDim.x), thread = int(threadIdx.x);
  const int64_t length = a.length;
  int n = 0;
  if (!a.mask) {
    for (int g = thread; g < group; g += threads) c.candidate[g] = g;
    n = group;
  } else {
    for (int first = 0; first < group; first += threads) {
      const int g = first + thread;
      bool valid = false;
      for (int64_t d = 0; g < group && d < length; ++d) {
        const bool there = a.mask.at(b, g, d);
        if (!there) a.clear(a.slot(b, g) + d);
        valid = valid || there;
      }
      const BlockSum sum = block_sum_before(valid, c.sums);
      if (valid) c.candidate[n + sum.before] = g;
      n += sum.total;
    }
  }
  c.n = n;
  __syncthreads();
  for (int64_t i = thread; i < n * length; i += threads) {  // along the tokens of a candidate, as they lie
    const int64_t packed = i / length, d = i % length;
    c.token[d * group + packed] = a.token.at(b, c.candidate[packed], d);
  }
  __syncthreads();

  if (group <= kRanked) {
    for (int i = thread; i < n; i += threads) {
      int rank = 0;
      for (int j = 0; j < n; ++j) rank += comes_before(c, group, length, j, i);
      c.order[rank] = i;
    }
    __syncthreads();
  } else {
    for (int i = thread; i < slots; i += threads) c.order[i] = i;
    __syncthreads();
    for (int run = 2; run <= slots; run *= 2) {
      for (int step = run / 2; step > 0; step /= 2) {
        for (int i = thread; i < slots / 2; i += threads) {
          const int low = 2 * i - (i & (step - 1)), high = low + step;
          const int x = c.order[low], y = c.order[high];
          // Numbers from n on stand for nothing and come last.
          const bool ascending = (low & run) == 0, before = y < n && (x >= n || comes_before(c, group, length, y, x));
          const bool wrong = ascending ? before : !before;
          if (wrong) {
            c.order[low] = y;
            c.order[high] = x;
          }
        }
        __syncthreads();
      }
    }
  }

  for (int p = thread; p < n; p += threads) {
    int common = -1;  // the first candidate begins every prefix, the empty one too
    if (p > 0) {
      const int x = c.order[p - 1], y = c.order[p];
      for (common = 0; common < length && c.token[common * group + x] == c.token[common * group + y];) ++common;
    }
    c.shared[p] = common;
  }
  __syncthreads();
}

// Of the order in c the candidates whose token of level d is there, where the mask tells tokens apart: `kept` begins as
// c with `order` and `shared` of its own. Ends with a barrier.
template <class Args>
VSTAR_DEVICE void keep_level(Candidates& kept, const Candidates& c, const WithScratch<Args>& a, int64_t b, int64_t d) {
  const auto there = [&](int p) { return a.mask.at(b, c.candidate[c.order[p]], d); };
  kept.n = 0;
  for (int first = 0; first < c.n; first += int(blockDim.x)) {
    const int p = first + int(threadIdx.x);
    const bool valid = p < c.n && there(p);
    const BlockSum sum = block_sum_before(valid, c.sums);
    if (valid) {
      int shared = c.shared[p];
      for (int i = p - 1; i >= 0 && !there(i); --i) shared = c.shared[i] < shared ? c.shared[i] : shared;
      kept.order[kept.n + sum.before] = c.order[p];
      kept.shared[kept.n + sum.before] = shared;
    }
    kept.n += sum.total;
  }
  __syncthreads();
}

// Scratch of an order of some of the candidates.
template <class Args>
int64_t kept_bytes(const Args& a) { return a.by_token() ? 8 * a.group : 0; }

template <class Args>
VSTAR_DEVICE Candidates lay_out_kept(int32_t* memory, const Candidates& c, const WithScratch<Args>& a) {
  Candidates kept = c;
  if (a.by_token()) {
    kept.order = memory;
    kept.shared = memory + a.group;
  }
  return kept;
}

// One launch, one block per request with so many bytes of scratch.
template <class Args>
inline void launch_requests(
    const Gpu& gpu, void (*kernel)(WithScratch<Args>), const Args& a, int64_t bytes, int threads) {
  if (a.batch == 0) return;
  const bool fits = bytes <= kMostShared;
  unsigned char* const workspace = gpu.workspace(fits ? 0 : a.batch * bytes);
  const WithScratch<Args> with_scratch{a, workspace, bytes, int(next_power_of_2(a.group))};
  gpu.launch(kernel, dim3{unsigned(a.batch)}, threads, fits ? bytes : 0, with_scratch);
}

// Of a block: one for each candidate, up to 256.
inline int candidate_threads(int64_t group) { return int(round_up(group < 1 ? 1 : group < 256 ? group : 256, 32)); }

// The distinct prefixes of one depth, numbered in order.
struct Level {
  int32_t* number;  // [G] p -> prefix
  int32_t* begin;   // [G + 1] prefix -> p; the last entry is n
  int size;

  static VSTAR_DEVICE Level lay_out(int32_t* memory, int64_t group) { return {memory, memory + group, 0}; }
  VSTAR_DEVICE int32_t* end(int64_t group) const { return begin + group + 1; }
};

inline int64_t level_bytes(int64_t group) { return 4 * (2 * group + 1); }

VSTAR_DEVICE void swap_levels(Level& a, Level& b) {
  const Level other = a;
  a = b;
  b = other;
}

// The prefixes of `depth` tokens; depth 0 is the empty prefix. Ends with a barrier.
VSTAR_DEVICE void find_level(Level& level, const Candidates& c, int64_t depth) {
  const int threads = int(blockDim.x);
  int size = 0;
  for (int first = 0; first < c.n; first += threads) {
    const int p = first + int(threadIdx.x);
    const bool begins = p < c.n && c.shared[p] < depth;
    const BlockSum sum = block_sum_before(begins, c.sums);
    const int number = size + sum.before + begins - 1;
    if (p < c.n) level.number[p] = number;
    if (begins) level.begin[number] = p;
    size += sum.total;
  }
  if (threadIdx.x == 0) level.begin[size] = c.n;
  level.size = size;
  __syncthreads();
}

}  // namespace vstar
