// Arguments of token_logp and of its gradient.
#pragma once

#include "common/temperature.h"
#include "common/trie.h"
#include "common/views.h"

namespace vstar {

// Rows of logits with targets, normalized over the whole vocabulary or over the children of the rows' nodes.
struct LogitRows {
  FloatView logits;  // [B, W, V]
  IntView target;    // [B, W, T]
  TrieView trie;
  IntView node;  // [B, W], absent: the whole vocabulary
  double temperature;
  InverseTemperature inv_temperature;
  int64_t batch, width, columns, targets, max_children;

  VSTAR_INLINE_MEMBER int64_t rows() const { return batch * width; }
  // Whether a gradient is divided by the temperature last: terms of it that cancel may be infinite otherwise.
  VSTAR_INLINE_MEMBER bool divided_last() const { return temperature < 1e-18 || inv_temperature.second != 1; }
};

struct TokenLogpArgs : LogitRows {
  float *logp, *entropy, *top, *log_mass;  // [B, W, T]; [B, W]
};

// An entropy as the gradient takes it. So little is what bounded exponents leave of 0; not divided by the smallest
// temperatures.
constexpr float kLeastEntropy = 1e-30f;

struct TokenLogpBackwardArgs : LogitRows {
  const float *logp, *entropy, *top, *log_mass;  // as the forward pass has written them
  FloatView grad_logp, grad_entropy;             // [B, W, T] and [B, W], or absent
  void* gradient;                                // [B, W, V], of the logits' type

  VSTAR_INLINE_MEMBER float entropy_of(int64_t r) const {
    return divided_last() && entropy[r] < kLeastEntropy ? 0.0f : entropy[r];
  }
};

}  // namespace vstar
