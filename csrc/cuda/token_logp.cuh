// token_logp: one block per row, or one warp where a trie leaves at most a thousand columns of it.
//
// token_logp_kernel reads a row once (rows.cuh) and keeps its largest logit and the logarithm of its mass; then one
// thread per target looks it up. token_logp_backward_kernel reads the row again and writes the gradient: over the whole
// vocabulary each thread takes eight entries at a time, which are written 16 bytes at a time wherever the row begins, since
// they are counted from the first multiple of 16 bytes in it; below a trie it clears the row first. Targets come last, behind
// a barrier: the first of equal ones writes the entry of all, so that a target that comes twice needs no atomics.
//
// bf16 [4096, 151936]: 1.2 GB of logits read in each pass, 1.2 GB of gradient written.
#pragma once

#include <type_traits>

#include "common/ops/token_logp.h"
#include "cuda/rows.cuh"

namespace vstar {

constexpr float kLog2e = 1.44269504088896341f, kLn2 = 0.69314718055994531f;

// A row: what it is normalized over, and where it lies.
template <class T, bool kFiltered>
struct TokenRow {
  int64_t b, w;
  const bool legal;      // or the whole vocabulary
  const int32_t* token;  // of the legal ones; null where the trie has none
  int32_t count;
  const T* from;
  int64_t stride;
  AliveNodes alive;  // kFiltered: of the legal ones

  VSTAR_DEVICE TokenRow(const LogitRows& a, int64_t r)
      : b(r / a.width), w(r % a.width), legal(bool(a.node)), token(nullptr), count(0) {
    from = a.logits.pointer<T>(b, w);
    stride = a.logits.stride[2];
    if (!legal) {
      count = int32_t(a.columns);
      return;
    }
    const EdgeRange edges = a.trie.edges(a.node.at(b, w));  // none for what is not a node
    token = a.trie.token + edges.begin;
    if (kFiltered) alive = a.trie.alive_of(b);
    count = int32_t(edges.end - edges.begin < a.max_children ? edges.end - edges.begin : a.max_children);
  }
  VSTAR_DEVICE RowReader<T, kFiltered> reader(const LogitRows& a) const {
    const int64_t first = !legal || count == 0 ? 0 : token[0];
    const int64_t last = !legal || count == 0 ? int64_t(count) - 1 : token[count - 1];
    return {from, stride, token, first, last, a.columns, count, alive};
  }
  VSTAR_DEVICE bool holds(const LogitRows& a, int64_t v) const {
    if (v < 0 || v >= a.columns) return false;
    if (!legal) return true;
    int32_t low = 0, high = count;  // tokens are sorted
    while (low < high) {
      const int32_t middle = (low + high) / 2;
      if (token[middle] < v) low = middle + 1; else high = middle;
    }
    return low < count && token[low] == v && is_alive(low);
  }
  VSTAR_DEVICE bool is_alive(int32_t c) const { return !kFiltered || alive.has(alive.child(token) + c); }
  // Whether no more than one token is legal.
  VSTAR_DEVICE bool forced() const {
    if (!kFiltered || count < 2) return count < 2;
    int left = 0;
    for (int32_t c = 0; c < count && left < 2; c += 32) {
      const uint32_t bits = alive_from(alive.bits, alive.child(token) + c);
      left += __popc(count - c < 32 ? bits & ((1u << (count - c)) - 1) : bits);
    }
    return left < 2;
  }
  VSTAR_DEVICE float at(int64_t v) const { return cleaned(widened(load(from + v * stride))); }
  // Eight of the whole vocabulary, wherever they lie.
  VSTAR_DEVICE void read(int32_t first, Eight<T>& z) const {
    const T* const at = from + first;
    if (Eight<T>::kSkewed && stride == 1 && first >= 8 && first + 16 <= count) {  // all that is read belongs to the row
      z.read_skewed(at, int(reinterpret_cast<uintptr_t>(at) % 16));
      return;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) z.put(i, load(from + (first + i) * stride));
  }
};

template <class T, int kWarps, bool kFiltered>
__global__ void __launch_bounds__(256, 3) token_logp_kernel(TokenLogpArgs a) {
  constexpr int kThreads = 32 * kWarps, kVectors = kWarps == 1 ? 1 : 4;
  VSTAR_SHARED(memory);
  const int thread = kWarps == 1 ? lane() : int(threadIdx.x);
  const int64_t r = kWarps == 1 ? int64_t(blockIdx.x) * 8 + warp() : int64_t(blockIdx.x);
  if (r >= a.rows()) return;  // a whole warp, and no barriers of the block follow
  const TokenRow<T, kFiltered> row(a, r);
  const RowStats s = read_row<T, kWarps, kVectors>(
      row.reader(a), thread, in_base_2(a.inv_temperature), reinterpret_cast<float*>(memory));
  const float log_mass = s.total > 0 ? logf(s.total) : 0.0f, row_max = s.top > -kInf ? s.top : 0.0f;
  if (thread == 0) {
    const float entropy = log_mass - s.moment * kLn2 / s.total;
    a.entropy[r] = s.total > 0 && row.count > 1 && entropy > 0 ? entropy : 0.0f;
    a.top[r] = s.top;
    a.log_mass[r] = log_mass;
  }
  for (int64_t t = thread; t < a.targets; t += kThreads) {
    const int64_t v = a.target.at(row.b, row.w, t);
    float logp = v < 0 ? 0.0f : -kInf;
    if (row.holds(a, v)) {
      const float z = row.at(v);
      if (z > -kInf) logp = (z - row_max) * a.inv_temperature - log_mass;
    }
    a.logp[r * a.targets + t] = logp;
  }
}

// What the gradient of an entry is made of, but for targets.
struct EntryGradient {
  float row_max, log_mass;
  InverseTemperature inv_temperature;
  float grad_logp, grad_entropy, entropy;
  bool divided_last;

  // What the terms of an entry are multiplied by, and then their sum.
  VSTAR_DEVICE float of_terms() const { return divided_last ? 1.0f : inv_temperature.first; }
  VSTAR_DEVICE float summed(float x) const { return divided_last ? x * inv_temperature : x; }

  // Without a branch: where logp may be -inf, p is 0, and what is made of both is not taken.
  VSTAR_DEVICE float at(float z) const {
    const float logp = (z - row_max) * inv_temperature - log_mass, p = power_of_2(fminf(logp * kLog2e, 0.0f));
    const float x = (-p * grad_logp - grad_entropy * (p * (logp + entropy))) * of_terms();
    return z > -kInf && p > 0 ? x : 0.0f;
  }
};

// Two halves in one word.
template <class Half>
VSTAR_DEVICE uint32_t packed(float low, float high) {
#if defined(__CUDA_ARCH__)
  uint32_t both;
  if constexpr (std::is_same_v<Half, BFloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  }
  return both;
#else
  Half half[2];
  put(low, half);
  put(high, half + 1);
  return half[0].bits | uint32_t(half[1].bits) << 16;
#endif
}

// Eight entries at a multiple of 16 bytes.
VSTAR_DEVICE void write_eight(float* to, const float (&x)[8]) {
  reinterpret_cast<float4*>(to)[0] = make_float4(x[0], x[1], x[2], x[3]);
  reinterpret_cast<float4*>(to)[1] = make_float4(x[4], x[5], x[6], x[7]);
}
template <class Half>
VSTAR_DEVICE void write_eight(Half* to, const float (&x)[8]) {
  uint4 v;
  v.x = packed<Half>(x[0], x[1]);
  v.y = packed<Half>(x[2], x[3]);
  v.z = packed<Half>(x[4], x[5]);
  v.w = packed<Half>(x[6], x[7]);
  *reinterpret_cast<uint4*>(to) = v;
}

constexpr int kGradientWarps = 8;

// By a block: eight(c) for the eight entries from c on of a row of so many, as often as they begin at a multiple of 16 bytes,
// and one(c) for what is left at the ends.
template <class T, class One, class Eights>
VSTAR_DEVICE void along_row(const T* row, int64_t columns, const One& one, const Eights& eight) {
  constexpr int32_t kSize = int32_t(sizeof(T)), kThreads = 32 * kGradientWarps;
  const int32_t thread = int32_t(threadIdx.x), before = int32_t((0 - reinterpret_cast<uintptr_t>(row)) % 16) / kSize;
  const int32_t count = int32_t(columns), lead = before < count ? before : count, end = count - (count - lead) % 8;
  if (thread < lead) one(thread);
#pragma unroll 2
  for (int32_t c = lead + 8 * thread; c < end; c += 8 * kThreads) eight(c);
  if (thread < count - end) one(end + thread);
}

template <class T, bool kFiltered>
__global__ void __launch_bounds__(32 * kGradientWarps, 4) token_logp_backward_kernel(TokenLogpBackwardArgs a) {
  constexpr int kThreads = 32 * kGradientWarps;
  VSTAR_SHARED(memory);
  double* const scratch = reinterpret_cast<double*>(memory);
  const int thread = int(threadIdx.x);
  const int64_t r = blockIdx.x;
  const TokenRow<T, kFiltered> row(a, r);
  const int32_t count = row.count;
  T* const to = static_cast<T*>(a.gradient) + r * a.columns;

  const auto weight = [&](int64_t t) -> double {  // of a target; padding and what has no probability has none
    const bool valid = a.target.at(row.b, row.w, t) >= 0 && a.logp[r * a.targets + t] > -kInf;
    return valid ? double(a.grad_logp.at(row.b, row.w, t)) : 0.0;
  };
  double total[1] = {0};
  if (a.grad_logp) {
    for (int64_t t = thread; t < a.targets; t += kThreads) total[0] += weight(t);
    block_sums<kGradientWarps>(total, scratch);
  }
  const float top = a.top[r];
  const EntryGradient gradient{
      top > -kInf ? top : 0.0f, a.log_mass[r], a.inv_temperature, float(total[0]),
      a.grad_entropy ? a.grad_entropy.at(row.b, row.w) : 0.0f, a.entropy_of(r), a.divided_last()};

  const bool forced = row.legal && row.forced();
  if (!row.legal) {
    const auto entry = [&](float z) { return gradient.summed(gradient.at(z)); };
    const auto whole = [&](const auto& read) {
      along_row(
          to, count, [&](int32_t v) { put(entry(row.at(v)), to + v); },
          [&](int32_t first) {
            Eight<T> z;
            float x[8];
            read(first, z);
#pragma unroll
            for (int i = 0; i < 8; ++i) x[i] = entry(cleaned(z.at(i)));
            write_eight(to + first, x);
          });
    };
    // As a rule the logits lie like the gradient.
    if (row.stride == 1 && (reinterpret_cast<uintptr_t>(row.from) - reinterpret_cast<uintptr_t>(to)) % 16 == 0) {
      whole([&](int32_t first, Eight<T>& z) { z.read(row.from + first); });
    } else {
      whole([&](int32_t first, Eight<T>& z) { row.read(first, z); });
    }
  } else {
    const float nothing[8] = {};
    along_row(
        to, a.columns, [&](int32_t v) { put(0.0f, to + v); }, [&](int32_t first) { write_eight(to + first, nothing); });
    __syncthreads();  // legal entries are other threads'
    for (int32_t c = thread; c < count; c += kThreads) {
      const int64_t v = row.token[c];
      if (v >= 0 && v < a.columns && row.is_alive(c)) put(forced ? 0.0f : gradient.summed(gradient.at(row.at(v))), to + v);
    }
  }
  if (!a.grad_logp || forced) return;
  __syncthreads();  // the targets' entries have been written by other threads
  for (int64_t t = thread; t < a.targets; t += kThreads) {
    const int64_t v = a.target.at(row.b, row.w, t);
    if (v < 0 || !(a.logp[r * a.targets + t] > -kInf)) continue;
    bool first = true;
    for (int64_t u = 0; u < t && first; ++u) first = a.target.at(row.b, row.w, u) != v;
    if (!first) continue;
    double own = 0;
    for (int64_t u = t; u < a.targets; ++u) own += a.target.at(row.b, row.w, u) == v ? weight(u) : 0.0;
    put(gradient.summed(float(own) * gradient.of_terms() + gradient.at(row.at(v))), to + v);
  }
}

inline void run(const Gpu& gpu, const TokenLogpArgs& a) {
  if (a.rows() == 0) return;
  dispatch(a.logits.type, [&](auto zero) {
    using T = decltype(zero);
    const bool filtered = a.trie.alive;
    if (a.node && a.max_children <= 1024) {
      const auto kernel = filtered ? token_logp_kernel<T, 1, true> : token_logp_kernel<T, 1, false>;
      gpu.launch(kernel, dim3{unsigned((a.rows() + 7) / 8)}, 256, 0, a);
    } else {
      const auto kernel = filtered ? token_logp_kernel<T, 8, true> : token_logp_kernel<T, 8, false>;
      gpu.launch(kernel, dim3{unsigned(a.rows())}, 256, 4 * 3 * 8, a);
    }
  });
}

inline void run(const Gpu& gpu, const TokenLogpBackwardArgs& a) {
  if (a.rows() == 0 || a.columns == 0) return;
  dispatch(a.logits.type, [&](auto zero) {
    using T = decltype(zero);
    constexpr int kThreads = 32 * kGradientWarps, kShared = 8 * kGradientWarps;
    const auto kernel = a.trie.alive ? token_logp_backward_kernel<T, true> : token_logp_backward_kernel<T, false>;
    gpu.launch(kernel, dim3{unsigned(a.rows())}, kThreads, kShared, a);
  });
}

}  // namespace vstar
