// sibling_grpo_loss: a block a request, a thread a token at a time, then one block that adds up the requests.
//
// With a mask a launch before counts the tokens of every sequence and request, since everything is divided by such
// counts; the blocks of the second launch add up the requests' counts for themselves, a few kilobytes from the
// caches. The gradient is written along with the sums. Sums are double, over fixed trees of threads: the same bits
// in every run, and for a few requests nothing but launches costs time.
#pragma once

#include "cuda/device.cuh"

namespace vstar {
namespace cuda {

enum LossType { kGrpo, kBnpo, kDrGrpo };
enum Divergence { kK1, kK2, kK3 };

constexpr int kLossWarps = 8, kLossThreads = 32 * kLossWarps;
constexpr int kLossSums = 7;

struct SiblingGRPOLoss {
  FloatView logp, old_logp, ref_logp, advantage;  // [B, G, L]; old_logp and ref_logp may be null
  MaskView valid, mask;
  IntView count;
  FloatView group_advantage;  // [B, G]
  FloatView depth_weight;     // [L], or null
  double global_weight, sibling_weight, kl_weight;
  float low, high;  // of the ratio
  int64_t divergence;
  bool by_node;
  int64_t loss_type;
  int64_t batch, group, length;
  float *loss, *terms, *gradient;
  // Workspace; null without a mask but for the sums.
  double* sums;       // [B, 7]
  int64_t* counts;    // [B, 2], tokens and sequences of a request
  int32_t* lengths;   // [B, G], tokens of a sequence
};

__device__ __forceinline__ double over(int64_t n) { return 1.0 / double(n > 1 ? n : 1); }

// The tokens and sequences of all requests, in all threads.
__device__ __forceinline__ void total_counts(const SiblingGRPOLoss& a, int64_t (&all)[2], int64_t* scratch) {
  if (a.mask.data == nullptr) {
    all[0] = a.batch * a.group * a.length;
    all[1] = a.length > 0 ? a.batch * a.group : 0;
    return;
  }
  all[0] = all[1] = 0;
  for (int64_t b = threadIdx.x; b < a.batch; b += kLossThreads) {
    all[0] += a.counts[2 * b];
    all[1] += a.counts[2 * b + 1];
  }
  block_sums<kLossWarps>(all, scratch);
}

__global__ void __launch_bounds__(kLossThreads) count_tokens_kernel(SiblingGRPOLoss a) {
  VSTAR_SHARED(memory);
  const int64_t b = blockIdx.x;
  int64_t here[2] = {0, 0};
  for (int64_t g = threadIdx.x; g < a.group; g += kLossThreads) {
    int32_t n = 0;
    for (int64_t d = 0; d < a.length; ++d) n += a.mask.at(b, g, d);
    a.lengths[b * a.group + g] = n;
    here[0] += n;
    here[1] += n > 0;
  }
  block_sums<kLossWarps>(here, reinterpret_cast<int64_t*>(memory));
  if (threadIdx.x == 0) {
    a.counts[2 * b] = here[0];
    a.counts[2 * b + 1] = here[1];
  }
}

// PPO's bound of ratio * a and its derivative by the log-probability. NaN is kept.
struct Surrogate {
  float value, slope;
  bool cut;
  __device__ __forceinline__ Surrogate(float ratio, float clipped, float a)
      : value(ratio * a), slope(ratio * a), cut(clipped * a < ratio * a) {
    if (!cut) return;
    value = clipped * a;
    slope = 0;
  }
};

__global__ void __launch_bounds__(kLossThreads) loss_kernel(SiblingGRPOLoss a) {
  VSTAR_SHARED(memory);
  const int64_t b = blockIdx.x, size = a.group * a.length;
  int64_t all[2];
  total_counts(a, all, reinterpret_cast<int64_t*>(memory));
  const int64_t sequences = a.mask.data ? a.counts[2 * b + 1] : a.group;
  const double node_weight = a.loss_type == kGrpo   ? over(sequences) * over(a.batch)
                             : a.loss_type == kBnpo ? over(all[1])
                                                    : over(a.batch * a.group);
  double s[kLossSums] = {};  // global, sibling, divergence, ratio; cut globally, among siblings, valid
  for (int64_t i = threadIdx.x; i < size; i += kLossThreads) {
    const int64_t g = i / a.length, d = i % a.length;
    float* const slope = a.gradient + b * size + i;
    if (!a.mask.at(b, g, d)) {
      *slope = 0;
      continue;
    }
    const int64_t tokens = a.mask.data ? a.lengths[b * a.group + g] : a.length;
    const double token_weight = a.loss_type == kGrpo   ? over(tokens) * over(all[1])
                                : a.loss_type == kBnpo ? over(all[0])
                                                       : over(a.batch * size);
    const float x = a.logp.at(b, g, d);
    const float ratio = a.old_logp.data ? expf(x - a.old_logp.at(b, g, d)) : 1.0f;
    const float raised = ratio < a.low ? a.low : ratio, clipped = a.high < raised ? a.high : raised;
    const Surrogate whole(ratio, clipped, a.group_advantage.at(b, g));
    double up = a.global_weight * token_weight * double(whole.slope);
    s[0] += token_weight * double(whole.value);
    s[3] += double(ratio);
    s[4] += whole.cut ? 1.0 : 0.0;
    if (a.valid.at(b, g, d)) {
      double weight = node_weight * (a.depth_weight.data ? double(a.depth_weight.at(d * a.depth_weight.stride[0])) : 1.0);
      if (a.by_node) weight *= over(a.count.at(b, g, d));
      const Surrogate node(ratio, clipped, a.advantage.at(b, g, d));
      up += a.sibling_weight * weight * double(node.slope);
      s[1] += weight * double(node.value);
      s[5] += node.cut ? 1.0 : 0.0;
      s[6] += 1.0;
    }
    if (a.ref_logp.data) {
      const float difference = a.ref_logp.at(b, g, d) - x;
      const double q = double(difference);
      double rise = q, distance = -q;
      if (a.divergence == kK2) distance = double(0.5f * difference * difference);
      if (a.divergence == kK3) {
        // e^d - 1 - d of a small d has no digits left in float; its series has them all.
        const double series = q * q * (0.5 + q * (1 / 6.0 + q / 24.0));
        const bool small = fabsf(difference) < 0.03f;
        rise = small ? q + series : double(expf(difference)) - 1.0;
        distance = small ? series : rise - q;
      }
      s[2] += token_weight * distance;
      up -= a.kl_weight * token_weight * (a.divergence == kK1 ? 1.0 : -rise);
    }
    *slope = float(0.0 - up);
  }
  block_sums<kLossWarps>(s, reinterpret_cast<double*>(memory));
  if (threadIdx.x < kLossSums) {
    for (int n = 0; n < kLossSums; ++n) {  // a register array is indexed by constants alone
      if (n == int(threadIdx.x)) a.sums[b * kLossSums + n] = s[n];
    }
  }
}

__global__ void __launch_bounds__(kLossThreads) add_up_kernel(SiblingGRPOLoss a) {
  VSTAR_SHARED(memory);
  int64_t all[2];
  total_counts(a, all, reinterpret_cast<int64_t*>(memory));
  double s[kLossSums] = {};
  for (int64_t b = threadIdx.x; b < a.batch; b += kLossThreads) {
    for (int n = 0; n < kLossSums; ++n) s[n] += a.sums[b * kLossSums + n];
  }
  block_sums<kLossWarps>(s, reinterpret_cast<double*>(memory));
  if (threadIdx.x != 0) return;
  *a.loss = float(a.kl_weight * s[2] - a.global_weight * s[0] - a.sibling_weight * s[1]);
  for (int n = 0; n < 3; ++n) a.terms[n] = float(s[n]);
  a.terms[3] = float(s[3] * over(all[0]));
  a.terms[4] = float(s[4] * over(all[0]));
  a.terms[5] = float(s[5] * over(int64_t(s[6])));
  a.terms[6] = float(s[6] * over(all[0]));
}

// Bytes of workspace.
struct LossPlan {
  int64_t sum_bytes, count_bytes, length_bytes;
  int64_t bytes() const { return sum_bytes + count_bytes + length_bytes; }
};

inline LossPlan plan_sibling_grpo_loss(int64_t batch, int64_t group, bool masked) {
  return {round_up(8 * kLossSums * batch, 256), masked ? round_up(16 * batch, 256) : 0, masked ? 4 * batch * group : 0};
}

// Two launches, three with a mask.
inline void sibling_grpo_loss(SiblingGRPOLoss a, const LossPlan& p, void* workspace, const Launcher& launch) {
  unsigned char* const memory = static_cast<unsigned char*>(workspace);
  a.sums = reinterpret_cast<double*>(memory);
  a.counts = p.count_bytes ? reinterpret_cast<int64_t*>(memory + p.sum_bytes) : nullptr;
  a.lengths = p.length_bytes ? reinterpret_cast<int32_t*>(memory + p.sum_bytes + p.count_bytes) : nullptr;
  const dim3 grid{unsigned(a.batch)};
  const int64_t scratch = 8 * kLossSums * kLossWarps;
  if (a.batch > 0 && a.mask.data) launch(count_tokens_kernel, grid, kLossThreads, scratch, a);
  if (a.batch > 0) launch(loss_kernel, grid, kLossThreads, scratch, a);
  launch(add_up_kernel, dim3{1}, kLossThreads, scratch, a);
}

}  // namespace cuda
}  // namespace vstar
