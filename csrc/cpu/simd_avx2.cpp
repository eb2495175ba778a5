#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define VSTAR_AVX2
#define VSTAR_SIMD_BYTES 32
#define VSTAR_SIMD_NAME simd_avx2
#include "cpu/simd_loops.inc"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
