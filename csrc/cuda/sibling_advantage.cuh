// sibling_advantage: a block a request, one launch. The block sorts the request's candidates (candidates.cuh); then,
// level by level, a thread sums up a prefix's rewards, a thread takes the statistics of a parent's children, and a
// thread writes a candidate's entries. Prefixes and children are contiguous runs, so threads walk short stretches
// of shared memory in a fixed order, and no result depends on how many there are.
//
// A block has a thread for each candidate, up to 256; further candidates are taken in turns. 1,024 requests of 64
// candidates keep all of an H100's multiprocessors busy at once. Groups whose scratch does not fit into shared
// memory (above about 1,000 candidates of 3 tokens) have it in a workspace instead.
#pragma once

#include "common/segment.h"
#include "cuda/candidates.cuh"

namespace vstar {
namespace cuda {

enum Baseline : int { kSibling = 0, kParent = 1, kLeaveOneOut = 2 };

struct SiblingAdvantage {
  IntView token;     // [B, G, L]
  FloatView reward;  // [B, G]
  MaskView mask;
  float* advantage;
  bool* valid;
  int32_t *node, *count;
  int64_t batch, group, length;
  double eps, std_floor;
  int64_t ddof, min_siblings;
  int baseline;
  RequestScratch scratch;
};

// (mean - base) * scale is a child's advantage; a scale of 0 stands for no signal.
struct Standardizer {
  double base, scale, total;
};

struct SiblingScratch {
  Candidates candidates;
  double* mean;              // [G] by prefix
  Standardizer* parent;      // [G] by prefix above
  double* reward;            // [G] by packed number
  Level above, here;

  static int64_t bytes(int64_t group, int64_t length) {
    return Candidates::bytes(group, length) + round_up((8 + 24 + 8) * group + 4 * (4 * group + 2), 16);
  }
};

__device__ __forceinline__ Standardizer standardize(
    const SiblingAdvantage& a, const double* mean, const int32_t* begin, int first, int children) {
  if (children < a.min_siblings) return {0, 0, 0};
  const Moments m = moments(children, [&](int64_t i) { return mean[first + i]; });
  if (m.equal) return {0, 0, 0};
  const double std = sqrt(m.sum_of_squares / double(children - a.ddof));
  Standardizer s{m.mean, 1.0 / ((std < a.std_floor ? a.std_floor : std) + a.eps), m.mean * double(children)};
  if (a.baseline == kParent) {
    double sum = 0;
    for (int i = first; i < first + children; ++i) sum += mean[i] * double(begin[i + 1] - begin[i]);
    s.base = sum / double(begin[first + children] - begin[first]);
  }
  return s;
}

__global__ void __launch_bounds__(256, 3) sibling_advantage_kernel(SiblingAdvantage a) {
  VSTAR_SHARED(memory);
  const int64_t b = blockIdx.x;
  const int group = int(a.group), threads = int(blockDim.x), thread = int(threadIdx.x);
  unsigned char* const scratch = a.scratch.of(b, memory);
  SiblingScratch s;
  s.parent = reinterpret_cast<Standardizer*>(scratch);
  s.mean = reinterpret_cast<double*>(s.parent + group);
  s.reward = s.mean + group;
  s.candidates = lay_out_candidates(reinterpret_cast<unsigned char*>(s.reward + group), group, a.length, a.scratch.slots);
  Candidates& c = s.candidates;
  s.above.number = c.sums + 33;
  s.above.begin = s.above.number + group;
  s.here.number = s.above.begin + group + 1;
  s.here.begin = s.here.number + group;
  const int64_t base = b * group * a.length;

  sort_candidates(c, a.token, a.mask, b, group, a.length, a.scratch.slots, [&](int g) {
    for (int64_t slot = base + g * a.length; slot < base + (g + 1) * a.length; ++slot) {
      a.advantage[slot] = 0.0f;
      a.valid[slot] = false;
      a.node[slot] = -1;
      a.count[slot] = 0;
    }
  });
  for (int i = thread; i < c.n; i += threads) s.reward[i] = double(a.reward.at(b, c.candidate[i]));
  find_level(s.above, c, 0);

  int id = 0;
  for (int64_t depth = 1; depth <= a.length; ++depth) {
    find_level(s.here, c, depth);
    for (int i = thread; i < s.here.size; i += threads) {
      const int begin = s.here.begin[i], end = s.here.begin[i + 1];
      double sum = 0;
      for (int p = begin; p < end; ++p) sum += s.reward[c.order[p]];
      s.mean[i] = sum / double(end - begin);
    }
    __syncthreads();
    for (int i = thread; i < s.above.size; i += threads) {
      const int end = s.above.begin[i + 1];
      const int first = s.here.number[s.above.begin[i]];
      const int children = (end < c.n ? s.here.number[end] : s.here.size) - first;
      s.parent[i] = standardize(a, s.mean, s.here.begin, first, children);
    }
    __syncthreads();
    for (int p = thread; p < c.n; p += threads) {
      const int i = s.here.number[p], above = s.above.number[p];
      const int end = s.above.begin[above + 1];
      const int siblings = (end < c.n ? s.here.number[end] : s.here.size) - s.here.number[s.above.begin[above]];
      const Standardizer parent = s.parent[above];
      const double mean = s.mean[i];
      const double over = a.baseline == kLeaveOneOut ? (parent.total - mean) / double(siblings - 1) : parent.base;
      const int64_t slot = base + c.candidate[c.order[p]] * a.length + depth - 1;
      a.advantage[slot] = parent.scale == 0 ? 0.0f : float((mean - over) * parent.scale);
      a.valid[slot] = siblings >= a.min_siblings;
      a.node[slot] = id + i;
      a.count[slot] = s.here.begin[i + 1] - s.here.begin[i];
    }
    id += s.here.size;
    const Level swap = s.above;
    s.above = s.here;
    s.here = swap;
    __syncthreads();  // the next level overwrites what this one has just read
  }
}

// One launch. The workspace has request_workspace() bytes.
inline void sibling_advantage(const SiblingAdvantage& a, void* workspace, const Launcher& launch) {
  if (a.batch == 0 || a.group == 0 || a.length == 0) return;
  launch_requests(sibling_advantage_kernel, a, SiblingScratch::bytes(a.group, a.length), candidate_threads(a.group), workspace, launch);
}

}  // namespace cuda
}  // namespace vstar
