// The rows of expand_topk: where their children are, their statistics, the logits and scores of children. expand_topk.cuh
// says how it is done.
#pragma once

#include <type_traits>

#include "common/gumbel.h"
#include "common/ops/expand_topk.h"
#include "cuda/rows.cuh"

namespace vstar {

// Where a row's children are. first: the first token if they are consecutive columns, else -1; line: of the logits, -1 for
// zeros.
struct alignas(16) ExpandEdges {
  int32_t begin, count, first, line;
};

// What the selection needs to know of a row.
struct alignas(16) ExpandRow : ExpandEdges {
  float row_max, log_sum, cum_logp, constant;
};

// How a call is laid out.
struct ExpandPlan {
  int32_t segments;                      // per row
  int32_t chunks, legal_chunks;          // per row; those of the legal children come first
  int32_t winners, picks, list, sorted;  // at most; room for segments, for candidates, and for those that are ordered
  int64_t space;                         // bytes of a request's selection
};

struct ExpandLaunch : ExpandTopKArgs {
  ExpandPlan plan;
  ExpandEdges* edges;    // [B, W]
  float4* stats;         // [B, W, chunks]
  float* best;           // [B, W, segments]
  unsigned char* space;  // [B, plan.space], null: in shared memory
};

constexpr int kLongSegment = 7, kShortSegment = 3;  // bits
constexpr int32_t kChunk = 4096, kTile = 1024, kTermsChunk = 1024, kShortRow = 1024;
constexpr int kRowWarps = 4;  // per block

static __device__ const float kZeroLogit = 0;  // the logits of a prefix that has none, with a stride of 0

// The largest of a segment, in all of its lanes.
template <int kLanes>
VSTAR_DEVICE float segment_max(float x) {
  for (int step = 1; step < kLanes; step *= 2) x = fmaxf(x, __shfl_xor_sync(kAll, x, step));
  return x;
}

// ---------------------------------------------------------------- long rows

// Statistics of a chunk; with `best`, also the largest logits of its segments.
template <class T, bool kFiltered>
VSTAR_DEVICE RowStats read_chunk(
    const RowReader<T, kFiltered>& reader, int32_t begin, InverseTemperature inv_temperature, float* best) {
  const int32_t end = reader.count - begin < kChunk ? reader.count : begin + kChunk;
  const int32_t mine = 128 * (lane() / 4) + 8 * (lane() % 4);
  RowStats s;
  for (int32_t tile = begin; tile < end; tile += kTile) {
    const int32_t c = tile + mine;
    Eight<T> z[4];
    reader.read_tile(tile, kTile, c, 32, z);
    const float top = segment_max<4>(largest(z));
    if (best && lane() % 4 == 0 && c < end) best[c >> kLongSegment] = top;
    s = added<32>(s, top, inv_temperature, [&](int i) { return z[i / 8].at(i % 8); });
  }
  return joined<1>(s, inv_temperature, nullptr);
}

// A warp per chunk. kFiltered, here and below: the trie is restricted.
template <class T, bool kFiltered>
__global__ void __launch_bounds__(32 * kRowWarps, 6) expand_rows_kernel(ExpandLaunch a, bool keeps_best) {
  const uint32_t task = blockIdx.x * kRowWarps + warp(), chunks = uint32_t(a.plan.chunks), width = uint32_t(a.width);
  const uint32_t r = task / chunks, b = r / width, w = r % width;
  const int32_t chunk = int32_t(task % chunks);
  if (r >= a.batch * a.width) return;
  const EdgeRange edges = a.trie.edges(a.node.at(b, w));  // none for what is not a node
  const int32_t count = int32_t(edges.end - edges.begin < a.max_children ? edges.end - edges.begin : a.max_children);
  const int32_t* const token = a.trie.token + edges.begin;
  const int64_t first = count > 0 ? load(token) : 0, last = count > 0 ? load(token + count - 1) : -1;
  const int64_t line = a.row_of(b, w), stride = line >= 0 ? a.logits.stride[2] : 0;
  const T* const from = line >= 0 ? a.logits.pointer<T>(b, line) : reinterpret_cast<const T*>(&kZeroLogit);
  const AliveNodes alive = kFiltered ? a.trie.alive_of(b) : AliveNodes{};
  const RowReader<T, kFiltered> legal(from, stride, token, first, last, a.columns, count, alive);
  if (chunk == 0 && lane() == 0) {
    a.edges[r].begin = int32_t(edges.begin);
    a.edges[r].count = count;
    a.edges[r].first = legal.token ? -1 : int32_t(first);
    a.edges[r].line = int32_t(line);
  }
  const bool whole = chunk >= a.plan.legal_chunks;
  const int32_t begin = kChunk * (whole ? chunk - a.plan.legal_chunks : chunk);
  if (whole ? count == 0 || (!kFiltered && count == a.columns) : begin >= count) return;
  const RowReader<T, kFiltered> reader =
      whole ? RowReader<T, kFiltered>(from, stride, nullptr, 0, a.columns - 1, a.columns, int32_t(a.columns)) : legal;
  float* const best = whole || !keeps_best ? nullptr : a.best + int64_t(r) * a.plan.segments;
  const RowStats s = read_chunk(reader, begin, in_base_2(a.inv_temperature), best);
  if (lane() == 0) a.stats[task] = make_float4(s.top, s.total, s.moment, 0);
}

// A row whose chunks have been read.
template <bool kFiltered>
VSTAR_DEVICE ExpandRow finished_row(
    const ExpandLaunch& a, int64_t b, int64_t w, const ExpandEdges& edges, const float4* stats, float& entropy) {
  const InverseTemperature inv_temperature = in_base_2(a.inv_temperature);
  const auto join = [&](int32_t first, int64_t count) {
    RowStats s;
    for (int64_t i = 0; kChunk * i < count; ++i) {
      const float4 x = stats[first + i];
      s = joined(s, {x.x, x.y, x.z}, inv_temperature);
    }
    return s;
  };
  const RowStats legal = join(0, edges.count);
  const bool whole = a.vocab && edges.count > 0 && (kFiltered || edges.count != a.columns);
  const RowStats all = whole ? join(a.plan.legal_chunks, a.columns) : legal;
  const float log_sum = logf(legal.total);
  entropy = log_sum - legal.moment * 0.69314718055994531f / legal.total;
  if (edges.count < 2 || !(legal.total > 0) || !(entropy > 0)) entropy = 0;
  ExpandRow row;
  static_cast<ExpandEdges&>(row) = edges;
  row.row_max = all.top > -kInf ? all.top : 0.0f;
  row.log_sum = all.total > 0 ? logf(all.total) : 0.0f;
  row.cum_logp = a.cum_logp.at_or(0.0f, b, w);
  row.constant = a.constant(b, w, entropy);
  return row;
}

// ---------------------------------------------------------------- children

// The tokens and logits, cleaned, of a row's children c, c + step, ...: -1 and -inf for none. No load waits for another but
// for that of its token: what is none reads the last child instead. T is the logits' type; void: looked up. A row that does
// not begin in the trie, at -1, is of all columns.
template <class T, bool kFiltered, int kCount>
VSTAR_DEVICE void read_children(
    const ExpandLaunch& a, int64_t b, const ExpandEdges& row, int32_t c, int32_t step, int32_t (&token)[kCount],
    float (&z)[kCount]) {
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    z[j] = -kInf;
    token[j] = -1;
  }
  if (row.count == 0 || a.columns == 0) return;
  const auto clamped = [](int32_t x, int32_t last) { return x < last ? x : last; };
#pragma unroll
  for (int j = 0; j < kCount; ++j) token[j] = row.first + clamped(c + j * step, row.count - 1);
  if (row.first < 0) {
    const int32_t* const list = a.trie.token + row.begin;
#pragma unroll
    for (int j = 0; j < kCount; ++j) token[j] = load(list + clamped(c + j * step, row.count - 1));
  }
  if (kFiltered && row.begin >= 0) {  // the token says it: a register more for each would be spilled
    const int32_t* const bits = a.trie.alive_of(b).bits;
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const uint32_t child = uint32_t(row.begin + clamped(c + j * step, row.count - 1)) + 1;
      if (!(load(bits + (child >> 5)) >> (child & 31) & 1)) token[j] = -1;
    }
  }
  const int32_t last = int32_t(a.columns) - 1;
  if constexpr (std::is_void<T>::value) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const int32_t v = clamped(token[j] < 0 ? 0 : token[j], last);
      z[j] = row.line < 0 ? 0.0f : a.logits.at(b, row.line, v);
    }
  } else {
    const T* const from = row.line < 0 ? reinterpret_cast<const T*>(&kZeroLogit) : a.logits.pointer<T>(b, row.line);
    const int64_t stride = row.line < 0 ? 0 : a.logits.stride[2];
    T x[kCount];
#pragma unroll
    for (int j = 0; j < kCount; ++j) x[j] = load(from + clamped(token[j] < 0 ? 0 : token[j], last) * stride);
#pragma unroll
    for (int j = 0; j < kCount; ++j) z[j] = widened(x[j]);
  }
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    const bool there = c + j * step < row.count && token[j] >= 0 && token[j] <= last;
    z[j] = there ? cleaned(z[j]) : -kInf;
    token[j] = there ? token[j] : -1;
  }
}

// Score (-inf: no candidate) and log-probability. Without an extra score it never falls as z rises.
struct Scored {
  float score, logp;
};
VSTAR_DEVICE Scored scored(const ExpandLaunch& a, const ExpandRow& row, float z, float extra_score) {
  const float logp = ((z - row.row_max) * a.inv_temperature - row.log_sum) + row.cum_logp;
  const float score = ((a.logp_weight == 0 ? 0.0f : a.logp_weight * logp) + row.constant) + extra_score;
  const bool wins = z > -kInf && logp > -kInf && score > -kInf;
  return {wins ? score : -kInf, logp};
}

VSTAR_DEVICE float extra_score(const ExpandLaunch& a, int64_t b, int64_t w, int32_t line, int32_t token) {
  float extra = 0;
  if (a.child_value && line >= 0) extra = a.value_weight * a.child_value.at(b, line, token);
  if (a.seed) extra += gumbel_from_bits(philox(uint64_t(a.seed.at(b)), uint32_t(a.node.at(b, w)), uint32_t(token)));
  return extra;
}

// kExtra: the children of a prefix differ by more than their logits.
template <bool kExtra>
VSTAR_DEVICE Scored scored_child(
    const ExpandLaunch& a, int64_t b, int64_t w, const ExpandRow& row, int32_t token, float z) {
  return scored(a, row, z, kExtra && z > -kInf ? extra_score(a, b, w, row.line, token) : 0.0f);
}

// The best scores of a row's segments from child `begin` on; by a warp.
template <class T, int kBits, bool kFiltered>
VSTAR_DEVICE void score_segments(
    const ExpandLaunch& a, int64_t b, int64_t w, const ExpandRow& row, int32_t begin, float* best) {
  constexpr int kLanes = kBits > 5 ? 32 : 1 << kBits, kSteps = (1 << kBits) / kLanes;
  const int32_t end = row.count - begin < kTermsChunk ? row.count : begin + kTermsChunk;
  for (int32_t at = begin; at < end; at += 32 * kSteps) {
    float mine = -kInf;
#pragma unroll 1  // the noise takes most of the time
    for (int j = 0; j < kSteps; ++j) {
      int32_t token[1];
      float z[1];
      read_children<T, kFiltered>(a, b, row, at + 32 * j + lane(), 0, token, z);
      mine = fmaxf(mine, scored_child<true>(a, b, w, row, token[0], z[0]).score);
    }
    mine = segment_max<kLanes>(mine);
    const int32_t c = at + lane();
    if (lane() % kLanes == 0 && c < end) best[c >> kBits] = mine;
  }
}

}  // namespace vstar
