// A CUDA GPU as a device of the ops. Where the tests compile the kernels for the emulator, the tensors are on the CPU.
#pragma once

#if defined(__CUDACC__)
#include <torch/csrc/stable/accelerator.h>
#endif

#include "cuda/device.cuh"
#include "torch/glue.h"

#if defined(__CUDACC__)
// Declared by torch only where torch itself is built for CUDA; the module is built against any torch.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#endif

namespace vstar {

#if defined(__CUDACC__)
inline void Launcher::check(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "CUDA: ", cudaGetErrorString(error));
}

// For as long as it lives, the device of a tensor is the current one.
class CurrentDevice {
 public:
  static constexpr const char* kKey = "CUDA";
  static constexpr bool kHostMemory = false;  // torch poisons what it makes by a setting of its own

  explicit CurrentDevice(const Tensor& like) : index_(like.device_index()), guard_(index_) {}
  static int32_t type() { return aoti_torch_device_type_cuda(); }
  int32_t index() const { return index_; }
  Launcher launcher() const {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    return {static_cast<cudaStream_t>(stream)};
  }

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
};
#else
class CurrentDevice {
 public:
  static constexpr const char* kKey = "CPU";
  static constexpr bool kHostMemory = true;

  explicit CurrentDevice(const Tensor&) {}
  static int32_t type() { return aoti_torch_device_type_cpu(); }
  static int32_t index() { return 0; }
  static Launcher launcher() { return {}; }
};
#endif

class Cuda final : public CurrentDevice, public Gpu {
 public:
  static constexpr const char* kLibrary = "vstar_ops_cuda";
  static constexpr int64_t kMaxGrid = int64_t(1) << 31;

  explicit Cuda(const Tensor& like) : CurrentDevice(like), Gpu(launcher()) {}

  // The kernels write zeros themselves.
  Tensor zeros(const Sizes& sizes, int32_t dtype) const { return empty(*this, sizes, dtype); }

  unsigned char* workspace(int64_t bytes) const override {
    if (bytes == 0) return nullptr;
    workspace_ = empty(*this, {bytes}, dtype_of<uint8_t>());
    void* const data = workspace_.data();
    if (kHostMemory) memset(data, 0xCB, size_t(bytes));  // what is read before it is written shows
    return static_cast<unsigned char*>(data);
  }

 private:
  mutable Tensor workspace_;
};

}  // namespace vstar
