// Host/device markers. Headers in common/ hold the arithmetic that every native backend shares; they
// include nothing from torch or CUDA, and every function is forced inline: the CPU backend compiles
// them several times for different instruction sets, and an out-of-line copy could be picked for the
// wrong one by the linker.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define VSTAR_INLINE __host__ __device__ __forceinline__
#define VSTAR_INLINE_MEMBER VSTAR_INLINE
#else
#define VSTAR_INLINE static inline __attribute__((always_inline))
#define VSTAR_INLINE_MEMBER inline __attribute__((always_inline))
#endif

namespace vstar {

template <class To, class From>
VSTAR_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast between equal sizes");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

}  // namespace vstar
