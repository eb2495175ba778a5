// Mean and deviation of a group of numbers. Two passes in double over float32 data: sums of float32 rewards are exact
// in practice, so the order of candidates does not show, and equal means compare equal. A value that is NaN or infinite
// makes what is compared with it NaN.
#pragma once

#include <cmath>

#include "macros.h"

namespace vstar {

struct Moments {
  double mean;            // NaN unless all values are finite
  double sum_of_squares;  // of the deviations from the mean
  bool equal;             // all values are the same: the standardized values are exactly 0
};

// `at(i)` gives the i-th of n >= 1 values.
template <class At>
VSTAR_INLINE Moments moments(int64_t n, const At& at) {
  const double first = at(0);
  double sum = 0;
  bool equal = true;
  for (int64_t i = 0; i < n; ++i) {
    const double x = at(i);
    sum += x;
    equal = equal && x - first == 0;  // infinities are not
  }
  const double mean = sum / double(n);
  double squares = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double off = at(i) - mean;
    squares += off * off;
  }
  return {mean - mean == 0 ? mean : double(NAN), squares, equal};
}

// 1 / (max(std, std_floor) + eps). A standard deviation of NaN stays NaN.
VSTAR_INLINE double standardizing_scale(double sum_of_squares, double degrees_of_freedom, double std_floor, double eps) {
  const double std = sqrt(sum_of_squares / degrees_of_freedom);
  return 1.0 / ((std < std_floor ? std_floor : std) + eps);
}

}  // namespace vstar
