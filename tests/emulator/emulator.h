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
// Counted per launch: block barriers, warp operations (shuffles, votes, warp barriers), atomics, and the 32-byte
// sectors that the warps read through __ldg. The n-th __ldg of a thread is taken to be the same instruction as
// the n-th of the other lanes, which is exact for warps that do not diverge.
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

constexpr size_t kStack = size_t(1) << 17;

enum class State { kReady, kBarrier, kWarp, kDone };
enum class Op { kNone, kShuffle, kVote, kSyncWarp, kSyncThreads };

struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStack]};
  void* pointer = nullptr;  // of its stack, where it does not run
#if !defined(__x86_64__)
  ucontext_t context;
#endif
  void* fake_stack = nullptr;
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

class Block;
inline Block* running = nullptr;
inline char* shared = nullptr;
inline size_t shared_size = 0;

#if defined(__x86_64__)
// Saves the callee-saved registers and the stack pointer, and goes on where another fiber did so; see main.cpp.
extern "C" void vstar_emulator_switch(void** save, void* load);
#endif

class Block {
 public:
  template <class Run>
  void run(unsigned threads, const Run& body, uint64_t& random) {
    call_ = [](const void* data) { (*static_cast<const Run*>(data))(); };
    data_ = &body;
    threads_ = threads;
    while (fibers_.size() < threads) fibers_.push_back(std::make_unique<Fiber>());
    ready_.clear();
    for (unsigned t = 0; t < threads; ++t) {
      start(*fibers_[t], t);
      ready_.push_back(t);
    }
    arrived_.assign((threads + 31) / 32, 0);
    read_.clear();
    at_barrier_ = done_ = 0;
    error_.clear();
    running = this;
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
      threadIdx.x = current_;
      enter(*fibers_[current_]);
    }
    running = nullptr;
    for (const auto& entry : read_) counts.sectors += int64_t(entry.second.size());
    if (!error_.empty()) {
      fibers_.clear();  // they stand in the middle of their work
      throw std::runtime_error(error_);
    }
  }

  // Of the thread that runs:
  unsigned barrier(bool vote) {
    Fiber& me = *fibers_[current_];
    me.state = State::kBarrier;
    me.op = Op::kSyncThreads;
    votes_ += vote;
    if (++at_barrier_ == threads_) {
      ++counts.barriers;
      for (unsigned t = 0; t < threads_; ++t) release(t, votes_);
      at_barrier_ = votes_ = 0;
    }
    leave();
    return me.votes;
  }

  // Every lane of the mask brings a value; returns the source's, and the votes of all.
  Fiber& warp(Op op, unsigned mask, uint64_t value, unsigned source, unsigned vote) {
    const unsigned warp = current_ / 32, lane = current_ % 32;
    Fiber& me = *fibers_[current_];
    if (!(mask >> lane & 1)) fail("a warp operation is called by lane " + std::to_string(lane) + " outside of its own mask");
    if (op == Op::kShuffle && !(mask >> source & 1)) {
      fail("lane " + std::to_string(lane) + " shuffles from lane " + std::to_string(source) + ", which takes no part");
    }
    me.state = State::kWarp;
    me.op = op;
    me.mask = mask;
    me.value = value;
    me.source = source;
    me.votes = vote;
    arrived_[warp] |= 1u << lane;
    if ((arrived_[warp] & mask) == mask) complete(warp, op, mask);
    leave();
    return me;
  }

  void read(const void* pointer, size_t size) {
    Fiber& me = *fibers_[current_];
    std::set<uintptr_t>& sectors = read_[{current_ / 32, me.reads++}];
    const uintptr_t first = reinterpret_cast<uintptr_t>(pointer);
    for (uintptr_t s = first / 32; s <= (first + size - 1) / 32; ++s) sectors.insert(s);
    counts.bytes += int64_t(size);
  }

  [[noreturn]] void fail(const std::string& message) {
    error_ = message + where();
    leave();
    abort();  // a block that failed is never entered again
  }

  static void entry() {
    Block& block = *running;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &block.main_bottom_, &block.main_size_);
#endif
    block.call_(block.data_);
    block.fibers_[block.current_]->state = State::kDone;
    ++block.done_;
    block.leave();
    abort();
  }

 private:
  void start(Fiber& fiber, unsigned number) {
    fiber.state = State::kReady;
    fiber.reads = 0;
    fiber.fake_stack = nullptr;
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

  void enter(Fiber& fiber) {
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, fiber.stack.get(), kStack);
#endif
#if defined(__x86_64__)
    vstar_emulator_switch(&main_pointer_, fiber.pointer);
#else
    swapcontext(&main_context_, &fiber.context);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
  }

  // Back to the scheduler, which returns here once the fiber is ready again.
  void leave() {
    Fiber& me = *fibers_[current_];
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(me.state == State::kDone ? nullptr : &me.fake_stack, main_bottom_, main_size_);
#endif
#if defined(__x86_64__)
    vstar_emulator_switch(&me.pointer, main_pointer_);
#else
    swapcontext(&me.context, &main_context_);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(me.fake_stack, nullptr, nullptr);
#endif
  }

  void release(unsigned t, unsigned votes) {
    Fiber& fiber = *fibers_[t];
    fiber.state = State::kReady;
    fiber.votes = votes;
    ready_.push_back(t);
  }

  void complete(unsigned warp, Op op, unsigned mask) {
    const unsigned first = warp * 32;
    unsigned votes = 0;
    uint64_t values[32] = {};
    for (unsigned lane = 0; lane < 32; ++lane) {
      if (!(mask >> lane & 1)) continue;
      const Fiber& fiber = *fibers_[first + lane];
      if (fiber.op != op || fiber.mask != mask) return;  // another operation: the wait is in vain
      values[lane] = fiber.value;
      votes |= (fiber.votes & 1) << lane;
    }
    ++counts.warp_operations;
    arrived_[warp] &= ~mask;
    for (unsigned lane = 0; lane < 32; ++lane) {
      if (!(mask >> lane & 1)) continue;
      Fiber& fiber = *fibers_[first + lane];
      fiber.value = values[fiber.source];
      release(first + lane, votes);
    }
  }

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
  std::vector<unsigned> ready_, arrived_;
  std::map<std::pair<unsigned, unsigned>, std::set<uintptr_t>> read_;
  std::string error_;
  void (*call_)(const void*) = nullptr;
  const void* data_ = nullptr;
  unsigned threads_ = 0, current_ = 0, at_barrier_ = 0, votes_ = 0, done_ = 0;
  void* main_pointer_ = nullptr;
#if !defined(__x86_64__)
  ucontext_t main_context_;
#endif
#if defined(__SANITIZE_ADDRESS__)
  const void* main_bottom_ = nullptr;
  size_t main_size_ = 0;
#endif
};

inline Block block;

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, unsigned threads, size_t shared_bytes, const Arguments&... arguments) {
  if (threads == 0 || threads > 1024) throw std::runtime_error("a block of " + std::to_string(threads) + " threads");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535) throw std::runtime_error("an impossible grid");
  if (shared_bytes > 227 * 1024) throw std::runtime_error(std::to_string(shared_bytes) + " bytes of shared memory");
  uint64_t random = ++seed * 0x9E3779B97F4A7C15u | 1;
  std::unique_ptr<char[]> memory(new char[shared_bytes]);
  shared = memory.get();
  shared_size = shared_bytes;
  gridDim = grid;
  blockDim = {threads};
  ++counts.launches;
  for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) {
    for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
      memset(shared, 0xCB, shared_bytes);
      ++counts.blocks;
      block.run(threads, [&] { kernel(arguments...); }, random);
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
  return unpack<T>(running->warp(Op::kShuffle, mask, pack(value), source, 0).value);
}

}  // namespace emulator

inline void __syncthreads() { emulator::running->barrier(false); }
inline int __syncthreads_count(int vote) { return int(emulator::running->barrier(vote != 0)); }
inline int __syncthreads_or(int vote) { return emulator::running->barrier(vote != 0) > 0; }
inline void __syncwarp(unsigned mask = ~0u) { emulator::running->warp(emulator::Op::kSyncWarp, mask, 0, 0, 0); }

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
  return emulator::running->warp(emulator::Op::kVote, mask, 0, threadIdx.x % 32, vote != 0).votes;
}
inline int __any_sync(unsigned mask, int vote) { return __ballot_sync(mask, vote) != 0; }
inline int __all_sync(unsigned mask, int vote) { return __ballot_sync(mask, vote) == mask; }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }

template <class T>
T atomicAdd(T* address, T value) {
  ++emulator::counts.atomics;
  const T old = *address;
  *address = old + value;
  return old;
}

template <class T>
T __ldg(const T* pointer) {
  if (emulator::counting) emulator::running->read(pointer, sizeof(T));
  return *pointer;
}
