// group_advantage on the CPU: one request after the other, two passes over its rewards.

#include "torch/group_advantage.h"

#include <vector>

#include "common/moments.h"
#include "torch/cpu.h"

namespace vstar {

void run(const Cpu& device, const GroupAdvantageArgs& a) {
  device.parallel_for(a.batch, 16384, a.group, [&](int64_t first, int64_t last) {
    std::vector<double> values(a.group);
    std::vector<int64_t> candidate(a.group);
    for (int64_t b = first; b < last; ++b) {
      float* const advantage = a.advantage + b * a.group;
      int64_t n = 0;
      for (int64_t g = 0; g < a.group; ++g) {
        advantage[g] = 0.0f;
        if (!a.mask.at(b, g)) continue;
        values[n] = a.reward.at(b, g);
        candidate[n++] = g;
      }
      if (n < 2) continue;
      const Moments m = moments(n, [&](int64_t i) { return values[i]; });
      if (m.equal) continue;
      const double scale =
          a.scaled ? standardizing_scale(m.sum_of_squares, double(n - a.ddof), a.std_floor, a.eps) : 1.0;
      for (int64_t i = 0; i < n; ++i) advantage[candidate[i]] = float((values[i] - m.mean) * scale);
    }
  });
}

}  // namespace vstar

VSTAR_REGISTER(Cpu, group_advantage);
