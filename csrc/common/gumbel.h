// Counter-based Gumbel noise, a pure function of (seed, node, token): Philox4x32-10 (Salmon et al.,
// "Parallel random numbers: as easy as 1, 2, 3", SC 2011) and -log(-log(1 - u)), u = (bits + 1/2) / 2^32.
#pragma once

#include <cmath>

#include "macros.h"

namespace vstar {

// First word of Philox4x32-10 with key `seed` and counter (node, token, 0, 0).
VSTAR_INLINE uint32_t philox(uint64_t seed, uint32_t node, uint32_t token) {
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  uint32_t c0 = node, c1 = token, c2 = 0, c3 = 0;
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(0xD2511F53u) * c0, p1 = uint64_t(0xCD9E8D57u) * c2;
    c0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
    c1 = uint32_t(p1);
    c2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
    c3 = uint32_t(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c0;
}

// Natural logarithm of a positive normal float, without branches so that loops over it vectorize.
// x = m * 2^e with m in [sqrt(1/2), sqrt(2)), polynomial in m - 1 (Cephes logf coefficients); 1-2 ulp.
VSTAR_INLINE float log_positive(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t shifted = bits - 0x3F3504F3u;  // bits of sqrt(1/2)
  const float e = float(int32_t(shifted) >> 23);
  const float m = bit_cast<float>((shifted & 0x007FFFFFu) + 0x3F3504F3u) - 1.0f;
  const float m2 = m * m;
  float p = 7.0376836292e-2f;
  p = p * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  float r = p * m * m2;
  r += e * -2.12194440e-4f;
  r -= 0.5f * m2;
  return (m + r) + e * 0.693359375f;
}

VSTAR_INLINE float gumbel_from_bits(uint32_t bits) {
  // -log(1 - u). Near u = 0, 1 - u cannot hold u: the classic correction recovers log1p(-u) from the
  // rounded 1 - u. Near u = 1, 1 - u is formed exactly from the complement.
  const float u = (float(bits) + 0.5f) * 2.3283064365386963e-10f;
  const float rounded = 1.0f - u;
  const float near_zero = (rounded - 1.0f + u) / rounded - log_positive(rounded);
  const float near_one = -log_positive((float(~bits) + 0.5f) * 2.3283064365386963e-10f);
  return -log_positive(bits < 0x80000000u ? near_zero : near_one);
}

// The same in double: 1 - u is exact, and its logarithm as good as log1p(-u).
VSTAR_INLINE double exact_gumbel(uint32_t bits) {
  return -log(-log((double(~bits) + 0.5) * 2.3283064365386963e-10));
}

// The n-th output of SplitMix64 from the state `seed`, n from 0.
VSTAR_INLINE uint64_t split_mix(uint64_t seed, uint64_t n) {
  uint64_t x = seed + (n + 1) * 0x9E3779B97F4A7C15u;
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
  x = (x ^ x >> 27) * 0x94D049BB133111EBu;
  return x ^ x >> 31;
}

}  // namespace vstar
