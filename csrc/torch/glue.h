// How an op meets torch's stable ABI: arguments become views, outputs are made, kernels are registered.
//
// An op is one function template <class Device> in torch/<op>.h. It reads the arguments of its schema, in their order,
// into the op's struct of arguments, makes the outputs, and calls run(device, arguments), which each backend defines.
#pragma once

#include <torch/csrc/stable/library.h>

#include <cstring>
#include <initializer_list>
#include <map>
#include <optional>
#include <string>
#include <utility>

#include "common/trie.h"
#include "common/views.h"

namespace vstar {

template <class T> struct ElementType;
#define VSTAR_ELEMENT_TYPE(T, name)                                 \
  template <> struct ElementType<T> {                               \
    static int32_t dtype() { return aoti_torch_dtype_##name(); }    \
    static constexpr const char* kName = #name;                     \
  };
VSTAR_ELEMENT_TYPE(float, float32)
VSTAR_ELEMENT_TYPE(double, float64)
VSTAR_ELEMENT_TYPE(BFloat16, bfloat16)
VSTAR_ELEMENT_TYPE(Float16, float16)
VSTAR_ELEMENT_TYPE(uint8_t, uint8)
VSTAR_ELEMENT_TYPE(int32_t, int32)
VSTAR_ELEMENT_TYPE(int64_t, int64)
VSTAR_ELEMENT_TYPE(bool, bool)

template <class T>
int32_t dtype_of() { return ElementType<T>::dtype(); }
inline int32_t dtype_of(FloatType type) {
  return dispatch(type, [](auto zero) { return dtype_of<decltype(zero)>(); });
}

// A tensor that a call owns. torch::stable::Tensor counts references, which costs an allocation per argument.
class Tensor {
 public:
  // `position` of an argument, counted from 1, for messages.
  explicit Tensor(AtenTensorHandle handle = nullptr, uint64_t position = 0) : handle_(handle), position_(position) {}
  Tensor(Tensor&& other) noexcept : Tensor(other.release(), other.position_) {}
  Tensor& operator=(Tensor&& other) noexcept {
    std::swap(handle_, other.handle_);
    std::swap(position_, other.position_);
    return *this;
  }
  ~Tensor() {
    if (handle_) aoti_torch_delete_tensor_object(handle_);
  }
  AtenTensorHandle release() { return std::exchange(handle_, nullptr); }
  explicit operator bool() const { return handle_ != nullptr; }

  int64_t dim() const { return get<int64_t>(aoti_torch_get_dim); }
  int64_t numel() const { return get<int64_t>(aoti_torch_get_numel); }
  int32_t device_index() const { return get<int32_t>(aoti_torch_get_device_index); }
  void* data() const { return get<void*>(torch_get_mutable_data_ptr); }
  int64_t size(int64_t axis) const {
    STD_TORCH_CHECK(axis < dim(), "argument ", position_, " must have more than ", axis, " dimensions");
    return get<int64_t*>(aoti_torch_get_sizes)[axis];
  }

  template <class T>
  void read(StridedView<T>& view) const {
    check<T>(dtype());
    view.data = static_cast<const T*>(read_strides(view));
  }
  void read(FloatView& view) const {
    const int32_t type = dtype();
    view.data = read_strides(view);
    if (type == dtype_of<BFloat16>()) {
      view.type = FloatType::kBFloat16;
    } else if (type == dtype_of<Float16>()) {
      view.type = FloatType::kFloat16;
    } else {
      check<float>(type);
    }
  }
  void read(IntView& view) const {
    const int32_t type = dtype();
    view.data = read_strides(view);
    view.wide = type == dtype_of<int64_t>();
    if (!view.wide) check<int32_t>(type);
  }
  template <class T>
  void read(Vector<T>& vector) const {
    read(vector.data);
    vector.size = numel();
  }
  // The elements of a contiguous tensor.
  template <class T>
  void read(T*& elements) const {
    check<std::remove_const_t<T>>(dtype());
    STD_TORCH_CHECK(get<bool>(aoti_torch_is_contiguous), "argument ", position_, " must be contiguous");
    if constexpr (std::is_const_v<T>) {
      elements = static_cast<T*>(get<const void*>(torch_get_const_data_ptr));
    } else {
      elements = static_cast<T*>(data());
    }
  }

 private:
  template <class Result>
  Result get(AOTITorchError (*function)(AtenTensorHandle, Result*)) const {
    Result result;
    TORCH_ERROR_CODE_CHECK(function(handle_, &result));
    return result;
  }
  int32_t dtype() const { return get<int32_t>(aoti_torch_get_dtype); }
  template <class T>
  void check(int32_t type) const {
    STD_TORCH_CHECK(type == dtype_of<T>(), "argument ", position_, " must be ", ElementType<T>::kName);
  }
  // Returns the data.
  const void* read_strides(Strides& view) const {
    const int64_t* strides = get<int64_t*>(aoti_torch_get_strides);
    for (int64_t i = dim() - 1; i >= 0; --i) view.stride[i] = strides[i];
    return get<const void*>(torch_get_const_data_ptr);
  }

  AtenTensorHandle handle_;
  uint64_t position_;
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

// ---------------------------------------------------------------- calls

// A `Tensor?` of the schema.
template <class View>
struct Optional {
  View& view;
};
template <class View>
Optional<View> optional(View& view) { return {view}; }

// A tensor, and where to put its sizes; null for those that are not asked for.
template <class View>
struct Sized {
  View& view;
  int64_t* size[3];
};
template <class View>
Sized<View> sized(View& view, int64_t* first, int64_t* second = nullptr, int64_t* third = nullptr) {
  return {view, {first, second, third}};
}
// Where a `Tensor?` is absent, sizes stay as they are.
template <class View>
struct OptionalSized : Sized<View> {};
template <class View>
OptionalSized<View> optional(Sized<View> view) { return {view}; }

// A call by the dispatcher: takes the arguments from its stack and leaves the results there.
template <class Device>
class Call {
 public:
  Call(StableIValue* stack, uint64_t inputs, uint64_t outputs)
      : stack_(stack), num_inputs_(inputs), num_outputs_(outputs) {}

  // Read all arguments, in the order of the schema.
  template <class... Fields>
  void inputs(Fields&&... fields) {
    (read(fields), ...);
    STD_TORCH_CHECK(inputs_ == num_inputs_, "the schema has ", num_inputs_, " arguments, the kernel ", inputs_);
  }

  // Make the next result.
  void output(void*& data, Sizes sizes, int32_t dtype) {
    Tensor tensor = empty(device(), sizes, dtype);
    if constexpr (Device::kHostMemory) {
      const int64_t n = poison_outputs ? tensor.numel() : 0;
      if (n > 0) poison(tensor.data(), n, aoti_torch_dtype_element_size(dtype));
    }
    data = add(std::move(tensor));
  }
  template <class T>
  void output(T*& elements, Sizes sizes) {
    void* data;
    output(data, sizes, dtype_of<T>());
    elements = static_cast<T*>(data);
  }
  // Make it for a kernel that need not write zeros.
  void output_zeros(void*& data, Sizes sizes, int32_t dtype) { data = add(device().zeros(sizes, dtype)); }

  // That of the tensors.
  const Device& device() const { return *device_; }

  void finish() {
    STD_TORCH_CHECK(outputs_ == num_outputs_, "the schema has ", num_outputs_, " results, the kernel ", outputs_);
    for (uint64_t i = 0; i < outputs_; ++i) stack_[i] = torch::stable::detail::from(output_[i].release());
  }

 private:
  static constexpr uint64_t kMaxTensors = 40, kMaxOutputs = 9;

  template <class T>
  T next() {
    STD_TORCH_CHECK(inputs_ < num_inputs_, "the schema has only ", num_inputs_, " arguments");
    return torch::stable::detail::to<T>(stack_[inputs_++]);
  }
  const Tensor& next_tensor(bool is_optional) {
    STD_TORCH_CHECK(tensors_ < kMaxTensors, "more than ", kMaxTensors, " tensors");
    Tensor& tensor = tensor_[tensors_++];
    const AtenTensorHandle handle =
        is_optional ? next<std::optional<AtenTensorHandle>>().value_or(nullptr) : next<AtenTensorHandle>();
    tensor = Tensor(handle, inputs_);
    if (tensor && !device_) device_.emplace(tensor);
    return tensor;
  }

  void read(std::string& text) { text = next<std::string>(); }
  void read(float& number) { number = float(next<double>()); }
  void read(TrieView& trie) { read_trie(trie, false); }
  void read(Optional<TrieView>& trie) { read_trie(trie.view, true); }
  template <class T>
  void read(T& field) {
    if constexpr (std::is_arithmetic_v<T>) {
      field = next<T>();
    } else {
      next_tensor(false).read(field);
    }
  }
  template <class View>
  void read(Optional<View>& field) {
    const Tensor& tensor = next_tensor(true);
    if (tensor) tensor.read(field.view);
  }
  template <class View>
  void read(Sized<View>& field) { read_sized(field, next_tensor(false)); }
  template <class View>
  void read(OptionalSized<View>& field) {
    const Tensor& tensor = next_tensor(true);
    if (tensor) read_sized(field, tensor);
  }
  template <class View>
  void read_sized(Sized<View>& field, const Tensor& tensor) {
    tensor.read(field.view);
    for (int64_t i = 0; i < 3; ++i) {
      if (field.size[i]) *field.size[i] = tensor.size(i);
    }
  }
  void read_trie(TrieView& trie, bool is_optional) {
    const Tensor &offset = next_tensor(is_optional), &token = next_tensor(is_optional), &alive = next_tensor(true);
    if (!offset) return;
    offset.read(trie.offset);
    token.read(trie.token);
    trie.num_nodes = offset.numel() - 1;
    trie.num_edges = token.numel();
    if (!alive) return;
    alive.read(trie.alive);
    const int64_t words = alive.size(1);
    STD_TORCH_CHECK(words > (trie.num_nodes + 31) / 32, "alive must have a bit per node and a word more, got ", words, " words");
    trie.alive_stride = alive.size(0) == 1 ? 0 : words;
  }

  void* add(Tensor tensor) {
    STD_TORCH_CHECK(outputs_ < num_outputs_ && outputs_ < kMaxOutputs, "the schema has only ", num_outputs_, " results");
    void* const data = tensor.data();
    output_[outputs_++] = std::move(tensor);
    return data;
  }

  StableIValue* const stack_;
  const uint64_t num_inputs_, num_outputs_;
  uint64_t inputs_ = 0, tensors_ = 0, outputs_ = 0;
  Tensor tensor_[kMaxTensors], output_[kMaxOutputs];
  std::optional<Device> device_;
};

// ---------------------------------------------------------------- registration

using Kernel = void (*)(StableIValue* stack, uint64_t inputs, uint64_t outputs);

// An op as the dispatcher calls it.
template <class Device, void (*op)(Call<Device>&)>
void kernel(StableIValue* stack, uint64_t inputs, uint64_t outputs) {
  Call<Device> call(stack, inputs, outputs);
  op(call);
  call.finish();
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

#define VSTAR_REGISTER(Device, op) \
  static const vstar::Registration<vstar::Device> registered_##op(#op, &vstar::kernel<vstar::Device, vstar::op>)

}  // namespace vstar
