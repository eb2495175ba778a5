#include "cuda/expand_topk.cuh"

#include "torch/cuda.cuh"
#include "torch/expand_topk.h"

namespace vstar {

inline void check_sizes(const Cuda&, const ExpandTopKArgs& a) {
  STD_TORCH_CHECK(
      cuda::expand_possible(a), "logits must have fewer than 2^32 legal children per request and 2^31 columns, got W = ",
      a.width, ", V = ", a.columns, " and up to ", a.max_children, " children per prefix");
}

void run(const Cuda& device, const ExpandTopKArgs& a) {
  const cuda::ExpandPlan plan = cuda::plan_expand_topk(a);
  cuda::launch_expand_topk(a, plan, device.workspace(cuda::expand_topk_workspace(plan)), device.launcher());
}

VSTAR_REGISTER(Cuda, expand_topk);

}  // namespace vstar
