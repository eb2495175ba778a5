// filter_items on the CPU: item by item, up to the first node that does not change. Without a list all nodes, the last
// one first: children have higher numbers than their parents.

#include "torch/filters.h"

#include <algorithm>

#include "cpu/memory.h"
#include "torch/cpu.h"

namespace vstar {
namespace {

constexpr int64_t kAtOnce = 64;  // items whose nodes are fetched together

constexpr auto plain = [](const int32_t* word) { return uint32_t(*word); };

bool has(const int32_t* bits, int64_t i) { return uint32_t(bits[i >> 5]) >> (i & 31) & 1; }
void flip(int32_t* bits, int64_t i) { bits[i >> 5] ^= int32_t(uint32_t(1) << (i & 31)); }

// Bring what lies above some items into the cache, level by level: the walks would wait for one node after the other.
void fetch(const FilterItemsArgs& a, const int32_t* alive, const int64_t* items, int64_t number) {
  int64_t node[kAtOnce];
  for (int64_t j = 0; j < number; ++j) node[j] = items[j] < 0 ? -1 : a.leaf_of(items[j]);
  for (int64_t level = 0; level < a.levels; ++level) {
    for (int64_t j = 0; j < number; ++j) {
      if (node[j] < 0) continue;
      const int64_t its_leaf = node[j] - (a.nodes - a.leaves);
      touch(its_leaf >= 0 ? a.item_offset + its_leaf : a.offset + node[j]);
      touch(alive + (node[j] >> 5));
      node[j] = a.above(node[j]);
    }
  }
}

void change(const FilterItemsArgs& a, int64_t r) {
  int32_t *const alive = a.alive_of(r), *const allowed = a.allowed_of(r);
  int64_t items[kAtOnce];
  for (int64_t first = 0; first < a.rows; first += kAtOnce) {
    const int64_t number = std::min(kAtOnce, a.rows - first);
    for (int64_t j = 0; j < number; ++j) {
      const int64_t item = a.item(r, first + j);
      items[j] = item < 0 || has(allowed, item) == a.allow ? -1 : item;
      if (items[j] >= 0) flip(allowed, item);
    }
    fetch(a, alive, items, number);
    for (int64_t j = 0; j < number; ++j) {
      for (int64_t n = items[j] < 0 ? -1 : a.leaf_of(items[j]); n >= 0; n = a.above(n)) {
        if (has(alive, n) == a.allow || (!a.allow && a.lives(r, n, plain))) break;
        flip(alive, n);
      }
    }
  }
}

void compute(const FilterItemsArgs& a, int64_t r) {
  int32_t* const alive = a.alive_of(r);
  std::fill_n(alive, a.words, 0);
  for (int64_t n = a.nodes - 1; n >= 0; --n) {
    if (a.lives(r, n, plain)) flip(alive, n);
  }
}

}  // namespace

void run(const Cpu& device, const FilterItemsArgs& a) {
  device.parallel_for(a.requests, 4096, a.row ? 16 * a.rows : a.nodes, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) a.row ? change(a, r) : compute(a, r);
  });
}

}  // namespace vstar

VSTAR_REGISTER(Cpu, filter_items);
