#include "cuda/prefix_tree.cuh"

#include "torch/cuda.cuh"
#include "torch/prefix_tree.h"

namespace vstar {

void run(const Cuda& device, const PrefixTreeArgs& a) {
  const int64_t bytes = cuda::request_workspace(a.batch, cuda::prefix_tree_scratch(a));
  cuda::launch_prefix_tree(a, device.workspace(bytes), device.launcher());
}

VSTAR_REGISTER(Cuda, prefix_tree);

}  // namespace vstar
