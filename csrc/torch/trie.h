#pragma once

#include <algorithm>

#include "common/trie.h"
#include "torch/glue.h"

namespace vstar {

inline TrieView view_trie(const Tensor& offset, const Tensor& token) {
  return {offset, token, offset.numel() - 1, token.numel()};
}

template <class Device>
float inverse_temperature(double temperature) {
  return float(std::min(1.0 / temperature, Device::kMaxInverseTemperature));
}

}  // namespace vstar
