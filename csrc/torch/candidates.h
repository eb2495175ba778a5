#pragma once

#include "common/ops/candidates.h"
#include "torch/glue.h"

namespace vstar {

inline void set_candidates(CandidateArgs& a, const Tensor& tokens, const OptionalTensor& mask) {
  a.token = tokens;
  a.mask = mask;
  a.batch = tokens.size(0);
  a.group = tokens.size(1);
  a.length = tokens.size(2);
}

}  // namespace vstar
