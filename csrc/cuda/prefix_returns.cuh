// prefix_returns: a block a request, one launch. The block sorts the request's candidates (candidates.cuh), which makes
// every bucket a run; then, level by level, a warp takes a bucket: its lanes lie along the embedding and add up the
// members in sorted order, so neighboring lanes read neighboring numbers and a sum's order is fixed. Every embedding
// is read once a level, after the first time from the caches.
#pragma once

#include "cuda/candidates.cuh"

namespace vstar {
namespace cuda {

struct PrefixReturns {
  IntView token;          // [B, G, L]
  FloatView embedding;    // [B, G, E]
  IntView target;         // [B, L]
  FloatView wanted;       // [B, E], the target's embedding
  MaskView mask;
  const double* weight;   // [L]
  float *returns, *similarity;
  int32_t *node, *count;
  int64_t batch, group, length, width;
  RequestScratch scratch;
};

inline int64_t prefix_returns_scratch(int64_t group, int64_t length) {
  return Candidates::bytes(group, length) + round_up(4 * (2 * group + 1), 16);
}

__global__ void __launch_bounds__(256, 3) prefix_returns_kernel(PrefixReturns a) {
  VSTAR_SHARED(memory);
  const int64_t b = blockIdx.x;
  const int group = int(a.group), warps = int(blockDim.x / 32);
  unsigned char* const scratch = a.scratch.of(b, memory);
  Candidates c = lay_out_candidates(scratch, group, a.length, a.scratch.slots);
  Level level{c.sums + 33, c.sums + 33 + group, 0};
  const int64_t base = b * group * a.length;

  sort_candidates(c, a.token, a.mask, b, group, a.length, a.scratch.slots, [&](int g) {
    for (int64_t slot = base + g * a.length; slot < base + (g + 1) * a.length; ++slot) {
      a.returns[slot] = 0.0f;
      a.similarity[slot] = 0.0f;
      a.node[slot] = -1;
      a.count[slot] = 0;
    }
  });
  double wanted_square = 0;
  for (int64_t e = lane(); e < a.width; e += 32) {
    const double x = double(a.wanted.at(b, e));
    wanted_square += x * x;
  }
  const double wanted_norm = sqrt(warp_sum(wanted_square));

  int id = 0;
  for (int64_t depth = 1; depth <= a.length; ++depth) {
    find_level(level, c, depth);
    for (int i = warp(); i < level.size; i += warps) {
      const int begin = level.begin[i], end = level.begin[i + 1];
      double square = 0, dot = 0;
      for (int64_t e = lane(); e < a.width; e += 32) {
        double sum = 0;
        for (int p = begin; p < end; ++p) sum += double(a.embedding.at(b, c.candidate[c.order[p]], e));
        square += sum * sum;
        dot += sum * double(a.wanted.at(b, e));
      }
      const double norm = sqrt(warp_sum(square)) * wanted_norm;
      dot = warp_sum(dot);
      const float cosine = norm == 0 ? 0.0f : float(dot / norm);
      bool matches = true;
      for (int64_t t = lane(); t < depth; t += 32) {
        matches = matches && c.token[t * group + c.order[begin]] == a.target.at(b, t);
      }
      const double weight = a.weight[depth - 1];
      const float value = float(__all_sync(kAll, matches) ? weight : -weight * (1.0 - double(cosine)));
      for (int p = begin + lane(); p < end; p += 32) {
        const int64_t slot = base + c.candidate[c.order[p]] * a.length + depth - 1;
        a.returns[slot] = value;
        a.similarity[slot] = cosine;
        a.node[slot] = id + i;
        a.count[slot] = end - begin;
      }
    }
    id += level.size;
    __syncthreads();  // the next level overwrites this one
  }
}

// One launch. The workspace has request_workspace() bytes.
inline void prefix_returns(const PrefixReturns& a, void* workspace, const Launcher& launch) {
  if (a.batch == 0 || a.group == 0 || a.length == 0) return;
  launch_requests(prefix_returns_kernel, a, prefix_returns_scratch(a.group, a.length), 256, workspace, launch);
}

}  // namespace cuda
}  // namespace vstar
