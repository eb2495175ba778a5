// How an op meets torch's stable ABI: arguments become views, outputs are made, kernels are registered.
//
// An op is one function template <class Device> in torch/<op>.h, whose parameters are those of its schema. It fills the
// op's struct of arguments and calls run(device, arguments), which each backend defines.
#pragma once

#include <torch/csrc/stable/library.h>

#include <cstring>
#include <initializer_list>
#include <map>
#include <optional>
#include <string>
#include <utility>

#include "common/views.h"

namespace vstar {

template <class T> int32_t dtype_of();
template <> inline int32_t dtype_of<float>() { return aoti_torch_dtype_float32(); }
template <> inline int32_t dtype_of<double>() { return aoti_torch_dtype_float64(); }
template <> inline int32_t dtype_of<BFloat16>() { return aoti_torch_dtype_bfloat16(); }
template <> inline int32_t dtype_of<Float16>() { return aoti_torch_dtype_float16(); }
template <> inline int32_t dtype_of<uint8_t>() { return aoti_torch_dtype_uint8(); }
template <> inline int32_t dtype_of<int32_t>() { return aoti_torch_dtype_int32(); }
template <> inline int32_t dtype_of<int64_t>() { return aoti_torch_dtype_int64(); }
template <> inline int32_t dtype_of<bool>() { return aoti_torch_dtype_bool(); }

// A tensor that a call owns, or none. torch::stable::Tensor counts references, which costs an allocation per argument.
// It converts to the views that the structs of arguments hold, and to a pointer if it is contiguous.
class Tensor {
 public:
  Tensor() = default;
  explicit Tensor(AtenTensorHandle handle) : handle_(handle) {}
  Tensor(Tensor&& other) noexcept : handle_(other.release()) {}
  Tensor& operator=(Tensor&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Tensor() {
    if (handle_) aoti_torch_delete_tensor_object(handle_);
  }
  AtenTensorHandle release() { return std::exchange(handle_, nullptr); }
  explicit operator bool() const { return handle_ != nullptr; }

  int64_t size(int64_t axis) const { return get<int64_t*>(aoti_torch_get_sizes)[axis]; }
  int64_t dim() const { return get<int64_t>(aoti_torch_get_dim); }
  int64_t numel() const { return get<int64_t>(aoti_torch_get_numel); }
  int32_t dtype() const { return get<int32_t>(aoti_torch_get_dtype); }
  bool contiguous() const { return get<bool>(aoti_torch_is_contiguous); }
  int32_t device_index() const { return get<int32_t>(aoti_torch_get_device_index); }
  void* data() const { return get<void*>(torch_get_mutable_data_ptr); }

  FloatType float_type() const {
    const int32_t type = dtype();
    if (type == dtype_of<float>()) return FloatType::kFloat32;
    if (type == dtype_of<BFloat16>()) return FloatType::kBFloat16;
    STD_TORCH_CHECK(type == dtype_of<Float16>(), "expected float32, bfloat16 or float16");
    return FloatType::kFloat16;
  }

  template <class T>
  operator StridedView<T>() const {
    StridedView<T> view{};
    if (handle_) view.data = static_cast<const T*>(fill(view, dtype_of<T>()));
    return view;
  }
  operator MaskView() const { return {static_cast<StridedView<bool>>(*this)}; }
  operator FloatView() const {
    FloatView view{};
    if (!handle_) return view;
    view.type = float_type();
    view.data = fill(view);
    return view;
  }
  operator IntView() const {
    IntView view{};
    if (!handle_) return view;
    view.wide = dtype() == dtype_of<int64_t>();
    view.data = view.wide ? fill(view) : fill(view, dtype_of<int32_t>());
    return view;
  }
  template <class T>
  operator T*() const {
    check_dtype(dtype_of<std::remove_const_t<T>>());
    STD_TORCH_CHECK(contiguous(), "expected a contiguous tensor");
    if constexpr (std::is_const_v<T>) {
      return static_cast<T*>(get<const void*>(torch_get_const_data_ptr));
    } else {
      return static_cast<T*>(data());
    }
  }

 private:
  template <class Result>
  Result get(AOTITorchError (*function)(AtenTensorHandle, Result*)) const {
    Result result;
    TORCH_ERROR_CODE_CHECK(function(handle_, &result));
    return result;
  }

  void check_dtype(int32_t expected) const {
    STD_TORCH_CHECK(dtype() == expected, "expected a tensor of scalar type ", expected, ", got ", dtype());
  }

  // The strides into a view; returns the data.
  const void* fill(Strides& view) const {
    const int64_t* strides = get<int64_t*>(aoti_torch_get_strides);
    for (int64_t i = dim() - 1; i >= 0; --i) view.stride[i] = strides[i];
    return get<const void*>(torch_get_const_data_ptr);
  }
  const void* fill(Strides& view, int32_t expected) const {
    check_dtype(expected);
    return fill(view);
  }

  AtenTensorHandle handle_ = nullptr;
};

// A `Tensor?` of a schema.
class OptionalTensor : public Tensor {
  using Tensor::Tensor;
};

// Whether new outputs hold the largest integer or NaN until they are written; for tests.
#if defined(VSTAR_EMULATED)
inline bool poison_outputs = true;
#else
inline bool poison_outputs = false;
#endif

// The largest integer of `size` bytes, which read as a float is NaN; true for a bool.
inline void poison(void* data, int64_t n, size_t size) {
  unsigned char* const bytes = static_cast<unsigned char*>(data);
  memset(bytes, size == 1 ? 1 : 0xFF, size_t(n) * size);
  for (int64_t i = 0; size > 1 && i < n; ++i) bytes[size_t(i + 1) * size - 1] = 0x7F;
}

using Sizes = std::initializer_list<int64_t>;

struct ContiguousStrides : Strides {
  explicit ContiguousStrides(Sizes sizes) : Strides{} {
    int64_t next = 1;
    for (size_t i = sizes.size(); i-- > 0; next *= sizes.begin()[i] > 0 ? sizes.begin()[i] : 1) stride[i] = next;
  }
};

// A new contiguous tensor, straight through the shim: the dispatcher's `empty` costs about a microsecond each.
template <class Device>
Tensor empty(const Device& device, Sizes sizes, int32_t dtype) {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      int64_t(sizes.size()), sizes.begin(), ContiguousStrides(sizes).stride, dtype, Device::type(), device.index(),
      &handle));
  return Tensor(handle);
}

// The results of an op, in the order of its schema.
template <size_t N>
class Outputs {
 public:
  // Returns where the tensor's data lie.
  void* add(Tensor tensor) {
    void* const data = tensor.data();
    tensor_[count_++] = std::move(tensor);
    return data;
  }

  template <class Device>
  void* create(const Device& device, Sizes sizes, int32_t dtype) {
    Tensor tensor = empty(device, sizes, dtype);
    if constexpr (Device::kHostMemory) {
      const int64_t n = poison_outputs ? tensor.numel() : 0;
      if (n > 0) poison(tensor.data(), n, aoti_torch_dtype_element_size(dtype));
    }
    return add(std::move(tensor));
  }
  template <class Device, class T>
  void create(const Device& device, Sizes sizes, T*& data) {
    data = static_cast<T*>(create(device, sizes, dtype_of<T>()));
  }

  void store(StableIValue* stack) {
    STD_TORCH_CHECK(count_ == N, "the op made ", count_, " outputs of ", N);
    for (size_t i = 0; i != N; ++i) stack[i] = torch::stable::detail::from(tensor_[i].release());
  }

 private:
  Tensor tensor_[N > 0 ? N : 1];
  size_t count_ = 0;
};

// ---------------------------------------------------------------- registration

template <class T>
struct Argument {
  static T take(StableIValue value) { return torch::stable::detail::to<T>(value); }
};
template <>
struct Argument<Tensor> {
  static Tensor take(StableIValue value) { return Tensor(torch::stable::detail::to<AtenTensorHandle>(value)); }
};
template <>
struct Argument<OptionalTensor> {
  static OptionalTensor take(StableIValue value) {
    return OptionalTensor(torch::stable::detail::to<std::optional<AtenTensorHandle>>(value).value_or(nullptr));
  }
};

template <size_t N, class... Parameters, size_t... I>
void call(Outputs<N> (*op)(Parameters...), StableIValue* stack, std::index_sequence<I...>) {
  op(Argument<std::decay_t<Parameters>>::take(stack[I])...).store(stack);
}

template <size_t N, class... Parameters>
void call(Outputs<N> (*op)(Parameters...), StableIValue* stack, uint64_t inputs, uint64_t outputs) {
  STD_TORCH_CHECK(
      inputs == sizeof...(Parameters) && outputs == N, "the schema has ", inputs, " arguments and ", outputs,
      " results, the kernel ", sizeof...(Parameters), " and ", N);
  call(op, stack, std::index_sequence_for<Parameters...>());
}

using Kernel = void (*)(StableIValue* stack, uint64_t inputs, uint64_t outputs);

// An op as the dispatcher calls it.
template <auto op>
void kernel(StableIValue* stack, uint64_t inputs, uint64_t outputs) {
  call(op, stack, inputs, outputs);
}

using torch::stable::detail::StableLibrary;

// The kernels of a module, by op.
template <class Device>
std::map<std::string, Kernel>& kernels() {
  static std::map<std::string, Kernel> all;
  return all;
}

template <class Device>
class Registration {
 public:
  Registration(const char* name, Kernel kernel)
      : library_(StableLibrary::Kind::IMPL, Device::kLibrary, Device::kKey, __FILE__, __LINE__) {
    library_.impl(name, kernel);
    kernels<Device>()[name] = kernel;
  }

 private:
  StableLibrary library_;
};

#define VSTAR_REGISTER(Device, op) static const Registration<Device> registered_##op(#op, &kernel<&op<Device>>)

}  // namespace vstar
