// prefix_tree on the CPU: in the sorted order every prefix is a run of candidates, so one sweep per level finds the
// nodes, numbered as they come.

#include "torch/prefix_tree.h"

#include <algorithm>

#include "cpu/candidates.h"
#include "torch/cpu.h"

namespace vstar {

void run(const Cpu& device, const PrefixTreeArgs& a) {
  const int64_t length = a.length, capacity = a.group * length;
  device.parallel_for(a.batch, 1024, capacity, [&](int64_t begin, int64_t end) {
    SortedCandidates r, kept;
    std::vector<int32_t> above;  // by packed position, the node of the level above
    for (int64_t b = begin; b < end; ++b) {
      const int64_t base = b * capacity;  // of the slots and of the candidates' nodes alike
      const int64_t all = sort_candidates(a, b, r);
      above.assign(all, -1);
      int32_t id = 0;
      for (int64_t d = 0; d < length; ++d) {
        int64_t n = all;
        const SortedCandidates& c = at_level(a, b, d, r, n, kept);
        for (int64_t i = 0; i < n; ++id) {
          const int64_t start = i;
          const int32_t parent = above[c.order[start]];
          int32_t first = c.sorted[start];
          do {
            const int32_t g = c.sorted[i];
            first = std::min(first, g);
            a.node[base + g * length + d] = above[c.order[i]] = id;
          } while (++i < n && c.shared[i] > d);
          a.store(base + id, parent, r.column[d * all + c.order[start]], d + 1, first, i - start);
        }
      }
      a.size[b] = id;
      const int64_t unused = base + id, count = capacity - id;
      for (int32_t* array : {a.parent, a.first}) std::fill_n(array + unused, count, -1);
      for (int32_t* array : {a.depth, a.count}) std::fill_n(array + unused, count, 0);
      if (a.token.wide) {
        std::fill_n(static_cast<int64_t*>(a.node_token) + unused, count, -1);
      } else {
        std::fill_n(static_cast<int32_t*>(a.node_token) + unused, count, -1);
      }
    }
  });
}

}  // namespace vstar

VSTAR_REGISTER(Cpu, prefix_tree);
