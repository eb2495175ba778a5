#pragma once

#include "common/views.h"

namespace vstar {

struct GroupAdvantageArgs {
  FloatView reward;  // [B, G]
  MaskView mask;     // [B, G]
  int64_t batch, group, ddof;
  double eps, std_floor;
  bool scaled;
  float* advantage;  // [B, G]
};

}  // namespace vstar
