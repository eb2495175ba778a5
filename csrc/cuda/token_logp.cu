#include "cuda/token_logp.cuh"

#include "torch/cuda.cuh"
#include "torch/token_logp.h"

namespace vstar {

void run(const Cuda& device, const TokenLogpArgs& a) { cuda::launch_token_logp(a, device.launcher()); }

void run(const Cuda& device, const TokenLogpBackwardArgs& a) {
  cuda::launch_token_logp_backward(a, device.launcher());
}

VSTAR_REGISTER(Cuda, token_logp);
VSTAR_REGISTER(Cuda, token_logp_backward);

}  // namespace vstar
