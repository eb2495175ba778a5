// What the CUDA module offers beside its kernels.
#include <memory>
#include <vector>

#include "cuda/group_advantage.cuh"
#include "torch/cuda.cuh"

namespace vstar {
namespace {

// Why the module's kernels cannot run on the current device; empty if they can.
std::string probe() {
#if defined(__CUDACC__)
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, group_advantage_kernel<1>);
  if (error == cudaSuccess) return "";
  cudaGetLastError();  // leave no error behind for who asks next
  return cudaGetErrorString(error);
#else
  return "";
#endif
}

// Register kernels for the ops vstar_ops::<name> too, so that the dispatcher calls them with no Python on the way.
void install(std::vector<std::string> names) {
  static auto& kept = *new std::vector<std::unique_ptr<StableLibrary>>;  // as long as the process lives
  auto library = std::make_unique<StableLibrary>(StableLibrary::Kind::IMPL, "vstar_ops", Cuda::kKey, __FILE__, __LINE__);
  for (const std::string& name : names) {
    const auto found = kernels<Cuda>().find(name);
    STD_TORCH_CHECK(found != kernels<Cuda>().end(), "the CUDA module has no kernel for the op ", name);
    library->impl(name.c_str(), found->second);
  }
  kept.push_back(std::move(library));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vstar_ops_cuda, CompositeExplicitAutograd, m) {
  m.impl("probe", TORCH_BOX(&probe));
  m.impl("install", TORCH_BOX(&install));
}

}  // namespace vstar
