#pragma once

#include "common/views.h"

namespace vstar {

// ---------------------------------------------------------------- advance

struct AdvanceBeamsArgs {
  IntView parent, token, node;   // [B, K]
  IntView sequence;              // [B, W, l]
  IntView slot, evaluated, row;  // [B, W]
  IntView row_slot;              // [R]
  int64_t batch, beams, width, length, rows;
  int32_t* out_sequence;  // [B, K, l + 1]
  int64_t *out_slot, *out_token;
  int32_t* out_evaluated;  // [B, K]

  // The beam that winner k of request b extends; -1: none, it is dead.
  VSTAR_INLINE_MEMBER int64_t above(int64_t b, int64_t k) const {
    const int64_t w = parent.at(b, k);
    return node.at(b, k) >= 0 && w >= 0 && w < width ? w : -1;
  }
  // Token i of winner k, which extends beam w.
  VSTAR_INLINE_MEMBER void store_token(int64_t b, int64_t k, int64_t w, int64_t i) const {
    const int64_t its_token = w < 0 ? -1 : i < length ? sequence.at(b, w, i) : token.at(b, k);
    out_sequence[(b * beams + k) * (length + 1) + i] = int32_t(its_token);
  }
  // All but its tokens.
  VSTAR_INLINE_MEMBER void store_state(int64_t b, int64_t k, int64_t w) const {
    const int64_t at = b * beams + k, r = w >= 0 && row ? row.at(b, w) : -1;
    const bool has_row = r >= 0 && r < rows;
    out_token[at] = w < 0 ? 0 : token.at(b, k);
    if (w < 0) {
      out_slot[at] = -1;
      out_evaluated[at] = 0;
    } else {
      out_slot[at] = has_row ? row_slot.at(r) : slot.at(b, w);
      out_evaluated[at] = int32_t(has_row || !evaluated ? length : evaluated.at(b, w));
    }
  }
};

// ---------------------------------------------------------------- rows

struct RowsToRunArgs {
  const int32_t* offset;  // of the trie
  IntView node;           // [B, W]
  IntView sequence;       // [B, W, l]
  IntView slot;           // [B, W]
  IntView evaluated;      // [B, W]
  int64_t num_nodes, batch, width, length;
  int32_t* row;             // [B, W]
  int64_t* parent;          // [B * W]
  int64_t *token, *place;   // [l, B * W]
  int32_t *num_rows, *num_tokens;  // [l], [B]

  VSTAR_INLINE_MEMBER int64_t beams() const { return batch * width; }

  // The first length that is missing of a beam that has a row; `length` for one that has none.
  VSTAR_INLINE_MEMBER int64_t missing(int64_t b, int64_t w) const {
    const int64_t n = node.at(b, w), e = evaluated.at(b, w);
    if (n < 0 || n >= num_nodes || int64_t(load(offset + n + 1)) - load(offset + n) < 2 || e >= length) return length;
    return e > 0 ? e : 0;
  }
  // Beam (b, w) is the i-th that lacks length s, and has this row.
  VSTAR_INLINE_MEMBER void store(int64_t b, int64_t w, int64_t s, int64_t i, int64_t its_row) const {
    token[s * beams() + i] = sequence.at(b, w, s);
    place[s * beams() + i] = its_row;
  }
  VSTAR_INLINE_MEMBER void clear(int64_t s, int64_t i) const {
    token[s * beams() + i] = 0;
    place[s * beams() + i] = -1;
  }
};

}  // namespace vstar
