// What the CPU module offers beside its kernels.
#include "cpu/simd.h"
#include "torch/cpu.h"

namespace vstar {
namespace {

std::string simd_level_op() { return simd_level(); }

void poison_outputs_op(bool enabled) { poison_outputs = enabled; }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vstar_ops, CompositeExplicitAutograd, m) {
  m.impl("simd_level", TORCH_BOX(&simd_level_op));
  m.impl("poison_outputs", TORCH_BOX(&poison_outputs_op));
}

}  // namespace vstar
