#include "cuda/sibling_advantage.cuh"

#include "torch/cuda.cuh"
#include "torch/sibling_advantage.h"

namespace vstar {

void run(const Cuda& device, const SiblingAdvantageArgs& a) {
  const int64_t bytes = cuda::request_workspace(a.batch, cuda::sibling_advantage_scratch(a));
  cuda::launch_sibling_advantage(a, device.workspace(bytes), device.launcher());
}

VSTAR_REGISTER(Cuda, sibling_advantage);

}  // namespace vstar
