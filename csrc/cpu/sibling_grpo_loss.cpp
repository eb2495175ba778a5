// sibling_grpo_loss on the CPU: a request at a time, once to count its tokens and once for everything else.
//
// Whatever a term is divided by is known after the first pass, so the second writes the gradient along with the
// sums. Sums are double: of a request in the order of its tokens, of the batch in the order of the requests.

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "cpu/torch_glue.h"

namespace vstar {
namespace {

enum LossType { kGrpo, kBnpo, kDrGrpo };
enum Divergence { kK1, kK2, kK3 };

struct Options {
  double global_weight, sibling_weight, kl_weight;
  float low, high;  // of the ratio
  int64_t divergence;
  bool by_node;
  int64_t loss_type;
};

// An array [B, G, L] of any strides, which may be absent, a request at a time.
template <class T>
class Requests {
 public:
  explicit Requests(const std::optional<Tensor>& tensor) : data_(tensor ? data<T>(*tensor) : nullptr) {
    for (int i = 0; data_ && i < 3; ++i) strides_[i] = tensor->stride(i);
  }
  explicit operator bool() const { return data_ != nullptr; }
  T at(int64_t b, int64_t g, int64_t d) const { return data_[b * strides_[0] + g * strides_[1] + d * strides_[2]]; }

 private:
  const T* data_;
  int64_t strides_[3] = {};
};

// Floats [B, G, L] of any dtype and strides, copied a request at a time.
class FloatRequests {
 public:
  explicit FloatRequests(const std::optional<Tensor>& tensor) {
    if (!tensor) return;
    floats_.emplace(*tensor);
    for (int i = 0; i < 3; ++i) {
      sizes_[i] = tensor->size(i);
      strides_[i] = tensor->stride(i);
    }
  }
  explicit operator bool() const { return floats_.has_value(); }
  void copy(int64_t b, float* out) const {
    const int64_t length = sizes_[2], first = b * strides_[0];
    if (strides_[1] == length * strides_[2]) {  // one run
      floats_->each(first, strides_[2], sizes_[1] * length, [&](int64_t i, float x) { out[i] = x; });
      return;
    }
    for (int64_t g = 0; g < sizes_[1]; ++g) {
      floats_->each(first + g * strides_[1], strides_[2], length, [&](int64_t i, float x) { out[g * length + i] = x; });
    }
  }

 private:
  std::optional<Floats> floats_;
  int64_t sizes_[3] = {}, strides_[3] = {};
};

struct Counts {
  int64_t tokens = 0, sequences = 0;
};

struct Sums {
  double over_sequences = 0, over_nodes = 0, divergence = 0, ratio = 0;
  int64_t global_cut = 0, sibling_cut = 0, valid = 0;
};

// PPO's bound of ratio * a and its derivative by the log-probability.
struct Surrogate {
  float value, slope;
  bool cut;
  Surrogate(float ratio, float clipped, float a) : value(ratio * a), slope(ratio * a), cut(clipped * a < ratio * a) {
    if (!cut) return;
    value = clipped * a;
    slope = 0;
  }
};

using Result = std::tuple<Tensor, Tensor, Tensor>;

Result sibling_grpo_loss(
    Tensor logp, std::optional<Tensor> old_logp, std::optional<Tensor> ref_logp, Tensor advantage, Tensor valid,
    Tensor count, Tensor group_advantage, std::optional<Tensor> mask, std::optional<Tensor> depth_weight,
    double global_weight, double sibling_weight, double kl_weight, double clip_low, double clip_high, int64_t kl, bool by_node,
    int64_t loss_type) {
  const int64_t batch = logp.size(0), group = logp.size(1), length = logp.size(2), size = group * length;
  const Options o{global_weight, sibling_weight, kl_weight, float(1 - clip_low), float(1 + clip_high), kl, by_node, loss_type};
  Tensor loss = new_tensor<float>({}), terms = new_tensor<float>({7}), gradient = new_tensor<float>({batch, group, length});
  float* const out = data<float>(gradient);
  const FloatRequests logps(logp), olds(old_logp), refs(ref_logp);
  const Requests<float> advantages(advantage);
  const Requests<bool> valids(valid), present(mask);
  const Requests<int32_t> counts(count);
  const Floats over_group(group_advantage);
  const int64_t group_strides[] = {group_advantage.stride(0), group_advantage.stride(1)};
  std::vector<double> depth(length, 1.0);
  for (int64_t d = 0; depth_weight && d < length; ++d) depth[d] = data<float>(*depth_weight)[d * depth_weight->stride(0)];

  const int64_t grain = std::max<int64_t>(1, 2048 / std::max<int64_t>(1, size));
  std::vector<Counts> there(batch);
  std::vector<int64_t> lengths(batch * group, length);  // tokens of each sequence
  torch::stable::parallel_for(0, batch, grain, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      for (int64_t g = 0; g < group; ++g) {
        int64_t& n = lengths[b * group + g];
        for (int64_t d = 0; present && d < length; ++d) n -= !present.at(b, g, d);
        there[b].tokens += n;
        there[b].sequences += n > 0;
      }
    }
  });
  Counts all;
  for (const Counts& c : there) {
    all.tokens += c.tokens;
    all.sequences += c.sequences;
  }
  const auto over = [](int64_t n) { return 1.0 / double(std::max<int64_t>(n, 1)); };

  std::vector<Sums> sums(batch);
  torch::stable::parallel_for(0, batch, grain, [&](int64_t first, int64_t last) {
    std::vector<float> x(size), old(size), ref(size), ratio(size, 1.0f), ascent(size);
    for (int64_t b = first; b < last; ++b) {
      Sums& s = sums[b];
      logps.copy(b, x.data());
      if (olds) {
        olds.copy(b, old.data());
        simd().exp_differences(x.data(), old.data(), size, ratio.data());
      }
      if (refs) {
        refs.copy(b, ref.data());
        if (o.divergence == kK3) simd().exp_differences(ref.data(), x.data(), size, ascent.data());
      }
      const double node_weight = o.loss_type == kGrpo   ? over(there[b].sequences) * over(batch)
                                 : o.loss_type == kBnpo ? over(all.sequences)
                                                        : over(batch * group);
      for (int64_t g = 0; g < group; ++g) {
        const double token_weight = o.loss_type == kGrpo   ? over(lengths[b * group + g]) * over(all.sequences)
                                    : o.loss_type == kBnpo ? over(all.tokens)
                                                           : over(batch * size);
        const float a = over_group.at(b * group_strides[0] + g * group_strides[1]);
        double over_sequence = 0, apart = 0;
        for (int64_t d = 0; d < length; ++d) {
          const int64_t i = g * length + d;
          float& slope = out[b * size + i];
          slope = 0;
          if (present && !present.at(b, g, d)) continue;
          const float r = ratio[i], clipped = std::min(std::max(r, o.low), o.high);
          const Surrogate whole(r, clipped, a);
          double up = o.global_weight * token_weight * whole.slope;
          over_sequence += whole.value;
          s.global_cut += whole.cut;
          s.ratio += r;
          if (valids.at(b, g, d)) {
            double weight = node_weight * depth[d];
            if (o.by_node) weight *= over(counts.at(b, g, d));
            const Surrogate node(r, clipped, advantages.at(b, g, d));
            up += o.sibling_weight * weight * node.slope;
            s.over_nodes += weight * node.value;
            s.sibling_cut += node.cut;
            ++s.valid;
          }
          if (refs) {
            const float difference = ref[i] - x[i];
            double rise = difference, distance = -difference;
            if (o.divergence == kK2) distance = 0.5 * difference * difference;
            if (o.divergence == kK3) {
              // e^d - 1 - d of a small d has no digits left in float; its series has them all.
              const double series = difference * difference * (0.5 + difference * (1 / 6.0 + difference / 24.0));
              const bool small = std::fabs(difference) < 0.03f;
              rise = small ? difference + series : double(ascent[i]) - 1;
              distance = small ? series : rise - difference;
            }
            apart += distance;
            up -= o.kl_weight * token_weight * (o.divergence == kK1 ? 1 : -rise);
          }
          slope = float(0 - up);
        }
        s.over_sequences += token_weight * over_sequence;
        s.divergence += token_weight * apart;
      }
    }
  });

  Sums total;
  for (const Sums& s : sums) {
    total.over_sequences += s.over_sequences;
    total.over_nodes += s.over_nodes;
    total.divergence += s.divergence;
    total.ratio += s.ratio;
    total.global_cut += s.global_cut;
    total.sibling_cut += s.sibling_cut;
    total.valid += s.valid;
  }
  *data<float>(loss) = float(o.kl_weight * total.divergence - o.global_weight * total.over_sequences - o.sibling_weight * total.over_nodes);
  const double results[] = {
      total.over_sequences,
      total.over_nodes,
      total.divergence,
      total.ratio * over(all.tokens),
      double(total.global_cut) * over(all.tokens),
      double(total.sibling_cut) * over(total.valid),
      double(total.valid) * over(all.tokens),
  };
  for (int i = 0; i < 7; ++i) data<float>(terms)[i] = float(results[i]);
  return {loss, terms, gradient};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vstar_ops, CPU, m) { m.impl("sibling_grpo_loss", TORCH_BOX(&sibling_grpo_loss)); }

}  // namespace vstar
