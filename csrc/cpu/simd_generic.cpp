// The baseline of the target architecture: SSE2 on x86-64, NEON on AArch64.
#define VSTAR_SIMD_BYTES 16
#define VSTAR_SIMD_NAME simd_generic
#include "cpu/simd_loops.inc"

#include <cstdlib>
#include <cstring>

#include "cpu/simd.h"

namespace vstar {

#if defined(__x86_64__)
extern const SimdLoops simd_avx2, simd_avx512;

// ATEN_CPU_CAPABILITY caps torch's own vector code, and this with it.
static bool allowed(const char* capability) {
  const char* const cap = getenv("ATEN_CPU_CAPABILITY");
  return cap == nullptr || strcmp(cap, capability) == 0 || strcmp(cap, "avx512") == 0;
}
static const bool kAvx512 = allowed("avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
static const bool kAvx2 = allowed("avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");

const SimdLoops& simd() { return kAvx512 ? simd_avx512 : kAvx2 ? simd_avx2 : simd_generic; }
const char* simd_level() { return kAvx512 ? "AVX-512" : kAvx2 ? "AVX2" : "SSE2"; }
#else
const SimdLoops& simd() { return simd_generic; }
const char* simd_level() { return "baseline"; }
#endif

}  // namespace vstar
