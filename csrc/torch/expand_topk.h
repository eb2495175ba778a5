#pragma once

#include "common/ops/expand_topk.h"
#include "torch/trie.h"

namespace vstar {

template <class Device>
Outputs<7> expand_topk(
    const Tensor& logits, const Tensor& offset, const Tensor& token, const Tensor& node, int64_t k,
    const OptionalTensor& cum_logp, const OptionalTensor& value, const OptionalTensor& bonus,
    const OptionalTensor& child_value, const OptionalTensor& seed, double logp_weight, double value_weight,
    double entropy_weight, double temperature, bool vocab, int64_t max_children) {
  const Device device(logits);
  ExpandTopKArgs a{};
  a.logits = logits;
  a.trie = view_trie(offset, token);
  a.node = node;
  a.cum_logp = cum_logp;
  if (value_weight != 0) {
    a.value = value;
    a.child_value = child_value;
  }
  a.bonus = bonus;
  a.seed = seed;
  a.logp_weight = float(logp_weight);
  a.value_weight = float(value_weight);
  a.entropy_weight = float(entropy_weight);
  a.inv_temperature = inverse_temperature<Device>(temperature);
  a.vocab = vocab;
  a.batch = logits.size(0);
  a.width = logits.size(1);
  a.columns = logits.size(2);
  a.k = k;
  a.max_children = max_children;
  check_sizes(device, a);
  Outputs<7> out;
  out.create(device, {a.batch, k}, a.score);
  out.create(device, {a.batch, k}, a.logp);
  out.create(device, {a.batch, k}, a.parent);
  out.create(device, {a.batch, k}, a.token);
  out.create(device, {a.batch, k}, a.child);
  out.create(device, {a.batch}, a.num_valid);
  out.create(device, {a.batch, a.width}, a.entropy);
  run(device, a);
  return out;
}

}  // namespace vstar
