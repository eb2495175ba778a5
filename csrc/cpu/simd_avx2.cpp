#if defined(__x86_64__)
#include <cstdint>
#include <cstring>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC target("avx2")
#endif
#define VSTAR_SIMD_NAME simd_avx2
#include "cpu/simd_loops.inc"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
