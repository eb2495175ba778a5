// What the ops on groups of token sequences have in common.
#pragma once

#include "common/views.h"

namespace vstar {

struct CandidateArgs {
  IntView token;  // [B, G, L]
  MaskView mask;  // [B, G], or [B, G, L]
  int64_t batch, group, length;

  // Whether the mask tells the tokens of a candidate apart.
  VSTAR_INLINE_MEMBER bool by_token() const { return mask && mask.stride[2] != 0; }

  // Of the outputs [B, G, L] of a request's candidate.
  VSTAR_INLINE_MEMBER int64_t slot(int64_t b, int64_t g) const { return (b * group + g) * length; }
};

}  // namespace vstar
