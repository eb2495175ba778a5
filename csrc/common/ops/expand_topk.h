#pragma once

#include "common/temperature.h"
#include "common/trie.h"
#include "common/views.h"

namespace vstar {

struct ExpandTopKArgs {
  FloatView logits;  // [B, W, V], or [B, R, V] with `row`
  TrieView trie;
  IntView node, row;                          // [B, W]
  StridedView<float> cum_logp, value, bonus;  // [B, W]
  FloatView child_value;                      // as logits
  StridedView<int64_t> seed;                  // [B]
  float logp_weight, value_weight, entropy_weight;
  InverseTemperature inv_temperature;
  bool vocab;  // normalized over all columns
  int64_t batch, width, rows, columns, k, max_children;
  float *score, *logp;              // [B, k]
  int32_t *parent, *token, *child;  // [B, k]
  int32_t* num_valid;               // [B]
  float* entropy;                   // [B, W]

  // Which row of its request a prefix' logits and child values are; -1: none, all of them are 0.
  VSTAR_INLINE_MEMBER int64_t row_of(int64_t b, int64_t w) const {
    if (!row) return w;
    const int64_t r = row.at(b, w);
    return r >= 0 && r < rows ? r : -1;
  }

  // What the scores of all children of a prefix contain.
  VSTAR_INLINE_MEMBER float constant(int64_t b, int64_t w, float its_entropy) const {
    const float sum = value_weight * value.at_or(0.0f, b, w) + bonus.at_or(0.0f, b, w);
    return entropy_weight != 0 ? sum + entropy_weight * its_entropy : sum;
  }

  // The i-th winner of request b: the child that an edge of the trie leads to.
  VSTAR_INLINE_MEMBER void store(
      int64_t b, int64_t i, float its_score, float its_logp, int32_t its_parent, int32_t its_token, int32_t edge) const {
    const int64_t at = b * k + i;
    score[at] = its_score;
    logp[at] = its_logp;
    parent[at] = its_parent;
    token[at] = its_token;
    child[at] = edge + 1;
  }
  VSTAR_INLINE_MEMBER void store_none(int64_t b, int64_t i) const {
    store(b, i, -__builtin_inff(), -__builtin_inff(), -1, -1, -2);
  }
};

}  // namespace vstar
