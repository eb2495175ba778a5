// CUDA's thread model on one host thread, so that the device code of csrc/cuda runs where there is no GPU.
//
// Included before a .cuh or .cu file, it stands in for the CUDA compiler's built-ins: threadIdx and its like, barriers,
// shuffles, votes, atomics, dynamic shared memory, launches. Every CUDA thread of a block is a fiber; blocks run one
// after the other. A fiber runs until it waits for others; which ready fiber runs next is drawn from a seed. Shared
// memory lies in a heap block of exactly the size that was asked for, which AddressSanitizer guards, and is filled
// with junk before each block, so that what was not written, or not yet, shows.
//
// Errors, thrown by the launch as std::runtime_error: a barrier, shuffle or vote that a thread named in it never
// reaches; one called by a lane outside of its own mask; a shuffle from a lane that takes no part.
//
// A build with ThreadSanitizer reports data races between CUDA threads; see races.h.
//
// Counted per launch: block barriers, warp operations (shuffles, votes, warp barriers), atomics, and the 32-byte
// sectors that the warps read through __ldg. The n-th __ldg of a thread is taken to be the same instruction as
// the n-th of the other lanes, which is exact for warps that do not diverge.
//
// A thread that has to wait writes down for what and leaves; all else is the scheduler's, on its own stack.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <set>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#include "races.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#define VSTAR_EMULATED 1
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

enum class State { kReady, kBarrier, kWarp, kDone };
enum class Op { kNone, kShuffle, kVote, kSyncWarp, kSyncThreads };

struct Fiber {
  Stack stack;
  void* pointer = nullptr;  // of its stack, where it does not run
#if !defined(__x86_64__)
  ucontext_t context;
#endif
  void* fake_stack = nullptr;
  void* known_as = nullptr;  // to ThreadSanitizer
  State state = State::kDone;
  Op op = Op::kNone;
  unsigned mask = 0, source = 0;
  uint64_t value = 0;
  unsigned votes = 0;
  unsigned reads = 0;
};

struct Counts {
  int64_t launches = 0, blocks = 0, barriers = 0, warp_operations = 0, atomics = 0, sectors = 0, bytes = 0;
};

inline Counts counts;
inline bool counting = false;  // sectors; they take time
inline uint64_t seed = 0;
inline std::set<const void*> kernels;  // that were launched
inline bool idle = false;              // launches are counted and run nothing, for the host's time

inline char* shared = nullptr;

#if defined(__x86_64__)
// Saves the callee-saved registers and the stack pointer, and goes on where another fiber did so; see main.cpp.
extern "C" void vstar_emulator_switch(void** save, void* load);
#endif

class Block {
 public:
  template <class Run>
  void run(unsigned threads, const Run& body, uint64_t& random, Races& races) {
    races_ = &races;
    scheduler_ = races.scheduler();
    call_ = [](const void* data) { (*static_cast<const Run*>(data))(); };
    data_ = &body;
    threads_ = threads;
    while (fibers_.size() < threads) fibers_.push_back(std::make_unique<Fiber>());
    ready_.clear();
    for (unsigned t = 0; t < threads; ++t) {
      start(*fibers_[t], t);
      ready_.push_back(t);
    }
    races.start(threads);
    arrived_.assign((threads + 31) / 32, 0);
    read_.clear();
    at_barrier_ = done_ = 0;
    error_.clear();
    while (done_ < threads && error_.empty()) {
      if (ready_.empty()) {
        error_ = deadlock();
        break;
      }
      random ^= random << 13, random ^= random >> 7, random ^= random << 17;  // xorshift
      const size_t pick = size_t((random >> 32) * ready_.size() >> 32);
      current_ = ready_[pick];
      ready_[pick] = ready_.back();
      ready_.pop_back();
      enter(fibers_[current_].get());
      settle(*fibers_[current_]);
    }
    for (const auto& entry : read_) counts.sectors += int64_t(entry.second.size());
    if (!error_.empty()) {
      fibers_.clear();  // they stand in the middle of their work
      throw std::runtime_error(error_);
    }
  }

  // Of the thread that runs; returns how many of all vote.
  VSTAR_UNSEEN unsigned barrier(bool vote) {
    me_->state = State::kBarrier;
    me_->op = Op::kSyncThreads;
    me_->votes = vote;
    leave();
    return me_->votes;
  }

  // Every lane of the mask brings a value; returns the source's, and the votes of all.
  struct Met {
    uint64_t value;
    unsigned votes;
  };
  VSTAR_UNSEEN Met warp(Op op, unsigned mask, uint64_t value, unsigned source, unsigned vote) {
    me_->state = State::kWarp;
    me_->op = op;
    me_->mask = mask;
    me_->value = value;
    me_->source = source;
    me_->votes = vote;
    leave();
    return {me_->value, me_->votes};
  }

  void read(const void* pointer, size_t size) {
    Fiber& me = *fibers_[current_];
    std::set<uintptr_t>& sectors = read_[{current_ / 32, me.reads++}];
    const uintptr_t first = reinterpret_cast<uintptr_t>(pointer);
    for (uintptr_t s = first / 32; s <= (first + size - 1) / 32; ++s) sectors.insert(s);
    counts.bytes += int64_t(size);
  }

  static void entry();

 private:
  void start(Fiber& fiber, unsigned number) {
    fiber.state = State::kReady;
    fiber.reads = 0;
    fiber.fake_stack = nullptr;
    fiber.known_as = races_->fiber(number);
    fiber.stack.renew();
#if defined(__x86_64__)
    // Staggered: equal addresses modulo a power of two would compete for the same lines of the caches.
    uintptr_t top = reinterpret_cast<uintptr_t>(fiber.stack.get() + kStack - number * 448 % 8192) & ~uintptr_t(15);
    void** frame = reinterpret_cast<void**>(top) - 2;
    *frame = reinterpret_cast<void*>(&Block::entry);  // `ret` goes there, with the stack aligned as after a call
    frame -= 6;
    memset(frame, 0, 6 * sizeof(void*));
    fiber.pointer = frame;
#else
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, &Block::entry, 0);
#endif
  }

  VSTAR_UNSEEN void enter(Fiber* fiber) {
    me_ = fiber;
    threadIdx.x = current_;
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, fiber->stack.get(), kStack);
#endif
    work_for(fiber->known_as);
#if defined(__x86_64__)
    vstar_emulator_switch(&main_pointer_, fiber->pointer);
#else
    swapcontext(&main_context_, &fiber->context);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
  }

  // Back to the scheduler, which returns here once the fiber is ready again.
  VSTAR_UNSEEN void leave() {
    Fiber& me = *me_;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(me.state == State::kDone ? nullptr : &me.fake_stack, main_bottom_, main_size_);
#endif
    work_for(scheduler_);
#if defined(__x86_64__)
    vstar_emulator_switch(&me.pointer, main_pointer_);
#else
    swapcontext(&me.context, &main_context_);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(me.fake_stack, nullptr, nullptr);
#endif
  }

  // A fiber has left. If all that it waits for have come, they are ready.
  void settle(Fiber& me) {
    if (me.state == State::kDone) {
      ++done_;
    } else if (me.state == State::kWarp) {
      meet_warp(me);
    } else {
      votes_ += me.votes;
      if (++at_barrier_ < threads_) return;
      ++counts.barriers;
      met_.resize(threads_);
      for (unsigned t = 0; t < threads_; ++t) {
        met_[t] = t;
        fibers_[t]->votes = votes_;
      }
      at_barrier_ = votes_ = 0;
      release();
    }
  }

  void meet_warp(const Fiber& me) {
    const unsigned warp = current_ / 32, lane = current_ % 32, mask = me.mask;
    const bool takes_part = mask >> lane & 1;
    if (!takes_part) return fail("a warp operation is called by lane " + std::to_string(lane) + " outside of its own mask");
    if (me.op == Op::kShuffle && !(mask >> me.source & 1)) {
      return fail("lane " + std::to_string(lane) + " shuffles from lane " + std::to_string(me.source) + ", which takes no part");
    }
    arrived_[warp] |= 1u << lane;
    if ((arrived_[warp] & mask) != mask) return;
    unsigned votes = 0;
    uint64_t values[32] = {};
    met_.clear();
    for (unsigned l = 0; l < 32; ++l) {
      if (!(mask >> l & 1)) continue;
      met_.push_back(warp * 32 + l);
      const Fiber& fiber = *fibers_[met_.back()];
      if (fiber.op != me.op || fiber.mask != mask) return;  // another operation: the wait is in vain
      values[l] = fiber.value;
      votes |= (fiber.votes & 1) << l;
    }
    ++counts.warp_operations;
    arrived_[warp] &= ~mask;
    for (const unsigned t : met_) {
      fibers_[t]->value = values[fibers_[t]->source];
      fibers_[t]->votes = votes;
    }
    release();
  }

  // Those who have met.
  void release() {
    races_->meet(met_);
    for (const unsigned t : met_) {
      fibers_[t]->state = State::kReady;
      ready_.push_back(t);
    }
  }

  void fail(const std::string& message) { error_ = message + where(); }

  std::string where() const {
    return " (block " + std::to_string(blockIdx.x) + ", thread " + std::to_string(current_) + ")";
  }

  std::string deadlock() const {
    static const char* const names[] = {"nothing", "a shuffle", "a vote", "__syncwarp", "__syncthreads"};
    std::map<std::string, std::vector<unsigned>> groups;
    for (unsigned t = 0; t < threads_; ++t) {
      const Fiber& fiber = *fibers_[t];
      std::string what = "ended";
      if (fiber.state != State::kDone) what = std::string("wait at ") + names[int(fiber.op)];
      if (fiber.state == State::kWarp) what += " of warp " + std::to_string(t / 32) + " with mask " + std::to_string(fiber.mask);
      groups[what].push_back(t);
    }
    std::string text = "divergence in block " + std::to_string(blockIdx.x) + ":";
    for (const auto& group : groups) {
      text += " " + std::to_string(group.second.size()) + " threads (first " + std::to_string(group.second[0]) + ") " + group.first + ";";
    }
    return text;
  }

  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<unsigned> ready_, arrived_, met_;
  std::map<std::pair<unsigned, unsigned>, std::set<uintptr_t>> read_;
  std::string error_;
  void (*call_)(const void*) = nullptr;
  const void* data_ = nullptr;
  unsigned threads_ = 0, current_ = 0, at_barrier_ = 0, votes_ = 0, done_ = 0;
  Fiber* me_ = nullptr;  // that runs
  Races* races_ = nullptr;
  void *main_pointer_ = nullptr, *scheduler_ = nullptr;
#if !defined(__x86_64__)
  ucontext_t main_context_;
#endif
#if defined(__SANITIZE_ADDRESS__)
  const void* main_bottom_ = nullptr;
  size_t main_size_ = 0;
#endif
};

inline Block block;

// Where a fiber begins.
VSTAR_UNSEEN void Block::entry() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &block.main_bottom_, &block.main_size_);
#endif
  block.call_(block.data_);
  block.me_->state = State::kDone;
  block.leave();
  abort();
}

// What the threads of a block read of it.
VSTAR_UNSEEN void place_block(unsigned x, unsigned y, char* memory) {
  blockIdx.x = x;
  blockIdx.y = y;
  shared = memory;
}

// Relaxed, as CUDA's are: they order nothing else.
VSTAR_UNSEEN void count_atomic() { ++counts.atomics; }

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, unsigned threads, size_t shared_bytes, const Arguments&... arguments) {
  if (threads == 0 || threads > 1024) throw std::runtime_error("a block of " + std::to_string(threads) + " threads");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535) throw std::runtime_error("an impossible grid");
  if (shared_bytes > 227 * 1024) throw std::runtime_error(std::to_string(shared_bytes) + " bytes of shared memory");
  ++counts.launches;
  if (idle) return;
  uint64_t random = ++seed * 0x9E3779B97F4A7C15u | 1;
  gridDim = grid;
  blockDim = {threads};
  kernels.insert(reinterpret_cast<const void*>(kernel));
  const auto body = [&] { kernel(arguments...); };
  Races races;
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) {
      char* const memory = races.begin_block(threads, shared_bytes);
      memset(memory, 0xCB, shared_bytes);
      place_block(x, y, memory);
      ++counts.blocks;
      block.run(threads, body, random, races);
    }
  }
}

template <class T>
uint64_t pack(T value) {
  static_assert(sizeof(T) <= 8, "a shuffle moves up to 8 bytes");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <class T>
T unpack(uint64_t bits) {
  T value;
  memcpy(&value, &bits, sizeof(T));
  return value;
}

template <class T>
T shuffle(unsigned mask, T value, unsigned source) {
  return unpack<T>(block.warp(Op::kShuffle, mask, pack(value), source, 0).value);
}

}  // namespace emulator

inline void __syncthreads() { emulator::block.barrier(false); }
inline int __syncthreads_count(int vote) { return int(emulator::block.barrier(vote != 0)); }
inline int __syncthreads_or(int vote) { return emulator::block.barrier(vote != 0) > 0; }
inline void __syncwarp(unsigned mask = ~0u) { emulator::block.warp(emulator::Op::kSyncWarp, mask, 0, 0, 0); }

template <class T>
T __shfl_sync(unsigned mask, T value, int lane) {
  return emulator::shuffle(mask, value, unsigned(lane) % 32);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return emulator::shuffle(mask, value, (threadIdx.x % 32) ^ unsigned(lanes));
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned lanes) {
  const unsigned lane = threadIdx.x % 32;
  return emulator::shuffle(mask, value, lane >= lanes ? lane - lanes : lane);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned lanes) {
  const unsigned lane = threadIdx.x % 32;
  return emulator::shuffle(mask, value, lane + lanes < 32 ? lane + lanes : lane);
}
inline unsigned __ballot_sync(unsigned mask, int vote) {
  return emulator::block.warp(emulator::Op::kVote, mask, 0, threadIdx.x % 32, vote != 0).votes;
}
inline int __any_sync(unsigned mask, int vote) { return __ballot_sync(mask, vote) != 0; }
inline int __all_sync(unsigned mask, int vote) { return __ballot_sync(mask, vote) == mask; }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)(x)) : 64; }

template <class T>
T atomicAdd(T* address, T value) {
  emulator::count_atomic();
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}

inline unsigned atomicOr(unsigned* address, unsigned value) {
  emulator::count_atomic();
  return __atomic_fetch_or(address, value, __ATOMIC_RELAXED);
}
inline unsigned atomicAnd(unsigned* address, unsigned value) {
  emulator::count_atomic();
  return __atomic_fetch_and(address, value, __ATOMIC_RELAXED);
}

template <class T>
T atomicCAS(T* address, T expected, T value) {
  emulator::count_atomic();
  __atomic_compare_exchange_n(address, &expected, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  return expected;
}

template <class T>
T __ldg(const T* pointer) {
  if (emulator::counting) emulator::block.read(pointer, sizeof(T));
  return *pointer;
}
