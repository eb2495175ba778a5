#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#endif
#define VSTAR_AVX512
#define VSTAR_SIMD_BYTES 64
#define VSTAR_SIMD_NAME simd_avx512
#include "cpu/simd_loops.inc"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
