// expand_topk in two launches: statistics of the rows, then a selection in each request.
//
// expand_rows_kernel: a row (prefix) is read by one warp, or by eight where rows are long; each thread takes eight
// neighboring children at a time, by one or two 16-byte loads where the children's tokens are consecutive, as those of
// a trie's upper levels are, else through the token list. In one pass over the logits every thread keeps maximum, sum of
// exponentials and sum of their products with the exponent, which are joined at the end, and every segment (a run of
// children) its largest logit. A thread of the eight warps has 32 logits in flight, 48 KB per multiprocessor (halves).
// Under "vocab" all columns are read too, unless all are legal. With extra scores (noise, child values) a segment keeps
// its best *score*: the row is read again once its statistics are known.
//
// expand_select_kernel: one block per request. The k best segments hold the k best children: a child outside of them is
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
#include "common/ops/expand_topk.h"
#include "cuda/rows.cuh"
#include "cuda/select.cuh"

namespace vstar {

// What the second launch needs to know of a row.
struct alignas(16) ExpandRow {
  float row_max, log_sum, cum_logp, constant;
  int32_t begin, count, node, line;  // line: of the logits, -1 for zeros
};

// How a call is laid out.
struct ExpandPlan {
  bool long_rows;
  int32_t segment_bits, segments;  // children per segment, as a power of 2; segments per row
  int32_t winners, list, cached;   // at most; room of the list of candidates; keys of segments in shared memory
  int64_t row_bytes, best_bytes, list_bytes, picked_bytes, shared;
};

struct ExpandLaunch : ExpandTopKArgs {
  ExpandPlan plan;
  bool extra_terms;  // the children of a prefix differ by more than their logits
  ExpandRow* row;    // [B, W]
  float* best;       // [B, W, segments]
  uint64_t* listed;  // [B, list], null: in shared memory
  int32_t* picked;   // [B, winners], null: in shared memory
};

// ---------------------------------------------------------------- rows

struct Scored {
  float score, logp;
};

// Score (-inf: no candidate) and log-probability. Without an extra score it never falls as z rises.
VSTAR_DEVICE Scored scored(const ExpandLaunch& a, const ExpandRow& row, float z, float extra_score) {
  const float logp = ((z - row.row_max) * a.inv_temperature - row.log_sum) + row.cum_logp;
  const float score = ((a.logp_weight == 0 ? 0.0f : a.logp_weight * logp) + row.constant) + extra_score;
  const bool wins = z > -kInf && logp > -kInf && score > -kInf;
  return {wins ? score : -kInf, logp};
}

VSTAR_DEVICE float extra_score(const ExpandLaunch& a, int64_t b, const ExpandRow& row, int64_t column) {
  float extra = 0;
  if (a.child_value && row.line >= 0) extra = a.value_weight * a.child_value.at(b, row.line, column);
  if (a.seed) extra += gumbel_from_bits(philox(uint64_t(a.seed.at(b)), uint32_t(row.node), uint32_t(column)));
  return extra;
}

static __device__ const float kZeroLogit = 0;  // the logits of a prefix that has none, with a stride of 0

constexpr int kLongWarps = 8, kLongVectors = 4, kLongSegment = 7;  // segments of 2^7 children
constexpr int kShortRows = 4, kShortSegment = 3;                   // rows per block

template <class T, int kWarps>
__global__ void __launch_bounds__(kWarps == 1 ? 32 * kShortRows : 32 * kWarps, kWarps == 1 ? 8 : 3)
    expand_rows_kernel(ExpandLaunch a) {
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
  const int64_t line = a.row_of(b, w), stride = line >= 0 ? a.logits.stride[2] : 0;
  const T* const from = line >= 0 ? a.logits.pointer<T>(b, line) : reinterpret_cast<const T*>(&kZeroLogit);
  const RowReader<T> reader(from, stride, token, first, last, a.columns, count);
  float* const best = a.best + r * a.plan.segments;
  const InverseTemperature inv_temperature = in_base_2(a.inv_temperature);

  const RowStats legal = read_row<T, kWarps, kVectors, kLanes>(
      reader, thread, inv_temperature, a.extra_terms ? nullptr : best, a.plan.segments, scratch);
  RowStats all = legal;
  if (a.vocab && count > 0 && count != a.columns) {
    const RowReader<T> whole(from, stride, nullptr, 0, a.columns - 1, a.columns, int32_t(a.columns));
    all = read_row<T, kWarps, kVectors, kLanes>(whole, thread, inv_temperature, nullptr, 0, scratch);
  }
  const float log_sum = logf(legal.total);
  float entropy = log_sum - legal.moment * 0.69314718055994531f / legal.total;
  if (count < 2 || !(legal.total > 0) || !(entropy > 0)) entropy = 0;

  ExpandRow row;
  row.row_max = all.top > -kInf ? all.top : 0.0f;
  row.log_sum = all.total > 0 ? logf(all.total) : 0.0f;
  row.cum_logp = a.cum_logp.at_or(0.0f, b, w);
  row.constant = a.constant(b, w, entropy);
  row.begin = int32_t(edges.begin);
  row.count = count;
  row.node = int32_t(node);
  row.line = int32_t(line);
  if (thread == 0) {
    a.row[r] = row;
    a.entropy[r] = entropy;
  }

  constexpr int32_t kTile = 8 * kThreads * kVectors;
  if (a.extra_terms) {
    for (int32_t tile = 0; tile < reader.count; tile += 8 * kThreads) {
      const int32_t at = tile + 8 * thread;
      float mine = -kInf;
#pragma unroll 1  // the noise takes most of the time, not the reads, which are in the caches
      for (int32_t i = at; i < at + 8; ++i) {
        if (i >= count) break;
        const int64_t v = reader.column(i);
        if (v < 0 || v >= a.columns) continue;
        const float z = cleaned(widened(load(from + v * reader.stride)));
        if (z > -kInf) mine = fmaxf(mine, scored(a, row, z, extra_score(a, b, row, v)).score);
      }
      mine = segment_max<kLanes>(mine);
      if (thread % kLanes == 0 && (at >> kSegmentBits) < a.plan.segments) best[at >> kSegmentBits] = mine;
    }
  }
  // The segments that no tile has reached.
  const int32_t tile = a.extra_terms ? 8 * kThreads : kTile;
  const int64_t reached = ((int64_t(count) + tile - 1) / tile * tile) >> kSegmentBits;
  for (int64_t i = reached + thread; i < a.plan.segments; i += kThreads) best[i] = -kInf;
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

VSTAR_DEVICE ExpandChild expand_child(const ExpandLaunch& a, int64_t b, uint32_t number) {
  const uint32_t span = uint32_t(a.plan.segments) << a.plan.segment_bits;
  ExpandChild child{0, -kInf, number / span, -1, -1};
  const ExpandRow row = a.row[b * a.width + child.parent];
  const int32_t c = int32_t(number - child.parent * span);
  if (c >= row.count) return child;
  child.edge = row.begin + c;
  child.token = __ldg(a.trie.token + child.edge);
  if (child.token < 0 || child.token >= a.columns) return child;
  const float z = row.line >= 0 ? cleaned(a.logits.at(b, row.line, child.token)) : 0.0f;
  if (!(z > -kInf)) return child;
  const float extra = a.extra_terms ? extra_score(a, b, row, child.token) : 0.0f;
  const Scored s = scored(a, row, z, extra);
  child.key = s.score > -kInf ? ordered_bits(s.score) : 0;
  child.logp = s.logp;
  return child;
}

__global__ void __launch_bounds__(kSelectThreads) expand_select_kernel(ExpandLaunch a) {
  VSTAR_SHARED(memory);
  SelectScratch& s = *reinterpret_cast<SelectScratch*>(memory);
  const ExpandPlan& p = a.plan;
  const int thread = int(threadIdx.x);
  const int64_t b = blockIdx.x, all_segments = a.width * p.segments;
  unsigned char* const rest = memory + kSelectScratch;
  uint64_t* const list = a.listed ? a.listed + b * p.list : reinterpret_cast<uint64_t*>(rest);
  uint32_t* const cache = reinterpret_cast<uint32_t*>(rest + (a.listed ? 0 : 8 * int64_t(p.list)));
  int32_t* const picked = a.picked ? a.picked + b * p.winners : reinterpret_cast<int32_t*>(cache + p.cached);
  const float* const best = a.best + b * all_segments;

  const auto segment_key = [&](int64_t i) -> uint32_t {
    float score = __ldg(best + i);
    if (!a.extra_terms && score > -kInf) {
      const ExpandRow* const from = a.row + b * a.width + uint32_t(i) / uint32_t(p.segments);
      const float4 head = __ldg(reinterpret_cast<const float4*>(from));
      const ExpandRow row{head.x, head.y, head.z, head.w, 0, 0, 0, 0};
      score = scored(a, row, score, 0.0f).score;
    }
    return score > -kInf ? ordered_bits(score) : 0;
  };
  const bool in_cache = all_segments <= p.cached;
  if (in_cache) {
    for (int64_t i = thread; i < all_segments; i += kSelectThreads) cache[i] = segment_key(i);
    __syncthreads();
  }
  const auto key_of_segment = [&](int64_t i) { return in_cache ? cache[i] : segment_key(i); };
  Cut cut = find_cut(key_of_segment, all_segments, uint32_t(p.winners), s);
  const auto pick = [&](int slot, int64_t i) { picked[slot] = int32_t(i); };
  const int segments = take_winners(key_of_segment, all_segments, cut, s, pick);

  // Where k segments were found, a child that cannot win is one below the worst of their best.
  const uint32_t bound = segments == p.winners && cut.key > 1 ? cut.key : 1;
  const int64_t children = int64_t(segments) << p.segment_bits;
  const auto number = [&](int64_t i) {
    const uint32_t within = uint32_t(i & ((1 << p.segment_bits) - 1));
    return (uint32_t(picked[i >> p.segment_bits]) << p.segment_bits) + within;
  };
  if (thread == 0) s.found = 0;
  __syncthreads();
  for (int64_t i = thread; i < children; i += kSelectThreads) {
    const uint32_t at = number(i), key = expand_child(a, b, at).key;
    if (key < bound) continue;
    const int slot = atomicAdd(&s.found, 1);
    if (slot < p.list) list[slot] = (uint64_t(key) << 32) | uint32_t(~at);
  }
  __syncthreads();
  int found = s.found;
  __syncthreads();
  if (found > p.list) {
    // Too many reach the bound. In enumeration order they can be cut; the list has room to sort the segments.
    for (int i = thread; i < segments; i += kSelectThreads) list[i] = uint32_t(~picked[i]);
    __syncthreads();
    sort_descending(list, segments, p.list);
    for (int i = thread; i < segments; i += kSelectThreads) picked[i] = int32_t(~uint32_t(list[i]));
    __syncthreads();
    const auto key = [&](int64_t i) { return expand_child(a, b, number(i)).key; };
    cut = find_cut(key, children, uint32_t(p.winners), s);
    found = take_winners(key, children, cut, s, [&](int slot, int64_t i) {
      const uint32_t at = number(i);
      list[slot] = (uint64_t(key(i)) << 32) | uint32_t(~at);
    });
  }
  int64_t room = 32;
  while (room < found) room *= 2;
  sort_descending(list, found, room);

  const int64_t count = found < p.winners ? found : p.winners;
  for (int64_t i = thread; i < a.k; i += kSelectThreads) {
    if (i < count) {
      const ExpandChild child = expand_child(a, b, key_sequence(list[i]));
      a.store(b, i, key_score(list[i]), child.logp, int32_t(child.parent), child.token, child.edge);
    } else {
      a.store_none(b, i);
    }
  }
  if (thread == 0) a.num_valid[b] = int32_t(count);
}

// ---------------------------------------------------------------- launches

// A request's children are numbered in 32 bits, w * span + c.
inline int64_t expand_segment_bits(const ExpandTopKArgs& a) {
  return (a.vocab && a.columns > a.max_children ? a.columns : a.max_children) > 1024 ? kLongSegment : kShortSegment;
}
inline int64_t expand_segments(const ExpandTopKArgs& a) {
  const int64_t children = a.max_children > 1 ? a.max_children : 1, bits = expand_segment_bits(a);
  return (children + (int64_t(1) << bits) - 1) >> bits;
}
inline bool fits(const Gpu&, const ExpandTopKArgs& a) {
  const int64_t numbers = (a.width * expand_segments(a)) << expand_segment_bits(a);
  return numbers < (int64_t(1) << 32) && a.columns < (int64_t(1) << 31) && a.rows < (int64_t(1) << 31);
}

inline ExpandPlan plan_expand_topk(const ExpandTopKArgs& a) {
  ExpandPlan p{};
  const int64_t children = a.max_children > 1 ? a.max_children : 1, segments = expand_segments(a);
  p.segment_bits = int32_t(expand_segment_bits(a));
  p.long_rows = p.segment_bits == kLongSegment;
  p.segments = int32_t(segments);
  const int64_t most = a.width * children > 1 ? a.width * children : 1;
  p.winners = int32_t(a.k < most ? a.k : most);
  p.list = int32_t(next_power_of_2(p.winners > 256 ? 2 * int64_t(p.winners) : 512));
  p.cached = a.width * segments <= 11776 ? int32_t(a.width * segments) : 0;
  p.shared = kSelectScratch + 4 * int64_t(p.cached);
  const bool small = p.list <= 4096;  // list and segments lie in shared memory
  p.row_bytes = round_up(int64_t(sizeof(ExpandRow)) * a.batch * a.width, 256);
  p.best_bytes = round_up(4 * a.batch * a.width * segments, 256);
  p.list_bytes = small ? 0 : 8 * a.batch * p.list;
  p.picked_bytes = small ? 0 : 4 * a.batch * p.winners;
  if (small) p.shared += 8 * int64_t(p.list) + 4 * int64_t(p.winners);
  return p;
}

template <class T>
inline void launch_expand_rows(const Gpu& gpu, const ExpandLaunch& a) {
  const int64_t rows = a.batch * a.width;
  if (rows == 0) return;
  if (a.plan.long_rows) {
    gpu.launch(expand_rows_kernel<T, kLongWarps>, dim3{unsigned(rows)}, 32 * kLongWarps, 4 * 3 * kLongWarps, a);
  } else {
    const dim3 grid{unsigned((rows + kShortRows - 1) / kShortRows)};
    gpu.launch(expand_rows_kernel<T, 1>, grid, 32 * kShortRows, 0, a);
  }
}

// Two launches.
inline void run(const Gpu& gpu, const ExpandTopKArgs& args) {
  if (args.batch == 0) return;
  const ExpandPlan p = plan_expand_topk(args);
  unsigned char* const rows = gpu.workspace(p.row_bytes + p.best_bytes + p.list_bytes + p.picked_bytes);
  unsigned char *const best = rows + p.row_bytes, *const list = best + p.best_bytes;
  ExpandLaunch a{
      args, p, args.seed || args.child_value || args.logp_weight < 0, reinterpret_cast<ExpandRow*>(rows),
      reinterpret_cast<float*>(best), p.list_bytes ? reinterpret_cast<uint64_t*>(list) : nullptr,
      p.picked_bytes ? reinterpret_cast<int32_t*>(list + p.list_bytes) : nullptr};
  a.max_children = a.max_children > 1 ? a.max_children : 1;
  dispatch(a.logits.type, [&](auto zero) { launch_expand_rows<decltype(zero)>(gpu, a); });
  gpu.launch(expand_select_kernel, dim3{unsigned(a.batch)}, kSelectThreads, p.shared, a);
}

}  // namespace vstar
