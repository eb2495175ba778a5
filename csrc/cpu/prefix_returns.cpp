// prefix_returns on the CPU: one sweep over each request's sorted candidates. A prefix is closed where the order
// leaves it; its sum of embeddings is then complete and goes into its parent's, so every embedding is read once.
// The first child hands its buffer over, so a prefix with a single child adds nothing up, and no sum begins as zeros.

#include <algorithm>
#include <cmath>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/candidates.h"
#include "cpu/torch_glue.h"

namespace vstar {
namespace {

struct Products {
  double square, dot;
};

// x.x and x.y in one pass, each in four interleaved sums: a fixed order that the compiler can vectorize.
Products products(const double* x, const double* y, int64_t n) {
  double square[4] = {}, dot[4] = {};
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) {
    for (int64_t j = 0; j < 4; ++j) {
      square[j] += x[i + j] * x[i + j];
      dot[j] += x[i + j] * y[i + j];
    }
  }
  for (; i < n; ++i) {
    square[i % 4] += x[i] * x[i];
    dot[i % 4] += x[i] * y[i];
  }
  return {(square[0] + square[2]) + (square[1] + square[3]), (dot[0] + dot[2]) + (dot[1] + dot[3])};
}

struct Request : SortedCandidates {
  std::vector<double> buffer;  // [L, E]
  std::vector<double*> sum;    // [L] -> [E] in buffer, of the open prefix of each depth
  std::vector<double> target;  // [E]
  std::vector<int64_t> start;  // [L] where the open prefix began
  std::vector<int32_t> id;     // [L] of the open prefix
  std::vector<float> cosine;   // [L] of the prefix that was closed last
};

using Result = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Result prefix_returns(
    Tensor tokens, Tensor embedding, Tensor target, Tensor target_embedding, std::optional<Tensor> mask,
    Tensor weights) {
  const int64_t batch = tokens.size(0), group = tokens.size(1), length = tokens.size(2), width = embedding.size(2);
  Tensor returns = new_tensor<float>({batch, group, length}), similarity = new_tensor<float>({batch, group, length});
  Tensor node = new_tensor<int32_t>({batch, group, length}), count = new_tensor<int32_t>({batch, group, length});
  float *to_returns = data<float>(returns), *to_similarity = data<float>(similarity);
  int32_t *to_node = data<int32_t>(node), *to_count = data<int32_t>(count);
  const CandidateTokens candidates(tokens, mask);
  const Floats item(embedding), wanted(target_embedding);
  const Integers target_token(target);
  STD_TORCH_CHECK(weights.scalar_type() == ScalarType::Double && weights.dim() == 1 && weights.size(0) == length &&
                      (length < 2 || weights.stride(0) == 1),
                  "weights must be contiguous float64 [L]");
  const double* weight = data<double>(weights);
  const int64_t item_strides[] = {embedding.stride(0), embedding.stride(1), embedding.stride(2)};
  const int64_t wanted_strides[] = {target_embedding.stride(0), target_embedding.stride(1)};
  const int64_t target_strides[] = {target.stride(0), target.stride(1)};

  const int64_t grain = std::max<int64_t>(1, 4096 / std::max<int64_t>(1, group * (length + width)));
  torch::stable::parallel_for(0, batch, grain, [&](int64_t first, int64_t last) {
    Request r;
    r.buffer.resize(length * width);
    for (int64_t d = 0; d < length; ++d) r.sum.push_back(r.buffer.data() + d * width);
    r.target.resize(width);
    r.start.resize(length);
    r.id.resize(length);
    r.cosine.resize(length);
    for (int64_t b = first; b < last; ++b) {
      const int64_t base = b * group * length;
      const int64_t n = candidates.sort(b, r, [&](int64_t g) {
        std::fill_n(to_returns + base + g * length, length, 0.0f);
        std::fill_n(to_similarity + base + g * length, length, 0.0f);
        std::fill_n(to_node + base + g * length, length, -1);
        std::fill_n(to_count + base + g * length, length, 0);
      });
      wanted.each(b * wanted_strides[0], wanted_strides[1], width, [&](int64_t e, float x) { r.target[e] = x; });
      const double target_norm = std::sqrt(products(r.target.data(), r.target.data(), width).square);

      // Nodes are numbered level by level: a level's numbers begin where those of the levels above end.
      int32_t begin = 0;
      for (int64_t d = 0; d < length; ++d) {
        r.id[d] = begin - 1;
        for (int64_t i = 0; i < n; ++i) begin += r.shared[i] <= d;
      }

      for (int64_t i = 0; i <= n; ++i) {
        // Close the prefixes that candidate i does not share, the longest first.
        const int64_t shared = i < n ? std::max(r.shared[i], 0) : 0;
        for (int64_t d = length - 1; i > 0 && d >= shared; --d) {
          if (d + 1 < length && r.start[d + 1] == r.start[d]) {
            r.cosine[d] = r.cosine[d + 1];  // its only child has the same candidates
          } else {
            const Products p = products(r.sum[d], r.target.data(), width);
            const double norm = std::sqrt(p.square) * target_norm;
            r.cosine[d] = norm == 0 ? 0.0f : float(p.dot / norm);
          }
          bool matches = true;
          for (int64_t t = 0; matches && t <= d; ++t) {
            matches = r.column[t * n + r.order[i - 1]] == target_token.at(b * target_strides[0] + t * target_strides[1]);
          }
          const float value = float(matches ? weight[d] : -weight[d] * (1.0 - double(r.cosine[d])));
          for (int64_t p = r.start[d]; p < i; ++p) {
            const int64_t slot = base + r.candidate[r.order[p]] * length + d;
            to_returns[slot] = value;
            to_similarity[slot] = r.cosine[d];
            to_node[slot] = r.id[d];
            to_count[slot] = int32_t(i - r.start[d]);
          }
          if (d == 0) continue;
          if (r.start[d] == r.start[d - 1]) {
            std::swap(r.sum[d], r.sum[d - 1]);
          } else {
            const double* from = r.sum[d];
            double* to = r.sum[d - 1];
            for (int64_t e = 0; e < width; ++e) to[e] += from[e];
          }
        }
        if (i == n) break;
        for (int64_t d = shared; d < length; ++d) {
          r.start[d] = i;
          ++r.id[d];
        }
        if (length == 0) continue;
        double* sum = r.sum[length - 1];
        const int64_t from = b * item_strides[0] + r.candidate[r.order[i]] * item_strides[1];
        if (r.start[length - 1] == i) {
          item.each(from, item_strides[2], width, [&](int64_t e, float x) { sum[e] = x; });
        } else {
          item.each(from, item_strides[2], width, [&](int64_t e, float x) { sum[e] += x; });
        }
      }
    }
  });
  return {returns, similarity, node, count};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vstar_ops, CPU, m) { m.impl("prefix_returns", TORCH_BOX(&prefix_returns)); }

}  // namespace vstar
