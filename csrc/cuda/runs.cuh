// Up to 64 things in an order, a thread for each: of position t is thread t of the block's one or two warps. Sets of positions
// are bits of an integer that every thread knows, so where a run of positions begins, where it ends and how many of them there
// are takes no communication.
#pragma once

#include "cuda/device.cuh"

namespace vstar {

using Positions = uint64_t;

VSTAR_DEVICE bool holds(Positions set, int p) { return set >> p & 1; }
VSTAR_DEVICE Positions up_to(int p) { return ~Positions(0) >> (63 - p); }
VSTAR_DEVICE int first_of(Positions set) { return __ffsll(int64_t(set)) - 1; }  // -1: none
VSTAR_DEVICE int last_of(Positions set) { return 63 - __clzll(int64_t(set)); }

template <int kWarps>
VSTAR_DEVICE void meet() {
  if (kWarps == 1) __syncwarp(); else __syncthreads();
}

// A set in shared memory: the threads that are in it say so before a barrier, and all know it behind.
struct Vote {
  uint32_t word[2];

  VSTAR_DEVICE void cast(bool in) {
    const uint32_t votes = __ballot_sync(kAll, in);
    if (lane() == 0) word[warp()] = votes;
  }
  template <int kWarps>
  VSTAR_DEVICE Positions result() const { return kWarps == 1 ? word[0] : word[0] | Positions(word[1]) << 32; }
};

// The run that a thread is in.
struct Run {
  int begin, last;
  Positions set;
  int before;   // positions of it before the thread's, in the same warp
  int longest;  // the most of them

  // Runs begin at `begins`, which holds 0; the last one ends with `inside`.
  VSTAR_DEVICE Run(Positions begins, Positions inside) {
    const int p = int(threadIdx.x);
    const Positions after = begins & ~up_to(p), next = after & (~after + 1);
    begin = last_of(begins & up_to(p));
    set = (next - 1) & (~Positions(0) << begin) & inside;
    last = last_of(set);
    before = p - begin < lane() ? p - begin : lane();
    longest = int(warp_max(uint32_t(before)));
  }

  // The sum of x over the run. Only as many steps are made as the longest run needs. Which numbers are added first depends on
  // their positions alone, and nothing outside of a run touches it, be it infinite. `sums` holds one number per thread.
  VSTAR_DEVICE void begin_sum(double x, double* sums) const {
#pragma unroll 1
    for (int step = 1; step <= longest; step *= 2) {
      const double other = __shfl_up_sync(kAll, x, unsigned(step));
      if (step <= before) x += other;
    }
    sums[threadIdx.x] = x;
  }
  // Behind a barrier.
  VSTAR_DEVICE double end_sum(const double* sums) const {
    const double sum = sums[last];
    return begin < 32 && last >= 32 ? sums[31] + sum : sum;
  }
};

// x / n, rounded as it should be, by what 1 / n is rounded to.
VSTAR_DEVICE double divided(double x, double n, double inverse) {
  const double quotient = x * inverse;
  return fma(fma(-quotient, n, x), inverse, quotient);
}

struct SortScratch {
  uint64_t key[64];
  int32_t place[64];
  uint4 bits[2][2];  // by turn and warp
};

// Ascending, by exchanges.
template <int kWarps>
VSTAR_DEVICE uint64_t sorted_key(uint64_t key, SortScratch& s) {
  const int p = int(threadIdx.x);
#pragma unroll
  for (int run = 2; run <= 32 * kWarps; run *= 2) {
#pragma unroll
    for (int step = run / 2; step > 0; step /= 2) {
      uint64_t other;
      if (step < 32) {
        other = __shfl_xor_sync(kAll, key, step);
      } else {
        s.key[p] = key;
        meet<kWarps>();
        other = s.key[p ^ step];
      }
      const bool keeps_less = ((p & run) == 0) == ((p & step) == 0);
      key = (other < key) == keeps_less ? other : key;
    }
  }
  return key;
}

// The candidate of request b that stands at a thread's position in the order of their tokens, equal ones in their own order;
// behind them stands what is no candidate. A key is 64 bits: the position, and above it of each token the bits in which
// candidates differ, those of the first token highest. As a rule they fit and one sort is enough; otherwise the low bits are
// sorted first, and every further sort keeps the order of the one before.
template <int kWarps, class Args>
VSTAR_DEVICE int sorted_candidate(const Args& a, int64_t b, SortScratch& s) {
  static_assert(kWarps <= 2, "sets of positions have 64 bits");
  constexpr int kBits = kWarps == 1 ? 5 : 6;
  const int p = int(threadIdx.x);
  int candidate = p, used = kBits, shift = 0;  // bits of the key that are taken, and of the token that it has already
  uint64_t key = uint64_t(p);
  const auto sort = [&] {
    s.place[p] = candidate;
    key = sorted_key<kWarps>(key, s);
    meet<kWarps>();
    candidate = s.place[key & ((1 << kBits) - 1)];
    meet<kWarps>();  // who goes on may write there
    key = uint64_t(p);
    used = kBits;
  };
  int64_t d = a.length - 1;
  for (int turn = 0; d >= 0; turn ^= 1) {
    const bool real = candidate < a.group;
    const uint64_t token = uint64_t(a.token.at(b, real ? candidate : 0, d)) ^ uint64_t(1) << 63;
    const uint32_t high = uint32_t(token >> 32), low = uint32_t(token);
    uint4 some{warp_or(high), warp_or(low), warp_or(~high), warp_or(~low)};  // bits that are set, and that are not
    if (kWarps > 1) {
      if (lane() == 0) s.bits[turn][warp()] = some;
      __syncthreads();
      const uint4 x = s.bits[turn][0], y = s.bits[turn][1];
      some = uint4{x.x | y.x, x.y | y.y, x.z | y.z, x.w | y.w};
    }
    const uint64_t differs = uint64_t(some.x & some.z) << 32 | (some.y & some.w);
    const int bits = 64 - __clzll(int64_t(differs)), left = bits - shift, take = left < 64 - used ? left : 64 - used;
    if (take > 0) key |= ((real ? token >> shift : ~uint64_t(0)) & up_to(take - 1)) << used;
    used += take;
    shift += take;
    if (shift < bits) {  // there is no room for the rest
      sort();
    } else {
      --d;
      shift = 0;
    }
  }
  sort();
  return candidate;
}

}  // namespace vstar
