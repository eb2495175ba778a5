#pragma once

#include "common/ops/filters.h"
#include "torch/glue.h"

namespace vstar {

template <class Device>
void filter_items(Call<Device>& call) {
  FilterItemsArgs a{};
  call.inputs(
      sized(a.alive, &a.requests, &a.words), sized(a.allowed, nullptr, &a.item_words), sized(a.offset, &a.nodes),
      sized(a.item_offset, &a.leaves), a.parent, sized(a.leaf, &a.items), sized(a.level_offset, &a.levels),
      optional(sized(a.row, nullptr, &a.rows)), optional(sized(a.within, &a.within_requests, nullptr)), a.allow);
  for (int64_t* const offsets : {&a.nodes, &a.leaves, &a.levels}) --*offsets;  // which are one more
  run(call.device(), a);
}

}  // namespace vstar
