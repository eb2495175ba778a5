// expand_topk in two launches: statistics of the rows, then a selection in each request.
//
// expand_rows_kernel: a row (prefix) is read by one warp, or by eight where rows are long, eight neighboring children
// a thread at a time: one or two 16-byte loads where the children's tokens are consecutive, as those of a trie's upper
// levels are, else through the token list. In one pass over the logits every thread keeps maximum, sum of exponentials
// and sum of their products with the exponent, which are joined at the end, and every segment (`segment` children in
// a row) its largest logit. A thread of the eight warps has 32 logits in flight, 48 KB a multiprocessor (halves). Under
// "vocab" all columns are read too, unless all are legal. With terms of each child's own (noise, action values) a
// segment keeps its best *score*: the row is read again once its statistics are known.
//
// expand_select_kernel: a block a request. The k best segments hold the k best children: a child outside of them is
// beaten by one of each, because the score rises with the logit and ties go to the earlier segment. So the block finds
// the k best segments, scores their children, drops what is below the k-th best segment's best, and sorts the
// rest, mostly little more than k. Where that is more than the list takes, ties above all, it is cut first.
//
// A candidate's number is its place in enumeration order: w * span + c. Which thread adds up which children depends on
// c alone, and not on how a row is aligned, so that a request gives the same bits in every batch: half-precision rows
// that do not begin at a multiple of 16 bytes are loaded as two aligned neighbors and shifted.
//
// Dense bf16, B=256 W=128 V=8192 K=128: 512 MiB of logits are read once, 8 MiB of maxima and 1 MiB of rows written and
// read, and 8 MiB of logits read again.
#pragma once

#include "common/gumbel.h"
#include "common/trie.h"
#include "cuda/rows.cuh"
#include "cuda/select.cuh"

namespace vstar {
namespace cuda {

// What the second launch needs to know of a row.
struct alignas(16) ExpandRow {
  float shift, log_sum, cum, constant;
  int32_t begin, count, node;
};

struct ExpandTopK {
  FloatView logits;  // [B, W, V]
  TrieView trie;
  IntView node;                       // [B, W]
  FloatView cum_logp, value, bonus;   // [B, W], or null
  FloatView child_value;              // [B, W, V], or null
  const int64_t* seed;                // [B], or null
  int64_t seed_stride;
  float logp_weight, value_weight, entropy_weight, inverse;
  bool vocab;
  int64_t batch, width, columns, k, max_children;
  float *score, *logp, *entropy;
  int32_t *parent, *token, *child, *count;
  // Filled in by expand_topk:
  bool own_terms;
  int32_t segment_bits, segments;  // children a segment, as a power of 2; segments a row
  int32_t winners, list, cached;   // at most; room of the list of candidates; keys of segments in shared memory
  ExpandRow* row;                  // [B, W]
  float* best;                     // [B, W, segments]
  int32_t* picked;                 // [B, winners], null: in shared memory
  uint64_t* listed;                // [B, list], null: in shared memory
};

// ---------------------------------------------------------------- rows

struct Scored {
  float score, logp;
};

// Score (-inf: no candidate) and log-probability. Without a term of its own it never falls as z rises.
__device__ __forceinline__ Scored scored(const ExpandTopK& a, const ExpandRow& row, float z, float own) {
  const float logp = ((z - row.shift) * a.inverse - row.log_sum) + row.cum;
  const float score = ((a.logp_weight == 0 ? 0.0f : a.logp_weight * logp) + row.constant) + own;
  const bool wins = z > -kInf && logp > -kInf && score > -kInf;
  return {wins ? score : -kInf, logp};
}

__device__ __forceinline__ float own_term(const ExpandTopK& a, int64_t b, int64_t w, int32_t node, int64_t column) {
  float own = 0;
  if (a.child_value.data) own = a.value_weight * a.child_value.at(b, w, column);
  if (a.seed) {
    own += gumbel_from_bits(philox(uint64_t(a.seed[b * a.seed_stride]), uint32_t(node), uint32_t(column)));
  }
  return own;
}

constexpr int kLongWarps = 8, kLongVectors = 4, kLongSegment = 7;  // segments of 2^7 children
constexpr int kShortRows = 4, kShortSegment = 3;                   // rows a block

template <class T, int kWarps>
__global__ void __launch_bounds__(kWarps == 1 ? 32 * kShortRows : 32 * kWarps, kWarps == 1 ? 8 : 3)
    expand_rows_kernel(ExpandTopK a) {
  constexpr int kThreads = 32 * kWarps, kVectors = kWarps == 1 ? 1 : kLongVectors;
  constexpr int kSegmentBits = kWarps == 1 ? kShortSegment : kLongSegment, kLanes = (1 << kSegmentBits) / 8;
  VSTAR_SHARED(memory);
  float* const scratch = reinterpret_cast<float*>(memory);
  const int thread = kWarps == 1 ? lane() : int(threadIdx.x);
  const int64_t r = kWarps == 1 ? int64_t(blockIdx.x) * kShortRows + warp() : int64_t(blockIdx.x);
  if (r >= a.batch * a.width) return;  // a whole warp, and no barriers of the block follow
  const int64_t b = uint32_t(r) / uint32_t(a.width), w = uint32_t(r) % uint32_t(a.width);  // fewer than 2^31 rows
  const int64_t node = a.node.at(b, w);
  const EdgeRange edges = a.trie.edges(node);  // none for what is not a node
  const int32_t count = int32_t(edges.end - edges.begin < a.max_children ? edges.end - edges.begin : a.max_children);
  const int32_t* const token = a.trie.token + edges.begin;
  const int64_t first = count > 0 ? token[0] : 0, last = count > 0 ? token[count - 1] : -1;
  const T* const from = static_cast<const T*>(a.logits.data) + b * a.logits.stride[0] + w * a.logits.stride[1];
  const RowReader<T> reader(from, a.logits.stride[2], token, first, last, a.columns, count);
  float* const best = a.best + r * a.segments;
  const float inverse = a.inverse * 1.44269504088896341f;

  const RowStats legal = read_row<T, kWarps, kVectors, kLanes>(
      reader, thread, inverse, a.own_terms ? nullptr : best, a.segments, scratch);
  RowStats all = legal;
  if (a.vocab && count > 0 && count != a.columns) {
    const RowReader<T> whole(from, a.logits.stride[2], nullptr, 0, a.columns - 1, a.columns, int32_t(a.columns));
    all = read_row<T, kWarps, kVectors, kLanes>(whole, thread, inverse, nullptr, 0, scratch);
  }
  const float log_sum = logf(legal.total);
  float entropy = log_sum - legal.moment * 0.69314718055994531f / legal.total;
  if (count < 2 || !(legal.total > 0) || !(entropy > 0)) entropy = 0;

  ExpandRow row;
  row.shift = all.top > -kInf ? all.top : 0.0f;
  row.log_sum = all.total > 0 ? logf(all.total) : 0.0f;
  row.cum = a.cum_logp.data ? a.cum_logp.at(b, w) : 0.0f;
  row.constant = a.value.data ? a.value_weight * a.value.at(b, w) : 0.0f;
  if (a.bonus.data) row.constant += a.bonus.at(b, w);
  if (a.entropy_weight != 0) row.constant += a.entropy_weight * entropy;
  row.begin = int32_t(edges.begin);
  row.count = count;
  row.node = int32_t(node);
  if (thread == 0) {
    a.row[r] = row;
    a.entropy[r] = entropy;
  }

  constexpr int32_t kTile = 8 * kThreads * kVectors;
  if (a.own_terms) {
    for (int32_t tile = 0; tile < reader.count; tile += 8 * kThreads) {
      const int32_t at = tile + 8 * thread;
      float mine = -kInf;
#pragma unroll 1  // the noise takes most of the time, not the reads, which are in the caches
      for (int32_t i = at; i < at + 8; ++i) {
        if (i >= count) break;
        const int64_t v = reader.column(i);
        if (v < 0 || v >= a.columns) continue;
        const float z = cleaned(widened(read_one(from + v * reader.stride)));
        if (z > -kInf) mine = fmaxf(mine, scored(a, row, z, own_term(a, b, w, row.node, v)).score);
      }
      mine = segment_max<kLanes>(mine);
      if (thread % kLanes == 0 && (at >> kSegmentBits) < a.segments) best[at >> kSegmentBits] = mine;
    }
  }
  // The segments that no tile has reached.
  const int32_t tile = a.own_terms ? 8 * kThreads : kTile;
  const int64_t reached = ((int64_t(count) + tile - 1) / tile * tile) >> kSegmentBits;
  for (int64_t i = reached + thread; i < a.segments; i += kThreads) best[i] = -kInf;
}

// ---------------------------------------------------------------- selection

constexpr int kSelectThreads = 512;
constexpr int64_t kSelectScratch = (sizeof(SelectScratch) + 15) / 16 * 16;

// A child of a request, by its number.
struct ExpandChild {
  uint32_t key;  // 0 if it cannot win
  float logp;
  uint32_t parent;
  int32_t edge, token;
};

__device__ __forceinline__ ExpandChild expand_child(const ExpandTopK& a, int64_t b, uint32_t number) {
  const uint32_t span = uint32_t(a.segments) << a.segment_bits;
  ExpandChild child{0, -kInf, number / span, -1, -1};
  const ExpandRow row = a.row[b * a.width + child.parent];
  const int32_t c = int32_t(number - child.parent * span);
  if (c >= row.count) return child;
  child.edge = row.begin + c;
  child.token = __ldg(a.trie.token + child.edge);
  if (child.token < 0 || child.token >= a.columns) return child;
  const float z = cleaned(a.logits.at(b, child.parent, child.token));
  if (!(z > -kInf)) return child;
  const float own = a.own_terms ? own_term(a, b, child.parent, row.node, child.token) : 0.0f;
  const Scored s = scored(a, row, z, own);
  child.key = s.score > -kInf ? ordered_bits(s.score) : 0;
  child.logp = s.logp;
  return child;
}

__global__ void __launch_bounds__(kSelectThreads) expand_select_kernel(ExpandTopK a) {
  VSTAR_SHARED(memory);
  SelectScratch& s = *reinterpret_cast<SelectScratch*>(memory);
  uint64_t* const list = a.listed ? a.listed + int64_t(blockIdx.x) * a.list : reinterpret_cast<uint64_t*>(memory + kSelectScratch);
  uint32_t* const cache = reinterpret_cast<uint32_t*>(memory + kSelectScratch + (a.listed ? 0 : 8 * int64_t(a.list)));
  int32_t* const picked = a.picked ? a.picked + int64_t(blockIdx.x) * a.winners : reinterpret_cast<int32_t*>(cache + a.cached);
  const int thread = int(threadIdx.x);
  const int64_t b = blockIdx.x, all_segments = a.width * a.segments;
  const float* const best = a.best + b * all_segments;

  const auto segment_key = [&](int64_t i) -> uint32_t {
    float score = __ldg(best + i);
    if (!a.own_terms && score > -kInf) {
      const float4 head = __ldg(reinterpret_cast<const float4*>(a.row + b * a.width + uint32_t(i) / uint32_t(a.segments)));
      ExpandRow row{head.x, head.y, head.z, head.w, 0, 0, 0};
      score = scored(a, row, score, 0.0f).score;
    }
    return score > -kInf ? ordered_bits(score) : 0;
  };
  const bool in_cache = all_segments <= a.cached;
  if (in_cache) {
    for (int64_t i = thread; i < all_segments; i += kSelectThreads) cache[i] = segment_key(i);
    __syncthreads();
  }
  const auto key_of_segment = [&](int64_t i) { return in_cache ? cache[i] : segment_key(i); };
  Cut cut = find_cut(key_of_segment, all_segments, uint32_t(a.winners), s);
  const int segments = take_winners(key_of_segment, all_segments, cut, s, [&](int slot, int64_t i) { picked[slot] = int32_t(i); });

  // Where k segments were found, a child that cannot win is one below the worst of their best.
  const uint32_t bound = segments == a.winners && cut.key > 1 ? cut.key : 1;
  const int64_t children = int64_t(segments) << a.segment_bits;
  const auto number = [&](int64_t i) {
    return (uint32_t(picked[i >> a.segment_bits]) << a.segment_bits) + uint32_t(i & ((1 << a.segment_bits) - 1));
  };
  if (thread == 0) s.found = 0;
  __syncthreads();
  for (int64_t i = thread; i < children; i += kSelectThreads) {
    const uint32_t at = number(i), key = expand_child(a, b, at).key;
    if (key < bound) continue;
    const int slot = atomicAdd(&s.found, 1);
    if (slot < a.list) list[slot] = (uint64_t(key) << 32) | uint32_t(~at);
  }
  __syncthreads();
  int found = s.found;
  __syncthreads();
  if (found > a.list) {
    // Too many reach the bound. In enumeration order they can be cut; the list has room to sort the segments.
    for (int i = thread; i < segments; i += kSelectThreads) list[i] = uint32_t(~picked[i]);
    __syncthreads();
    sort_descending(list, segments, a.list);
    for (int i = thread; i < segments; i += kSelectThreads) picked[i] = int32_t(~uint32_t(list[i]));
    __syncthreads();
    const auto key = [&](int64_t i) { return expand_child(a, b, number(i)).key; };
    cut = find_cut(key, children, uint32_t(a.winners), s);
    found = take_winners(key, children, cut, s, [&](int slot, int64_t i) {
      const uint32_t at = number(i);
      list[slot] = (uint64_t(key(i)) << 32) | uint32_t(~at);
    });
  }
  int64_t room = 32;
  while (room < found) room *= 2;
  sort_descending(list, found, room);

  const int64_t count = found < a.winners ? found : a.winners;
  for (int64_t i = thread; i < a.k; i += kSelectThreads) {
    const bool there = i < count;
    const uint64_t key = there ? list[i] : 0;
    ExpandChild child{0, -kInf, ~0u, -2, -1};
    if (there) child = expand_child(a, b, key_sequence(key));
    const int64_t to = b * a.k + i;
    a.score[to] = there ? key_score(key) : -kInf;
    a.logp[to] = child.logp;
    a.parent[to] = int32_t(child.parent);
    a.token[to] = child.token;
    a.child[to] = child.edge + 1;
  }
  if (thread == 0) a.count[b] = int32_t(count);
}

// ---------------------------------------------------------------- launches

// How a call is laid out; `bytes` of workspace, and whether a request's children can be numbered in 32 bits.
struct ExpandPlan {
  bool long_rows, possible;
  int32_t segment_bits, segments, winners, list, cached;
  int64_t row_bytes, best_bytes, picked_bytes, list_bytes, shared;
  int64_t bytes() const { return row_bytes + best_bytes + picked_bytes + list_bytes; }
};

inline ExpandPlan plan_expand_topk(
    int64_t batch, int64_t width, int64_t columns, int64_t k, int64_t max_children, bool vocab) {
  ExpandPlan p{};
  const int64_t children = max_children > 1 ? max_children : 1, longest = vocab && columns > children ? columns : children;
  p.long_rows = longest > 1024;
  p.segment_bits = p.long_rows ? kLongSegment : kShortSegment;
  const int64_t segments = (children + (1 << p.segment_bits) - 1) >> p.segment_bits;
  p.possible = ((width * segments) << p.segment_bits) < (int64_t(1) << 32) && columns < (int64_t(1) << 31);
  if (!p.possible) return p;
  p.segments = int32_t(segments);
  const int64_t most = width * children > 1 ? width * children : 1;
  p.winners = int32_t(k < most ? k : most);
  p.list = int32_t(next_power_of_2(p.winners > 256 ? 2 * int64_t(p.winners) : 512));
  p.cached = width * segments <= 11776 ? int32_t(width * segments) : 0;
  p.shared = kSelectScratch + 4 * int64_t(p.cached);
  const bool small = p.list <= 4096;  // list and segments lie in shared memory
  p.row_bytes = round_up(int64_t(sizeof(ExpandRow)) * batch * width, 256);
  p.best_bytes = round_up(4 * batch * width * segments, 256);
  p.list_bytes = small ? 0 : 8 * batch * p.list;
  p.picked_bytes = small ? 0 : 4 * batch * p.winners;
  if (small) p.shared += 8 * int64_t(p.list) + 4 * int64_t(p.winners);
  return p;
}

template <class T>
inline void launch_expand_rows(const ExpandTopK& a, const ExpandPlan& p, const Launcher& launch) {
  const int64_t rows = a.batch * a.width;
  if (rows == 0) return;
  if (p.long_rows) {
    launch(expand_rows_kernel<T, kLongWarps>, dim3{unsigned(rows)}, 32 * kLongWarps, 4 * 3 * kLongWarps, a);
  } else {
    const dim3 grid{unsigned((rows + kShortRows - 1) / kShortRows)};
    launch(expand_rows_kernel<T, 1>, grid, 32 * kShortRows, 0, a);
  }
}

// Two launches. The workspace has plan.bytes() bytes.
inline void expand_topk(ExpandTopK a, const ExpandPlan& p, void* workspace, const Launcher& launch) {
  if (a.batch == 0) return;
  a.max_children = a.max_children > 1 ? a.max_children : 1;
  a.own_terms = a.seed != nullptr || a.child_value.data != nullptr || a.logp_weight < 0;
  a.segment_bits = p.segment_bits;
  a.segments = p.segments;
  a.winners = p.winners;
  a.list = p.list;
  a.cached = p.cached;
  unsigned char* const memory = static_cast<unsigned char*>(workspace);
  a.row = reinterpret_cast<ExpandRow*>(memory);
  a.best = reinterpret_cast<float*>(memory + p.row_bytes);
  a.listed = p.list_bytes ? reinterpret_cast<uint64_t*>(memory + p.row_bytes + p.best_bytes) : nullptr;
  a.picked = p.picked_bytes ? reinterpret_cast<int32_t*>(memory + p.row_bytes + p.best_bytes + p.list_bytes) : nullptr;
  switch (a.logits.type) {
    case FloatType::kFloat32: launch_expand_rows<float>(a, p, launch); break;
    case FloatType::kBFloat16: launch_expand_rows<BFloat16>(a, p, launch); break;
    default: launch_expand_rows<Float16>(a, p, launch);
  }
  launch(expand_select_kernel, dim3{unsigned(a.batch)}, kSelectThreads, p.shared, a);
}

}  // namespace cuda
}  // namespace vstar
