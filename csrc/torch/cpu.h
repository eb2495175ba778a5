// The CPU as a device of the ops.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdlib>

#include "torch/glue.h"

namespace vstar {

struct Cpu {
  static constexpr const char *kLibrary = "vstar_ops", *kKey = "CPU";
  static constexpr bool kHostMemory = true;
  static constexpr int64_t kMaxGrid = INT64_MAX;

  explicit Cpu(const Tensor&) {}
  static int32_t type() { return aoti_torch_device_type_cpu(); }
  static int32_t index() { return 0; }

  // Memory of the system is zero already; pages that are not written are never fetched.
  static Tensor zeros(const Sizes& sizes, int32_t dtype) {
    constexpr size_t kAlign = 64;
    size_t bytes = size_t(aoti_torch_dtype_element_size(dtype));
    for (const int64_t size : sizes) bytes *= size_t(size);
    char* const memory = static_cast<char*>(std::calloc(bytes + kAlign, 1));
    STD_TORCH_CHECK(memory != nullptr, "out of memory: ", bytes, " bytes");
    char* const aligned = memory + (kAlign - reinterpret_cast<uintptr_t>(memory) % kAlign) % kAlign;
    const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
    const auto type = torch::stable::detail::to<torch::headeronly::ScalarType>(torch::stable::detail::from(dtype));
    const torch::stable::Tensor tensor = torch::stable::from_blob(
        aligned, {sizes.begin(), size_t(sizes.dim)}, {ContiguousStrides(sizes).stride, size_t(sizes.dim)}, cpu, type,
        [memory](void*) { std::free(memory); });
    AtenTensorHandle handle;
    TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(tensor.get(), &handle));
    return Tensor(handle);
  }

  static int64_t num_threads() { return torch::stable::get_num_threads(); }
  // body(begin, end) for parts of [0, n), each worth at least `work` where an item is worth `each`.
  template <class Body>
  static void parallel_for(int64_t n, int64_t work, int64_t each, const Body& body) {
    torch::stable::parallel_for(0, n, std::max<int64_t>(1, work / std::max<int64_t>(1, each)), body);
  }
};

}  // namespace vstar
