#pragma once

#include "common/ops/token_logp.h"
#include "torch/glue.h"

namespace vstar {

template <class Device>
void finish_rows(LogitRows& a) {
  a.inv_temperature = inverse_of(a.temperature);
  STD_TORCH_CHECK(
      a.columns < Device::kMaxGrid && a.rows() < Device::kMaxGrid,
      "logits must have fewer than 2^31 columns and rows, got V = ", a.columns, " and ", a.rows(), " rows");
}

template <class Device>
void token_logp(Call<Device>& call) {
  TokenLogpArgs a{};
  call.inputs(
      sized(a.logits, &a.batch, &a.width, &a.columns), sized(a.target, nullptr, nullptr, &a.targets), optional(a.trie),
      optional(a.node), a.temperature, a.max_children);
  finish_rows<Device>(a);
  call.output(a.logp, {a.batch, a.width, a.targets});
  call.output(a.entropy, {a.batch, a.width});
  call.output(a.top, {a.batch, a.width});
  call.output(a.log_mass, {a.batch, a.width});
  run(call.device(), a);
}

template <class Device>
void token_logp_backward(Call<Device>& call) {
  TokenLogpBackwardArgs a{};
  call.inputs(
      optional(a.grad_logp), optional(a.grad_entropy), sized(a.logits, &a.batch, &a.width, &a.columns),
      sized(a.target, nullptr, nullptr, &a.targets), optional(a.trie), optional(a.node), a.logp, a.entropy, a.top,
      a.log_mass, a.temperature, a.max_children);
  finish_rows<Device>(a);
  const Sizes sizes{a.batch, a.width, a.columns};
  if (a.node) {
    call.output_zeros(a.gradient, sizes, dtype_of(a.logits.type));
  } else {
    call.output(a.gradient, sizes, dtype_of(a.logits.type));
  }
  run(call.device(), a);
}

}  // namespace vstar
