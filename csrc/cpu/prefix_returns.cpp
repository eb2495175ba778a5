// prefix_returns on the CPU: one sweep over each request's sorted candidates. A prefix is closed where the order
// leaves it; its sum of embeddings is then complete and goes into its parent's, so every embedding is read once.
// The first child hands its buffer over, so a prefix with a single child adds nothing up, and no sum begins as zeros.

#include "torch/prefix_returns.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "cpu/candidates.h"
#include "torch/cpu.h"

namespace vstar {
namespace {

// The open prefix of a depth.
struct Bucket {
  double* sum;     // [E] of the embeddings of its candidates, those below open prefixes not counted in yet
  int64_t start;   // where it began
  int64_t count;   // of candidates in the sum
  int64_t closed;  // of candidates of the prefix that was closed last, below the same open prefix
  int32_t id;      // of the prefix that was closed last, as its cosine
  float cosine;
};

class Sweep {
 public:
  explicit Sweep(const PrefixReturnsArgs& args)
      : a(args), buffer(a.length * a.width), target(a.width), bucket(a.length) {
    for (int64_t d = 0; d < a.length; ++d) bucket[d].sum = buffer.data() + d * a.width;
  }

  void request(int64_t b) {
    n = sort_candidates(a, b, r);
    a.target_embedding.each(
        a.target_embedding.offset(b), a.target_embedding.stride[1], a.width, [&](int64_t e, float x) { target[e] = x; });
    target_norm = std::sqrt(simd().dot(target.data(), target.data(), a.width));

    // Nodes are numbered level by level: a level's numbers begin where those of the levels above end.
    int32_t begin = 0;
    for (int64_t d = 0; d < a.length; ++d) {
      bucket[d].id = begin - 1;
      int64_t there = n;
      const SortedCandidates& c = at_level(a, b, d, r, there, kept);
      for (int64_t i = 0; i < there; ++i) begin += c.shared[i] <= d;
    }
    for (int64_t i = 0; i <= n; ++i) {
      // Close the prefixes that candidate i does not share, the longest first.
      const int64_t shared = i < n ? std::max(r.shared[i], 0) : 0;
      for (int64_t d = a.length - 1; i > 0 && d >= shared; --d) close(b, i, d);
      if (i < n && a.length > 0) open(b, i, shared);
    }
  }

 private:
  // The prefix of level d that ends before position i.
  void close(int64_t b, int64_t i, int64_t d) {
    Bucket& mine = bucket[d];
    if (mine.count == 0) return;  // all of its candidates end before
    ++mine.id;
    mine.closed = mine.count;
    if (d + 1 < a.length && bucket[d + 1].closed == mine.count) {
      mine.cosine = bucket[d + 1].cosine;  // its only child has the same candidates
    } else {
      const double dot = simd().dot(mine.sum, target.data(), a.width), square = simd().dot(mine.sum, mine.sum, a.width);
      mine.cosine = bucket_cosine(dot, square, target_norm);
    }
    bool matches = true;
    for (int64_t t = 0; matches && t <= d; ++t) matches = r.column[t * n + r.order[i - 1]] == a.target.at(b, t);
    const float value = bucket_return(matches, a.weight[d], mine.cosine);
    for (int64_t p = mine.start; p < i; ++p) {
      if (!a.mask.at(b, r.sorted[p], d)) continue;
      a.store(a.slot(b, r.sorted[p]) + d, value, mine.cosine, mine.id, mine.count);
    }
    if (d == 0) return;
    Bucket& above = bucket[d - 1];
    if (above.count == 0) {
      std::swap(mine.sum, above.sum);
    } else {
      simd().add(mine.sum, a.width, above.sum);
    }
    above.count += mine.count;
  }

  // The prefixes that candidate i begins, those longer than what it shares; its embedding goes into the longest that
  // it has.
  void open(int64_t b, int64_t i, int64_t shared) {
    for (int64_t d = shared; d < a.length; ++d) {
      bucket[d].start = i;
      bucket[d].count = bucket[d].closed = 0;
    }
    int64_t end = a.by_token() ? 0 : a.length;
    while (end < a.length && a.mask.at(b, r.sorted[i], end)) ++end;
    if (end == 0) return;
    Bucket& longest = bucket[end - 1];
    simd().typed[int(a.embedding.type)].accumulate(
        a.embedding.address(b, r.sorted[i]), a.embedding.stride[2], a.width, longest.count == 0, longest.sum);
    ++longest.count;
  }

  const PrefixReturnsArgs& a;
  SortedCandidates r, kept;
  int64_t n = 0;
  double target_norm = 0;
  std::vector<double> buffer;  // [L, E]
  std::vector<double> target;  // [E]
  std::vector<Bucket> bucket;  // [L]
};

}  // namespace

void run(const Cpu& device, const PrefixReturnsArgs& a) {
  device.parallel_for(a.batch, 4096, a.group * (a.length + a.width), [&](int64_t first, int64_t last) {
    Sweep sweep(a);
    for (int64_t b = first; b < last; ++b) sweep.request(b);
  });
}

}  // namespace vstar

VSTAR_REGISTER(Cpu, prefix_returns);
