// The hot loops of the CPU ops and how they are picked: simd_loops.inc is compiled for several instruction
// sets, and simd() is the table of the best one that this processor runs.
#pragma once

#include "common/floats.h"
#include "common/temperature.h"
#include "common/trie.h"

namespace vstar {

struct SoftmaxSums {
  float top;        // the largest logit, -inf if there is none
  double mass;      // sum of exp(d), d = (z - top) * inverse_temperature
  double weighted;  // sum of exp(d) * d
};

// A prefix and its children, which lie at `position` of a batch's arrays. Their scores are
// logp_weight * (cum_logp + (d - log_mass)) + constant (+ extra).
struct PrefixRow {
  const void* logits;  // null: all are 0
  const void* ahead;  // where a long row's successor begins, or null
  const int32_t* token;
  int64_t children;  // at least 1
  int64_t position;
  int32_t parent;
  float cum_logp;
  float log_mass;
  float constant;
  SoftmaxSums sums;
};

// Score of the most probable child without extra. Rounding is monotonic: with logp_weight >= 0 no child's is above.
VSTAR_INLINE float best_score(const PrefixRow& row, float logp_weight) {
  return row.constant + (logp_weight != 0 ? logp_weight * (row.cum_logp - row.log_mass) : 0.0f);
}

// The gradient of a row of logits: p_v (slope + curve log p_v), log p_v = (z_v - top) * inverse_temperature - log_mass.
struct RowGradient {
  float top, log_mass, slope, curve;
};

// Tokens of sibling_grpo_loss whose numbers are finite and small, without dual or joint clipping. Those that are not
// there have the ratio, advantages and weights 0, those that are not valid the node weight 0.
struct PlainLoss {
  const float *ratio, *group_advantage, *advantage;
  const float *difference, *exp_difference;  // of the reference; not read without an estimate
  const double *weight, *node_weight;
  float low, high;  // bounds of the ratio
  double global_weight, sibling_weight, kl_weight;
  int estimate;  // of the divergence, 1 to 3; 0: none
};

struct PlainLossSums {
  double global, sibling, kl, ratio;
  int64_t global_clipped, sibling_clipped;
};

// Arrays named d, extra and score are written, and may be read, up to 15 elements past their end; rows follow
// each other without gaps, so they are processed in order.
struct TypedLoops {
  // Fill in the rows' sums over the legal logits, and d, which is -inf or NaN for a child that is not alive or has no finite
  // logit. A row without a finite logit has the mass 1.
  void (*legal_softmaxes)(
      PrefixRow* rows, int64_t count, int64_t stride, InverseTemperature inverse_temperature, const AliveNodes& alive, float* d);
  // The sums over a whole row of n logits, without `weighted`.
  SoftmaxSums (*vocab_softmax)(const void* row, int64_t stride, int64_t n, InverseTemperature inverse_temperature);
  // The sums over n logits, entropy's too.
  SoftmaxSums (*block_softmax)(const void* row, int64_t stride, int64_t n, InverseTemperature inverse_temperature);
  // Write n numbers of the logits' type; 0 for logits at -inf.
  void (*softmax_gradient)(
      const void* row, int64_t stride, int64_t n, InverseTemperature inverse_temperature, const RowGradient& gradient,
      void* out);
  // to[i] += row[i], or = row[i] if it begins with this row
  void (*accumulate)(const void* row, int64_t stride, int64_t n, bool begins, double* to);
  // out[i] = scale * row[token[i]]
  void (*gather_scaled)(const void* row, int64_t stride, const int32_t* token, int64_t n, float scale, float* out);
};

constexpr int64_t kMostRanked = 96;  // scores, for rank(), which is faster than std::sort up to here

struct SimdLoops {
  TypedLoops typed[3];  // by FloatType
  // extra[i] += Gumbel noise of (seed, node, token[i])
  void (*add_noise)(float* extra, const int32_t* token, int64_t n, uint64_t seed, uint32_t node);
  // out[i] = exp(a[i] - b[i]), of any numbers
  void (*exp_differences)(const float* a, const float* b, int64_t n, float* out);
  // Whether n >= 1 numbers are the same; infinities are not.
  bool (*all_equal)(const float* x, int64_t n);
  // Sums in double, in an order that n alone decides: of n numbers, of the squares of their distances to the mean, of products.
  double (*sum)(const float* x, int64_t n);
  double (*sum_of_squares)(const float* x, int64_t n, double mean);
  double (*dot)(const double* x, const double* y, int64_t n);
  // to[i] += x[i]
  void (*add)(const double* x, int64_t n, double* to);
  // out[i] = (x[i] - mean) * scale, in double
  void (*standardize)(const float* x, int64_t n, double mean, double scale, float* out);
  // The terms of sibling_grpo_loss of n tokens. All arrays are accessed up to 15 elements past n, where the read ones hold 0.
  void (*loss_terms)(const PlainLoss& loss, int64_t n, float* gradient, PlainLossSums& sums);
  // Scores, -inf for children that can never win or do not reach the threshold. `extra`, which starts at the
  // first row's first child, may be null.
  void (*score_rows)(
      const PrefixRow* rows, int64_t count, const float* d, const float* extra, float logp_weight, float threshold,
      float* score);
  // The children of a row, at its d, whose scores without extra are above a threshold, and these scores. Only for
  // logp_weight > 0, with which scores rise with d. Like `filter`, `index` and `score` have room for 16 more.
  int64_t (*filter_row)(
      const PrefixRow& row, const float* d, float logp_weight, float threshold, int32_t* index, float* score);
  // Some score that at least k of n scores reach; -inf where none is found cheaply.
  float (*reached_by)(const float* score, int64_t n, int64_t k);
  // Indices of the scores above the threshold, ascending. `index` has room for 16 more than n.
  int64_t (*filter)(const float* score, int64_t n, float threshold, int32_t* index);
  // The indices of n <= kMostRanked scores, none of them NaN, the largest first, equal ones ascending. The scores are read up
  // to 15 elements past n.
  void (*rank)(const float* score, int64_t n, int32_t* order);
  // The indices of n different keys below INT64_MAX, the smallest first. Up to the next multiple of 8 INT64_MAX follows them.
  // Faster than std::sort up to most_keys_ranked.
  void (*rank_keys)(const int64_t* key, int64_t n, int32_t* order);
  int64_t most_keys_ranked;
};

const SimdLoops& simd();
const char* simd_level();

}  // namespace vstar
