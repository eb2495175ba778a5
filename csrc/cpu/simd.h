// The hot loops of the CPU ops and how they are picked: simd_loops.inc is compiled for several instruction
// sets, and simd() is the table of the best one that this processor runs.
#pragma once

#include "common/floats.h"

namespace vstar {

struct SoftmaxSums {
  double mass;      // sum of exp(d)
  double weighted;  // sum of exp(d) * d
};

// What is the same for all children of one prefix in
// score = logp_weight * (cum_logp + (d - log_mass)) + constant (+ extra).
struct RowTerms {
  float cum_logp;
  float log_mass;
  float logp_weight;
  float constant;
  bool has_extra;
};

struct TypedLoops {
  // z[i] = the cleaned logit of token[i], padded with -inf to a multiple of 16; returns the maximum. n >= 1.
  float (*gather)(const void* row, int64_t stride, const int32_t* token, int64_t n, float* z);
  // Maximum of a whole row of n cleaned logits, -inf if n is 0.
  float (*row_max)(const void* row, int64_t stride, int64_t n);
  // Sum of exp((z - top) * inverse_temperature) over a whole row.
  double (*row_mass)(const void* row, int64_t stride, int64_t n, float top, float inverse_temperature);
  // out[i] = scale * row[token[i]]
  void (*gather_scaled)(const void* row, int64_t stride, const int32_t* token, int64_t n, float scale, float* out);
};

struct SimdLoops {
  TypedLoops typed[3];  // by FloatType
  // z becomes d = (z - top) * inverse_temperature; z is padded as by gather.
  SoftmaxSums (*softmax_sums)(float* z, int64_t n, float top, float inverse_temperature);
  // extra[i] += Gumbel noise of (seed, node, token[i])
  void (*add_noise)(float* extra, const int32_t* token, int64_t n, uint64_t seed, uint32_t node);
  // Indices of the children whose score beats the threshold, ascending; z and extra then hold their
  // log-probabilities and scores. `extra` is readable and writable up to the padding in any case, `index`
  // has room for one more than n.
  int64_t (*score_and_filter)(
      float* z, float* extra, int64_t n, const RowTerms& row, float threshold, int32_t* index);
};

const SimdLoops& simd();
const char* simd_level();

}  // namespace vstar
