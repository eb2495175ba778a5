// sibling_advantage: one launch. In the order of a request's candidates by their tokens, every prefix is a run of them, and
// the children of one parent are a run of runs.
//
// Up to 64 candidates: a thread per candidate, one or two warps per request (runs.cuh). A level's runs are those of the level
// above, cut where neighbors differ in its token. The mean of a node, and mean and squares of its siblings' means, are sums
// over runs, by shuffles. A thread computes all that its own candidate's node is given: that siblings compute the same costs
// less than to hand it on. Threads meet four times per level.
//
// More: a block per request, which sorts its candidates (candidates.cuh); then, level by level, one thread per prefix sums
// up its rewards, one per parent takes the statistics of its children, and one per candidate writes its results. Threads walk
// short stretches of shared memory in a fixed order, and no result depends on how many threads there are. A block has a
// thread for each candidate, up to 256; further candidates are taken in turns. Groups whose scratch does not fit into
// shared memory (above about 1,000 candidates of 3 tokens) have it in a workspace instead.
#pragma once

#include "common/ops/sibling_advantage.h"
#include "cuda/candidates.cuh"
#include "cuda/runs.cuh"

namespace vstar {

// ---------------------------------------------------------------- up to 64 candidates

struct SiblingScratch {
  Vote valid, kept, there, begins, nodes, differs;
  double node[64], total[64], mean[64], squares[64], parent[64];  // sums over runs, and the nodes' means
  double inverse[64];                                              // of 1 to 64
  float reward[64];                                                // by candidate
  SortScratch sort;
};

// The advantage of a thread's node, and what else its candidate is given, on a level.
struct SiblingResult {
  Positions nodes;  // those that begin one
  int count, siblings;
  float advantage;
};

// `there`: the positions whose token of the level is there; a run without one is no node.
template <int kWarps>
VSTAR_DEVICE SiblingResult compare_siblings(
    const SiblingAdvantageArgs& a, const Run& family, const Run& node, Positions there, double reward,
    double of_request, SiblingScratch& s) {
  const auto over = [&](double x, int n) {
    const int at_least_1 = n > 0 ? n : 1;
    return divided(x, double(at_least_1), s.inverse[at_least_1 - 1]);
  };
  const int p = int(threadIdx.x);
  SiblingResult result;
  result.count = __popcll(there & node.set);
  const bool head = p == node.begin && result.count > 0;  // stands for its node
  s.nodes.cast(head);
  node.begin_sum(holds(there, p) ? reward : 0.0, s.node);
  meet<kWarps>();
  result.nodes = s.nodes.result<kWarps>();
  const Positions siblings = result.nodes & family.set;
  result.siblings = __popcll(siblings);
  const double mean = over(node.end_sum(s.node), result.count);
  s.mean[p] = mean;
  family.begin_sum(head ? mean : 0.0, s.total);
  if (a.baseline == Baseline::kParent) family.begin_sum(head ? mean * double(result.count) : 0.0, s.parent);
  meet<kWarps>();
  const double center = over(family.end_sum(s.total), result.siblings), off = mean - center;
  s.differs.cast(head && !(mean - s.mean[first_of(siblings)] == 0));
  family.begin_sum(head ? off * off : 0.0, s.squares);
  meet<kWarps>();
  const bool compares = result.siblings >= a.min_siblings && (s.differs.result<kWarps>() & family.set) != 0;
  const double squares = family.end_sum(s.squares);
  const SiblingScale scale = sibling_scale_of(
      a, result.siblings, center - center == 0 ? center : double(NAN),
      compares ? siblings_scale(a, result.siblings, of_request, squares) : 0.0,
      [&] { return over(family.end_sum(s.parent), __popcll(there & family.set)); });
  result.advantage = sibling_advantage_of(a, scale, mean, result.siblings);
  return result;
}

// What all advantages of a request are multiplied by; `valid` are the candidates that it has.
template <int kWarps>
VSTAR_DEVICE double scale_of_request(const SiblingAdvantageArgs& a, Positions valid, double reward, double* scratch) {
  return request_scale(a, __popcll(valid), [&] {
    const bool counts = holds(valid, int(threadIdx.x));
    double sum[1] = {counts ? reward : 0.0};
    block_sums<kWarps>(sum, scratch);
    const double off = reward - sum[0] / double(__popcll(valid));
    double squares[1] = {counts ? off * off : 0.0};
    block_sums<kWarps>(squares, scratch);
    return squares[0];
  });
}

template <int kWarps>
__global__ void __launch_bounds__(32 * kWarps, 16) sibling_small_kernel(SiblingAdvantageArgs a) {
  VSTAR_SHARED(memory);
  SiblingScratch& s = *reinterpret_cast<SiblingScratch*>(memory);
  const int64_t b = blockIdx.x;
  const int p = int(threadIdx.x), group = int(a.group);
  const bool inside = p < group;
  s.inverse[p] = 1.0 / double(p + 1);
  s.reward[p] = inside ? a.reward.at(b, p) : 0.0f;
  bool any = false;  // token of the candidate is there
  for (int64_t d = 0; inside && d < (a.by_token() ? a.length : 1); ++d) any = any || a.mask.at(b, p, d);
  s.valid.cast(any);
  meet<kWarps>();
  const Positions valid = s.valid.result<kWarps>();
  const double of_request = scale_of_request<kWarps>(a, valid, double(s.reward[p]), s.node);

  const int sorted = sorted_candidate<kWarps>(a, b, s.sort), candidate = inside ? sorted : 0;  // others are not written
  s.sort.place[p] = candidate;
  const double reward = double(s.reward[candidate]);
  s.kept.cast(inside && holds(valid, candidate));
  meet<kWarps>();
  const int previous = s.sort.place[p > 0 ? p - 1 : 0];
  Positions there = s.kept.result<kWarps>(), begins = 1;
  Run family(begins, up_to(group - 1));
  int id = 0;
  for (int64_t d = 0; d < a.length; ++d) {
    const int64_t token = a.token.at(b, candidate, d);
    int64_t before = __shfl_up_sync(kAll, token, 1);
    if (kWarps > 1 && lane() == 0) before = a.token.at(b, previous, d);
    s.begins.cast(inside && (holds(begins, p) || token != before));
    const bool present = a.by_token() && inside && a.mask.at(b, candidate, d);
    if (a.by_token()) s.there.cast(present);
    meet<kWarps>();
    begins = s.begins.result<kWarps>() | 1;
    if (a.by_token()) there = s.there.result<kWarps>();
    const Run node(begins, up_to(group - 1));
    const SiblingResult result = compare_siblings<kWarps>(a, family, node, there, reward, of_request, s);
    const int number = id + __popcll(result.nodes & up_to(p)) - 1;
    const int64_t at = a.slot(b, candidate) + d;
    if (inside && holds(there, p)) {
      a.store(at, result.advantage, result.siblings >= a.min_siblings, number, result.count);
    } else if (inside) {
      a.clear(at);
    }
    id += __popcll(result.nodes);
    family = node;
  }
}

// ---------------------------------------------------------------- more candidates

__global__ void __launch_bounds__(256, 3) sibling_advantage_kernel(WithScratch<SiblingAdvantageArgs> a) {
  VSTAR_SHARED(memory);
  const int64_t b = blockIdx.x;
  const int group = int(a.group), threads = int(blockDim.x), thread = int(threadIdx.x);
  SiblingScale* const scale = reinterpret_cast<SiblingScale*>(a.scratch(b, memory));  // [G] by parent
  double* const mean = reinterpret_cast<double*>(scale + group);                      // [G] by prefix
  double* const reward = mean + group;                                                // [G] by packed number
  Candidates c = lay_out_candidates(reinterpret_cast<unsigned char*>(reward + group), a);
  Level above = Level::lay_out(c.sums + 33, group), here = Level::lay_out(above.end(group), group);

  sort_candidates(c, a, b);
  for (int i = thread; i < c.n; i += threads) reward[i] = double(a.reward.at(b, c.candidate[i]));
  Candidates now = lay_out_kept(here.end(group), c, a);  // the candidates whose token of the level is there
  find_level(above, c, 0);
  const double of_request = request_scale(
      a, c.n, [&] { return moments(c.n, [&](int64_t i) { return reward[i]; }).sum_of_squares; });
  // The children of the i-th parent: their number, and the first.
  const auto first_child = [&](int i) { return here.number[above.begin[i]]; };
  const auto siblings_below = [&](int i) {
    const int end = above.begin[i + 1];
    return (end < now.n ? here.number[end] : here.size) - first_child(i);
  };

  int id = 0;
  for (int64_t depth = 1; depth <= a.length; ++depth) {
    if (a.by_token()) {
      keep_level(now, c, a, b, depth - 1);
      find_level(above, now, depth - 1);
    }
    find_level(here, now, depth);
    for (int i = thread; i < here.size; i += threads) {
      const int begin = here.begin[i], end = here.begin[i + 1];
      double sum = 0;
      for (int p = begin; p < end; ++p) sum += reward[now.order[p]];
      mean[i] = sum / double(end - begin);
    }
    __syncthreads();
    for (int i = thread; i < above.size; i += threads) {
      const int first = first_child(i);
      scale[i] = sibling_scale(
          a, siblings_below(i), of_request, [&](int64_t j) { return mean[first + j]; },
          [&](int64_t j) { return here.begin[first + j + 1] - here.begin[first + j]; });
    }
    __syncthreads();
    for (int p = thread; p < now.n; p += threads) {
      const int i = here.number[p], parent = above.number[p], siblings = siblings_below(parent);
      const float advantage = sibling_advantage_of(a, scale[parent], mean[i], siblings);
      const int64_t at = a.slot(b, c.candidate[now.order[p]]) + depth - 1;
      a.store(at, advantage, siblings >= a.min_siblings, id + i, here.begin[i + 1] - here.begin[i]);
    }
    id += here.size;
    swap_levels(above, here);
    __syncthreads();  // the next level overwrites what this one has just read
  }
}

inline void run(const Gpu& gpu, const SiblingAdvantageArgs& a) {
  if (a.batch == 0 || a.group == 0 || a.length == 0) return;
  if (a.group <= 64) {
    const int threads = a.group <= 32 ? 32 : 64;
    const auto kernel = threads == 32 ? sibling_small_kernel<1> : sibling_small_kernel<2>;
    gpu.launch(kernel, dim3{unsigned(a.batch)}, threads, int64_t(sizeof(SiblingScratch)), a);
    return;
  }
  const int64_t numbers = int64_t(sizeof(SiblingScale) + 2 * sizeof(double)) * a.group;
  const int64_t bytes = Candidates::bytes(a.group, a.length) + round_up(numbers + 2 * level_bytes(a.group) + kept_bytes(a), 16);
  launch_requests(gpu, sibling_advantage_kernel, a, bytes, candidate_threads(a.group));
}

}  // namespace vstar
