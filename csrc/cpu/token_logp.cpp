// token_logp and its gradient on the CPU.
//
// Over the whole vocabulary a task is a block of a row's columns, in the first-level cache between the search for
// its maximum and the sums; blocks are merged in order, so the partition over threads does not show. Over a trie's
// legal children a task is a row, and its few logits are gathered. The gradient is written once, block by block,
// from the row's two saved numbers; then the entries of the targets, in double, over it.

#include "torch/token_logp.h"

#include <cmath>
#include <vector>

#include "cpu/simd.h"
#include "torch/cpu.h"

namespace vstar {
namespace {

constexpr float kInf = INFINITY;
constexpr int64_t kBlock = 4096;   // columns
constexpr int64_t kGrain = 16384;  // logits that are worth another thread

// A row and its place [b, w] in the batch.
struct LogitRow {
  const LogitRows& a;
  const int64_t r, b, w;

  LogitRow(const LogitRows& args, int64_t row) : a(args), r(row), b(row / args.width), w(row % args.width) {}

  const char* from(int64_t column) const { return a.logits.address(b, w, column); }
  int64_t target(int64_t t) const { return a.target.at(b, w, t); }
  EdgeRange edges() const { return a.trie.edges_within(a.node.at(b, w), a.columns); }
};

void store_statistics(const TokenLogpArgs& a, int64_t r, const SoftmaxSums& sums) {
  const double log_mass = std::log(sums.mass);
  a.top[r] = sums.top;
  a.log_mass[r] = float(log_mass);
  a.entropy[r] = float(std::max(0.0, log_mass - sums.weighted / sums.mass));
}

// The log-probabilities of a row's targets; legal(column) is that of a column of the vocabulary.
template <class Legal>
void store_targets(const TokenLogpArgs& a, const LogitRow& row, const Legal& legal) {
  for (int64_t t = 0; t < a.targets; ++t) {
    const int64_t target = row.target(t);
    float logp = target < 0 ? 0.0f : -kInf;
    if (target >= 0 && target < a.columns) logp = legal(target);
    a.logp[row.r * a.targets + t] = logp;
  }
}

// The sums of blocks as if they were one.
SoftmaxSums merged(const SoftmaxSums* blocks, int64_t count, InverseTemperature inv_temperature) {
  SoftmaxSums all{-kInf, 0, 0};
  for (int64_t i = 0; i < count; ++i) all.top = std::max(all.top, blocks[i].top);
  if (all.top == -kInf) return {-kInf, 1, 0};
  for (int64_t i = 0; i < count; ++i) {
    if (blocks[i].mass == 0) continue;
    const double below = (double(blocks[i].top) - double(all.top)) * inv_temperature;
    const double scale = std::exp(below);
    if (scale == 0) continue;  // `below` may be -inf
    all.mass += scale * blocks[i].mass;
    all.weighted += scale * (blocks[i].weighted + below * blocks[i].mass);
  }
  return all;
}

// body(row, block, first column, columns) for all blocks of all rows.
template <class Body>
void for_blocks(const Cpu& device, const LogitRows& a, int64_t blocks, const Body& body) {
  const int64_t columns = std::min(a.columns, kBlock);
  device.parallel_for(a.rows() * blocks, kGrain, columns, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t begin = i % blocks * kBlock;
      body(LogitRow(a, i / blocks), i, begin, std::min(kBlock, a.columns - begin));
    }
  });
}

// body(first row, last row), over the children of the rows' nodes.
template <class Body>
void for_legal_rows(const Cpu& device, const LogitRows& a, const Body& body) {
  device.parallel_for(a.rows(), kGrain, std::min<int64_t>(a.max_children, 256) + a.targets + 16, body);
}

void whole_vocabulary(const Cpu& device, const TokenLogpArgs& a) {
  const TypedLoops& loops = simd().typed[int(a.logits.type)];
  const int64_t blocks = std::max<int64_t>(1, (a.columns + kBlock - 1) / kBlock);
  std::vector<SoftmaxSums> sums(a.rows() * blocks);
  for_blocks(device, a, blocks, [&](const LogitRow& row, int64_t i, int64_t begin, int64_t n) {
    sums[i] = loops.block_softmax(row.from(begin), a.logits.stride[2], n, a.inv_temperature);
  });
  for (int64_t r = 0; r < a.rows(); ++r) {
    const LogitRow row(a, r);
    store_statistics(a, r, merged(sums.data() + r * blocks, blocks, a.inv_temperature));
    store_targets(a, row, [&](int64_t column) {
      const float z = clean(a.logits.at(row.b, row.w, column));
      return z > -kInf ? (z - a.top[r]) * a.inv_temperature - a.log_mass[r] : -kInf;
    });
  }
}

void legal_children(const Cpu& device, const TokenLogpArgs& a) {
  const TypedLoops& loops = simd().typed[int(a.logits.type)];
  for_legal_rows(device, a, [&](int64_t first, int64_t last) {
    std::vector<float> d;
    for (int64_t r = first; r < last; ++r) {
      const LogitRow row(a, r);
      const EdgeRange range = row.edges();
      const int32_t* const tokens = a.trie.token + range.begin;
      PrefixRow prefix{};
      prefix.logits = row.from(0);
      prefix.token = tokens;
      prefix.children = range.end - range.begin;
      prefix.sums = {-kInf, 1, 0};
      const int64_t n = prefix.children;
      if (int64_t(d.size()) < n + 16) d.resize(n + 16);
      const AliveNodes alive = a.trie.alive_of(row.b);
      if (n > 0) loops.legal_softmaxes(&prefix, 1, a.logits.stride[2], a.inv_temperature, alive, d.data());
      store_statistics(a, r, prefix.sums);
      store_targets(a, row, [&](int64_t column) {
        const int32_t* found = std::lower_bound(tokens, tokens + n, int32_t(column));
        const bool legal = found != tokens + n && *found == column && d[found - tokens] > -kInf;
        return legal ? d[found - tokens] - a.log_mass[r] : -kInf;
      });
    }
  });
}

// What a row's gradient is made of: p_v (slope + curve log p_v), and the targets' own on top.
struct Coefficients {
  double slope = 0, curve = 0;
  bool none() const { return slope == 0 && curve == 0; }
};

class Backward {
 public:
  explicit Backward(const TokenLogpBackwardArgs& args) : a(args), coefficients_(args.rows()) {
    for (int64_t r = 0; r < a.rows(); ++r) {
      const LogitRow row(a, r);
      Coefficients& c = coefficients_[r];
      for (int64_t t = 0; t < a.targets; ++t) c.slope -= weight(row, t);
      if (a.grad_entropy) {
        c.curve = -double(a.grad_entropy.at(row.b, row.w));
        c.slope += c.curve * a.entropy_of(r);
      }
    }
  }

  template <class T>
  void dense(const Cpu& device, T* out) const {
    const TypedLoops& loops = simd().typed[int(a.logits.type)];
    const int64_t blocks = (a.columns + kBlock - 1) / kBlock;
    for_blocks(device, a, blocks, [&](const LogitRow& row, int64_t, int64_t begin, int64_t n) {
      T* to = out + row.r * a.columns + begin;
      if (coefficients_[row.r].none()) {
        memset(static_cast<void*>(to), 0, n * sizeof(T));
      } else if (a.divided_last()) {
        for (int64_t i = 0; i < n; ++i) put(entry(row.r, a.logits.at(row.b, row.w, begin + i)), to + i);
      } else {
        loops.softmax_gradient(row.from(begin), a.logits.stride[2], n, a.inv_temperature, of_row(row.r), to);
      }
    });
    for (int64_t r = 0; r < a.rows(); ++r) store_targets(LogitRow(a, r), out + r * a.columns);
  }

  // `out` is zero.
  template <class T>
  void sparse(const Cpu& device, T* out) const {
    const TypedLoops& loops = simd().typed[int(a.logits.type)];
    const TypedLoops& float_loops = simd().typed[int(FloatType::kFloat32)];
    for_legal_rows(device, a, [&](int64_t first, int64_t last) {
      std::vector<float> z, gradient;
      for (int64_t r = first; r < last; ++r) {
        const LogitRow row(a, r);
        T* to = out + r * a.columns;
        if (!coefficients_[r].none()) {
          const EdgeRange range = row.edges();
          const int64_t n = range.end - range.begin;
          const int32_t* tokens = a.trie.token + range.begin;
          if (int64_t(z.size()) < n) {
            z.resize(n);
            gradient.resize(n);
          }
          loops.gather_scaled(row.from(0), a.logits.stride[2], tokens, n, 1.0f, z.data());
          if (const AliveNodes alive = a.trie.alive_of(row.b)) {
            for (int64_t i = 0; i < n; ++i) z[i] = alive.has(range.begin + i + 1) ? z[i] : -kInf;
          }
          if (a.divided_last()) {
            for (int64_t i = 0; i < n; ++i) gradient[i] = entry(r, z[i]);
          } else {
            float_loops.softmax_gradient(z.data(), 1, n, a.inv_temperature, of_row(r), gradient.data());
          }
          for (int64_t i = 0; i < n; ++i) put(gradient[i], to + tokens[i]);
        }
        store_targets(row, to);
      }
    });
  }

 private:
  RowGradient of_row(int64_t r) const {
    const Coefficients& c = coefficients_[r];
    return {a.top[r], a.log_mass[r], float(c.slope / a.temperature), float(c.curve / a.temperature)};
  }

  // One entry of softmax_gradient, in double.
  float entry(int64_t r, float z) const {
    const Coefficients& c = coefficients_[r];
    const double below = double(clean(z)) - double(a.top[r]);
    const double logp = below * a.inv_temperature - double(a.log_mass[r]), p = std::exp(logp);
    return p > 0 ? float(p * (c.slope + c.curve * logp) / a.temperature) : 0.0f;  // NaN where all logits are -inf
  }

  // A valid target: padding has no column, and at -inf there is no gradient.
  bool valid(const LogitRow& row, int64_t t) const {
    return row.target(t) >= 0 && a.logp[row.r * a.targets + t] > -kInf;
  }
  double weight(const LogitRow& row, int64_t t) const {
    return a.grad_logp && valid(row, t) ? a.grad_logp.at(row.b, row.w, t) : 0;
  }

  // Overwrite the entries of a row that are targets.
  template <class T>
  void store_targets(const LogitRow& row, T* to) const {
    for (int64_t t = 0; t < a.targets; ++t) {
      if (!valid(row, t)) continue;
      const int64_t column = row.target(t);
      const auto same = [&](int64_t u) { return row.target(u) == column; };
      int64_t u = 0;
      while (u < t && !same(u)) ++u;
      if (u < t) continue;  // done with an earlier one
      double own = 0;
      for (; u < a.targets; ++u) own += same(u) ? weight(row, u) : 0;
      const double logp = a.logp[row.r * a.targets + t];
      const Coefficients& c = coefficients_[row.r];
      put(float((std::exp(logp) * (c.slope + c.curve * logp) + own) / a.temperature), to + column);
    }
  }

  const TokenLogpBackwardArgs& a;
  std::vector<Coefficients> coefficients_;
};

}  // namespace

void run(const Cpu& device, const TokenLogpArgs& a) {
  if (a.node) {
    legal_children(device, a);
  } else {
    whole_vocabulary(device, a);
  }
}

void run(const Cpu& device, const TokenLogpBackwardArgs& a) {
  const Backward backward(a);
  dispatch(a.logits.type, [&](auto zero) {
    auto* const out = static_cast<decltype(zero)*>(a.gradient);
    if (a.node) {
      backward.sparse(device, out);
    } else {
      backward.dense(device, out);
    }
  });
}

}  // namespace vstar

VSTAR_REGISTER(Cpu, token_logp);
VSTAR_REGISTER(Cpu, token_logp_backward);
