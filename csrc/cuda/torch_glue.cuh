// What the launchers need of torch's stable ABI: views of tensors, outputs, the current stream. The ops are
// registered as vstar_ops_cuda::*, from where vstar_ops/ops/_library.py takes them.
//
// Where the tests compile the launchers for the emulator, the tensors are on the CPU and new ones are filled with
// junk, so that an entry that no kernel writes is seen.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>

#include "cuda/device.cuh"

#if defined(__CUDACC__)
#define VSTAR_DISPATCH_KEY CUDA
// Declared by torch only where torch itself is built for CUDA; the module is built against any torch.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#else
#define VSTAR_DISPATCH_KEY CPU
#endif

namespace vstar {
namespace cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#if defined(__CUDACC__)
inline void Launcher::check(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "CUDA: ", cudaGetErrorString(error));
}

// Makes a tensor's device the current one for as long as it lives.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& tensor) : device_(tensor.get_device_index()) {
    Launcher::check(cudaGetDevice(&before_));
    if (device_ != before_) Launcher::check(cudaSetDevice(device_));
  }
  ~OnDeviceOf() {
    if (device_ != before_) cudaSetDevice(before_);
  }
  Launcher launcher() const {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    return {static_cast<cudaStream_t>(stream)};
  }

 private:
  int device_, before_ = 0;
};
#else
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor&) {}
  Launcher launcher() const { return {}; }
};
#endif

template <class T> int32_t dtype_of();
template <> inline int32_t dtype_of<float>() { return aoti_torch_dtype_float32(); }
template <> inline int32_t dtype_of<int64_t>() { return aoti_torch_dtype_int64(); }
template <> inline int32_t dtype_of<int32_t>() { return aoti_torch_dtype_int32(); }
template <> inline int32_t dtype_of<BFloat16>() { return aoti_torch_dtype_bfloat16(); }
template <> inline int32_t dtype_of<Float16>() { return aoti_torch_dtype_float16(); }
template <> inline int32_t dtype_of<bool>() { return aoti_torch_dtype_bool(); }
template <> inline int32_t dtype_of<uint8_t>() { return aoti_torch_dtype_uint8(); }

// A new contiguous tensor on another's device. Straight through the shim: the dispatcher's `empty` costs about
// a microsecond each.
template <class T>
inline Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> sizes) {
  int64_t strides[4];
  int64_t stride = 1;
  for (int64_t i = int64_t(sizes.size()) - 1; i >= 0; --i) {
    strides[i] = stride;
    stride *= sizes.begin()[i] > 0 ? sizes.begin()[i] : 1;
  }
#if defined(__CUDACC__)
  const int32_t device = aoti_torch_device_type_cuda(), index = like.get_device_index();
#else
  const int32_t device = aoti_torch_device_type_cpu(), index = 0;
#endif
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      int64_t(sizes.size()), sizes.begin(), strides, dtype_of<T>(), device, index, &handle));
  Tensor tensor(handle);
#if !defined(__CUDACC__)
  if (tensor.numel() > 0) memset(tensor.mutable_data_ptr(), 0xCB, size_t(tensor.numel()) * sizeof(T));
#endif
  return tensor;
}

template <class T>
inline T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

inline FloatView view_floats(const Tensor& tensor) {
  FloatView view{tensor.const_data_ptr(), FloatType::kFloat32, {}};
  switch (tensor.scalar_type()) {
    case ScalarType::Float: break;
    case ScalarType::BFloat16: view.type = FloatType::kBFloat16; break;
    case ScalarType::Half: view.type = FloatType::kFloat16; break;
    default: STD_TORCH_CHECK(false, "expected float32, bfloat16 or float16");
  }
  for (int64_t i = 0; i < tensor.dim(); ++i) view.stride[i] = tensor.stride(i);
  return view;
}

// Of what is not there, null.
inline FloatView view_floats(const std::optional<Tensor>& tensor) {
  return tensor ? view_floats(*tensor) : FloatView{nullptr, FloatType::kFloat32, {}};
}

inline IntView view_ints(const Tensor& tensor) {
  const bool wide = tensor.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(wide || tensor.scalar_type() == ScalarType::Int, "expected int32 or int64");
  IntView view{tensor.const_data_ptr(), wide, {}};
  for (int64_t i = 0; i < tensor.dim(); ++i) view.stride[i] = tensor.stride(i);
  return view;
}

inline MaskView view_mask(const std::optional<Tensor>& mask) {
  MaskView view{nullptr, {}};
  if (!mask) return view;
  view.data = static_cast<const unsigned char*>(mask->const_data_ptr());
  for (int64_t i = 0; i < mask->dim(); ++i) view.stride[i] = mask->stride(i);
  return view;
}

// Room for a launch's scratch; null for no bytes.
class Workspace {
 public:
  Workspace(const Tensor& like, int64_t bytes) {
    if (bytes > 0) tensor_ = new_tensor<uint8_t>(like, {bytes});
  }
  void* data() const { return tensor_ ? tensor_->mutable_data_ptr() : nullptr; }

 private:
  std::optional<Tensor> tensor_;
};

}  // namespace cuda
}  // namespace vstar
