// Views of an op's arguments: a pointer and strides, and for numbers of several types which one it is. The same on the
// host and on a GPU, where they are read through the read-only cache. A view without data is an absent argument.
#pragma once

#include "floats.h"

namespace vstar {

template <class T>
VSTAR_INLINE T load(const T* from) {
#if defined(__CUDA_ARCH__) || defined(VSTAR_EMULATED)
  return __ldg(from);
#else
  return *from;
#endif
}
VSTAR_INLINE BFloat16 load(const BFloat16* from) { return {load(&from->bits)}; }
VSTAR_INLINE Float16 load(const Float16* from) { return {load(&from->bits)}; }
VSTAR_INLINE bool load(const bool* from) { return load(reinterpret_cast<const unsigned char*>(from)) != 0; }

// Positions, in elements, of up to three indices.
struct Strides {
  int64_t stride[3];

  VSTAR_INLINE_MEMBER int64_t offset(int64_t i) const { return i * stride[0]; }
  VSTAR_INLINE_MEMBER int64_t offset(int64_t i, int64_t j) const { return i * stride[0] + j * stride[1]; }
  VSTAR_INLINE_MEMBER int64_t offset(int64_t i, int64_t j, int64_t l) const {
    return i * stride[0] + j * stride[1] + l * stride[2];
  }
};

template <class T>
struct StridedView : Strides {
  const T* data;

  VSTAR_INLINE_MEMBER explicit operator bool() const { return data != nullptr; }
  template <class... Index>
  VSTAR_INLINE_MEMBER T at(Index... i) const { return load(data + offset(i...)); }
  template <class... Index>
  VSTAR_INLINE_MEMBER T at_or(T absent, Index... i) const { return data ? at(i...) : absent; }
};

// A contiguous vector, which is not read past its ends.
template <class T>
struct Vector {
  const T* data;
  int64_t size;

  VSTAR_INLINE_MEMBER explicit operator bool() const { return data != nullptr; }
  VSTAR_INLINE_MEMBER T at_or(T absent, int64_t i) const { return i >= 0 && i < size ? load(data + i) : absent; }
};

// Which entries are valid: all without a mask.
struct MaskView : StridedView<bool> {
  template <class... Index>
  VSTAR_INLINE_MEMBER bool at(Index... i) const { return at_or(true, i...); }
};

// Integers of 32 or 64 bits.
struct IntView : Strides {
  const void* data;
  bool wide;

  VSTAR_INLINE_MEMBER explicit operator bool() const { return data != nullptr; }
  template <class... Index>
  VSTAR_INLINE_MEMBER int64_t at(Index... i) const {
    if (wide) return load(static_cast<const int64_t*>(data) + offset(i...));
    return load(static_cast<const int32_t*>(data) + offset(i...));
  }
};

// float32, bfloat16 or float16 numbers as floats. The type is the same for all threads, so the branch costs little.
struct FloatView : Strides {
  const void* data;
  FloatType type;

  VSTAR_INLINE_MEMBER explicit operator bool() const { return data != nullptr; }
  template <class... Index>
  VSTAR_INLINE_MEMBER float at(Index... i) const {
    const int64_t position = offset(i...);
    if (type == FloatType::kFloat32) return load(static_cast<const float*>(data) + position);
    const uint16_t bits = load(static_cast<const uint16_t*>(data) + position);
    return type == FloatType::kBFloat16 ? to_float(BFloat16{bits}) : to_float(Float16{bits});
  }

  // Where an element lies; T is the element's type.
  template <class T, class... Index>
  VSTAR_INLINE_MEMBER const T* pointer(Index... i) const { return static_cast<const T*>(data) + offset(i...); }
  template <class... Index>
  VSTAR_INLINE_MEMBER const char* address(Index... i) const {
    return static_cast<const char*>(data) + offset(i...) * element_size(type);
  }

  // use(l, element) for the n elements at `first`, `first` + step, ...; the type is looked up once.
  template <class Use>
  void each(int64_t first, int64_t step, int64_t n, const Use& use) const {
    dispatch(type, [&](auto zero) {
      const auto* from = static_cast<const decltype(zero)*>(data) + first;
      if (step == 1) {
        for (int64_t l = 0; l < n; ++l) use(l, to_float(from[l]));
      } else {
        for (int64_t l = 0; l < n; ++l) use(l, to_float(from[l * step]));
      }
    });
  }
};

}  // namespace vstar
