// sibling_grpo_loss: one block per request, one thread per token at a time, then one block that adds up the requests.
//
// With a mask, or for ratios of whole sequences, a launch before counts the tokens of every sequence and request, since
// everything is divided by such counts; the blocks of the second launch add up the requests' counts for themselves, a
// few kilobytes from the caches. The gradient is written along with the sums. Sums are double, over fixed trees of
// threads: the same bits in every run, and for a few requests nothing but launches costs time.
#pragma once

#include "common/ops/sibling_grpo_loss.h"
#include "cuda/device.cuh"

namespace vstar {

constexpr int kLossWarps = 8, kLossThreads = 32 * kLossWarps;

struct LossLaunch : SiblingGRPOLossArgs {
  // Workspace; but for the sums unused where nothing is counted.
  double* sums;      // [B, 8]
  double* averages;  // [B, G], the mean log-ratio of a sequence
  int64_t* counts;   // [B, 2], tokens and sequences of a request
  int32_t* lengths;  // [B, G], tokens of a sequence
  bool counted;
};

// Of all requests, in all threads.
VSTAR_DEVICE TokenCounts total_counts(const LossLaunch& a, int64_t* scratch) {
  if (!a.counted) return {a.batch * a.group * a.length, a.length > 0 ? a.batch * a.group : 0};
  int64_t all[2] = {0, 0};
  for (int64_t b = threadIdx.x; b < a.batch; b += kLossThreads) {
    all[0] += a.counts[2 * b];
    all[1] += a.counts[2 * b + 1];
  }
  block_sums<kLossWarps>(all, scratch);
  return {all[0], all[1]};
}

__global__ void __launch_bounds__(kLossThreads) count_tokens_kernel(LossLaunch a) {
  VSTAR_SHARED(memory);
  const int64_t b = blockIdx.x;
  int64_t counts[2] = {0, 0};
  for (int64_t g = threadIdx.x; g < a.group; g += kLossThreads) {
    int32_t n = 0;
    double sum = 0;
    for (int64_t d = 0; d < a.length; ++d) {
      if (!a.mask.at(b, g, d)) continue;
      ++n;
      if (a.averages_ratios()) sum += double(a.logp.at(b, g, d)) - double(a.old_logp.at(b, g, d));
    }
    a.lengths[b * a.group + g] = n;
    if (a.averages_ratios()) a.averages[b * a.group + g] = sum / double(n);
    counts[0] += n;
    counts[1] += n > 0;
  }
  block_sums<kLossWarps>(counts, reinterpret_cast<int64_t*>(memory));
  if (threadIdx.x == 0) {
    a.counts[2 * b] = counts[0];
    a.counts[2 * b + 1] = counts[1];
  }
}

VSTAR_DEVICE TokenTerms loss_terms(const LossLaunch& a, const LossToken& token, int64_t b, int64_t g, int64_t d) {
  const double x = a.logp.at(b, g, d), difference = a.ref_logp ? double(a.ref_logp.at(b, g, d)) - x : 0.0;
  double log_ratio = x - (a.old_logp ? double(a.old_logp.at(b, g, d)) : x);
  if (a.averages_ratios()) log_ratio = a.averages[b * a.group + g];
  if (fits_float(a, log_ratio, difference) && fits_float(token.global) && fits_float(token.sibling)) {
    const Ratios<float> r{a.old_logp ? expf(float(log_ratio)) : 1.0f, float(difference), false, false};
    return token_terms(a, token, r, [&] { return expf(r.difference); });
  }
  const Ratios<double> r = exact_ratios(a, log_ratio, difference);
  return token_terms(a, token, r, [&] { return exp(r.difference); });
}

__global__ void __launch_bounds__(kLossThreads) loss_kernel(LossLaunch a) {
  VSTAR_SHARED(memory);
  const int64_t b = blockIdx.x, size = a.group * a.length;
  TokenCounts own{};
  if (!a.normalizer) own = total_counts(a, reinterpret_cast<int64_t*>(memory));
  const LossCounts all = loss_counts(a, own);
  const double weight_of_node = node_weight(a, a.counted ? a.counts[2 * b + 1] : a.group, all);
  double s[kNumLossSums] = {};
  for (int64_t i = threadIdx.x; i < size; i += kLossThreads) {
    const int64_t g = i / a.length, d = i % a.length;
    float* const gradient = a.gradient + b * size + i;
    if (!a.mask.at(b, g, d)) {
      *gradient = 0;
      continue;
    }
    const double weight = token_weight(a, a.counted ? a.lengths[b * a.group + g] : a.length, all);
    const LossToken token = loss_token(a, b, g, d, a.group_advantage.at(b, g), weight, weight_of_node);
    const TokenTerms t = loss_terms(a, token, b, g, d);
    *gradient = t.gradient;
    s[kGlobal] += weight * t.global;
    s[kKl] += weight * t.kl;
    s[kJoint] += t.joint;
    s[kRatio] += t.ratio;
    s[kGlobalClipped] += t.global_clipped ? 1.0 : 0.0;
    if (token.valid) {
      s[kSibling] += t.sibling;
      s[kSiblingClipped] += t.sibling_clipped ? 1.0 : 0.0;
      s[kValid] += 1.0;
    }
  }
  block_sums<kLossWarps>(s, reinterpret_cast<double*>(memory));
  if (threadIdx.x < kNumLossSums) {
    for (int n = 0; n < kNumLossSums; ++n) {  // a register array is indexed by constants alone
      if (n == int(threadIdx.x)) a.sums[b * kNumLossSums + n] = s[n];
    }
  }
}

__global__ void __launch_bounds__(kLossThreads) add_up_kernel(LossLaunch a) {
  VSTAR_SHARED(memory);
  const TokenCounts all = total_counts(a, reinterpret_cast<int64_t*>(memory));
  double s[kNumLossSums] = {};
  for (int64_t b = threadIdx.x; b < a.batch; b += kLossThreads) {
    for (int n = 0; n < kNumLossSums; ++n) s[n] += a.sums[b * kNumLossSums + n];
  }
  block_sums<kLossWarps>(s, reinterpret_cast<double*>(memory));
  if (threadIdx.x == 0) store_loss(a, s, all.tokens);
}

// Two launches, three with a mask or for ratios of whole sequences.
inline void run(const Gpu& gpu, const SiblingGRPOLossArgs& args) {
  const bool counted = args.mask || args.averages_ratios();
  const int64_t sequences = args.batch * args.group, averaged = args.averages_ratios() ? sequences : 0;
  const int64_t bytes = 8 * (kNumLossSums * args.batch + averaged) + (counted ? 16 * args.batch + 4 * sequences : 0);
  double* const sums = reinterpret_cast<double*>(gpu.workspace(bytes));
  double* const averages = sums + kNumLossSums * args.batch;
  int64_t* const counts = reinterpret_cast<int64_t*>(averages + averaged);
  const LossLaunch a{args, sums, averages, counts, reinterpret_cast<int32_t*>(counts + 2 * args.batch), counted};
  const dim3 grid{unsigned(a.batch)};
  const int64_t scratch = 8 * kNumLossSums * kLossWarps;
  if (a.batch > 0 && counted) gpu.launch(count_tokens_kernel, grid, kLossThreads, scratch, a);
  if (a.batch > 0) gpu.launch(loss_kernel, grid, kLossThreads, scratch, a);
  gpu.launch(add_up_kernel, dim3{1}, kLossThreads, scratch, a);
}

}  // namespace vstar
