#include "cuda/ved.cuh"

#include "torch/cuda.cuh"
#include "torch/ved.h"

namespace vstar {

void run(const Cuda& device, const VedSelectArgs& a) { cuda::launch_ved_select(a, device.launcher()); }
void run(const Cuda& device, const VedInsertArgs& a) { cuda::launch_ved_insert(a, device.launcher()); }
void run(const Cuda& device, const VedCandidatesArgs& a) {
  cuda::launch_ved_candidates(a, device.workspace(cuda::ved_candidates_workspace(a)), device.launcher());
}

VSTAR_REGISTER(Cuda, ved_select);
VSTAR_REGISTER(Cuda, ved_insert);
VSTAR_REGISTER(Cuda, ved_candidates);

}  // namespace vstar
