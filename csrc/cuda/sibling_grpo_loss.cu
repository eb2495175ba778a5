#include "cuda/sibling_grpo_loss.cuh"

#include "torch/cuda.cuh"
#include "torch/sibling_grpo_loss.h"

namespace vstar {

void run(const Cuda& device, const SiblingGRPOLossArgs& a) {
  cuda::launch_sibling_grpo_loss(a, device.workspace(cuda::sibling_grpo_loss_workspace(a)), device.launcher());
}

VSTAR_REGISTER(Cuda, sibling_grpo_loss);

}  // namespace vstar
