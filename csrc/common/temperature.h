// What logits are multiplied by, 1 / temperature. One float holds it only for ordinary temperatures, for which the
// second factor is 1 and changes no bit.
#pragma once

#include "macros.h"

namespace vstar {

struct InverseTemperature {
  float first, second;
};

VSTAR_INLINE float operator*(float x, InverseTemperature y) { return x * y.first * y.second; }
VSTAR_INLINE double operator*(double x, InverseTemperature y) { return x * double(y.first) * double(y.second); }

// Where exponents are of base 2.
VSTAR_INLINE InverseTemperature in_base_2(InverseTemperature x) { return {x.first * 1.44269504088896341f, x.second}; }

// Both factors are normal floats, so that -inf stays -inf, and the first is finite in base 2 too.
inline InverseTemperature inverse_of(double temperature) {
  constexpr double kLeast = 0x1p-126, kMost = 0x1p126, kMax = 3.4028234663852886e38;
  const double inverse = 1.0 / temperature;
  if (inverse >= kLeast && inverse <= kMost) return {float(inverse), 1.0f};
  const double first = inverse < kLeast ? kLeast : kMost, second = 1.0 / first / temperature;
  return {float(first), float(second < kLeast ? kLeast : second > kMax ? kMax : second)};
}

}  // namespace vstar
