// The steps of value-guided decoding on the CPU, tree by tree; a tree is small (a few dozen nodes to a few
// thousand) and its arrays stay in the cache. Children are found by scanning the parent array: no link needs
// upkeep, and the scan is the one that a warp does on a GPU.

#include "torch/ved.h"

#include <algorithm>
#include <vector>

#include "torch/cpu.h"

namespace vstar {
namespace {

class Tree {
 public:
  Tree(const VedSelectArgs& args, int64_t b)
      : a(args), b_(b), base_(b * a.capacity), node_(a.node + base_), parent_(a.parent + base_),
        priority_(a.priority + base_), visits_(a.visits + base_), next_child_(a.next_child + base_),
        size_(tree_size(a.size[b], a.capacity)) {
    for (int64_t level = 0; level <= a.levels; ++level) gate_.push_back(a.gate(b, level));
  }

  void select() {
    const int64_t first_row = b_ * a.rows();
    for (int64_t row = first_row; row < first_row + a.rows(); ++row) a.clear(row);
    if (size_ == 0) return;
    int32_t& budget = a.budget[b_];
    int64_t left = budget - size_;
    std::vector<int64_t> trail;
    for (int64_t path = 0; path < a.paths; ++path) {
      bool expanded = false;
      for (int64_t idle = 0; !expanded; ++idle) {
        if (left <= 0 || !expandable()) return;
        if (idle > a.max_idle) {
          budget = int32_t(budget - left);
          return;
        }
        traverse(trail);
        for (int64_t level = 0; level < int64_t(trail.size()); ++level) {
          const int64_t s = trail[level];
          ++visits_[s];
          if (level == a.levels || left <= 0 || !open(s)) continue;
          a.take(b_, first_row + path * a.levels + level, s);
          expanded = true;
          --left;
        }
      }
    }
  }

 private:
  // From the root always to the child of largest bound, ties to the lower token, until there is no child.
  void traverse(std::vector<int64_t>& trail) const {
    trail.assign(1, 0);
    const double log_total = std::log1p(double(visits_[0]));
    for (int64_t level = 0; level < a.levels; ++level) {
      const int64_t current = trail.back();
      int64_t best = -1;
      double best_bound = 0;
      for (int64_t s = 1; s < size_; ++s) {
        if (parent_[s] != current) continue;
        const double bound = tree_bound(priority_[s], visits_[s], log_total, a.exploration);
        if (best < 0 || bound > best_bound || (bound == best_bound && node_[s] < node_[best])) best = s, best_bound = bound;
      }
      if (best < 0) return;
      trail.push_back(best);
    }
  }

  // Whether a node passes the gate and has an unexpanded child; moves its pointer past the children that the
  // initial beam search has put into the tree.
  bool open(int64_t s) {
    const int64_t level = a.depth[base_ + s];
    if (level < 0 || level > a.levels || !(double(priority_[s]) >= gate_[level])) return false;
    const int32_t* const children = a.child_node + (base_ + s) * a.children;
    const int64_t count = a.listed(base_ + s);
    int32_t& next = next_child_[s];
    for (; next >= 0 && next < count; ++next) {
      if (std::find(node_, node_ + size_, children[next]) == node_ + size_) return true;
    }
    return false;
  }

  bool expandable() {
    for (int64_t s = 0; s < size_; ++s) {
      if (open(s)) return true;
    }
    return false;
  }

  const VedSelectArgs& a;
  const int64_t b_, base_;
  const int32_t *node_, *parent_;
  const float* priority_;
  int32_t *visits_, *next_child_;
  const int64_t size_;
  std::vector<double> gate_;
};

struct Leaf {
  LeafKey key;
  int64_t place;
};

// The leaves of a tree, in no particular order.
void find_leaves(const VedCandidatesArgs& a, int64_t b, std::vector<Leaf>& found) {
  found.clear();
  std::vector<int32_t> evaluated;
  const int64_t base = b * a.capacity, size = tree_size(a.size[b], a.capacity);
  for (int64_t s = 0; s < size; ++s) {
    if (a.depth[base + s] != a.length) continue;
    found.push_back({a.evaluated_key(base + s), s * a.width()});
    evaluated.push_back(a.node[base + s]);
  }
  std::sort(evaluated.begin(), evaluated.end());
  for (int64_t s = 0; s < size; ++s) {
    const int64_t count = std::min<int64_t>(a.num_leaves[base + s], a.slots);
    for (int64_t slot = 0; slot < count; ++slot) {
      const int32_t leaf = a.leaf_node[(base + s) * a.slots + slot];
      if (std::binary_search(evaluated.begin(), evaluated.end(), leaf)) continue;
      found.push_back({a.completion_key(base + s, slot), s * a.width() + 1 + slot});
    }
  }
}

template <class T>
void copy_list(int64_t to, int64_t row, const ListCopy<T>& list) {
  std::copy_n(list.from + row * list.width, list.width, list.to + to * list.width);
}

}  // namespace

void run(const Cpu& device, const VedSelectArgs& a) {
  device.parallel_for(a.batch, 16, 1, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) Tree(a, b).select();
  });
}

void run(const Cpu& device, const VedInsertArgs& a) {
  device.parallel_for(a.batch, 16, 1, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      for (int64_t row = b * a.rows; row < (b + 1) * a.rows; ++row) {
        const int64_t level = a.level(b, row, a.size[b]);
        if (level < 0) continue;
        const int64_t to = b * a.capacity + a.size[b]++;
        a.with_lists([&](const auto&... list) { (copy_list(to, row, list), ...); });
        a.set_up(b, to, row, level);
      }
    }
  });
}

void run(const Cpu& device, const VedCandidatesArgs& a) {
  device.parallel_for(a.batch, 4, 1, [&](int64_t first, int64_t last) {
    std::vector<Leaf> found;
    for (int64_t b = first; b < last; ++b) {
      find_leaves(a, b, found);
      const int64_t count = std::min<int64_t>(a.k, int64_t(found.size()));
      std::partial_sort(found.begin(), found.begin() + count, found.end(), [](const Leaf& x, const Leaf& y) {
        return better_leaf(x.key, x.place, y.key, y.place);
      });
      for (int64_t i = 0; i < count; ++i) {
        a.store(b, i, b * a.capacity + found[i].place / a.width(), found[i].place % a.width() - 1);
      }
      for (int64_t i = count; i < a.k; ++i) a.store_none(b, i);
      a.out_count[b] = int32_t(count);
    }
  });
}

}  // namespace vstar

VSTAR_REGISTER(Cpu, ved_select);
VSTAR_REGISTER(Cpu, ved_insert);
VSTAR_REGISTER(Cpu, ved_candidates);
