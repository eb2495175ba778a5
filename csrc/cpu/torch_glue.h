// What the CPU ops need of torch's stable ABI: typed views of tensors and cheap outputs.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "common/floats.h"
#include "cpu/simd.h"

namespace vstar {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T> int32_t dtype_of();
template <> inline int32_t dtype_of<float>() { return aoti_torch_dtype_float32(); }
template <> inline int32_t dtype_of<int32_t>() { return aoti_torch_dtype_int32(); }
template <> inline int32_t dtype_of<int64_t>() { return aoti_torch_dtype_int64(); }
template <> inline int32_t dtype_of<bool>() { return aoti_torch_dtype_bool(); }
template <> inline int32_t dtype_of<BFloat16>() { return aoti_torch_dtype_bfloat16(); }
template <> inline int32_t dtype_of<Float16>() { return aoti_torch_dtype_float16(); }

// A new contiguous CPU tensor. Sized directly through the shim: the dispatcher's `empty` costs about
// a microsecond each, and small calls allocate seven.
inline Tensor new_tensor(std::initializer_list<int64_t> sizes, int32_t dtype) {
  int64_t strides[4];
  int64_t stride = 1;
  for (int64_t i = int64_t(sizes.size()) - 1; i >= 0; --i) {
    strides[i] = stride;
    stride *= sizes.begin()[i] > 0 ? sizes.begin()[i] : 1;
  }
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      int64_t(sizes.size()), sizes.begin(), strides, dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

template <class T>
inline Tensor new_tensor(std::initializer_list<int64_t> sizes) { return new_tensor(sizes, dtype_of<T>()); }

template <class T>
inline T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// Element (i, j) of a float matrix of any strides, which may be absent.
class OptionalMatrix {
 public:
  explicit OptionalMatrix(const std::optional<Tensor>& tensor)
      : data_(tensor ? data<float>(*tensor) : nullptr),
        rows_(tensor ? tensor->stride(0) : 0),
        columns_(tensor ? tensor->stride(1) : 0) {}
  float at(int64_t i, int64_t j) const { return data_ ? data_[i * rows_ + j * columns_] : 0.0f; }

 private:
  const float* data_;
  int64_t rows_, columns_;
};

// Integers of 32 or 64 bits, by position in elements.
class Integers {
 public:
  explicit Integers(const Tensor& tensor)
      : data_(tensor.mutable_data_ptr()), wide_(tensor.scalar_type() == ScalarType::Long) {
    STD_TORCH_CHECK(wide_ || tensor.scalar_type() == ScalarType::Int, "expected int32 or int64");
  }
  int64_t at(int64_t position) const {
    return wide_ ? static_cast<const int64_t*>(data_)[position] : static_cast<const int32_t*>(data_)[position];
  }

 private:
  const void* data_;
  bool wide_;
};

inline FloatType float_type(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return FloatType::kFloat32;
    case ScalarType::BFloat16: return FloatType::kBFloat16;
    case ScalarType::Half: return FloatType::kFloat16;
    default: STD_TORCH_CHECK(false, "expected float32, bfloat16 or float16");
  }
}

inline int64_t element_size(FloatType type) { return type == FloatType::kFloat32 ? 4 : 2; }

// Elements of float32, bfloat16 or float16 as floats, by position in elements.
class Floats {
 public:
  explicit Floats(const Tensor& tensor) : data_(tensor.const_data_ptr()), type_(float_type(tensor)) {}
  float at(int64_t position) const {
    switch (type_) {
      case FloatType::kFloat32: return static_cast<const float*>(data_)[position];
      case FloatType::kBFloat16: return to_float(static_cast<const BFloat16*>(data_)[position]);
      default: return to_float(static_cast<const Float16*>(data_)[position]);
    }
  }

  // use(i, element at first + i * stride) for the n elements of a row; the dtype is looked up once.
  template <class Use>
  void each(int64_t first, int64_t stride, int64_t n, const Use& use) const {
    const auto loop = [&](const auto* data) {
      if (stride == 1) {
        for (int64_t i = 0; i < n; ++i) use(i, to_float(data[first + i]));
      } else {
        for (int64_t i = 0; i < n; ++i) use(i, to_float(data[first + i * stride]));
      }
    };
    switch (type_) {
      case FloatType::kFloat32: return loop(static_cast<const float*>(data_));
      case FloatType::kBFloat16: return loop(static_cast<const BFloat16*>(data_));
      default: return loop(static_cast<const Float16*>(data_));
    }
  }

 private:
  const void* data_;
  FloatType type_;
};

}  // namespace vstar
