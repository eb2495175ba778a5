// The float types of the inputs; all arithmetic is float32 or wider.
#pragma once

#include "macros.h"

namespace vstar {

struct BFloat16 { uint16_t bits; };
struct Float16 { uint16_t bits; };
enum class FloatType { kFloat32, kBFloat16, kFloat16 };

VSTAR_INLINE int64_t element_size(FloatType type) { return type == FloatType::kFloat32 ? 4 : 2; }

// use(T{}) with the type T of the elements.
template <class Use>
inline auto dispatch(FloatType type, const Use& use) {
  switch (type) {
    case FloatType::kFloat32: return use(float{});
    case FloatType::kBFloat16: return use(BFloat16{});
    default: return use(Float16{});
  }
}

VSTAR_INLINE float to_float(float x) { return x; }
VSTAR_INLINE float to_float(BFloat16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
VSTAR_INLINE float to_float(Float16 x) {
  const uint32_t magnitude = uint32_t(x.bits & 0x7FFFu) << 13;
  // The multiplication moves the exponent's bias and turns subnormal halves into normal floats.
  float value = bit_cast<float>(magnitude) * 5.192296858534828e33f;  // 2^112
  value = (x.bits & 0x7C00u) == 0x7C00u ? bit_cast<float>(magnitude | 0x7F800000u) : value;
  return bit_cast<float>(bit_cast<uint32_t>(value) | (uint32_t(x.bits & 0x8000u) << 16));
}

// Store the nearest representable number, ties to even.
VSTAR_INLINE void put(float x, float* to) { *to = x; }
VSTAR_INLINE void put(float x, BFloat16* to) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = bits + 0x7FFFu + ((bits >> 16) & 1u);
  to->bits = uint16_t((x == x ? rounded : bits | 0x00400000u) >> 16);
}
VSTAR_INLINE void put(float x, Float16* to) {
  const uint32_t bits = bit_cast<uint32_t>(x), magnitude = bits & 0x7FFFFFFFu;
  const uint32_t normal = (magnitude - 0x38000000u + 0x0FFFu + ((magnitude >> 13) & 1u)) >> 13;
  // Added to 1/2, what is below the normal halves is rounded to their spacing.
  const uint32_t small = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3F000000u;
  uint32_t half = magnitude < 0x38800000u ? small : normal;
  half = magnitude >= 0x47800000u ? (magnitude > 0x7F800000u ? 0x7E00u : 0x7C00u) : half;
  to->bits = uint16_t(half | (bits >> 31) << 15);
}

constexpr float kFloatMax = 3.4028234663852886e38f;

// How logits are read: NaN as -inf, +inf as the largest finite float.
VSTAR_INLINE float clean(float z) {
  if (!(z == z)) return -__builtin_inff();
  return z > kFloatMax ? kFloatMax : z;
}

}  // namespace vstar
