// group_advantage on the CPU: one request after the other, two passes over its rewards.

#include "torch/group_advantage.h"

#include <algorithm>
#include <vector>

#include "common/moments.h"
#include "cpu/simd.h"
#include "torch/cpu.h"

namespace vstar {

// As moments(), but for the order of the sums.
static Moments moments_of(const float* x, int64_t n) {
  const double mean = simd().sum(x, n) / double(n);
  return {mean - mean == 0 ? mean : double(NAN), simd().sum_of_squares(x, n, mean), simd().all_equal(x, n)};
}

void run(const Cpu& device, const GroupAdvantageArgs& a) {
  device.parallel_for(a.batch, 16384, a.group, [&](int64_t first, int64_t last) {
    std::vector<float> values(a.group), standardized(a.group);
    for (int64_t b = first; b < last; ++b) {
      float* const advantage = a.advantage + b * a.group;
      const int64_t step = a.reward.stride[1];
      const float* x = values.data();
      int64_t n = a.group;
      if (a.mask) {
        n = 0;
        a.reward.each(a.reward.offset(b), step, a.group, [&](int64_t g, float reward) {
          values[n] = reward;
          n += a.mask.at(b, g);
        });
      } else if (a.reward.type == FloatType::kFloat32 && step == 1) {
        x = a.reward.pointer<float>(b);
      } else {
        a.reward.each(a.reward.offset(b), step, n, [&](int64_t g, float reward) { values[g] = reward; });
      }
      const Moments m = n < 2 ? Moments{0, 0, true} : moments_of(x, n);
      if (a.mask || m.equal) std::fill_n(advantage, a.group, 0.0f);
      if (m.equal) continue;
      const double scale =
          a.scaled ? standardizing_scale(m.sum_of_squares, double(n - a.ddof), a.std_floor, a.eps) : 1.0;
      simd().standardize(x, n, m.mean, scale, a.mask ? standardized.data() : advantage);
      for (int64_t g = 0, i = 0; a.mask && g < a.group; ++g) {
        if (a.mask.at(b, g)) advantage[g] = standardized[i++];
      }
    }
  });
}

}  // namespace vstar

VSTAR_REGISTER(Cpu, group_advantage);
