// expand_topk: statistics of the rows, then a selection in each request; in one launch if a request's rows are short and
// few, else in two, or three with extra scores (noise, child values).
//
// Long rows are cut into chunks of 4,096 children, a warp each, so that one long row keeps many multiprocessors busy, and
// no work of a row is done by more than two warps if it has 8,192. In one pass over the logits every lane keeps maximum,
// sum of exponentials and sum of their products with the exponent, which are joined at the end, and every segment (a run
// of 128 children) its largest logit. Four lanes read a segment, eight neighboring children at a time, by one or two
// 16-byte loads where the children's tokens are consecutive, as those of a trie's upper levels are, else through the token
// list. So a segment's maximum takes two shuffles, and halves are compared two at a time. Under "vocab" the columns are
// read in chunks too, unless all are legal. What the chunks of a row say is joined where it is needed, by one thread.
// Short rows are read by eight lanes each, neighboring children in neighboring lanes, and have segments of eight.
//
// The selection is a block per request. The k best segments hold the k best children: a child outside of them is beaten by
// one of each, because the score rises with the logit and ties go to the earlier segment. So the block finds a bound that
// the k best segments reach and few others, scores their children, and lists those that reach it too, mostly little more
// than k, which are ranked by comparing all pairs. Where the list takes fewer, ties above all, a better bound is found.
// With extra scores a segment has its best *score* instead of its largest logit, found once the row's statistics are known.
//
// A candidate's number is its place in enumeration order: w * max_children + c. Which lane adds up which children depends
// on c alone, and neither on how a row is aligned nor on the batch, so that a request gives the same bits in every batch:
// half-precision rows that do not begin at a multiple of 16 bytes are loaded as two aligned neighbors and shifted.
//
// Dense bf16, B=256 W=128 V=8192 K=128: 512 MiB of logits are read once, 8 MiB of maxima and 1.5 MiB of statistics written
// and read, and 8 MiB of logits read again.
#pragma once

#include "cuda/expand_rows.cuh"
#include "cuda/select.cuh"

namespace vstar {

// ---------------------------------------------------------------- selection

// What the selection of a request works on.
struct ExpandSpace {
  uint64_t* list;    // [plan.list] candidates
  ExpandRow* row;    // [W]
  uint32_t* key;     // [W, segments] scores of the segments
  uint32_t* picked;  // [plan.picks] segments

  static int64_t bytes(const ExpandLaunch& a) {
    const ExpandPlan& p = a.plan;
    return round_up(8 * int64_t(p.list) + a.width * (int64_t(sizeof(ExpandRow)) + 4 * p.segments) + 4 * int64_t(p.picks), 16);
  }
  VSTAR_DEVICE ExpandSpace(const ExpandLaunch& a, unsigned char* at) {
    list = reinterpret_cast<uint64_t*>(at);
    row = reinterpret_cast<ExpandRow*>(list + a.plan.list);
    key = reinterpret_cast<uint32_t*>(row + a.width);
    picked = key + a.width * a.plan.segments;
  }
};

// Hand every child of the picked segments, as a key, to `use`.
template <class T, int kBits, bool kExtra, bool kFiltered, class Use>
VSTAR_DEVICE void each_child(const ExpandLaunch& a, int64_t b, const ExpandSpace& space, uint32_t picked, const Use& use) {
  constexpr int kLanes = kBits > 5 ? 32 : 1 << kBits, kSteps = (1 << kBits) / kLanes;  // a segment: lanes, steps of each
  const uint32_t within = threadIdx.x % kLanes, segments = uint32_t(a.plan.segments);
  for (uint32_t i = threadIdx.x / kLanes; i < picked; i += kSelectThreads / kLanes) {
    const uint32_t segment = space.picked[i], w = segment / segments, first = (segment - w * segments) << kBits;
    const ExpandRow row = space.row[w];
    int32_t token[kSteps];
    float z[kSteps];
    read_children<T, kFiltered>(a, b, row, int32_t(first + within), kLanes, token, z);
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
      const float score = scored_child<kExtra>(a, b, w, row, token[j], z[j]).score;
      const uint32_t number = w * uint32_t(a.max_children) + first + kLanes * j + within;
      use(numbered(score > -kInf ? ordered_bits(score) : 0, number));
    }
  }
}

// A block selects a request's winners. Its rows are finished; `best` may be the same memory as space.key. Counters and
// s.found are clear.
template <class T, int kBits, bool kExtra, bool kFiltered>
VSTAR_DEVICE void select_children(
    const ExpandLaunch& a, int64_t b, const ExpandSpace& space, const float* best, SelectScratch& s) {
  const ExpandPlan& p = a.plan;
  const uint32_t thread = threadIdx.x, segments = uint32_t(p.segments), all_segments = uint32_t(a.width) * segments;
  const uint32_t winners = uint32_t(p.winners), span = uint32_t(a.max_children), children = uint32_t(a.width) * span;

  // Segments.
  const auto score_segment = [&](const auto& use) {
    for (uint32_t at = thread; at < all_segments; at += 4 * kSelectThreads) {
      float score[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {  // all under way at once
        const uint32_t i = at + j * kSelectThreads;
        score[j] = best[i < all_segments ? i : at];
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t i = at + j * kSelectThreads, w = i / segments;
        if (i >= all_segments) break;
        const ExpandRow& row = space.row[w];
        if (int32_t((i - w * segments) << kBits) >= row.count) score[j] = -kInf;
        if (!kExtra) score[j] = scored(a, row, score[j], 0.0f).score;
        const uint32_t key = score[j] > -kInf ? ordered_bits(score[j]) : 0;
        space.key[i] = key;
        use(numbered(key, i));
      }
    }
  };
  const auto each_segment = [&](const auto& use) {
    for (uint32_t i = thread; i < all_segments; i += kSelectThreads) use(numbered(space.key[i], i));
  };
  KeyRange range = find_range(score_segment, all_segments, s);
  const bool few = range.exist < winners, picks_all = range.exist <= uint32_t(p.picks);
  const uint64_t bound = few ? 1 : picks_all ? range.low : find_bound(each_segment, range, winners, uint32_t(p.picks), s);
  each_segment([&](uint64_t key) {
    if (key >= bound) space.picked[atomicAdd(&s.found, 1u)] = ~uint32_t(key);
  });
  __syncthreads();
  const uint32_t picked = s.found;
  __syncthreads();

  // Children. A winner is no worse than the best of the k-th segment.
  uint64_t least = few ? 1 : least_key(uint32_t(bound >> 32), children);
  uint32_t found;
  const auto enlist = [&](uint64_t key) {
    if (key < least) return;
    const uint32_t slot = atomicAdd(&s.found, 1u);
    if (slot < uint32_t(p.list)) space.list[slot] = key;
  };
  while (true) {
    if (thread == 0) s.found = 0;
    __syncthreads();
    each_child<T, kBits, kExtra, kFiltered>(a, b, space, picked, enlist);
    __syncthreads();
    found = s.found;
    __syncthreads();
    if (found <= uint32_t(p.list)) break;
    const auto each = [&](const auto& use) { each_child<T, kBits, kExtra, kFiltered>(a, b, space, picked, use); };
    least = find_bound(each, {least, range.high, found}, winners, uint32_t(p.sorted), s);
  }
  if (found > uint32_t(p.sorted)) {
    if (thread == 0) s.found = 0;
    const auto each_listed = [&](const auto& use) {
      for (uint32_t i = thread; i < found; i += kSelectThreads) use(space.list[i]);
    };
    least = find_bound(each_listed, {least, range.high, found}, winners, uint32_t(p.sorted), s);
    for (uint32_t first = 0; first < found; first += kSelectThreads) {
      const uint64_t key = first + thread < found ? space.list[first + thread] : 0;
      __syncthreads();  // what follows overwrites only what has been read
      if (key >= least) space.list[atomicAdd(&s.found, 1u)] = key;
    }
    __syncthreads();
    found = s.found;
  }

  // In order: ranked where there is a thread for each, which looks its child up meanwhile.
  const uint32_t count = found < winners ? found : winners;
  const bool ranked = found <= kSelectThreads;
  if (!ranked) {
    int64_t room = 2 * kSelectThreads;
    while (room < found) room *= 2;
    sort_descending(space.list, found, room);
  }
  for (uint32_t first = 0; first < found; first += kSelectThreads) {
    const uint32_t i = first + (ranked ? warp() + kSelectWarps * lane() : thread);
    const uint64_t key = i < found ? space.list[i] : 0;
    const uint32_t number = key_sequence(key), w = key > 0 ? number / span : 0;
    const ExpandRow row = space.row[w];
    const int32_t c = key > 0 ? int32_t(number - w * span) : row.count;
    int32_t token[1];
    float z[1];
    read_children<T, false>(a, b, row, c, 0, token, z);  // what wins is alive
    const float logp = scored(a, row, z[0], 0.0f).logp;
    const uint32_t place = ranked ? rank_of_own(space.list, found) : i;
    if (key > 0 && place < count) a.store(b, place, key_score(key), logp, int32_t(w), token[0], row.begin + c);
  }
  for (int64_t i = count + thread; i < a.k; i += kSelectThreads) a.store_none(b, i);
  if (thread == 0) a.num_valid[b] = int32_t(count);
}

// Finish the rows of a request. Ends with a barrier.
template <bool kFiltered>
VSTAR_DEVICE void finish_rows(
    const ExpandLaunch& a, int64_t b, const ExpandEdges* edges, const float4* stats, ExpandRow* row, SelectScratch& s) {
  for (int64_t w = threadIdx.x; w < a.width; w += kSelectThreads) {
    float entropy;
    row[w] = finished_row<kFiltered>(a, b, w, edges[w], stats + w * a.plan.chunks, entropy);
    a.entropy[b * a.width + w] = entropy;
  }
  clear(s);
}

constexpr int64_t kSelectScratch = (sizeof(SelectScratch) + 15) / 16 * 16;

// T is the logits' type where the selection's arrays lie in shared memory, else void.
template <class T, bool kExtra, bool kFiltered>
__global__ void __launch_bounds__(kSelectThreads, std::is_void<T>::value || (kExtra && kFiltered) ? 1 : 2)
    expand_select_kernel(ExpandLaunch a) {
  VSTAR_SHARED(memory);
  SelectScratch& s = *reinterpret_cast<SelectScratch*>(memory);
  const int64_t b = blockIdx.x, rows = b * a.width;
  constexpr bool kSmall = !std::is_void<T>::value;
  const ExpandSpace space(a, kSmall ? memory + kSelectScratch : a.space + b * a.plan.space);
  finish_rows<kFiltered>(a, b, a.edges + rows, a.stats + rows * a.plan.chunks, space.row, s);
  select_children<T, kLongSegment, kExtra, kFiltered>(a, b, space, a.best + rows * a.plan.segments, s);
}

template <bool kFiltered>
__global__ void __launch_bounds__(32 * kRowWarps) expand_terms_kernel(ExpandLaunch a) {
  const uint32_t parts = uint32_t((a.max_children + kTermsChunk - 1) / kTermsChunk), width = uint32_t(a.width);
  const uint32_t task = blockIdx.x * kRowWarps + warp(), r = task / parts, b = r / width, w = r % width;
  if (r >= a.batch * a.width) return;
  const int32_t begin = int32_t(task % parts) * kTermsChunk;
  const ExpandEdges edges = a.edges[r];
  if (begin >= edges.count) return;
  float entropy;
  const ExpandRow row = finished_row<kFiltered>(a, b, w, edges, a.stats + int64_t(r) * a.plan.chunks, entropy);
  score_segments<void, kLongSegment, kFiltered>(a, b, w, row, begin, a.best + int64_t(r) * a.plan.segments);
}

// ---------------------------------------------------------------- short rows

// Statistics of four rows, by eight lanes each, and with `best` the largest logits of their segments. All lanes take part.
template <class T, bool kFiltered>
VSTAR_DEVICE RowStats read_short(const ExpandLaunch& a, int64_t b, const ExpandEdges& row, float* best) {
  constexpr int kLanes = 1 << kShortSegment;
  const InverseTemperature inv_temperature = in_base_2(a.inv_temperature);
  RowStats s;
  for (int32_t tile = 0; __any_sync(kAll, tile < row.count); tile += 64) {
    int32_t token[8];
    float z[8], top = -kInf;
    read_children<T, kFiltered>(a, b, row, tile + lane() % kLanes, kLanes, token, z);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float most = segment_max<kLanes>(z[j]);
      top = fmaxf(top, most);
      const int32_t c = tile + kLanes * j;
      if (best && lane() % kLanes == j && c < row.count) best[c >> kShortSegment] = most;
    }
    s = added<8>(s, top, inv_temperature, [&](int j) { return z[j]; });
  }
  for (int step = 1; step < kLanes; step *= 2) {  // the top is that of all lanes
    s.total += __shfl_xor_sync(kAll, s.total, step);
    s.moment += __shfl_xor_sync(kAll, s.moment, step);
  }
  return s;
}

inline int64_t fused_bytes(const ExpandLaunch& a) {
  return kSelectScratch + a.plan.space + a.width * int64_t(sizeof(ExpandEdges) + sizeof(float4) * a.plan.chunks);
}

// All of it, a block per request.
template <class T, bool kExtra, bool kFiltered>
__global__ void __launch_bounds__(kSelectThreads, 2) expand_fused_kernel(ExpandLaunch a) {
  VSTAR_SHARED(memory);
  SelectScratch& s = *reinterpret_cast<SelectScratch*>(memory);
  const ExpandSpace space(a, memory + kSelectScratch);
  ExpandEdges* const edges = reinterpret_cast<ExpandEdges*>(memory + kSelectScratch + a.plan.space);
  float4* const stats = reinterpret_cast<float4*>(edges + a.width);
  float* const best = reinterpret_cast<float*>(space.key);
  const int64_t b = blockIdx.x;
#pragma unroll 1
  for (int64_t w = threadIdx.x; w < a.width; w += kSelectThreads) {
    const EdgeRange range = a.trie.edges(a.node.at(b, w));  // none for what is not a node
    const int32_t count = int32_t(range.end - range.begin < a.max_children ? range.end - range.begin : a.max_children);
    const int64_t first = count > 0 ? load(a.trie.token + range.begin) : -1;
    const int64_t last = count > 0 ? load(a.trie.token + range.begin + count - 1) : -1;
    const bool consecutive = first >= 0 && last < a.columns && last - first + 1 == count;
    edges[w] = ExpandEdges{int32_t(range.begin), count, consecutive ? int32_t(first) : -1, int32_t(a.row_of(b, w))};
  }
  __syncthreads();
  constexpr int kLanes = 1 << kShortSegment, kRows = 32 / kLanes;
  for (int64_t first = kRows * warp(); first < a.width; first += kRows * kSelectWarps) {
    const int64_t w = first + lane() / kLanes;
    ExpandEdges row{0, 0, -1, -1};
    if (w < a.width) row = edges[w];
    for (int32_t chunk = 0; chunk < a.plan.chunks; ++chunk) {
      const bool whole = chunk > 0;
      if (whole) row = ExpandEdges{kFiltered ? -1 : 0, row.count > 0 ? int32_t(a.columns) : 0, 0, row.line};
      const RowStats x = read_short<T, kFiltered>(a, b, row, whole || kExtra ? nullptr : best + w * a.plan.segments);
      if (lane() % kLanes == 0 && w < a.width) stats[w * a.plan.chunks + chunk] = make_float4(x.top, x.total, x.moment, 0);
    }
  }
  __syncthreads();
  finish_rows<kFiltered>(a, b, edges, stats, space.row, s);
  if (kExtra) {
    for (int64_t w = warp(); w < a.width; w += kSelectWarps) {
      score_segments<T, kShortSegment, kFiltered>(a, b, w, space.row[w], 0, best + w * a.plan.segments);
    }
    __syncthreads();
  }
  select_children<T, kShortSegment, kExtra, kFiltered>(a, b, space, best, s);
}

// ---------------------------------------------------------------- launches

inline int64_t expand_chunks(int64_t columns) { return columns > kChunk ? (columns + kChunk - 1) / kChunk : 1; }

inline bool fits(const Gpu&, const ExpandTopKArgs& a) {
  constexpr int64_t kMost = int64_t(1) << 31;
  const int64_t children = a.max_children > 1 ? a.max_children : 1;  // numbered in 32 bits
  const int64_t chunks = expand_chunks(children) + (a.vocab ? expand_chunks(a.columns) : 0);
  return a.width * children < 2 * kMost && a.columns < kMost && a.rows < kMost && a.batch * a.width < kMost / chunks;
}

inline ExpandPlan plan_expand_topk(const ExpandLaunch& a, int segment_bits) {
  ExpandPlan p{};
  p.segments = int32_t((a.max_children + (1 << segment_bits) - 1) >> segment_bits);
  p.legal_chunks = int32_t(expand_chunks(a.max_children));
  p.chunks = p.legal_chunks + (a.vocab ? int32_t(expand_chunks(a.columns)) : 0);
  const int64_t most = a.width * a.max_children > 1 ? a.width * a.max_children : 1, all_segments = a.width * p.segments;
  p.winners = int32_t(a.k < most ? a.k : most);
  const int64_t picks = int64_t(p.winners) + p.winners / 2 + 64;
  p.picks = int32_t(picks < all_segments ? picks : all_segments);
  p.list = int32_t(p.winners > 1024 ? next_power_of_2(2 * int64_t(p.winners)) : 2048);
  p.sorted = p.winners > kSelectThreads / 2 ? p.list : kSelectThreads;
  return p;
}

inline unsigned row_blocks(int64_t tasks) { return unsigned((tasks + kRowWarps - 1) / kRowWarps); }

template <class T, bool kFiltered>
inline void launch_expand_topk(const Gpu& gpu, ExpandLaunch& a, bool extra) {
  const dim3 requests{unsigned(a.batch)};
  a.plan = plan_expand_topk(a, kShortSegment);
  a.plan.space = ExpandSpace::bytes(a);
  const bool short_rows = a.max_children <= kShortRow && (!a.vocab || a.columns <= kShortRow);
  if (short_rows && a.width * a.max_children <= (extra ? 8192 : 32768) && fused_bytes(a) <= kMostShared) {
    const auto fused = extra ? expand_fused_kernel<T, true, kFiltered> : expand_fused_kernel<T, false, kFiltered>;
    gpu.launch(fused, requests, kSelectThreads, fused_bytes(a), a);
    return;
  }
  const ExpandPlan& p = a.plan = plan_expand_topk(a, kLongSegment);
  a.plan.space = ExpandSpace::bytes(a);
  const bool small = kSelectScratch + p.space <= kMostShared;
  const int64_t rows = a.batch * a.width, edge_bytes = round_up(int64_t(sizeof(ExpandEdges)) * rows, 256);
  const int64_t stat_bytes = round_up(int64_t(sizeof(float4)) * rows * p.chunks, 256);
  const int64_t best_bytes = round_up(4 * rows * p.segments, 256), space_bytes = small ? 0 : a.batch * p.space;
  unsigned char* const memory = gpu.workspace(edge_bytes + stat_bytes + best_bytes + space_bytes);
  a.edges = reinterpret_cast<ExpandEdges*>(memory);
  a.stats = reinterpret_cast<float4*>(memory + edge_bytes);
  a.best = reinterpret_cast<float*>(memory + edge_bytes + stat_bytes);
  a.space = memory + edge_bytes + stat_bytes + best_bytes;
  if (rows > 0) {
    gpu.launch(expand_rows_kernel<T, kFiltered>, dim3{row_blocks(rows * p.chunks)}, 32 * kRowWarps, 0, a, !extra);
    const int64_t parts = (a.max_children + kTermsChunk - 1) / kTermsChunk;
    if (extra) gpu.launch(expand_terms_kernel<kFiltered>, dim3{row_blocks(rows * parts)}, 32 * kRowWarps, 0, a);
  }
  const auto select =
      small ? (extra ? expand_select_kernel<T, true, kFiltered> : expand_select_kernel<T, false, kFiltered>)
            : (extra ? expand_select_kernel<void, true, kFiltered> : expand_select_kernel<void, false, kFiltered>);
  gpu.launch(select, requests, kSelectThreads, kSelectScratch + (small ? p.space : 0), a);
}

inline void run(const Gpu& gpu, const ExpandTopKArgs& args) {
  if (args.batch == 0) return;
  ExpandLaunch a{};
  static_cast<ExpandTopKArgs&>(a) = args;
  a.max_children = a.max_children > 1 ? a.max_children : 1;
  const bool extra = args.seed || args.child_value || args.logp_weight < 0;
  dispatch(a.logits.type, [&](auto zero) {
    if (a.trie.alive) {
      launch_expand_topk<decltype(zero), true>(gpu, a, extra);
    } else {
      launch_expand_topk<decltype(zero), false>(gpu, a, extra);
    }
  });
}

}  // namespace vstar
