// Memory that is fetched ahead.
#pragma once

namespace vstar {

// A load that nothing waits for. Of many prefetches at once a processor leaves some out, most where their pages are many.
template <class T>
inline void touch(const T* address) {
  asm volatile("" : : "r"(*address));
}

}  // namespace vstar
