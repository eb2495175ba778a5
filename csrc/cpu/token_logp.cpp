// token_logp and its gradient on the CPU.
//
// Over the whole vocabulary a task is a block of a row's columns, in the first-level cache between the search for
// its maximum and the sums; blocks are merged in order, so the partition over threads does not show. Over a trie's
// legal children a task is a row, and its few logits are gathered. The gradient is written once, block by block,
// from the row's two saved numbers; then the entries of the targets, in double, over it.

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <tuple>
#include <vector>

#include "common/trie.h"
#include "cpu/torch_glue.h"

namespace vstar {
namespace {

constexpr float kInf = INFINITY;
constexpr int64_t kBlock = 4096;   // columns
constexpr int64_t kGrain = 16384;  // logits that are worth another thread

float inverse(double temperature) { return float(std::min(1.0 / temperature, 3e38)); }

// Floats [B, W] or [B, W, T] of any strides, by row number r = b * W + w.
class RowFloats {
 public:
  explicit RowFloats(const Tensor& tensor)
      : floats_(tensor),
        width_(std::max<int64_t>(tensor.size(1), 1)),
        strides_{tensor.stride(0), tensor.stride(1), tensor.dim() > 2 ? tensor.stride(2) : 0} {}
  float at(int64_t r, int64_t t = 0) const {
    return floats_.at(r / width_ * strides_[0] + r % width_ * strides_[1] + t * strides_[2]);
  }

 private:
  Floats floats_;
  int64_t width_, strides_[3];
};

class Problem {
 public:
  Problem(
      const Tensor& logits, const Tensor& targets, const std::optional<Tensor>& offset,
      const std::optional<Tensor>& token, const std::optional<Tensor>& node, double temperature)
      : width(logits.size(1)),
        rows(logits.size(0) * width),
        columns(logits.size(2)),
        number(targets.size(2)),
        type(float_type(logits)),
        stride(logits.stride(2)),
        temperature(temperature),
        loops(simd().typed[int(type)]),
        logits_(static_cast<const char*>(logits.const_data_ptr())),
        batch_stride_(logits.stride(0) * element_size(type)),
        width_stride_(logits.stride(1) * element_size(type)),
        targets_(targets),
        target_strides_{targets.stride(0), targets.stride(1), targets.stride(2)} {
    if (!node) return;
    trie_ = {data<int32_t>(*offset), data<int32_t>(*token), offset->numel() - 1, token->numel()};
    node_.emplace(*node);
    node_strides_[0] = node->stride(0);
    node_strides_[1] = node->stride(1);
  }

  const int64_t width, rows, columns, number;  // number of targets a row
  const FloatType type;
  const int64_t stride;
  const double temperature;
  const TypedLoops& loops;

  bool legal() const { return node_.has_value(); }
  const char* row(int64_t r) const { return logits_ + r / width * batch_stride_ + r % width * width_stride_; }
  const char* row(int64_t r, int64_t column) const { return row(r) + column * stride * element_size(type); }
  int64_t target(int64_t r, int64_t t) const {
    return targets_.at(r / width * target_strides_[0] + r % width * target_strides_[1] + t * target_strides_[2]);
  }
  EdgeRange edges(int64_t r) const {
    return trie_.edges_within(node_->at(r / width * node_strides_[0] + r % width * node_strides_[1]), columns);
  }
  const int32_t* tokens(EdgeRange range) const { return trie_.token + range.begin; }
  float logit(int64_t r, int64_t column) const {
    switch (type) {
      case FloatType::kFloat32: return clean(reinterpret_cast<const float*>(row(r))[column * stride]);
      case FloatType::kBFloat16: return clean(to_float(reinterpret_cast<const BFloat16*>(row(r))[column * stride]));
      default: return clean(to_float(reinterpret_cast<const Float16*>(row(r))[column * stride]));
    }
  }

 private:
  const char* logits_;
  const int64_t batch_stride_, width_stride_;
  const Integers targets_;
  const int64_t target_strides_[3];
  TrieView trie_{};
  std::optional<Integers> node_;
  int64_t node_strides_[2] = {};
};

struct Outputs {
  float *logp, *entropy, *top, *log_mass;

  void statistics(int64_t r, const SoftmaxSums& sums) const {
    const double log_mass_ = std::log(sums.mass);
    top[r] = sums.top;
    log_mass[r] = float(log_mass_);
    entropy[r] = float(std::max(0.0, log_mass_ - sums.weighted / sums.mass));
  }
};

// The sums of blocks as if they were one.
SoftmaxSums merged(const SoftmaxSums* blocks, int64_t count, double inverse_temperature) {
  SoftmaxSums all{-kInf, 0, 0};
  for (int64_t i = 0; i < count; ++i) all.top = std::max(all.top, blocks[i].top);
  if (all.top == -kInf) return {-kInf, 1, 0};
  for (int64_t i = 0; i < count; ++i) {
    if (blocks[i].mass == 0) continue;
    const double below = (double(blocks[i].top) - double(all.top)) * inverse_temperature;
    const double scale = std::exp(below);
    if (scale == 0) continue;  // `below` may be -inf
    all.mass += scale * blocks[i].mass;
    all.weighted += scale * (blocks[i].weighted + below * blocks[i].mass);
  }
  return all;
}

void whole_vocabulary(const Problem& p, const Outputs& out) {
  const int64_t blocks = std::max<int64_t>(1, (p.columns + kBlock - 1) / kBlock);
  const float scale = inverse(p.temperature);
  std::vector<SoftmaxSums> sums(p.rows * blocks);
  torch::stable::parallel_for(0, p.rows * blocks, std::max<int64_t>(1, kGrain / std::clamp<int64_t>(p.columns, 1, kBlock)),
                              [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t begin = i % blocks * kBlock;
      sums[i] = p.loops.block_softmax(p.row(i / blocks, begin), p.stride, std::min(kBlock, p.columns - begin), scale);
    }
  });
  for (int64_t r = 0; r < p.rows; ++r) {
    out.statistics(r, merged(sums.data() + r * blocks, blocks, scale));
    for (int64_t t = 0; t < p.number; ++t) {
      const int64_t target = p.target(r, t);
      float logp = target < 0 ? 0.0f : -kInf;
      if (target >= 0 && target < p.columns) {
        const float z = p.logit(r, target);
        if (z > -kInf) logp = (z - out.top[r]) * scale - out.log_mass[r];
      }
      out.logp[r * p.number + t] = logp;
    }
  }
}

void legal_children(const Problem& p, const Outputs& out, int64_t max_children) {
  const float scale = inverse(p.temperature);
  const int64_t work = std::min<int64_t>(max_children, 256) + p.number + 16;
  torch::stable::parallel_for(0, p.rows, std::max<int64_t>(1, kGrain / work), [&](int64_t first, int64_t last) {
    std::vector<float> d;
    for (int64_t r = first; r < last; ++r) {
      const EdgeRange range = p.edges(r);
      const int64_t n = range.end - range.begin;
      const int32_t* tokens = p.tokens(range);
      Row row{};
      row.logits = p.row(r);
      row.token = tokens;
      row.children = n;
      row.sums = {-kInf, 1, 0};
      if (int64_t(d.size()) < n + 16) d.resize(n + 16);
      if (n > 0) p.loops.legal_softmaxes(&row, 1, p.stride, scale, d.data());
      out.statistics(r, row.sums);
      for (int64_t t = 0; t < p.number; ++t) {
        const int64_t target = p.target(r, t);
        float logp = target < 0 ? 0.0f : -kInf;
        if (target >= 0 && target < p.columns) {
          const int32_t* found = std::lower_bound(tokens, tokens + n, int32_t(target));
          if (found != tokens + n && *found == target) logp = d[found - tokens] - out.log_mass[r];
        }
        out.logp[r * p.number + t] = logp;
      }
    }
  });
}

using Result = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Result token_logp(
    Tensor logits, Tensor targets, std::optional<Tensor> offset, std::optional<Tensor> token,
    std::optional<Tensor> node, double temperature, int64_t max_children) {
  const Problem p(logits, targets, offset, token, node, temperature);
  const int64_t batch = logits.size(0);
  Tensor logp = new_tensor<float>({batch, p.width, p.number}), entropy = new_tensor<float>({batch, p.width});
  Tensor top = new_tensor<float>({batch, p.width}), log_mass = new_tensor<float>({batch, p.width});
  const Outputs out{data<float>(logp), data<float>(entropy), data<float>(top), data<float>(log_mass)};
  if (p.legal()) {
    legal_children(p, out, max_children);
  } else {
    whole_vocabulary(p, out);
  }
  return {logp, entropy, top, log_mass};
}

// What a row's gradient is made of: p_v (slope + curve log p_v), and the targets' own on top.
struct Coefficients {
  double slope = 0, curve = 0;
  bool none() const { return slope == 0 && curve == 0; }
};

class Backward {
 public:
  Backward(
      const Problem& problem, const std::optional<Tensor>& grad_logp, const std::optional<Tensor>& grad_entropy,
      const Tensor& logp, const Tensor& entropy, const Tensor& top, const Tensor& log_mass)
      : p_(problem), logp_(logp), top_(top), log_mass_(log_mass), coefficients_(problem.rows) {
    if (grad_logp) grad_.emplace(*grad_logp);
    std::optional<RowFloats> grad_h;
    if (grad_entropy) grad_h.emplace(*grad_entropy);
    const RowFloats h(entropy);
    for (int64_t r = 0; r < p_.rows; ++r) {
      Coefficients& c = coefficients_[r];
      for (int64_t t = 0; t < p_.number; ++t) c.slope -= weight(r, t);
      if (grad_h) {
        c.curve = -double(grad_h->at(r));
        c.slope += c.curve * h.at(r);
      }
    }
  }

  const Coefficients& coefficients(int64_t r) const { return coefficients_[r]; }
  RowGradient row(int64_t r) const {
    const Coefficients& c = coefficients_[r];
    return {top_.at(r), log_mass_.at(r), float(c.slope / p_.temperature), float(c.curve / p_.temperature)};
  }

  // Overwrite the entries of row r that are targets.
  template <class T>
  void targets(int64_t r, T* row) const {
    for (int64_t t = 0; t < p_.number; ++t) {
      if (!counts(r, t)) continue;
      const int64_t column = p_.target(r, t);
      const auto same = [&](int64_t u) { return p_.target(r, u) == column; };
      int64_t u = 0;
      while (u < t && !same(u)) ++u;
      if (u < t) continue;  // done with an earlier one
      double own = 0;
      for (; u < p_.number; ++u) own += same(u) ? weight(r, u) : 0;
      const double logp = logp_.at(r, t);
      const Coefficients& c = coefficients_[r];
      put(float((std::exp(logp) * (c.slope + c.curve * logp) + own) / p_.temperature), row + column);
    }
  }

 private:
  // A target that is there: padding has no column, and at -inf there is no gradient.
  bool counts(int64_t r, int64_t t) const { return p_.target(r, t) >= 0 && logp_.at(r, t) > -kInf; }
  double weight(int64_t r, int64_t t) const { return grad_ && counts(r, t) ? grad_->at(r, t) : 0; }

  const Problem& p_;
  std::optional<RowFloats> grad_;
  const RowFloats logp_, top_, log_mass_;
  std::vector<Coefficients> coefficients_;
};

// Memory of the system is zero already; pages that are not written are never fetched.
Tensor zeros(int64_t batch, int64_t width, int64_t columns, FloatType type, ScalarType dtype) {
  constexpr size_t kAlign = 64;
  const size_t bytes = size_t(batch * width * columns * element_size(type));
  char* const memory = static_cast<char*>(std::calloc(bytes + kAlign, 1));
  STD_TORCH_CHECK(memory != nullptr, "out of memory: ", bytes, " bytes for the gradient of the logits");
  char* const aligned = memory + (kAlign - reinterpret_cast<uintptr_t>(memory) % kAlign) % kAlign;
  const int64_t sizes[] = {batch, width, columns};
  const int64_t w = std::max<int64_t>(width, 1), v = std::max<int64_t>(columns, 1), strides[] = {w * v, v, 1};
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  return torch::stable::from_blob(aligned, {sizes, 3}, {strides, 3}, cpu, dtype, [memory](void*) { std::free(memory); });
}

template <class T>
void dense(const Problem& p, const Backward& backward, T* out) {
  const int64_t blocks = (p.columns + kBlock - 1) / kBlock;
  const float scale = inverse(p.temperature);
  torch::stable::parallel_for(0, p.rows * blocks, std::max<int64_t>(1, kGrain / std::clamp<int64_t>(p.columns, 1, kBlock)),
                              [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t r = i / blocks, begin = i % blocks * kBlock, n = std::min(kBlock, p.columns - begin);
      T* to = out + r * p.columns + begin;
      if (backward.coefficients(r).none()) {
        memset(static_cast<void*>(to), 0, n * sizeof(T));
      } else {
        p.loops.softmax_gradient(p.row(r, begin), p.stride, n, scale, backward.row(r), to);
      }
    }
  });
  for (int64_t r = 0; r < p.rows; ++r) backward.targets(r, out + r * p.columns);
}

template <class T>
void sparse(const Problem& p, const Backward& backward, int64_t max_children, T* out) {
  const float scale = inverse(p.temperature);
  const int64_t work = std::min<int64_t>(max_children, 256) + p.number + 16;
  torch::stable::parallel_for(0, p.rows, std::max<int64_t>(1, kGrain / work), [&](int64_t first, int64_t last) {
    std::vector<float> z, gradient;
    for (int64_t r = first; r < last; ++r) {
      if (backward.coefficients(r).none() && p.number == 0) continue;
      const EdgeRange range = p.edges(r);
      const int64_t n = range.end - range.begin;
      const int32_t* tokens = p.tokens(range);
      T* to = out + r * p.columns;
      if (!backward.coefficients(r).none()) {
        if (int64_t(z.size()) < n) {
          z.resize(n);
          gradient.resize(n);
        }
        p.loops.gather_scaled(p.row(r), p.stride, tokens, n, 1.0f, z.data());
        simd().typed[int(FloatType::kFloat32)].softmax_gradient(z.data(), 1, n, scale, backward.row(r), gradient.data());
        for (int64_t i = 0; i < n; ++i) put(gradient[i], to + tokens[i]);
      }
      backward.targets(r, to);
    }
  });
}

template <class T>
Tensor gradient(const Problem& p, const Backward& backward, int64_t batch, int64_t max_children, ScalarType dtype) {
  Tensor out = p.legal() ? zeros(batch, p.width, p.columns, p.type, dtype)
                         : new_tensor<T>({batch, p.width, p.columns});
  if (p.legal()) {
    sparse(p, backward, max_children, data<T>(out));
  } else {
    dense(p, backward, data<T>(out));
  }
  return out;
}

Tensor token_logp_backward(
    std::optional<Tensor> grad_logp, std::optional<Tensor> grad_entropy, Tensor logits, Tensor targets,
    std::optional<Tensor> offset, std::optional<Tensor> token, std::optional<Tensor> node, Tensor logp, Tensor entropy,
    Tensor top, Tensor log_mass, double temperature, int64_t max_children) {
  const Problem p(logits, targets, offset, token, node, temperature);
  const Backward backward(p, grad_logp, grad_entropy, logp, entropy, top, log_mass);
  const auto made = [&](auto zero) {
    return gradient<decltype(zero)>(p, backward, logits.size(0), max_children, logits.scalar_type());
  };
  switch (p.type) {
    case FloatType::kFloat32: return made(float{});
    case FloatType::kBFloat16: return made(BFloat16{});
    default: return made(Float16{});
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vstar_ops, CPU, m) {
  m.impl("token_logp", TORCH_BOX(&token_logp));
  m.impl("token_logp_backward", TORCH_BOX(&token_logp_backward));
}

}  // namespace vstar
