// Which CUDA threads have synchronized with which, told to ThreadSanitizer. Does nothing in a build without it.
//
// ThreadSanitizer knows every CUDA thread as a fiber of its own, with its own clock, although all of them run on one
// host thread. A switch from one to another synchronizes nothing. What does: a launch, with what came before and comes
// after it; a barrier, shuffle or vote, the threads that meet there with each other, and nobody else. Blocks never meet.
//
// The emulator's own work would look like a race, because it stands between the threads. It is done either by the
// scheduler, as a thread of its own, or in functions that are VSTAR_UNSEEN.
#pragma once

#include <cstdlib>
#include <memory>
#include <vector>

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#include <sys/mman.h>

// Not inlined either: the code around it is instrumented.
#define VSTAR_UNSEEN inline __attribute__((no_sanitize("thread"), noinline))
#else
#define VSTAR_UNSEEN inline
#endif

namespace emulator {

constexpr size_t kStack = size_t(1) << 17;

#if defined(__SANITIZE_THREAD__)

constexpr unsigned kNoSynchronization = 1;  // a flag of __tsan_switch_to_fiber
constexpr size_t kMostFibers = 2048;        // they take 0.8 MB each

// From here on the host thread works for this fiber.
VSTAR_UNSEEN void work_for(void* fiber) { __tsan_switch_to_fiber(fiber, kNoSynchronization); }

// The stack of a CUDA thread. Mapped anew, it has not been written to by the thread that had it in the block before.
class Stack {
 public:
  Stack() : memory_(map(nullptr, 0)) {}
  ~Stack() { munmap(memory_, kStack); }
  Stack(const Stack&) = delete;
  char* get() const { return memory_; }
  void renew() { map(memory_, MAP_FIXED); }

 private:
  static char* map(void* at, int flags) {
    void* const memory = mmap(at, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0);
    if (memory == MAP_FAILED) abort();
    return static_cast<char*>(memory);
  }

  char* memory_;
};

// The threads of a launch.
class Races {
 public:
  // From the launch to the end of this object.
  Races() : scheduler_(__tsan_get_current_fiber()) {}
  ~Races() { join(); }

  // The fibers of a block's threads, and its shared memory, both new to this launch. Where there are no more fibers,
  // the blocks to come are taken to run after those before.
  char* begin_block(unsigned threads, size_t shared_bytes) {
    if (used_ + threads > kMostFibers) join();
    first_ = used_;
    used_ += threads;
    while (fibers().size() < used_) fibers().push_back(__tsan_create_fiber(0));
    shared_.emplace_back(new char[shared_bytes]);
    return shared_.back().get();
  }
  // Once shared memory has been filled.
  void start(unsigned threads) {
    const std::unique_ptr<char> place(new char);
    __tsan_release(place.get());
    for (unsigned t = 0; t < threads; ++t) at(fiber(t), place.get(), __tsan_acquire);
  }

  void* fiber(unsigned thread) const { return fibers()[first_ + thread]; }
  void* scheduler() const { return scheduler_; }

  // These threads of the block have waited for each other.
  void meet(const std::vector<unsigned>& threads) {
    const std::unique_ptr<char> place(new char);  // a new one each time: nobody has met here before
    for (const unsigned t : threads) at(fiber(t), place.get(), __tsan_release);
    for (const unsigned t : threads) at(fiber(t), place.get(), __tsan_acquire);
  }

 private:
  static std::vector<void*>& fibers() {  // used by one launch after the other, because it is slow to make them
    static std::vector<void*> all;
    return all;
  }
  static VSTAR_UNSEEN void at(void* fiber, char* place, void (*act)(void*)) {
    void* const here = __tsan_get_current_fiber();
    work_for(fiber);
    act(place);
    work_for(here);
  }
  void join() {
    const std::unique_ptr<char> place(new char);
    for (size_t f = 0; f < used_; ++f) at(fibers()[f], place.get(), __tsan_release);
    __tsan_acquire(place.get());
    shared_.clear();
    used_ = 0;
  }

  void* const scheduler_;
  std::vector<std::unique_ptr<char[]>> shared_;
  size_t first_ = 0, used_ = 0;
};

#else

inline void work_for(void*) {}

class Stack {
 public:
  char* get() const { return memory_.get(); }
  void renew() {}

 private:
  std::unique_ptr<char[]> memory_{new char[kStack]};
};

class Races {
 public:
  char* begin_block(unsigned, size_t shared_bytes) {
    if (!shared_) shared_.reset(new char[shared_bytes]);
    return shared_.get();
  }
  void start(unsigned) {}
  void* fiber(unsigned) const { return nullptr; }
  void* scheduler() const { return nullptr; }
  void meet(const std::vector<unsigned>&) {}

 private:
  std::unique_ptr<char[]> shared_;
};

#endif

}  // namespace emulator
