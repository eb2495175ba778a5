#pragma once

#include <cmath>

#include "common/gumbel.h"
#include "common/views.h"

namespace vstar {

// ---------------------------------------------------------------- draw

struct DrawChildrenArgs {
  StridedView<float> list_logp;        // [R, C]
  IntView list_token, list_node;       // [R, C]
  IntView sequence;                    // [B, K, l]
  IntView row, prefix;                 // [B, K]
  StridedView<float> cum_logp;         // [B, K]
  StridedView<int64_t> seed;           // [B]
  int64_t base_seed;                   // without seeds, what they are derived from
  bool pack;                           // lost candidates come last
  int64_t batch, candidates, length, rows, children;
  int32_t *out_sequence, *out_node;    // [B, K, l + 1], [B, K]
  float* out_logp;                     // [B, K]
  int32_t* num_valid;                  // [B]

  // Which list candidate k of request b draws from; -1: none, it is lost.
  VSTAR_INLINE_MEMBER int64_t list_of(int64_t b, int64_t k) const {
    const int64_t r = row ? row.at(b, k) : b;
    return r >= 0 && r < rows ? r : -1;
  }
  VSTAR_INLINE_MEMBER uint32_t prefix_of(int64_t b, int64_t k) const { return prefix ? uint32_t(prefix.at(b, k)) : 0; }
  // The key of a candidate's noise: far apart for each, whatever the requests' own seeds are.
  VSTAR_INLINE_MEMBER uint64_t key(int64_t b, int64_t k) const {
    const uint64_t its_seed = seed ? uint64_t(seed.at(b)) : split_mix(uint64_t(base_seed), uint64_t(b));
    return its_seed + uint64_t(k + 1) * 0x5851F42D4C957F2Du;
  }
  // An entry of a list can be drawn; NaN cannot.
  VSTAR_INLINE_MEMBER bool drawable(int64_t r, int64_t c) const {
    return list_node.at(r, c) >= 0 && list_logp.at(r, c) > -__builtin_inff();
  }
  VSTAR_INLINE_MEMBER double perturbed(int64_t r, int64_t c, uint64_t its_key, uint32_t its_prefix) const {
    return double(list_logp.at(r, c)) + exact_gumbel(philox(its_key, its_prefix, uint32_t(list_token.at(r, c))));
  }
  // Candidate k of request b has drawn entry c of its list (none if negative), and stands at `to` among the results.
  VSTAR_INLINE_MEMBER void store(int64_t b, int64_t k, int64_t c, int64_t to) const {
    const int64_t at = b * candidates + to, r = list_of(b, k);
    int32_t* const tokens = out_sequence + at * (length + 1);
    for (int64_t i = 0; i < length; ++i) tokens[i] = c < 0 ? -1 : int32_t(sequence.at(b, k, i));
    tokens[length] = c < 0 ? -1 : int32_t(list_token.at(r, c));
    out_node[at] = c < 0 ? -1 : int32_t(list_node.at(r, c));
    out_logp[at] = c < 0 ? -__builtin_inff() : cum_logp.at_or(0.0f, b, k) + list_logp.at(r, c);
  }
};

// ---------------------------------------------------------------- rows

struct DistinctRowsArgs {
  IntView node, token, row;  // [B, K]
  IntView slot;              // [R]
  int64_t batch, candidates, rows;
  int32_t* out_row;               // [B, K]
  int64_t *out_parent, *out_token;  // [B * K]
  int32_t *out_node, *num_rows, *num_tokens;  // [B * K], [1], [B]

  VSTAR_INLINE_MEMBER int64_t total() const { return batch * candidates; }

  // Row `to` is the prefix of candidate k of request b.
  VSTAR_INLINE_MEMBER void store(int64_t b, int64_t k, int64_t to) const {
    const int64_t r = row ? row.at(b, k) : b;
    out_parent[to] = r >= 0 && r < rows ? slot.at(r) : -1;
    out_token[to] = token.at(b, k);
    out_node[to] = int32_t(node.at(b, k));
  }
  VSTAR_INLINE_MEMBER void clear(int64_t to) const {
    out_parent[to] = out_node[to] = -1;
    out_token[to] = 0;
  }
};

}  // namespace vstar
