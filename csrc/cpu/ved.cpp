// The steps of value-guided decoding on the CPU, tree by tree; a tree is small (a few dozen nodes to a few
// thousand) and its arrays stay in the cache. Children are found by scanning the parent array: no link needs
// upkeep, and the scan is the one that a warp does on a GPU.

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "common/tree.h"
#include "cpu/torch_glue.h"

namespace vstar {
namespace {

constexpr float kInf = INFINITY;

// The arrays of B trees that steps 2 and 3 look at: [B, T], or [B, T, C] for children, [B, levels + 1] for depths.
struct Trees {
  const int32_t *node, *parent, *num_children, *child_node, *depth, *depth_count;
  const float *priority, *child_logp;
  const double* depth_sum;
  int32_t *visits, *next_child, *budget;
  const int32_t* size;
  int64_t capacity, children, levels;
  double exploration;
  int64_t paths, max_idle;
};

struct Rows {
  int32_t *parent, *node;
  float* logp;
};

class Tree {
 public:
  Tree(const Trees& all, int64_t b)
      : all_(all),
        node_(all.node + b * all.capacity),
        parent_(all.parent + b * all.capacity),
        num_children_(all.num_children + b * all.capacity),
        child_node_(all.child_node + b * all.capacity * all.children),
        child_logp_(all.child_logp + b * all.capacity * all.children),
        depth_(all.depth + b * all.capacity),
        priority_(all.priority + b * all.capacity),
        visits_(all.visits + b * all.capacity),
        next_child_(all.next_child + b * all.capacity),
        size_(std::min<int64_t>(std::max<int32_t>(all.size[b], 0), all.capacity)) {
    for (int64_t level = 0; level <= all.levels; ++level) {
      const int64_t i = b * (all.levels + 1) + level;
      mean_.push_back(all.depth_sum[i] / std::max(all.depth_count[i], 1));
    }
  }

  void select(int32_t& budget, const Rows& rows) {
    if (size_ == 0) return;
    int64_t left = budget - size_;
    std::vector<int64_t> trail;
    for (int64_t path = 0; path < all_.paths; ++path) {
      bool expanded = false;
      for (int64_t idle = 0; !expanded; ++idle) {
        if (left <= 0 || !expandable()) return;
        if (idle > all_.max_idle) {
          budget = int32_t(budget - left);
          return;
        }
        traverse(trail);
        for (int64_t level = 0; level < int64_t(trail.size()); ++level) {
          const int64_t s = trail[level];
          ++visits_[s];
          if (level == all_.levels || left <= 0 || !open(s)) continue;
          const int64_t row = path * all_.levels + level, child = s * all_.children + next_child_[s]++;
          rows.parent[row] = int32_t(s);
          rows.node[row] = child_node_[child];
          rows.logp[row] = child_logp_[child];
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
    for (int64_t level = 0; level < all_.levels; ++level) {
      const int64_t current = trail.back();
      int64_t best = -1;
      double best_bound = 0;
      for (int64_t s = 1; s < size_; ++s) {
        if (parent_[s] != current) continue;
        const double bound = tree_bound(priority_[s], visits_[s], log_total, all_.exploration);
        if (best < 0 || bound > best_bound || (bound == best_bound && node_[s] < node_[best])) best = s, best_bound = bound;
      }
      if (best < 0) return;
      trail.push_back(best);
    }
  }

  // Whether a node passes the gate and has an unexpanded child; moves its pointer past the children that the
  // initial beam search has put into the tree.
  bool open(int64_t s) {
    const int64_t level = depth_[s];
    if (level < 0 || level > all_.levels || !(double(priority_[s]) >= mean_[level])) return false;
    const int64_t count = std::min<int64_t>(num_children_[s], all_.children);
    int32_t& next = next_child_[s];
    while (next >= 0 && next < count) {
      const int32_t wanted = child_node_[s * all_.children + next];
      if (std::find(node_, node_ + size_, wanted) == node_ + size_) return true;
      ++next;
    }
    return false;
  }

  bool expandable() {
    for (int64_t s = 0; s < size_; ++s) {
      if (open(s)) return true;
    }
    return false;
  }

  const Trees& all_;
  const int32_t *node_, *parent_, *num_children_, *child_node_;
  const float* child_logp_;
  const int32_t* depth_;
  const float* priority_;
  int32_t *visits_, *next_child_;
  int64_t size_;
  std::vector<double> mean_;
};

std::tuple<Tensor, Tensor, Tensor> ved_select(
    Tensor node, Tensor parent, Tensor priority, Tensor visits, Tensor next_child, Tensor num_children,
    Tensor child_node, Tensor child_logp, Tensor size, Tensor budget, Tensor depth, Tensor depth_sum,
    Tensor depth_count, int64_t levels, double exploration, int64_t paths, int64_t max_idle) {
  const int64_t batch = node.size(0), rows = paths * levels;
  const Trees trees{
      data<int32_t>(node),       data<int32_t>(parent),      data<int32_t>(num_children), data<int32_t>(child_node),
      data<int32_t>(depth),      data<int32_t>(depth_count), data<float>(priority),       data<float>(child_logp),
      data<double>(depth_sum),   data<int32_t>(visits),      data<int32_t>(next_child),   data<int32_t>(budget),
      data<int32_t>(size),       node.size(1),               child_node.size(2),          levels,
      exploration,               paths,                      max_idle};
  Tensor row_parent = new_tensor<int32_t>({batch, rows}), row_node = new_tensor<int32_t>({batch, rows});
  Tensor row_logp = new_tensor<float>({batch, rows});
  const Rows all{data<int32_t>(row_parent), data<int32_t>(row_node), data<float>(row_logp)};
  torch::stable::parallel_for(0, batch, 16, [&](int64_t first, int64_t last) {
    std::fill(all.parent + first * rows, all.parent + last * rows, -1);
    std::fill(all.node + first * rows, all.node + last * rows, -1);
    std::fill(all.logp + first * rows, all.logp + last * rows, -kInf);
    for (int64_t b = first; b < last; ++b) {
      Tree(trees, b).select(trees.budget[b], {all.parent + b * rows, all.node + b * rows, all.logp + b * rows});
    }
  });
  return {row_parent, row_node, row_logp};
}

// Copies entry `from` of one array to entry `to` of another, entries of `width` elements.
template <class T>
struct Copy {
  const T* source;
  T* target;
  int64_t width;
  Copy(const Tensor& rows, const Tensor& tree)
      : source(data<T>(rows)), target(data<T>(tree)), width(tree.dim() > 2 ? tree.size(2) : 1) {}
  void operator()(int64_t from, int64_t to) const { std::copy_n(source + from * width, width, target + to * width); }
};

void ved_insert(
    Tensor node, Tensor parent, Tensor logp, Tensor value, Tensor entropy, Tensor priority, Tensor visits,
    Tensor next_child, Tensor num_children, Tensor child_node, Tensor child_logp, Tensor leaf_node, Tensor leaf_logp,
    Tensor leaf_score, Tensor num_leaves, Tensor slot, Tensor size, Tensor depth, Tensor depth_sum,
    Tensor depth_count, Tensor row_parent, Tensor row_node, Tensor row_logp, Tensor row_slot, Tensor row_value,
    Tensor row_entropy, Tensor row_num_children, Tensor row_child_node, Tensor row_child_logp, Tensor row_leaf_node,
    Tensor row_leaf_logp, Tensor row_leaf_score, Tensor row_num_leaves, double logp_weight, double entropy_weight) {
  const int64_t batch = node.size(0), capacity = node.size(1), rows = row_node.size(1), depths = depth_sum.size(1);
  const Copy<int32_t> ints[] = {{row_node, node},           {row_parent, parent},       {row_num_children, num_children},
                                {row_child_node, child_node}, {row_leaf_node, leaf_node}, {row_num_leaves, num_leaves}};
  const Copy<float> floats[] = {{row_logp, logp},             {row_entropy, entropy},     {row_child_logp, child_logp},
                                {row_leaf_logp, leaf_logp},   {row_leaf_score, leaf_score}};
  const Copy<int64_t> slots(row_slot, slot);
  const float* values = data<float>(row_value);
  const float* entropies = data<float>(row_entropy);
  const float* logps = data<float>(row_logp);
  const int32_t* row_nodes = data<int32_t>(row_node);
  const int32_t* row_parents = data<int32_t>(row_parent);
  float *value_at = data<float>(value), *priority_at = data<float>(priority);
  int32_t *visits_at = data<int32_t>(visits), *next_at = data<int32_t>(next_child), *depth_at = data<int32_t>(depth);
  int32_t *sizes = data<int32_t>(size), *counts = data<int32_t>(depth_count);
  double* sums = data<double>(depth_sum);

  torch::stable::parallel_for(0, batch, 16, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t from = b * rows + r;
        if (row_nodes[from] < 0 || sizes[b] < 0 || sizes[b] >= capacity) continue;
        const int64_t above = row_parents[from];
        const int64_t level = above >= 0 && above < sizes[b] ? depth_at[b * capacity + above] + 1 : 0;
        if (level >= depths) continue;
        const int64_t to = b * capacity + sizes[b]++;
        for (const auto& copy : ints) copy(from, to);
        for (const auto& copy : floats) copy(from, to);
        slots(from, to);
        const float limit = 3.4028234663852886e38f;
        const float v = values[from] == values[from] ? std::min(std::max(values[from], -limit), limit) : -limit;
        value_at[to] = v;
        priority_at[to] = tree_priority(v, entropies[from], logps[from], entropy_weight, logp_weight);
        visits_at[to] = next_at[to] = 0;
        depth_at[to] = int32_t(level);
        sums[b * depths + level] += priority_at[to];
        ++counts[b * depths + level];
      }
    }
  });
}

struct Candidate {
  int32_t tier;    // leaves that were evaluated come first
  float score;
  int32_t prefix;  // orders equal scores, as does log-probability among the completions of one prefix
  float logp;
  int32_t node;
};

bool operator<(const Candidate& a, const Candidate& b) {
  if (a.tier != b.tier) return a.tier < b.tier;
  if (a.score != b.score) return a.score > b.score;
  if (a.prefix != b.prefix) return a.prefix < b.prefix;
  if (a.tier > 0 && a.logp != b.logp) return a.logp > b.logp;
  return a.node < b.node;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> ved_candidates(
    Tensor node, Tensor logp, Tensor value, Tensor size, Tensor depth, Tensor leaf_node, Tensor leaf_logp,
    Tensor leaf_score, Tensor num_leaves, int64_t length, int64_t k, double logp_weight, bool forced_first) {
  const int64_t batch = node.size(0), capacity = node.size(1), slots = leaf_node.size(2);
  Tensor out_node = new_tensor<int32_t>({batch, k}), out_count = new_tensor<int32_t>({batch});
  Tensor out_logp = new_tensor<float>({batch, k}), out_score = new_tensor<float>({batch, k});
  const int32_t *nodes = data<int32_t>(node), *sizes = data<int32_t>(size), *depths = data<int32_t>(depth);
  const int32_t *leaf_nodes = data<int32_t>(leaf_node), *leaf_counts = data<int32_t>(num_leaves);
  const float *logps = data<float>(logp), *values = data<float>(value);
  const float *leaf_logps = data<float>(leaf_logp), *leaf_scores = data<float>(leaf_score);
  int32_t *to_node = data<int32_t>(out_node), *to_count = data<int32_t>(out_count);
  float *to_logp = data<float>(out_logp), *to_score = data<float>(out_score);

  torch::stable::parallel_for(0, batch, 4, [&](int64_t first, int64_t last) {
    std::vector<Candidate> found;
    std::vector<int32_t> evaluated;
    for (int64_t b = first; b < last; ++b) {
      found.clear();
      evaluated.clear();
      const int64_t base = b * capacity, end = base + std::min<int64_t>(std::max(sizes[b], 0), capacity);
      for (int64_t s = base; s < end; ++s) {
        if (depths[s] != length) continue;
        found.push_back({0, leaf_rank(values[s], logps[s], logp_weight), nodes[s], logps[s], nodes[s]});
        evaluated.push_back(nodes[s]);
      }
      std::sort(evaluated.begin(), evaluated.end());
      for (int64_t s = base; s < end; ++s) {
        const int64_t count = std::min<int64_t>(leaf_counts[s], slots);
        for (int64_t i = s * slots; i < s * slots + count; ++i) {
          const int32_t leaf = leaf_nodes[i];
          if (std::binary_search(evaluated.begin(), evaluated.end(), leaf)) continue;
          const bool forced = forced_first && leaf_counts[s] == 1;
          found.push_back({forced ? 0 : 1, leaf_scores[i], forced ? leaf : nodes[s], leaf_logps[i], leaf});
        }
      }
      const int64_t count = std::min<int64_t>(k, int64_t(found.size()));
      std::partial_sort(found.begin(), found.begin() + count, found.end());
      for (int64_t i = 0; i < k; ++i) {
        to_node[b * k + i] = i < count ? found[i].node : -1;
        to_logp[b * k + i] = i < count ? found[i].logp : -kInf;
        to_score[b * k + i] = i < count ? found[i].score : -kInf;
      }
      to_count[b] = int32_t(count);
    }
  });
  return {out_node, out_logp, out_score, out_count};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vstar_ops, CPU, m) {
  m.impl("ved_select", TORCH_BOX(&ved_select));
  m.impl("ved_insert", TORCH_BOX(&ved_insert));
  m.impl("ved_candidates", TORCH_BOX(&ved_candidates));
}

}  // namespace vstar
