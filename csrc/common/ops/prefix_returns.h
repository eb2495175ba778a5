#pragma once

#include <cmath>

#include "common/ops/candidates.h"

namespace vstar {

struct PrefixReturnsArgs : CandidateArgs {
  FloatView embedding;         // [B, G, E]
  IntView target;              // [B, L]
  FloatView target_embedding;  // [B, E]
  const double* weight;        // [L]
  int64_t width;
  float *returns, *similarity;  // [B, G, L], as all results
  int32_t *node, *count;

  VSTAR_INLINE_MEMBER void store(int64_t at, float value, float cosine, int64_t its_node, int64_t its_count) const {
    returns[at] = value;
    similarity[at] = cosine;
    node[at] = int32_t(its_node);
    count[at] = int32_t(its_count);
  }

  // The results of a token that the mask leaves out.
  VSTAR_INLINE_MEMBER void clear(int64_t at) const { store(at, 0.0f, 0.0f, -1, 0); }
};

// Of a bucket's sum of embeddings x with the target's y: x.y, x.x and |y|.
VSTAR_INLINE float bucket_cosine(double dot, double square, double target_norm) {
  const double norm = sqrt(square) * target_norm;
  return norm == 0 ? 0.0f : float(dot / norm);
}

VSTAR_INLINE float bucket_return(bool matches, double weight, float cosine) {
  return float(matches ? weight : -weight * (1.0 - double(cosine)));
}

}  // namespace vstar
