// group_advantage on the CPU: one request after the other, two passes over its rewards.

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/segment.h"
#include "cpu/torch_glue.h"

namespace vstar {
namespace {

Tensor group_advantage(Tensor rewards, std::optional<Tensor> mask, double eps, int64_t ddof, double std_floor) {
  const int64_t batch = rewards.size(0), group = rewards.size(1);
  Tensor advantage = new_tensor<float>({batch, group});
  const Floats reward(rewards);
  const bool* present = mask ? data<bool>(*mask) : nullptr;
  float* out = data<float>(advantage);

  torch::stable::parallel_for(0, batch, std::max<int64_t>(1, 16384 / std::max<int64_t>(1, group)),
                              [&](int64_t first, int64_t last) {
    std::vector<double> values(group);
    std::vector<int64_t> where(group);
    for (int64_t b = first; b < last; ++b) {
      int64_t n = 0;
      for (int64_t g = 0; g < group; ++g) {
        out[b * group + g] = 0.0f;
        if (present && !present[b * mask->stride(0) + g * mask->stride(1)]) continue;
        values[n] = reward.at(b * rewards.stride(0) + g * rewards.stride(1));
        where[n++] = g;
      }
      if (n <= ddof) continue;
      const Moments m = moments(n, [&](int64_t i) { return values[i]; });
      if (m.equal) continue;
      const double scale = 1.0 / (std::max(std::sqrt(m.sum_of_squares / double(n - ddof)), std_floor) + eps);
      for (int64_t i = 0; i < n; ++i) out[b * group + where[i]] = float((values[i] - m.mean) * scale);
    }
  });
  return advantage;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vstar_ops, CPU, m) { m.impl("group_advantage", TORCH_BOX(&group_advantage)); }

}  // namespace vstar
