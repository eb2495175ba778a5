// The total order of candidates: score descending, then enumeration order (w, then v) ascending.
#pragma once

#include "macros.h"

namespace vstar {

// Unsigned integers that compare like the floats; -0.0 equals 0.0.
VSTAR_INLINE uint32_t ordered_bits(float score) {
  const uint32_t bits = bit_cast<uint32_t>(score + 0.0f);
  return bits ^ ((bits >> 31) ? 0xFFFFFFFFu : 0x80000000u);
}

VSTAR_INLINE float from_ordered_bits(uint32_t bits) {
  return bit_cast<float>(bits ^ ((bits >> 31) ? 0x80000000u : 0xFFFFFFFFu));
}

// The larger key is the better candidate; `sequence` counts candidates in enumeration order.
VSTAR_INLINE uint64_t candidate_key(float score, uint32_t sequence) {
  return (uint64_t(ordered_bits(score)) << 32) | uint32_t(~sequence);
}

VSTAR_INLINE uint32_t key_sequence(uint64_t key) { return ~uint32_t(key); }

VSTAR_INLINE float key_score(uint64_t key) { return from_ordered_bits(uint32_t(key >> 32)); }

}  // namespace vstar
