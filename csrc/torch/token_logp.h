#pragma once

#include "common/ops/token_logp.h"
#include "torch/glue.h"

namespace vstar {

template <class Device>
void finish_rows(LogitRows& a) {
  a.inv_temperature = inverse_of(a.temperature);
  STD_TORCH_CHECK(a.rows() == 0 || bool(a.node) == bool(a.trie.offset), "node must be given where a trie is");
  STD_TORCH_CHECK(
      a.columns < Device::kMaxGrid && a.rows() < Device::kMaxGrid,
      "logits must have fewer than 2^31 columns and rows, got V = ", a.columns, " and ", a.rows(), " rows");
}

template <class Device>
void token_logp(Call<Device>& call) {
  TokenLogpArgs a{};
  Sizes logits{}, targets{};
  call.inputs(
      rows(a.logits, &a.batch, &a.width, &a.columns, &logits), rows(a.target, &a.batch, &a.width, &a.targets, &targets),
      optional(a.trie), optional(rows(a.node, &a.batch, &a.width)), a.temperature, a.max_children);
  finish_rows<Device>(a);
  call.output(a.logp, targets);
  call.output(a.entropy, logits.without_last());
  call.output(a.top, logits.without_last());
  call.output(a.log_mass, logits.without_last());
  run(call.device(), a);
}

template <class Device>
void token_logp_backward(Call<Device>& call) {
  TokenLogpBackwardArgs a{};
  Sizes logits{};
  call.rows_of(2);
  call.inputs(
      optional(rows(a.grad_logp, &a.batch, &a.width, &a.targets)), optional(rows(a.grad_entropy, &a.batch, &a.width)),
      rows(a.logits, &a.batch, &a.width, &a.columns, &logits), rows(a.target, &a.batch, &a.width, &a.targets),
      optional(a.trie), optional(rows(a.node, &a.batch, &a.width)), a.logp, a.entropy, a.top, a.log_mass, a.temperature,
      a.max_children);
  finish_rows<Device>(a);
  if (a.node) {
    call.output_zeros(a.gradient, logits, dtype_of(a.logits.type));
  } else {
    call.output(a.gradient, logits, dtype_of(a.logits.type));
  }
  run(call.device(), a);
}

}  // namespace vstar
