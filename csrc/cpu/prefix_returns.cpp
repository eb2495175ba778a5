// prefix_returns on the CPU: one sweep over each request's sorted candidates. A prefix is closed where the order
// leaves it; its sum of embeddings is then complete and goes into its parent's, so every embedding is read once.

#include <cmath>
#include <tuple>
#include <vector>

#include "cpu/candidates.h"
#include "cpu/torch_glue.h"

namespace vstar {
namespace {

// Dot product in eight interleaved sums: a fixed order that the compiler can vectorise.
double dot(const double* x, const double* y, int64_t n) {
  double part[8] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    for (int64_t j = 0; j < 8; ++j) part[j] += x[i + j] * y[i + j];
  }
  for (; i < n; ++i) part[i % 8] += x[i] * y[i];
  return ((part[0] + part[4]) + (part[2] + part[6])) + ((part[1] + part[5]) + (part[3] + part[7]));
}

struct Request : SortedCandidates {
  std::vector<double> sum;     // [L, E] of the open prefix of each depth
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
  const double* weight = data<double>(weights);
  const int64_t item_strides[] = {embedding.stride(0), embedding.stride(1), embedding.stride(2)};
  const int64_t wanted_strides[] = {target_embedding.stride(0), target_embedding.stride(1)};
  const int64_t target_strides[] = {target.stride(0), target.stride(1)};

  const int64_t grain = std::max<int64_t>(1, 4096 / std::max<int64_t>(1, group * (length + width)));
  torch::stable::parallel_for(0, batch, grain, [&](int64_t first, int64_t last) {
    Request r;
    r.sum.resize(length * width);
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
      for (int64_t e = 0; e < width; ++e) r.target[e] = wanted.at(b * wanted_strides[0] + e * wanted_strides[1]);
      const double target_norm = std::sqrt(dot(r.target.data(), r.target.data(), width));

      // Nodes are numbered level by level: a level's numbers begin where those of the levels above end.
      int32_t begin = 0;
      for (int64_t d = 0; d < length; ++d) {
        r.id[d] = begin - 1;
        for (int64_t i = 0; i < n; ++i) begin += r.shared[i] <= d;
      }
      std::fill(r.sum.begin(), r.sum.end(), 0.0);

      for (int64_t i = 0; i <= n; ++i) {
        // Close the prefixes that candidate i does not share, the longest first.
        const int64_t shared = i < n ? std::max(r.shared[i], 0) : 0;
        for (int64_t d = length - 1; i > 0 && d >= shared; --d) {
          double* sum = r.sum.data() + d * width;
          if (d + 1 < length && r.start[d + 1] == r.start[d]) {
            r.cosine[d] = r.cosine[d + 1];  // its only child has the same candidates
          } else {
            const double norm = std::sqrt(dot(sum, sum, width)) * target_norm;
            r.cosine[d] = norm == 0 ? 0.0f : float(dot(sum, r.target.data(), width) / norm);
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
          for (int64_t e = 0; d > 0 && e < width; ++e) sum[e - width] += sum[e];
          std::fill_n(sum, width, 0.0);
        }
        if (i == n) break;
        for (int64_t d = shared; d < length; ++d) {
          r.start[d] = i;
          ++r.id[d];
        }
        if (length == 0) continue;
        double* sum = r.sum.data() + (length - 1) * width;
        const int64_t from = b * item_strides[0] + r.candidate[r.order[i]] * item_strides[1];
        for (int64_t e = 0; e < width; ++e) sum[e] += item.at(from + e * item_strides[2]);
      }
    }
  });
  return {returns, similarity, node, count};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vstar_ops, CPU, m) { m.impl("prefix_returns", TORCH_BOX(&prefix_returns)); }

}  // namespace vstar
