// A row of logits, read once: each thread takes eight neighboring entries at a time, by 16-byte loads where they lie
// together, and the statistics from which its softmax and entropy are found. One warp per row, or one block.
#pragma once

#include "common/temperature.h"
#include "common/trie.h"
#include "cuda/device.cuh"

namespace vstar {

// 2^x for x <= 0.
VSTAR_DEVICE float power_of_2(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return std::exp2(x);
#endif
}

// Of a set of logits: the largest; the sums of p = 2^x and p x with x = (z - top) / temperature * log2(e).
struct RowStats {
  float top = -kInf, total = 0, moment = 0;
};

// x for z; what is infinitely below is far enough below to add nothing.
VSTAR_DEVICE float below(float z, float top, InverseTemperature inv_temperature) {
  return fmaxf((z - top) * inv_temperature, -160.0f);
}

VSTAR_DEVICE RowStats rescaled(const RowStats& s, float top, InverseTemperature inv_temperature) {
  const float off = below(s.top, top, inv_temperature), scale = power_of_2(off);
  return {top, s.total * scale, (s.moment + s.total * off) * scale};
}

// Two disjoint sets together.
VSTAR_DEVICE RowStats joined(const RowStats& x, const RowStats& y, InverseTemperature inv_temperature) {
  const float top = fmaxf(x.top, y.top);
  const RowStats a = rescaled(x, top, inv_temperature), b = rescaled(y, top, inv_temperature);
  return {top, a.total + b.total, a.moment + b.moment};
}

// A set and kCount logits more, the largest of which is `top`, cleaned. As a rule no exponent needs a bound above, since
// no logit is infinite, and the temperature is one factor.
template <int kCount, class At>
VSTAR_DEVICE RowStats added(const RowStats& set, float top, InverseTemperature inv_temperature, const At& at) {
  const RowStats s = rescaled(set, fmaxf(set.top, top), inv_temperature);
  float total = 0, moment = 0;
  const auto add = [&](const auto& exponent) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float x = exponent(at(i)), p = power_of_2(x);
      total += p;
      moment = fmaf(p, x, moment);
    }
  };
  if (s.top < kFloatMax && inv_temperature.second == 1.0f) {
    add([&](float z) { return fmaxf((z - s.top) * inv_temperature.first, -160.0f); });
  } else {
    add([&](float z) { return fminf(below(z, s.top, inv_temperature), 0.0f); });
  }
  return {s.top, s.total + total, s.moment + moment};
}

// Joined over the threads of a row. `scratch` holds 3 * kWarps floats.
template <int kWarps>
VSTAR_DEVICE RowStats joined(RowStats s, InverseTemperature inv_temperature, float* scratch) {
  s = rescaled(s, warp_max(s.top), inv_temperature);
  s.total = warp_sum(s.total);
  s.moment = warp_sum(s.moment);
  if (kWarps == 1) return s;
  if (lane() == 0) {
    scratch[3 * warp()] = s.top;
    scratch[3 * warp() + 1] = s.total;
    scratch[3 * warp() + 2] = s.moment;
  }
  __syncthreads();
  float top = -kInf;
  for (int i = 0; i < kWarps; ++i) top = fmaxf(top, scratch[3 * i]);
  RowStats all{top, 0, 0};
  for (int i = 0; i < kWarps; ++i) {
    const RowStats one = rescaled({scratch[3 * i], scratch[3 * i + 1], scratch[3 * i + 2]}, top, inv_temperature);
    all.total += one.total;
    all.moment += one.moment;
  }
  __syncthreads();
  return all;
}

// NaN reads as -inf, +inf as the largest finite float: `clean` in two instructions.
VSTAR_DEVICE float cleaned(float z) { return fminf(fmaxf(z, -kInf), kFloatMax); }

template <class T> constexpr uint32_t kNone = 0;  // the bits of -inf
template <> inline constexpr uint32_t kNone<BFloat16> = 0xFF80;
template <> inline constexpr uint32_t kNone<Float16> = 0xFC00;

template <class T>
VSTAR_DEVICE T lowest() { return T{uint16_t(kNone<T>)}; }
template <>
VSTAR_DEVICE float lowest<float>() { return -kInf; }

VSTAR_DEVICE float widened(float x) { return x; }
VSTAR_DEVICE float widened(BFloat16 x) { return to_float(x); }
VSTAR_DEVICE float widened(Float16 x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#else
  return to_float(x);
#endif
}

// The larger of two pairs of halves each; NaN loses.
template <class T>
VSTAR_DEVICE uint32_t larger_halves(uint32_t x, uint32_t y) {
#if defined(__CUDA_ARCH__)
  uint32_t larger;
  if (kNone<T> == kNone<BFloat16>) {
    asm("max.bf16x2 %0, %1, %2;" : "=r"(larger) : "r"(x), "r"(y));
  } else {
    asm("max.f16x2 %0, %1, %2;" : "=r"(larger) : "r"(x), "r"(y));
  }
  return larger;
#else
  const auto pick = [](uint32_t p, uint32_t q) {
    const float a = to_float(T{uint16_t(p)}), b = to_float(T{uint16_t(q)});
    return !(a == a) || b > a ? q & 0xFFFFu : p & 0xFFFFu;
  };
  return pick(x, y) | pick(x >> 16, y >> 16) << 16;
#endif
}

// Eight logits as they lie in memory, which saves registers; NaN and infinity are dealt with where they are used.
template <class T>
struct Eight {
  uint32_t word[4];

  VSTAR_DEVICE float at(int i) const { return widened(T{uint16_t(word[i / 2] >> (i % 2 * 16))}); }
  VSTAR_DEVICE void read(const T* from) {
    const uint4 v = __ldg(reinterpret_cast<const uint4*>(from));
    word[0] = v.x;
    word[1] = v.y;
    word[2] = v.z;
    word[3] = v.w;
  }
  // The eight from `skip` bytes after a multiple of 16 on; reads the 32 bytes that hold them.
  VSTAR_DEVICE void read_skewed(const T* from, int skip) {
    const uint4* const aligned = reinterpret_cast<const uint4*>(reinterpret_cast<uintptr_t>(from) - uintptr_t(skip));
    const uint4 x = __ldg(aligned), y = __ldg(aligned + 1);
    const uint64_t a = x.x | uint64_t(x.y) << 32, b = x.z | uint64_t(x.w) << 32;
    const uint64_t c = y.x | uint64_t(y.y) << 32, d = y.z | uint64_t(y.w) << 32;
    const int right = skip % 8 * 8, left = 63 - right;
    const uint64_t low = skip < 8 ? a : b, middle = skip < 8 ? b : c, high = skip < 8 ? c : d;
    const uint64_t first = low >> right | middle << left << 1, second = middle >> right | high << left << 1;
    word[0] = uint32_t(first);
    word[1] = uint32_t(first >> 32);
    word[2] = uint32_t(second);
    word[3] = uint32_t(second >> 32);
  }
  static constexpr bool kSkewed = true;
  VSTAR_DEVICE void raise(const Eight& other) {
    for (int i = 0; i < 4; ++i) word[i] = larger_halves<T>(word[i], other.word[i]);
  }
  VSTAR_DEVICE float largest() const {
    const uint32_t pair = larger_halves<T>(larger_halves<T>(word[0], word[1]), larger_halves<T>(word[2], word[3]));
    return fmaxf(widened(T{uint16_t(pair)}), widened(T{uint16_t(pair >> 16)}));
  }
  VSTAR_DEVICE void clear() {
    const uint32_t lowest = kNone<T> | kNone<T> << 16;
    word[0] = word[1] = word[2] = word[3] = lowest;
  }
  VSTAR_DEVICE void put(int i, T x) {
    const uint32_t bits = x.bits;
    word[i / 2] = i % 2 ? (word[i / 2] & 0xFFFFu) | bits << 16 : (word[i / 2] & 0xFFFF0000u) | bits;
  }
};
template <>
struct Eight<float> {
  float z[8];

  VSTAR_DEVICE float at(int i) const { return z[i]; }
  VSTAR_DEVICE void read(const float* from) {
    for (int half = 0; half < 2; ++half) {
      const float4 v = __ldg(reinterpret_cast<const float4*>(from) + half);
      z[4 * half] = v.x;
      z[4 * half + 1] = v.y;
      z[4 * half + 2] = v.z;
      z[4 * half + 3] = v.w;
    }
  }
  VSTAR_DEVICE void read_skewed(const float*, int) {}
  static constexpr bool kSkewed = false;  // floats are read one by one instead: that is half as many as of halves
  VSTAR_DEVICE void raise(const Eight& other) {
    for (int i = 0; i < 8; ++i) z[i] = fmaxf(z[i], other.z[i]);
  }
  VSTAR_DEVICE float largest() const {
    float top = z[0];
    for (int i = 1; i < 8; ++i) top = fmaxf(top, z[i]);
    return top;
  }
  VSTAR_DEVICE void clear() {
    for (int i = 0; i < 8; ++i) z[i] = -kInf;
  }
  VSTAR_DEVICE void put(int i, float x) { z[i] = x; }
};

// The bits of 32 nodes from one on; behind those of the last node is a word more.
VSTAR_DEVICE uint32_t alive_from(const int32_t* bits, int64_t node) {
  const int32_t* const word = bits + (node >> 5);
  const uint64_t both = uint32_t(load(word)) | uint64_t(uint32_t(load(word + 1))) << 32;
  return uint32_t(both >> (node & 31));
}

// Columns of a row of logits: those of a list of tokens, or `count` from `first` on. kFiltered: children that are not alive
// read as -inf.
template <class T, bool kFiltered = false>
struct RowReader {
  const T* from;
  int64_t stride;
  const int32_t* token;  // null: consecutive
  int64_t first, columns;
  int32_t count, skip;  // bytes from a multiple of 16 to the first
  bool plain;           // consecutive in memory and inside of the row
  const int32_t* bits;  // of the nodes, null: all are alive
  int64_t child;        // the node of the first

  VSTAR_DEVICE RowReader(
      const T* from, int64_t stride, const int32_t* token, int64_t first, int64_t last, int64_t columns, int32_t count,
      const AliveNodes& alive = {})
      : from(from), stride(stride), token(token), first(first), columns(columns), count(count), bits(alive.bits),
        child(kFiltered ? alive.child(token) : 0) {
    const bool consecutive = count > 0 && first >= 0 && last < columns && last - first + 1 == count;
    plain = consecutive && stride == 1;
    if (consecutive) this->token = nullptr;
    skip = plain ? int32_t(reinterpret_cast<uintptr_t>(from + first) % 16) : 0;
  }
  VSTAR_DEVICE int64_t column(int32_t c) const { return token ? int64_t(token[c]) : first + c; }

  // Whether child c, which exists, is alive.
  VSTAR_DEVICE bool alive(int32_t c) const { return !kFiltered || !bits || alive_from(bits, child + c) & 1; }
  // -inf for those of the children c .. c + 7 that are not.
  VSTAR_DEVICE void drop(int32_t c, Eight<T>& z) const {
    if (!kFiltered || !bits || c >= count) return;
    const uint32_t kept = alive_from(bits, child + c);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (!(kept >> i & 1)) z.put(i, lowest<T>());
    }
  }

  // The logit of child c; -inf if there is none.
  VSTAR_DEVICE float at(int32_t c) const {
    if (c >= count || !alive(c)) return -kInf;
    const int64_t v = column(c);
    return v >= 0 && v < columns ? widened(load(from + v * stride)) : -kInf;
  }

  // The logits of the children c .. c + 7, a multiple of 8; -inf where there is none.
  VSTAR_DEVICE void read(int32_t c, Eight<T>& z) const {
    read_all(c, z);
    drop(c, z);
  }
  VSTAR_DEVICE void read_all(int32_t c, Eight<T>& z) const {
    if (plain && skip == 0 && c + 8 <= count) {
      z.read(from + first + c);
      return;
    }
    if (Eight<T>::kSkewed && plain && c >= 8 && c + 16 <= count) {  // all that is read belongs to the row
      z.read_skewed(from + first + c, skip);
      return;
    }
    z.clear();
    if (c >= count) return;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (c + i >= count) continue;
      const int64_t v = column(c + i);
      if (v >= 0 && v < columns) z.put(i, load(from + v * stride));
    }
  }

  // Those of eight children each from c, c + step, ... on, by all lanes, which together read `size` children from `tile` on.
  template <int kVectors>
  VSTAR_DEVICE void read_tile(int32_t tile, int32_t size, int32_t c, int32_t step, Eight<T> (&z)[kVectors]) const {
    if (plain && skip == 0 && tile + size <= count) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) z[v].read(from + first + c + v * step);
    } else if (Eight<T>::kSkewed && plain && tile > 0 && tile + size + 8 <= count) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) z[v].read_skewed(from + first + c + v * step, skip);
    } else {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) read_all(c + v * step, z[v]);
    }
#pragma unroll
    for (int v = 0; v < kVectors; ++v) drop(c + v * step, z[v]);
  }
};

// The largest of kVectors times eight, cleaned.
template <class T, int kVectors>
VSTAR_DEVICE float largest(const Eight<T> (&z)[kVectors]) {
  Eight<T> top = z[0];
#pragma unroll
  for (int v = 1; v < kVectors; ++v) top.raise(z[v]);
  return cleaned(top.largest());
}

// Statistics of what `reader` reads.
template <class T, int kWarps, int kVectors, bool kFiltered>
VSTAR_DEVICE RowStats read_row(
    const RowReader<T, kFiltered>& reader, int thread, InverseTemperature inv_temperature, float* scratch) {
  constexpr int kThreads = 32 * kWarps;
  RowStats s;
  for (int32_t tile = 0; tile < reader.count; tile += 8 * kThreads * kVectors) {
    Eight<T> z[kVectors];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) reader.read(tile + 8 * (v * kThreads + thread), z[v]);
    s = added<8 * kVectors>(s, largest(z), inv_temperature, [&](int i) { return z[i / 8].at(i % 8); });
  }
  return joined<kWarps>(s, inv_temperature, scratch);
}

}  // namespace vstar
