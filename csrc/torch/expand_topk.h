#pragma once

#include "common/ops/expand_topk.h"
#include "torch/glue.h"

namespace vstar {

template <class Device>
void expand_topk(Call<Device>& call) {
  ExpandTopKArgs a{};
  double temperature;
  call.inputs(
      sized(a.logits, nullptr, &a.rows, &a.columns), a.trie, sized(a.node, &a.batch, &a.width), optional(a.row), a.k,
      optional(a.cum_logp), optional(a.value), optional(a.bonus), optional(a.child_value), optional(a.seed),
      a.logp_weight, a.value_weight, a.entropy_weight, temperature, a.vocab, a.max_children);
  if (a.value_weight == 0) a.value.data = nullptr, a.child_value.data = nullptr;
  a.inv_temperature = inverse_of(temperature);
  STD_TORCH_CHECK(
      fits(call.device(), a), "logits must have fewer than 2^32 legal children per request and 2^31 rows and columns, got W = ",
      a.width, ", V = ", a.columns, " and up to ", a.max_children, " children per prefix");
  call.output(a.score, {a.batch, a.k});
  call.output(a.logp, {a.batch, a.k});
  call.output(a.parent, {a.batch, a.k});
  call.output(a.token, {a.batch, a.k});
  call.output(a.child, {a.batch, a.k});
  call.output(a.num_valid, {a.batch});
  call.output(a.entropy, {a.batch, a.width});
  run(call.device(), a);
}

}  // namespace vstar
