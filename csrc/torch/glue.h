// How an op meets torch's stable ABI: arguments become views, outputs are made, kernels are registered.
//
// An op is one function template <class Device> in torch/<op>.h. It reads the arguments of its schema, in their order,
// into the op's struct of arguments, makes the outputs, and calls run(device, arguments), which each backend defines.
#pragma once

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <exception>
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

// Sizes of a tensor.
struct Sizes {
  static constexpr int64_t kMaxDim = 3;
  int64_t size[kMaxDim] = {}, dim = 0;

  Sizes(std::initializer_list<int64_t> sizes) : dim(int64_t(sizes.size())) {
    std::copy(sizes.begin(), sizes.end(), size);
  }
  const int64_t* begin() const { return size; }
  const int64_t* end() const { return size + dim; }
  Sizes without_last() const {
    Sizes rest = *this;
    --rest.dim;
    return rest;
  }
};

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
  int32_t device_type() const { return get<int32_t>(aoti_torch_get_device_type); }
  int32_t device_index() const { return get<int32_t>(aoti_torch_get_device_index); }
  void* data() const { return get<void*>(torch_get_mutable_data_ptr); }
  uint64_t position() const { return position_; }
  Sizes sizes() const {
    Sizes sizes{};
    sizes.dim = dim();
    STD_TORCH_CHECK(
        sizes.dim <= Sizes::kMaxDim, "argument ", position_, " must have at most ", Sizes::kMaxDim, " dimensions, got ",
        sizes.dim);
    std::copy_n(get<int64_t*>(aoti_torch_get_sizes), sizes.dim, sizes.size);
    return sizes;
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
    for (int64_t i = sizes().dim - 1; i >= 0; --i) view.stride[i] = strides[i];
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

struct ContiguousStrides : Strides {
  explicit ContiguousStrides(const Sizes& sizes) : Strides{} {
    int64_t next = 1;
    for (int64_t i = sizes.dim; i-- > 0; next *= sizes.size[i] > 0 ? sizes.size[i] : 1) stride[i] = next;
  }
};

// A new contiguous tensor, straight through the shim: the dispatcher's `empty` costs about a microsecond each.
template <class Device>
Tensor empty(const Device& device, const Sizes& sizes, int32_t dtype) {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      sizes.dim, sizes.begin(), ContiguousStrides(sizes).stride, dtype, Device::type(), device.index(),
      &handle));
  return Tensor(handle);
}

// ---------------------------------------------------------------- calls

// A `Tensor?` of the schema; where it is absent, the field and its sizes stay as they are.
template <class Field>
struct Optional {
  Field field;
};
template <class View>
Optional<View&> optional(View& view) { return {view}; }

// A tensor of as many dimensions, and their sizes; null for any. The first tensor that has a size says what it is, and
// all others must agree.
template <class View>
struct Sized {
  View& view;
  int64_t dim;
  int64_t* size[Sizes::kMaxDim];
};
template <class View, class... Axis>
Sized<View> sized(View& view, Axis... size) {
  return {view, sizeof...(size), {size...}};
}
template <class View>
Optional<Sized<View>> optional(Sized<View> field) { return {field}; }

// A table [B, W, last], of which [last] is one row and [B, last] has one row per request; or numbers [B, W], [B], [] of
// the rows of the first such table. `given` is what the sizes were.
template <class View>
struct Rows {
  View& view;
  int64_t *batch, *width, *last;
  Sizes* given;
};
template <class View>
Rows<View> rows(View& view, int64_t* batch, int64_t* width, int64_t* last = nullptr, Sizes* given = nullptr) {
  return {view, batch, width, last, given};
}
template <class View>
Optional<Rows<View>> optional(Rows<View> field) { return {field}; }

// A call by the dispatcher: takes the arguments from its stack and leaves the results there.
template <class Device>
class Call {
 public:
  Call(StableIValue* stack, uint64_t inputs, uint64_t outputs)
      : stack_(stack), num_inputs_(inputs), num_outputs_(outputs) {}

  // Read all arguments, in the order of the schema. A wrong one is told when all are read: what is not read is not freed.
  template <class... Fields>
  void inputs(Fields&&... fields) {
    (try_read(fields), ...);
    if (failure_) std::rethrow_exception(failure_);
    for (uint64_t i = 0; i < tensors_; ++i) {
      const Tensor& tensor = tensor_[i];
      STD_TORCH_CHECK(
          !tensor || (tensor.device_type() == Device::type() && tensor.device_index() == device_index_), "argument ",
          tensor.position(), " must be on the device of the other tensors");
    }
    STD_TORCH_CHECK(inputs_ == num_inputs_, "the schema has ", num_inputs_, " arguments, the kernel ", inputs_);
  }

  // Rows of tables are those of this argument, counted from 0, where it is not the first of them.
  void rows_of(uint64_t argument) {
    Tensor table(torch::stable::detail::to<AtenTensorHandle>(stack_[argument]), argument + 1);
    leading_ = table.dim() - 1;
    table.release();  // it is read with the others
  }

  // Make the next result.
  void output(void*& data, const Sizes& sizes, int32_t dtype) {
    Tensor tensor = empty(device(), sizes, dtype);
    if constexpr (Device::kHostMemory) {
      const int64_t n = poison_outputs ? tensor.numel() : 0;
      if (n > 0) poison(tensor.data(), n, aoti_torch_dtype_element_size(dtype));
    }
    data = add(std::move(tensor));
  }
  template <class T>
  void output(T*& elements, const Sizes& sizes) {
    void* data;
    output(data, sizes, dtype_of<T>());
    elements = static_cast<T*>(data);
  }
  // Make it for a kernel that need not write zeros.
  void output_zeros(void*& data, const Sizes& sizes, int32_t dtype) { data = add(device().zeros(sizes, dtype)); }

  // That of the tensors.
  const Device& device() const { return *device_; }

  void finish() {
    STD_TORCH_CHECK(outputs_ == num_outputs_, "the schema has ", num_outputs_, " results, the kernel ", outputs_);
    for (uint64_t i = 0; i < outputs_; ++i) stack_[i] = torch::stable::detail::from(output_[i].release());
  }

 private:
  static constexpr uint64_t kMaxTensors = 40, kMaxOutputs = 9, kMaxSizes = 10;

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
    if (tensor && !device_) {
      device_.emplace(tensor);
      device_index_ = tensor.device_index();
    }
    return tensor;
  }

  template <class Field>
  void try_read(Field& field) {
    try {
      read(field);
    } catch (...) {
      if (!failure_) failure_ = std::current_exception();
    }
  }
  void read(std::string& text) { text = next<std::string>(); }
  void read(float& number) { number = float(next<double>()); }
  void read(TrieView& trie) { read_trie(trie, false); }
  void read(Optional<TrieView&>& trie) { read_trie(trie.field, true); }
  template <class T>
  void read(T& field) {
    if constexpr (std::is_arithmetic_v<T>) {
      field = next<T>();
    } else {
      read_tensor(field, next_tensor(false));
    }
  }
  template <class Field>
  void read(Optional<Field>& optional) {
    const Tensor& tensor = next_tensor(true);
    if (tensor) read_tensor(optional.field, tensor);
  }
  template <class View>
  void read_tensor(View& view, const Tensor& tensor) { tensor.read(view); }
  template <class View>
  void read_tensor(Sized<View>& field, const Tensor& tensor) {
    const Sizes given = tensor.sizes();
    STD_TORCH_CHECK(
        given.dim == field.dim, "argument ", tensor.position(), " must have ", field.dim, " dimensions, got ", given.dim);
    for (int64_t i = 0; i < given.dim; ++i) read_size(field.size[i], given.size[i], tensor);
    tensor.read(field.view);
  }
  // What a size is, or whether it is what it was.
  void read_size(int64_t* size, int64_t given, const Tensor& tensor) {
    if (!size) return;
    int64_t** const known = std::find(size_, size_ + sizes_, size);
    if (known == size_ + sizes_) {
      STD_TORCH_CHECK(sizes_ < kMaxSizes, "more than ", kMaxSizes, " sizes");
      size_[sizes_++] = size;
      *size = given;
    }
    STD_TORCH_CHECK(*size == given, "argument ", tensor.position(), " must have a size of ", *size, ", got ", given);
  }
  template <class View>
  void read_tensor(Rows<View>& field, const Tensor& tensor) {
    const Sizes given = tensor.sizes();
    if (leading_ < 0) leading_ = given.dim - 1;
    const bool has_last = given.dim > leading_;
    STD_TORCH_CHECK(
        leading_ >= 0 && given.dim == leading_ + has_last && (field.last || !has_last), "argument ", tensor.position(),
        " must have rows like the others, got ", given.dim, " dimensions");
    tensor.read(field.view);
    const Strides strides = field.view;
    const auto place = [&](int64_t at, int64_t axis, bool exists, int64_t* size) {
      field.view.stride[at] = exists ? strides.stride[axis] : 0;
      read_size(size, exists ? given.size[axis] : 1, tensor);
    };
    place(0, 0, leading_ > 0, field.batch);
    place(1, 1, leading_ > 1, field.width);
    place(2, leading_, has_last, field.last);
    if (field.given) *field.given = given;
  }
  void read_trie(TrieView& trie, bool is_optional) {
    const Tensor &offset = next_tensor(is_optional), &token = next_tensor(is_optional), &alive = next_tensor(true);
    STD_TORCH_CHECK(bool(offset) == bool(token), "argument ", token.position(), " must be given where offset is");
    if (!offset) return;
    offset.read(trie.offset);
    token.read(trie.token);
    trie.num_nodes = offset.numel() - 1;
    trie.num_edges = token.numel();
    if (!alive) return;
    alive.read(trie.alive);
    const Sizes rows = alive.sizes();
    const int64_t words = rows.size[1];
    STD_TORCH_CHECK(
        rows.dim == 2 && words > (trie.num_nodes + 31) / 32, "alive must have a bit per node and a word more, got ", words,
        " words");
    trie.alive_stride = rows.size[0] == 1 ? 0 : words;
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
  int64_t* size_[kMaxSizes];
  uint64_t sizes_ = 0;
  int64_t leading_ = -1;  // dimensions before the last one of a table of rows
  std::optional<Device> device_;
  int32_t device_index_ = 0;
  std::exception_ptr failure_;
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
