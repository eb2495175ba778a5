// Arguments of token_logp and of its gradient.
#pragma once

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
  float inv_temperature;
  int64_t batch, width, columns, targets, max_children;

  VSTAR_INLINE_MEMBER int64_t rows() const { return batch * width; }
};

struct TokenLogpArgs : LogitRows {
  float *logp, *entropy, *top, *log_mass;  // [B, W, T]; [B, W]
};

struct TokenLogpBackwardArgs : LogitRows {
  const float *logp, *entropy, *top, *log_mass;  // as the forward pass has written them
  FloatView grad_logp, grad_entropy;             // [B, W, T] and [B, W], or absent
  void* gradient;                                // [B, W, V], of the logits' type
};

}  // namespace vstar
