// sibling_advantage on the CPU: sort each request's candidates once, then every prefix is a run of the
// sorted order and every sibling group a run of runs.
//
// Per depth one sweep over the order finds nodes, means, group statistics and writes the result.

#include "torch/sibling_advantage.h"

#include <algorithm>
#include <vector>

#include "cpu/candidates.h"
#include "torch/cpu.h"

namespace vstar {
namespace {

struct Child {
  double mean;
  int64_t count;
  int64_t end;  // one past its last position in the sorted order
};

class Sweep {
 public:
  explicit Sweep(const SiblingAdvantageArgs& args) : a(args) {}

  void request(int64_t b) {
    const int64_t all = sort_candidates(a, b, r);
    reward.resize(all);
    for (int64_t i = 0; i < all; ++i) reward[i] = a.reward.at(b, r.candidate[i]);
    of_request = request_scale(a, all, [&] { return moments(all, [&](int64_t i) { return reward[i]; }).sum_of_squares; });
    int64_t id = -1;
    for (int64_t depth = 1; depth <= a.length; ++depth) {
      int64_t n = all;
      const SortedCandidates& c = at_level(a, b, depth - 1, r, n, kept);
      for (int64_t begin = 0; begin < n;) {  // one parent prefix of depth - 1 tokens
        const int64_t end = find_children(c, begin, n, depth);
        store(c, b, begin, depth, id);
        begin = end;
      }
    }
  }

 private:
  // The children of the parent that begins at a position; returns where the next one begins.
  int64_t find_children(const SortedCandidates& c, int64_t begin, int64_t n, int64_t depth) {
    children.clear();
    int64_t i = begin;
    do {
      double sum = 0;
      const int64_t start = i;
      do {
        sum += reward[c.order[i++]];
      } while (i < n && c.shared[i] >= depth);
      children.push_back({sum / double(i - start), i - start, i});
    } while (i < n && c.shared[i] >= depth - 1);
    return i;
  }

  void store(const SortedCandidates& c, int64_t b, int64_t position, int64_t depth, int64_t& id) const {
    const int64_t siblings = int64_t(children.size());
    const SiblingScale scale = sibling_scale(
        a, siblings, of_request, [&](int64_t i) { return children[i].mean; },
        [&](int64_t i) { return children[i].count; });
    for (const Child& child : children) {
      const float advantage = sibling_advantage_of(a, scale, child.mean, siblings);
      ++id;
      for (; position < child.end; ++position) {
        const int64_t at = a.slot(b, c.sorted[position]) + depth - 1;
        a.store(at, advantage, siblings >= a.min_siblings, id, child.count);
      }
    }
  }

  const SiblingAdvantageArgs& a;
  SortedCandidates r, kept;
  double of_request = 1;
  std::vector<double> reward;
  std::vector<Child> children;
};

}  // namespace

void run(const Cpu& device, const SiblingAdvantageArgs& a) {
  device.parallel_for(a.batch, 1024, a.group * a.length, [&](int64_t first, int64_t last) {
    Sweep sweep(a);
    for (int64_t b = first; b < last; ++b) sweep.request(b);
  });
}

}  // namespace vstar

VSTAR_REGISTER(Cpu, sibling_advantage);
