// What surrounds the model's forward in a round of value-guided decoding.
//
// ved_evaluate_kernel: one block per row, which one warp reads, or all of them where rows are long, in the order of
// expand_topk, so that log-probabilities have the same bits. Then the two lists are made one after the other. Of a short
// row all children are sorted in shared memory; of a long one first a bound is found that no more reach than the list has
// room for, for which the children are scored several times.
//
// ved_beams_kernel: one warp per request. The lists are a few dozen long: votes say where an entry goes.
#pragma once

#include "common/gumbel.h"
#include "common/ops/ved_rows.h"
#include "cuda/expand_rows.cuh"
#include "cuda/select.cuh"

namespace vstar {

// ---------------------------------------------------------------- inputs

constexpr int kInputThreads = 128;

__global__ void __launch_bounds__(kInputThreads) ved_inputs_kernel(VedInputsArgs a) {
  const int64_t i = int64_t(blockIdx.x) * kInputThreads + threadIdx.x;
  if (i < a.batch * a.rows) a.fill(i / a.rows, i % a.rows);
}

inline void run(const Gpu& gpu, const VedInputsArgs& a) {
  const int64_t blocks = (a.batch * a.rows + kInputThreads - 1) / kInputThreads;
  if (blocks > 0) gpu.launch(ved_inputs_kernel, dim3{unsigned(blocks)}, kInputThreads, 0, a);
}

// ---------------------------------------------------------------- evaluate

struct VedEvaluateLaunch : VedEvaluateArgs {
  int64_t list;         // room of a list, a power of 2
  uint64_t* workspace;  // [B * rows, list], null: in shared memory
};

// What the log-probabilities of a row's children have in common.
struct EvaluatedRow {
  float row_max, log_sum, cum_logp, entropy;
};

struct EvaluateScratch {
  SelectScratch select;
  EvaluatedRow row;
  float sums[3 * kSelectWarps];
  int32_t counts[33];
};
constexpr int64_t kEvaluateScratch = (sizeof(EvaluateScratch) + 15) / 16 * 16;

// Statistics of a short row by eight lanes, in the order of expand_topk's read_short.
template <class T, bool kFiltered>
VSTAR_DEVICE RowStats read_by_eight(const RowReader<T, kFiltered>& reader, InverseTemperature inv_temperature) {
  RowStats s;
  for (int32_t tile = 0; tile < reader.count; tile += 64) {
    float z[8], top = -kInf;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      z[j] = cleaned(reader.at(tile + lane() % 8 + 8 * j));
      top = fmaxf(top, z[j]);
    }
    s = added<8>(s, segment_max<8>(top), inv_temperature, [&](int j) { return z[j]; });
  }
  for (int step = 1; step < 8; step *= 2) {
    s.total += __shfl_xor_sync(kAll, s.total, step);
    s.moment += __shfl_xor_sync(kAll, s.moment, step);
  }
  return s;
}

template <class T, int kWarps, bool kFiltered>
VSTAR_DEVICE EvaluatedRow evaluated_row(
    const VedEvaluateLaunch& a, const RowReader<T, kFiltered>& reader, int64_t b, int64_t p, float* scratch) {
  const InverseTemperature inv_temperature = in_base_2(a.inv_temperature);
  const auto read = [&](const RowReader<T, kFiltered>& from) {
    RowStats s;
    if constexpr (kWarps == 1) {  // four times the same
      s = read_by_eight(from, inv_temperature);
    } else {
      for (int32_t first = 0; first < from.count; first += kWarps * kChunk) {
        const int32_t begin = first + kChunk * warp();
        const RowStats mine = begin < from.count ? read_chunk(from, begin, inv_temperature, nullptr) : RowStats{};
        if (lane() == 0) {
          scratch[3 * warp()] = mine.top;
          scratch[3 * warp() + 1] = mine.total;
          scratch[3 * warp() + 2] = mine.moment;
        }
        __syncthreads();
        for (int i = 0; i < kWarps && first + kChunk * i < from.count; ++i) {
          s = joined(s, {scratch[3 * i], scratch[3 * i + 1], scratch[3 * i + 2]}, inv_temperature);
        }
        __syncthreads();
      }
    }
    return s;
  };
  const RowStats legal = read(reader);
  RowStats all = legal;
  if (a.vocab && reader.count > 0 && (kFiltered || reader.count != a.columns)) {
    all = read(RowReader<T, kFiltered>(reader.from, reader.stride, nullptr, 0, a.columns - 1, a.columns, int32_t(a.columns)));
  }
  float entropy = logf(legal.total) - legal.moment * 0.69314718055994531f / legal.total;
  if (reader.count < 2 || !(legal.total > 0) || !(entropy > 0)) entropy = 0;
  return {all.top > -kInf ? all.top : 0.0f, all.total > 0 ? logf(all.total) : 0.0f, a.logp.at(b, p), entropy};
}

template <class T, int kWarps, bool kFiltered>
__global__ void __launch_bounds__(kWarps == 1 ? 64 : 32 * kWarps, 1) ved_evaluate_kernel(VedEvaluateLaunch a) {
  VSTAR_SHARED(memory);
  EvaluateScratch& s = *reinterpret_cast<EvaluateScratch*>(memory);
  const int thread = int(threadIdx.x), threads = int(blockDim.x);
  const int64_t r = blockIdx.x, b = r / a.rows, p = r % a.rows, node = a.node.at(b, p);
  uint64_t* const list = a.workspace ? a.workspace + r * a.list : reinterpret_cast<uint64_t*>(memory + kEvaluateScratch);
  const EdgeRange edges = a.trie.edges(node);  // none for what is not a node
  const int32_t n = int32_t(edges.end - edges.begin < a.max_children ? edges.end - edges.begin : a.max_children);
  const int32_t* const token = a.trie.token + edges.begin;
  const T* const from = a.logits.pointer<T>(b, p);
  const RowReader<T, kFiltered> reader(
      from, a.logits.stride[2], token, n > 0 ? token[0] : 0, n > 0 ? token[n - 1] : -1, a.columns, n,
      kFiltered ? a.trie.alive_of(b) : AliveNodes{});
  if (kWarps > 1) clear(s.select);
  if (kWarps > 1 || warp() == 0) {
    const EvaluatedRow mine = evaluated_row<T, kWarps, kFiltered>(a, reader, b, p, s.sums);
    if (thread == 0) s.row = mine;
  }
  __syncthreads();
  const EvaluatedRow row = s.row;
  const float value = a.own_value(b, p);
  if (thread == 0) {
    a.out_value[r] = value;
    a.out_entropy[r] = row.entropy;
  }

  for (int among_leaves = 0; among_leaves < 2; ++among_leaves) {
    const int64_t width = among_leaves ? a.leaves : a.children;
    const float weight = a.rank_weight(among_leaves);
    const auto logp_of = [&](int64_t v) {
      const float z = cleaned(widened(load(from + v * reader.stride)));
      return ((z - row.row_max) * a.inv_temperature - row.log_sum) + row.cum_logp;
    };
    const auto key = [&](int64_t i) -> uint32_t {
      const int64_t v = reader.column(int32_t(i));
      if (v < 0 || v >= a.columns || !reader.alive(int32_t(i)) || !a.listed(edges.begin + i + 1, among_leaves)) return 0;
      const float logp = logp_of(v);
      float score = weight == 0 ? 0.0f : weight * logp;
      if (!among_leaves) score += gumbel_from_bits(philox(uint64_t(a.seed.at(b)), uint32_t(node), uint32_t(v)));
      if (among_leaves && a.child_value) score += a.child_weight * a.child_value.at(b, p, v);
      return logp > -kInf && score > -kInf ? ordered_bits(score) : 0;
    };
    const int32_t of = (among_leaves ? a.has_leaves(edges) : a.is_open(node)) ? n : 0;  // no list, no children
    int32_t found = 0;
    if (kWarps == 1) {
      for (int32_t i = thread; i < of; i += threads) {
        list[i] = numbered(key(i), uint32_t(i));
        found += list[i] != 0;
      }
      found = block_sum_before(found, s.counts).total;
    } else if (of > 0) {
      const auto each = [&](const auto& use) {
        for (int32_t i = thread; i < of; i += threads) use(numbered(key(i), uint32_t(i)));
      };
      if (thread == 0) s.select.found = 0;
      const KeyRange range = find_range(each, uint32_t(of), s.select);
      const uint32_t room = uint32_t(a.list), wanted = range.exist < width ? range.exist : uint32_t(width);
      const uint64_t bound = range.exist <= room ? range.low : find_bound(each, range, wanted, room, s.select);
      each([&](uint64_t x) {
        if (x > 0 && x >= bound) list[atomicAdd(&s.select.found, 1u)] = x;
      });
      __syncthreads();
      found = int32_t(s.select.found);
    }
    const int32_t filled = kWarps == 1 ? of : found;
    int64_t room = 32;
    while (room < filled) room *= 2;
    sort_descending(list, filled, room);
    if (found > width) found = int32_t(width);
    for (int64_t i = thread; i < width; i += threads) {
      if (i >= found) {
        among_leaves ? a.clear_leaf(r, i) : a.clear_child(r, i);
        continue;
      }
      const int64_t c = key_sequence(list[i]), child = edges.begin + c + 1;
      const float logp = logp_of(reader.column(int32_t(c)));
      among_leaves ? a.store_leaf(r, i, child, logp, key_score(list[i]), value) : a.store_child(r, i, child, logp);
    }
    if (thread == 0) (among_leaves ? a.num_leaves : a.num_children)[r] = found;
    __syncthreads();  // the list is read by other threads
  }
}

inline void run(const Gpu& gpu, const VedEvaluateArgs& args) {
  const int64_t rows = args.batch * args.rows;
  if (rows == 0) return;
  VedEvaluateLaunch a{args, 32, nullptr};
  const int64_t longest = a.vocab && a.columns > a.max_children ? a.columns : a.max_children;
  const bool is_long = longest > kShortRow;
  const int64_t width = a.children > a.leaves ? a.children : a.leaves;
  const int64_t entries = is_long && width < a.max_children ? width : a.max_children;
  a.list = next_power_of_2(entries > 32 ? entries : 32);
  const bool small = a.list <= 4096;
  if (!small) a.workspace = reinterpret_cast<uint64_t*>(gpu.workspace(8 * rows * a.list));
  const int64_t shared = kEvaluateScratch + (small ? 8 * a.list : 0);
  dispatch(a.logits.type, [&](auto zero) {
    using T = decltype(zero);
    const bool filtered = a.trie.alive;
    if (is_long) {
      const auto kernel = filtered ? ved_evaluate_kernel<T, kSelectWarps, true> : ved_evaluate_kernel<T, kSelectWarps, false>;
      gpu.launch(kernel, dim3{unsigned(rows)}, kSelectThreads, shared, a);
    } else {
      const auto kernel = filtered ? ved_evaluate_kernel<T, 1, true> : ved_evaluate_kernel<T, 1, false>;
      gpu.launch(kernel, dim3{unsigned(rows)}, 64, shared, a);
    }
  });
}

// ---------------------------------------------------------------- beams

constexpr int kBeamWarps = 4;

__global__ void __launch_bounds__(32 * kBeamWarps) ved_beams_kernel(VedBeamsArgs a) {
  const int64_t b = int64_t(blockIdx.x) * kBeamWarps + warp();
  if (b >= a.batch) return;  // a whole warp, and no barriers of the block follow
  int last = 0;
  for (int64_t p = lane(); p < a.rows; p += 32) last += a.above.at(b, p) >= 0;
  const int64_t start = a.tree_size[b] - warp_sum(last);
  int64_t n = 0;
  // Up to `most` beams in all of those that a list holds and is_new takes.
  const auto take = [&](const BeamList& list, int64_t most, const auto& is_new) {
    for (int64_t first = 0; first < list.size && n < most; first += 32) {
      const int64_t i = first + lane();
      const int32_t node = i < list.size ? a.beam(list, b, i) : -1;
      const bool taken = node >= 0 && is_new(node);
      const unsigned all = __ballot_sync(kAll, taken);
      const int64_t j = n + __popc(all & ((1u << lane()) - 1));
      if (taken && j < most) a.store(list, b, i, j, start);
      n += __popc(all);
    }
    if (n > most) n = most;
    __syncwarp();  // what was stored is looked at
  };
  take(a.first, a.num_first < a.width ? a.num_first : a.width, [](int32_t) { return true; });
  const int64_t num_first = n;
  take(a.others, a.width, [&](int32_t node) {
    for (int64_t j = 0; j < num_first; ++j) {
      if (a.out_node[b * a.width + j] == node) return false;
    }
    return true;
  });
  for (int64_t j = n + lane(); j < a.width; j += 32) a.clear(b, j);
}

inline void run(const Gpu& gpu, const VedBeamsArgs& a) {
  const int64_t blocks = (a.batch + kBeamWarps - 1) / kBeamWarps;
  if (blocks > 0) gpu.launch(ved_beams_kernel, dim3{unsigned(blocks)}, 32 * kBeamWarps, 0, a);
}

}  // namespace vstar
