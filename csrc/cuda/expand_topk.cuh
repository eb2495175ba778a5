// expand_topk in two launches, one where a request's rows are few and short: statistics of the rows, then a selection in
// each request.
//
// Rows are cut into chunks of 4,096 children, a warp each, so that one long row keeps many multiprocessors busy and a row
// of 8,192 pays twice for what is done once per chunk. In one pass over the logits every lane keeps maximum, sum of
// exponentials and sum of their products with the exponent, which are joined at the end, and every segment (a run of 128
// children) its largest logit. Four lanes read a segment, eight neighboring children at a time, by one or two 16-byte
// loads where the children's tokens are consecutive, as those of a trie's upper levels are, else through the token list.
// So a segment's maximum takes two shuffles, and that of halves is found two at a time. Rows of up to 1,024 children
// are read by one warp, a child per lane, and have segments of eight. Under "vocab" the columns are read in chunks too,
// unless all are legal. What a row's chunks say is joined where it is needed, by one thread per row.
//
// The selection is a block per request. The k best segments hold the k best children: a child outside of them is beaten by
// one of each, because the score rises with the logit and ties go to the earlier segment. So the block finds a bound that
// the k best segments reach and few others, scores their children, and lists those that reach it too, mostly little more
// than k. Where the list takes fewer, ties above all, the children are cut as the segments were. With extra scores (noise,
// child values) a segment has its best *score* instead: a launch between the two reads the rows again.
//
// A candidate's number is its place in enumeration order: w * span + c. Which lane adds up which children depends on c
// alone, and neither on how a row is aligned nor on the launch, so that a request gives the same bits in every batch:
// half-precision rows that do not begin at a multiple of 16 bytes are loaded as two aligned neighbors and shifted.
//
// Dense bf16, B=256 W=128 V=8192 K=128: 512 MiB of logits are read once, 8 MiB of maxima and 1.5 MiB of statistics written
// and read, and 8 MiB of logits read again.
#pragma once

#include "common/gumbel.h"
#include "common/ops/expand_topk.h"
#include "cuda/rows.cuh"
#include "cuda/select.cuh"

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
  bool long_rows, fused, small;    // small: the selection's arrays lie in shared memory
  int32_t segment_bits, segments;  // children per segment, as a power of 2; segments per row
  int32_t chunks, legal_chunks;    // per row; those of the legal children come first
  int32_t winners, picks, list, sorted;  // at most; room for segments, candidates, and those that are sorted
  int64_t space;                   // bytes of a request's selection
};

struct ExpandLaunch : ExpandTopKArgs {
  ExpandPlan plan;
  bool extra_terms;   // the children of a prefix differ by more than their logits
  ExpandEdges* edges;    // [B, W]
  float4* stats;         // [B, W, chunks]
  float* best;           // [B, W, segments]
  unsigned char* space;  // [B, plan.space], null: in shared memory
};

constexpr int kLongSegment = 7, kShortSegment = 3;  // bits
constexpr int32_t kChunk = 4096, kLongTile = 1024, kShortTile = 128, kTermsChunk = 1024;
constexpr int kRowWarps = 4;  // per block, each with a row or chunk of its own

static __device__ const float kZeroLogit = 0;  // the logits of a prefix that has none, with a stride of 0

// The largest of a segment, in all of its lanes.
template <int kLanes>
VSTAR_DEVICE float segment_max(float x) {
  for (int step = 1; step < kLanes; step *= 2) x = fmaxf(x, __shfl_xor_sync(kAll, x, step));
  return x;
}

// ---------------------------------------------------------------- rows

// Statistics of a chunk; with `best`, also the largest logits of its segments.
template <class T>
VSTAR_DEVICE RowStats long_chunk(const RowReader<T>& reader, int32_t begin, InverseTemperature inv_temperature, float* best) {
  const int32_t end = reader.count - begin < kChunk ? reader.count : begin + kChunk;
  const int32_t mine = 128 * (lane() / 4) + 8 * (lane() % 4);
  RowStats s;
  for (int32_t tile = begin; tile < end; tile += kLongTile) {
    const int32_t c = tile + mine;
    Eight<T> z[4];
    reader.read_tile(tile, kLongTile, c, 32, z);
    const float top = segment_max<4>(largest(z));
    if (best && lane() % 4 == 0 && c < end) best[c >> kLongSegment] = top;
    s = added<32>(s, top, inv_temperature, [&](int i) { return z[i / 8].at(i % 8); });
  }
  return joined<1>(s, inv_temperature, nullptr);
}

template <class T>
VSTAR_DEVICE RowStats short_row(const RowReader<T>& reader, InverseTemperature inv_temperature, float* best) {
  RowStats s;
  for (int32_t tile = 0; tile < reader.count; tile += kShortTile) {
    float z[4], top = -kInf;
#pragma unroll
    for (int j = 0; j < 4; ++j) z[j] = reader.at(tile + 32 * j + lane());
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int32_t c = tile + 32 * j + lane();
      const float mine = cleaned(z[j]);
      top = fmaxf(top, mine);
      if (!best || c - lane() >= reader.count) continue;  // all lanes
      const float most = segment_max<1 << kShortSegment>(mine);
      if (lane() % (1 << kShortSegment) == 0 && c < reader.count) best[c >> kShortSegment] = most;
    }
    s = added<4>(s, top, inv_temperature, [&](int j) { return z[j]; });
  }
  return joined<1>(s, inv_temperature, nullptr);
}

// One chunk of a row, by a warp; what it writes to is the row's.
template <class T, bool kLong>
VSTAR_DEVICE void read_chunk(
    const ExpandLaunch& a, int64_t b, int64_t w, int32_t chunk, ExpandEdges* edges, float4* stats, float* best) {
  const EdgeRange range = a.trie.edges(a.node.at(b, w));  // none for what is not a node
  const int32_t count = int32_t(range.end - range.begin < a.max_children ? range.end - range.begin : a.max_children);
  const int32_t* const token = a.trie.token + range.begin;
  const int64_t first = count > 0 ? load(token) : 0, last = count > 0 ? load(token + count - 1) : -1;
  const int64_t line = a.row_of(b, w), stride = line >= 0 ? a.logits.stride[2] : 0;
  const T* const from = line >= 0 ? a.logits.pointer<T>(b, line) : reinterpret_cast<const T*>(&kZeroLogit);
  const RowReader<T> legal(from, stride, token, first, last, a.columns, count);
  const bool whole = chunk >= a.plan.legal_chunks;
  if (chunk == 0 && lane() == 0) {
    edges->begin = int32_t(range.begin);
    edges->count = count;
    edges->first = legal.token ? -1 : int32_t(first);
    edges->line = int32_t(line);
  }
  const int32_t begin = kChunk * (whole ? chunk - a.plan.legal_chunks : chunk);
  if (whole ? count == 0 || count == a.columns : begin >= count) return;
  const RowReader<T> reader =
      whole ? RowReader<T>(from, stride, nullptr, 0, a.columns - 1, a.columns, int32_t(a.columns)) : legal;
  float* const to = whole || a.extra_terms ? nullptr : best;
  const InverseTemperature inv_temperature = in_base_2(a.inv_temperature);
  const RowStats s = kLong ? long_chunk(reader, begin, inv_temperature, to) : short_row(reader, inv_temperature, to);
  if (lane() == 0) stats[chunk] = make_float4(s.top, s.total, s.moment, 0);
}

template <class T, bool kLong>
__global__ void __launch_bounds__(32 * kRowWarps, 6) expand_rows_kernel(ExpandLaunch a) {
  const uint32_t task = blockIdx.x * kRowWarps + warp(), chunks = kLong ? a.plan.chunks : a.vocab ? 2 : 1;
  const uint32_t r = task / chunks, b = r / uint32_t(a.width), w = r % uint32_t(a.width);
  if (r >= a.batch * a.width) return;
  read_chunk<T, kLong>(
      a, b, w, int32_t(task % chunks), a.edges + r, a.stats + int64_t(r) * chunks, a.best + int64_t(r) * a.plan.segments);
}

// A row whose chunks have been read.
VSTAR_DEVICE ExpandRow finished_row(
    const ExpandLaunch& a, int64_t b, int64_t w, const ExpandEdges& edges, const float4* stats, float& entropy) {
  const InverseTemperature inv_temperature = in_base_2(a.inv_temperature);
  const auto join = [&](int32_t first, int64_t count) {
    RowStats s;
    for (int64_t i = 0; kChunk * i < count; ++i) {
      const float4 x = stats[first + i];
      s = i == 0 ? RowStats{x.x, x.y, x.z} : joined(s, {x.x, x.y, x.z}, inv_temperature);
    }
    return s;
  };
  const RowStats legal = join(0, edges.count);
  const bool whole = a.vocab && edges.count > 0 && edges.count != a.columns;
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

VSTAR_DEVICE float extra_score(const ExpandLaunch& a, int64_t b, int64_t w, int32_t line, int64_t column) {
  float extra = 0;
  if (a.child_value && line >= 0) extra = a.value_weight * a.child_value.at(b, line, column);
  if (a.seed) extra += gumbel_from_bits(philox(uint64_t(a.seed.at(b)), uint32_t(a.node.at(b, w)), uint32_t(column)));
  return extra;
}

struct ExpandChild : Scored {
  int32_t edge, token;
};
VSTAR_DEVICE ExpandChild expand_child(const ExpandLaunch& a, int64_t b, int64_t w, const ExpandRow& row, int32_t c) {
  ExpandChild child{{-kInf, -kInf}, row.begin + c, -1};
  if (c >= row.count) return child;
  child.token = row.first >= 0 ? row.first + c : load(a.trie.token + child.edge);
  if (child.token < 0 || child.token >= a.columns) return child;
  const float z = row.line >= 0 ? cleaned(a.logits.at(b, row.line, child.token)) : 0.0f;
  const float extra = a.extra_terms && z > -kInf ? extra_score(a, b, w, row.line, child.token) : 0.0f;
  static_cast<Scored&>(child) = scored(a, row, z, extra);
  return child;
}

// The best scores of a row's segments from child `begin` on, where the children differ by more than their logits; by a
// warp.
template <bool kLong>
VSTAR_DEVICE void score_segments(
    const ExpandLaunch& a, int64_t b, int64_t w, const ExpandRow& row, int32_t begin, float* best) {
  constexpr int kSteps = kLong ? 4 : 1, kLanes = kLong ? 32 : 8;
  const int32_t end = row.count - begin < kTermsChunk ? row.count : begin + kTermsChunk;
  for (int32_t at = begin; at < end; at += 32 * kSteps) {
    float mine = -kInf;
#pragma unroll 1  // the noise takes most of the time
    for (int j = 0; j < kSteps; ++j) mine = fmaxf(mine, expand_child(a, b, w, row, at + 32 * j + lane()).score);
    mine = segment_max<kLanes>(mine);
    const int32_t c = at + lane();
    if (lane() % kLanes == 0 && c < end) best[c >> (kLong ? kLongSegment : kShortSegment)] = mine;
  }
}

template <bool kLong>
__global__ void __launch_bounds__(32 * kRowWarps) expand_terms_kernel(ExpandLaunch a) {
  const uint32_t parts = uint32_t((a.max_children + kTermsChunk - 1) / kTermsChunk);
  const uint32_t task = blockIdx.x * kRowWarps + warp();
  const uint32_t r = task / parts, b = r / uint32_t(a.width), w = r % uint32_t(a.width);
  if (r >= a.batch * a.width) return;
  const int32_t begin = int32_t(task % parts) * kTermsChunk;
  const ExpandEdges edges = a.edges[r];
  if (begin >= edges.count) return;
  float entropy;
  const ExpandRow row = finished_row(a, b, w, edges, a.stats + int64_t(r) * a.plan.chunks, entropy);
  score_segments<kLong>(a, b, w, row, begin, a.best + int64_t(r) * a.plan.segments);
}

// ---------------------------------------------------------------- selection

// What the selection of a request works on.
struct ExpandSpace {
  uint64_t* list;    // [plan.list] candidates
  ExpandRow* row;    // [W]
  uint32_t* key;     // [W, segments] scores of the segments
  uint32_t* picked;  // [plan.picks] segments

  static int64_t bytes(const ExpandLaunch& a) {
    const ExpandPlan& p = a.plan;
    return round_up(8 * int64_t(p.list) + a.width * (int64_t(sizeof(ExpandRow)) + 4 * p.segments) + 4 * p.picks, 16);
  }
  VSTAR_DEVICE ExpandSpace(const ExpandLaunch& a, unsigned char* at) {
    list = reinterpret_cast<uint64_t*>(at);
    row = reinterpret_cast<ExpandRow*>(list + a.plan.list);
    key = reinterpret_cast<uint32_t*>(row + a.width);
    picked = key + a.width * a.plan.segments;
  }
};

// A block selects a request's winners. edges, stats and best are the request's; `best` may be the same memory as space.key.
template <bool kLong, bool kTerms>
VSTAR_DEVICE void select_children(
    const ExpandLaunch& a, int64_t b, const ExpandSpace& space, const ExpandEdges* edges, const float4* stats, float* best,
    SelectScratch& s) {
  constexpr int kBits = kLong ? kLongSegment : kShortSegment;
  const ExpandPlan& p = a.plan;
  const uint32_t thread = threadIdx.x, segments = uint32_t(p.segments), all_segments = uint32_t(a.width) * segments;
  const uint32_t winners = uint32_t(p.winners), span = segments << kBits;
  for (int64_t w = thread; w < a.width; w += kSelectThreads) {
    float entropy;
    space.row[w] = finished_row(a, b, w, edges[w], stats + w * p.chunks, entropy);
    a.entropy[b * a.width + w] = entropy;
  }
  clear(s);
  if (kTerms) {
    for (int64_t w = warp(); w < a.width; w += kSelectWarps) {
      for (int32_t begin = 0; begin < space.row[w].count; begin += kTermsChunk) {
        score_segments<kLong>(a, b, w, space.row[w], begin, best + w * segments);
      }
    }
    __syncthreads();
  }

  // Segments.
  const auto with_number = [](uint32_t score, uint32_t number) { return score ? uint64_t(score) << 32 | uint32_t(~number) : 0; };
  const auto each_segment = [&](const auto& use) {
    for (uint32_t i = thread; i < all_segments; i += kSelectThreads) use(with_number(space.key[i], i));
  };
  const auto score_each_segment = [&](const auto& use) {
    for (uint32_t i = thread; i < all_segments; i += kSelectThreads) {
      const uint32_t w = i / segments;
      const ExpandRow& row = space.row[w];
      float score = -kInf;
      if (int32_t(i - w * segments) << kBits < row.count) score = best[i];
      if (!a.extra_terms) score = scored(a, row, score, 0.0f).score;
      const uint32_t key = score > -kInf ? ordered_bits(score) : 0;
      space.key[i] = key;
      use(with_number(key, i));
    }
  };
  uint64_t bound = find_bound(score_each_segment, each_segment, all_segments, winners, uint32_t(p.picks), s);
  each_segment([&](uint64_t key) {
    if (key >= bound && key > 0) space.picked[atomicAdd(&s.found, 1u)] = ~uint32_t(key);
  });
  __syncthreads();
  const uint32_t picked = s.found;
  __syncthreads();
  if (thread == 0) s.found = 0;
  __syncthreads();

  // Children. A winner is no worse than the k-th of the segments' best.
  const auto each_child = [&](const auto& use) {
    constexpr int kLanes = kLong ? 32 : 8, kSteps = kLong ? 4 : 1;  // a segment is taken by some lanes, in some steps
    for (uint32_t i = thread / kLanes; i < picked; i += kSelectThreads / kLanes) {
      const uint32_t segment = space.picked[i], w = segment / segments, within = thread % kLanes;
      const ExpandRow row = space.row[w];
      uint64_t key[kSteps];
#pragma unroll
      for (int j = 0; j < kSteps; ++j) {
        const uint32_t number = (segment << kBits) + kLanes * j + within;
        const float score = expand_child(a, b, w, row, int32_t(number - w * span)).score;
        key[j] = with_number(score > -kInf ? ordered_bits(score) : 0, number);
      }
#pragma unroll
      for (int j = 0; j < kSteps; ++j) use(key[j]);
    }
  };
  const uint64_t least = bound >> 32 << 32 | 1;
  const auto enlist = [&](uint64_t key) {
    if (key < least) return;
    const uint32_t slot = atomicAdd(&s.found, 1u);
    if (slot < uint32_t(p.list)) space.list[slot] = key;
  };
  each_child(enlist);
  __syncthreads();
  uint32_t found = s.found;
  __syncthreads();
  const uint32_t sorted = uint32_t(p.sorted);
  if (found > sorted) {
    if (thread == 0) s.found = 0;
    if (found > uint32_t(p.list)) {  // not all are listed
      bound = find_bound(each_child, each_child, a.width * int64_t(span), winners, sorted, s);
      each_child([&](uint64_t key) {
        if (key >= bound && key > 0) space.list[atomicAdd(&s.found, 1u)] = key;
      });
    } else {
      const auto each_listed = [&](const auto& use) {
        for (uint32_t i = thread; i < found; i += kSelectThreads) use(space.list[i]);
      };
      bound = find_bound(each_listed, each_listed, a.width * int64_t(span), winners, sorted, s);
      for (uint32_t first = 0; first < found; first += kSelectThreads) {
        const uint64_t key = first + thread < found ? space.list[first + thread] : 0;
        __syncthreads();  // what follows overwrites only what has been read
        if (key >= bound && key > 0) space.list[atomicAdd(&s.found, 1u)] = key;
      }
    }
    __syncthreads();
    found = s.found;
  }

  // In order.
  const uint32_t count = found < winners ? found : winners;
  const auto store = [&](uint32_t place, uint64_t key, int64_t w, const ExpandChild& child) {
    a.store(b, place, key_score(key), child.logp, int32_t(w), child.token, child.edge);
  };
  const auto child_of = [&](uint64_t key, uint32_t& w) {
    const uint32_t number = key_sequence(key);
    w = number / span;
    return expand_child(a, b, w, space.row[w], int32_t(number - w * span));
  };
  if (found <= kSelectThreads) {
    if (thread == 0) space.list[found] = 0;
    __syncthreads();
    const auto place = [&](auto parts) {
      constexpr int kParts = decltype(parts)::value;
      const uint32_t i = thread / kParts;
      const uint64_t key = i < found ? space.list[i] : 0;
      uint32_t w = 0;
      ExpandChild child{};
      if (key > 0) child = child_of(key, w);  // its loads are under way while it is ranked
      const uint32_t rank = rank_of<kParts>(key, space.list, found);
      if (thread % kParts == 0 && key > 0 && rank < count) store(rank, key, w, child);
    };
    if (found <= kSelectThreads / 4) {
      place(std::integral_constant<int, 4>());
    } else if (found <= kSelectThreads / 2) {
      place(std::integral_constant<int, 2>());
    } else {
      place(std::integral_constant<int, 1>());
    }
  } else {
    int64_t room = 2 * kSelectThreads;
    while (room < found) room *= 2;
    __syncthreads();
    sort_descending(space.list, found, room);
    for (uint32_t i = thread; i < count; i += kSelectThreads) {
      uint32_t w;
      const ExpandChild child = child_of(space.list[i], w);
      store(i, space.list[i], w, child);
    }
  }
  for (int64_t i = count + thread; i < a.k; i += kSelectThreads) a.store_none(b, i);
  if (thread == 0) a.num_valid[b] = int32_t(count);
}

constexpr int64_t kSelectScratch = (sizeof(SelectScratch) + 15) / 16 * 16;

template <bool kLong, bool kSmall>
__global__ void __launch_bounds__(kSelectThreads) expand_select_kernel(ExpandLaunch a) {
  VSTAR_SHARED(memory);
  const int64_t b = blockIdx.x, rows = b * a.width;
  const ExpandSpace space(a, kSmall ? memory + kSelectScratch : a.space + b * a.plan.space);
  select_children<kLong, false>(
      a, b, space, a.edges + rows, a.stats + rows * a.plan.chunks, a.best + rows * a.plan.segments,
      *reinterpret_cast<SelectScratch*>(memory));
}

// All of it, for a request with few and short rows.
inline int64_t fused_bytes(const ExpandLaunch& a) { return a.width * (sizeof(ExpandEdges) + sizeof(float4) * a.plan.chunks); }

template <class T>
__global__ void __launch_bounds__(kSelectThreads) expand_fused_kernel(ExpandLaunch a) {
  VSTAR_SHARED(memory);
  const int64_t b = blockIdx.x;
  ExpandEdges* const edges = reinterpret_cast<ExpandEdges*>(memory + kSelectScratch);
  float4* const stats = reinterpret_cast<float4*>(edges + a.width);
  const ExpandSpace space(a, reinterpret_cast<unsigned char*>(stats + a.width * a.plan.chunks));
  float* const best = reinterpret_cast<float*>(space.key);
  for (int64_t w = warp(); w < a.width; w += kSelectWarps) {
    for (int32_t chunk = 0; chunk < a.plan.chunks; ++chunk) {
      read_chunk<T, false>(a, b, w, chunk, edges + w, stats + w * a.plan.chunks, best + w * a.plan.segments);
    }
  }
  __syncthreads();
  SelectScratch& s = *reinterpret_cast<SelectScratch*>(memory);
  if (a.extra_terms) {
    select_children<false, true>(a, b, space, edges, stats, best, s);
  } else {
    select_children<false, false>(a, b, space, edges, stats, best, s);
  }
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
inline int64_t expand_chunks(int64_t columns) { return columns > kChunk ? (columns + kChunk - 1) / kChunk : 1; }
inline bool fits(const Gpu&, const ExpandTopKArgs& a) {
  const int64_t numbers = (a.width * expand_segments(a)) << expand_segment_bits(a);
  return numbers < (int64_t(1) << 32) && a.columns < (int64_t(1) << 31) && a.rows < (int64_t(1) << 31);
}

inline ExpandPlan plan_expand_topk(const ExpandLaunch& a) {
  ExpandPlan p{};
  p.segment_bits = int32_t(expand_segment_bits(a));
  p.long_rows = p.segment_bits == kLongSegment;
  p.segments = int32_t(expand_segments(a));
  p.legal_chunks = int32_t(expand_chunks(a.max_children));
  p.chunks = p.legal_chunks + (a.vocab ? int32_t(expand_chunks(a.columns)) : 0);
  const int64_t most = a.width * a.max_children > 1 ? a.width * a.max_children : 1;
  p.winners = int32_t(a.k < most ? a.k : most);
  const int64_t picks = p.winners + p.winners / 2 + 64, all_segments = a.width * p.segments;
  p.picks = int32_t(picks < all_segments ? picks : all_segments);
  p.list = int32_t(p.winners > 1024 ? next_power_of_2(2 * int64_t(p.winners)) : 2048);
  p.sorted = p.winners > kSelectThreads / 2 ? p.list : kSelectThreads;
  return p;
}

// Two launches; three with extra terms; or one.
template <class T>
inline void launch_expand_topk(const Gpu& gpu, ExpandLaunch& a) {
  const int64_t rows = a.batch * a.width;
  ExpandPlan& p = a.plan;
  p.space = ExpandSpace::bytes(a);
  const int64_t whole = kSelectScratch + p.space + fused_bytes(a);
  const dim3 requests{unsigned(a.batch)};
  if (!p.long_rows && whole <= kMostShared && a.width * a.max_children <= 32768) {
    gpu.launch(expand_fused_kernel<T>, requests, kSelectThreads, whole, a);
    return;
  }
  const bool small = kSelectScratch + p.space <= kMostShared;
  const int64_t edge_bytes = round_up(int64_t(sizeof(ExpandEdges)) * rows, 256);
  const int64_t stat_bytes = round_up(int64_t(sizeof(float4)) * rows * p.chunks, 256);
  const int64_t best_bytes = round_up(4 * rows * p.segments, 256), space_bytes = small ? 0 : a.batch * p.space;
  unsigned char* const memory = gpu.workspace(edge_bytes + stat_bytes + best_bytes + space_bytes);
  a.edges = reinterpret_cast<ExpandEdges*>(memory);
  a.stats = reinterpret_cast<float4*>(memory + edge_bytes);
  a.best = reinterpret_cast<float*>(memory + edge_bytes + stat_bytes);
  a.space = memory + edge_bytes + stat_bytes + best_bytes;
  const auto warps = [&](int64_t tasks) { return dim3{unsigned((tasks + kRowWarps - 1) / kRowWarps)}; };
  const int64_t parts = (a.max_children + kTermsChunk - 1) / kTermsChunk, shared = kSelectScratch + (small ? p.space : 0);
  if (rows > 0) {
    gpu.launch(p.long_rows ? expand_rows_kernel<T, true> : expand_rows_kernel<T, false>, warps(rows * p.chunks), 32 * kRowWarps, 0, a);
    if (a.extra_terms) {
      gpu.launch(p.long_rows ? expand_terms_kernel<true> : expand_terms_kernel<false>, warps(rows * parts), 32 * kRowWarps, 0, a);
    }
  }
  const auto select = p.long_rows ? (small ? expand_select_kernel<true, true> : expand_select_kernel<true, false>)
                                  : (small ? expand_select_kernel<false, true> : expand_select_kernel<false, false>);
  gpu.launch(select, requests, kSelectThreads, shared, a);
}

inline void run(const Gpu& gpu, const ExpandTopKArgs& args) {
  if (args.batch == 0) return;
  ExpandLaunch a{};
  static_cast<ExpandTopKArgs&>(a) = args;
  a.max_children = a.max_children > 1 ? a.max_children : 1;
  a.extra_terms = args.seed || args.child_value || args.logp_weight < 0;
  a.plan = plan_expand_topk(a);
  dispatch(a.logits.type, [&](auto zero) { launch_expand_topk<decltype(zero)>(gpu, a); });
}

}  // namespace vstar
