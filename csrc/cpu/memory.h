// Memory that is fetched ahead, and memory that comes in large pieces.
#pragma once

#include <cstddef>
#include <cstdint>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace vstar {

// A load that nothing waits for. Of many prefetches at once a processor leaves some out, most where their pages are many.
template <class T>
inline void touch(const T* address) {
  asm volatile("" : : "r"(*address));
}

// Ask for pages of 2 MB under what is about to be written in full. A new tensor of this size has no pages yet, and to get
// them one by one, 4 KB each, takes as long as to write them four times.
inline void in_large_pages(void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kLarge = uintptr_t(1) << 21;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kLarge - 1) & ~(kLarge - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(kLarge - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // an answer of no is no error
#endif
}

}  // namespace vstar
