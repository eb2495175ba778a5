#pragma once

#include "common/views.h"

namespace vstar {

struct FilterItemsArgs {
  int32_t *alive, *allowed;                            // [R, words], [R, item_words]: bits
  const int32_t *offset, *item_offset, *parent, *leaf;  // of the trie; the parent of each node, the leaf of each item
  const int32_t* level_offset;                         // [levels + 1]
  IntView row;                                         // [R, M]; without it all nodes are computed
  const int32_t* within;                               // [1 or R, item_words]
  bool allow;
  int64_t requests, words, item_words, nodes, leaves, items, levels, rows, within_requests;

  VSTAR_INLINE_MEMBER int32_t* alive_of(int64_t r) const { return alive + r * words; }
  VSTAR_INLINE_MEMBER int32_t* allowed_of(int64_t r) const { return allowed + r * item_words; }

  // The item that a request lists, if it may change; else -1.
  VSTAR_INLINE_MEMBER int64_t item(int64_t r, int64_t i) const {
    const int64_t at = row.at(r, i);
    if (at < 0 || at >= items) return -1;
    if (!allow || !within) return at;
    const int64_t word = load(within + (within_requests == 1 ? 0 : r * item_words) + (at >> 5));
    return word >> (at & 31) & 1 ? at : -1;
  }
  VSTAR_INLINE_MEMBER int64_t leaf_of(int64_t item) const { return node_or_none(load(leaf + item)); }
  VSTAR_INLINE_MEMBER int64_t above(int64_t node) const { return node_or_none(load(parent + node)); }
  VSTAR_INLINE_MEMBER int64_t node_or_none(int64_t node) const { return node >= 0 && node < nodes ? node : -1; }

  // Whether a node has an allowed item, or a child that is alive. `read` reads a word.
  template <class Read>
  VSTAR_INLINE_MEMBER bool lives(int64_t r, int64_t node, const Read& read) const {
    const int64_t its_leaf = node - (nodes - leaves);
    if (its_leaf >= 0) return any(allowed_of(r), item_offset[its_leaf], item_offset[its_leaf + 1], items, read);
    return any(alive_of(r), int64_t(offset[node]) + 1, int64_t(offset[node + 1]) + 1, nodes, read);
  }

  // Whether one of the bits begin .. end - 1 is set.
  template <class Read>
  VSTAR_INLINE_MEMBER static bool any(const int32_t* bits, int64_t begin, int64_t end, int64_t size, const Read& read) {
    if (begin < 0 || end > size || begin >= end) return false;
    const int64_t last = (end - 1) >> 5;
    uint32_t keep = ~uint32_t(0) << (begin & 31);
    for (int64_t word = begin >> 5; word <= last; ++word, keep = ~uint32_t(0)) {
      if (word == last) keep &= ~uint32_t(0) >> (31 - ((end - 1) & 31));
      if (read(bits + word) & keep) return true;
    }
    return false;
  }
};

}  // namespace vstar
