#include "cuda/prefix_returns.cuh"

#include "torch/cuda.cuh"
#include "torch/prefix_returns.h"

namespace vstar {

void run(const Cuda& device, const PrefixReturnsArgs& a) {
  const int64_t bytes = cuda::request_workspace(a.batch, cuda::prefix_returns_scratch(a));
  cuda::launch_prefix_returns(a, device.workspace(bytes), device.launcher());
}

VSTAR_REGISTER(Cuda, prefix_returns);

}  // namespace vstar
