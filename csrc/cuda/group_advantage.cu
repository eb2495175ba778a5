#include "cuda/group_advantage.cuh"

#include "torch/cuda.cuh"
#include "torch/group_advantage.h"

namespace vstar {

void run(const Cuda& device, const GroupAdvantageArgs& a) { cuda::launch_group_advantage(a, device.launcher()); }

VSTAR_REGISTER(Cuda, group_advantage);

}  // namespace vstar
