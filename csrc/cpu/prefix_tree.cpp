// prefix_tree on the CPU: in the sorted order every prefix is a run of candidates, so one sweep a level finds the
// nodes, numbered as they come.

#include <algorithm>
#include <tuple>
#include <vector>

#include "cpu/candidates.h"
#include "cpu/torch_glue.h"

namespace vstar {
namespace {

struct Request : SortedCandidates {
  std::vector<int32_t> above;  // [n] by sorted position, the node of the level above
};

using Result = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class Token>
Result build(const Tensor& tokens, const std::optional<Tensor>& mask) {
  const int64_t batch = tokens.size(0), group = tokens.size(1), length = tokens.size(2), capacity = group * length;
  Tensor parent = new_tensor<int32_t>({batch, capacity}), token = new_tensor<Token>({batch, capacity});
  Tensor depth = new_tensor<int32_t>({batch, capacity}), first = new_tensor<int32_t>({batch, capacity});
  Tensor count = new_tensor<int32_t>({batch, capacity}), node = new_tensor<int32_t>({batch, group, length});
  Tensor size = new_tensor<int32_t>({batch});
  int32_t *parents = data<int32_t>(parent), *depths = data<int32_t>(depth), *firsts = data<int32_t>(first);
  int32_t *counts = data<int32_t>(count), *nodes = data<int32_t>(node), *sizes = data<int32_t>(size);
  Token* node_tokens = data<Token>(token);
  const CandidateTokens candidates(tokens, mask);

  const int64_t grain = std::max<int64_t>(1, 1024 / std::max<int64_t>(1, capacity));
  torch::stable::parallel_for(0, batch, grain, [&](int64_t begin, int64_t end) {
    Request r;
    for (int64_t b = begin; b < end; ++b) {
      const int64_t base = b * capacity;  // of the slots and of the candidates' nodes alike
      const int64_t n = candidates.sort(b, r, [&](int64_t g) { std::fill_n(nodes + base + g * length, length, -1); });
      r.above.assign(n, -1);
      int32_t id = 0;
      for (int64_t d = 0; d < length; ++d) {
        for (int64_t i = 0; i < n; ++id) {
          const int64_t start = i, slot = base + id;
          parents[slot] = r.above[start];
          node_tokens[slot] = Token(r.column[d * n + r.order[start]]);
          depths[slot] = int32_t(d + 1);
          int32_t least = r.candidate[r.order[start]];
          do {
            const int32_t g = r.candidate[r.order[i]];
            least = std::min(least, g);
            nodes[base + g * length + d] = r.above[i] = id;
          } while (++i < n && r.shared[i] > d);
          firsts[slot] = least;
          counts[slot] = int32_t(i - start);
        }
      }
      sizes[b] = id;
      const int64_t unused = capacity - id;
      std::fill_n(parents + base + id, unused, -1);
      std::fill_n(node_tokens + base + id, unused, Token(-1));
      std::fill_n(depths + base + id, unused, 0);
      std::fill_n(firsts + base + id, unused, -1);
      std::fill_n(counts + base + id, unused, 0);
    }
  });
  return {parent, token, depth, first, count, node, size};
}

Result prefix_tree(Tensor tokens, std::optional<Tensor> mask) {
  return tokens.scalar_type() == ScalarType::Long ? build<int64_t>(tokens, mask) : build<int32_t>(tokens, mask);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vstar_ops, CPU, m) { m.impl("prefix_tree", TORCH_BOX(&prefix_tree)); }

}  // namespace vstar
