// sibling_grpo_loss on the CPU: one request at a time, once to count its tokens and once for everything else.
//
// Whatever a term is divided by is known after the first pass, so the second writes the gradient along with the
// sums. They are added up in an order that depends on the size of a request alone, and then in that of the requests.

#include "torch/sibling_grpo_loss.h"

#include <algorithm>
#include <array>
#include <utility>
#include <vector>

#include "cpu/simd.h"
#include "torch/cpu.h"

namespace vstar {
namespace {

using Sums = std::array<double, kNumLossSums>;

class Loss {
 public:
  Loss(const Cpu& device, const SiblingGRPOLossArgs& args)
      : device_(device), a_(args), size_(a_.group * a_.length), tokens_(a_.batch * a_.group, a_.length),
        count_(a_.batch), sums_(a_.batch) {}

  void run() {
    const auto for_requests = [&](const auto& body) { device_.parallel_for(a_.batch, 2048, size_, body); };
    for_requests([&](int64_t first, int64_t last) {
      for (int64_t b = first; b < last; ++b) count_tokens(b);
    });
    for (const TokenCounts& request : count_) {
      own_.tokens += request.tokens;
      own_.sequences += request.sequences;
    }
    all_ = loss_counts(a_, own_);
    for_requests([&](int64_t first, int64_t last) {
      Scratch scratch(size_);
      for (int64_t b = first; b < last; ++b) {
        if (prepare(b, scratch)) {
          plain_request(b, scratch);
        } else {
          request(b, scratch);
        }
      }
    });
    Sums total{};
    for (const Sums& sums : sums_) {
      for (size_t i = 0; i < sums.size(); ++i) total[i] += sums[i];
    }
    store_loss(a_, total.data(), own_.tokens);
  }

 private:
  struct Scratch {
    explicit Scratch(int64_t size) {
      for (auto* x : {&logp, &old, &ref, &ratio, &difference, &exp_difference, &group_advantage, &advantage, &gradient}) {
        x->resize(size + 16);  // loops work on whole vectors
      }
      weight.resize(size + 16);
      node_weight.resize(size + 16);
    }
    // [G, L]; those of the last two lines only of plain terms
    std::vector<float> logp, old, ref, ratio, difference, exp_difference;
    std::vector<float> group_advantage, advantage, gradient;
    std::vector<double> weight, node_weight;
    int64_t valid;
  };

  void count_tokens(int64_t b) {
    for (int64_t g = 0; g < a_.group; ++g) {
      int64_t& n = tokens_[b * a_.group + g];
      for (int64_t d = 0; a_.mask && d < a_.length; ++d) n -= !a_.mask.at(b, g, d);
      count_[b].tokens += n;
      count_[b].sequences += n > 0;
    }
  }

  // The numbers of a request, as floats.
  void copy(const FloatView& from, int64_t b, float* to) const {
    if (from.stride[1] == a_.length * from.stride[2]) {  // one run
      from.each(from.offset(b), from.stride[2], size_, [&](int64_t i, float x) { to[i] = x; });
      return;
    }
    for (int64_t g = 0; g < a_.group; ++g, to += a_.length) {
      from.each(from.offset(b, g), from.stride[2], a_.length, [&](int64_t d, float x) { to[d] = x; });
    }
  }

  // Whether log-ratios of two policies are well within what fits into float.
  bool all_fit(const std::vector<float>& x, const std::vector<float>& y) const {
    const float most = 0.999f * float(most_log_ratio(a_));
    int32_t n = 0;
    for (int64_t i = 0; i < size_; ++i) n += !(fabsf(x[i] - y[i]) <= most);
    return n == 0;
  }
  // On policy the old policy is this one.
  const std::vector<float>& old_logp(const Scratch& s) const { return a_.old_logp ? s.old : s.logp; }
  // Whether advantages fit too, and the weights of levels are finite.
  bool advantages_fit(const Scratch& s) const {
    int32_t n = 0;
    for (int64_t d = 0; d < a_.length; ++d) n += !std::isfinite(a_.depth_weight.at_or(1.0f, d));
    for (int64_t i = 0; i < size_; ++i) n += !fits_float(s.group_advantage[i]) + !fits_float(s.advantage[i]);
    return n == 0;
  }

  // Read a request. Returns whether it has only plain terms: without dual or joint clipping, all finite.
  bool prepare(int64_t b, Scratch& s) const {
    for (const auto& [from, to] : {std::pair(&a_.logp, &s.logp), {&a_.old_logp, &s.old}, {&a_.ref_logp, &s.ref}}) {
      if (*from) copy(*from, b, to->data());
    }
    for (int64_t g = 0, i = 0; a_.mask && g < a_.group; ++g) {  // what takes no part decides nothing
      for (int64_t d = 0; d < a_.length; ++d, ++i) {
        if (!a_.mask.at(b, g, d)) s.logp[i] = s.old[i] = s.ref[i] = 0;
      }
    }
    if (a_.old_logp) {
      simd().exp_differences(s.logp.data(), s.old.data(), size_, s.ratio.data());
    } else {
      std::fill_n(s.ratio.begin(), size_, 1.0f);
    }
    bool plain = !a_.joint && a_.cap == INFINITY && !a_.averages_ratios() && all_fit(s.logp, old_logp(s));
    if (a_.ref_logp) {
      for (int64_t i = 0; i < size_; ++i) s.difference[i] = s.ref[i] - s.logp[i];
      plain = plain && all_fit(s.ref, s.logp);
      if (a_.divergence == kK3) simd().exp_differences(s.ref.data(), s.logp.data(), size_, s.exp_difference.data());
    }
    if (!plain) return false;
    weigh(b, s);
    return advantages_fit(s);
  }

  // Weights and advantages of all tokens.
  void weigh(int64_t b, Scratch& s) const {
    const double weight_of_node = node_weight(a_, count_[b].sequences, all_);
    s.valid = 0;
    for (int64_t g = 0, i = 0; g < a_.group; ++g) {
      const double weight = token_weight(a_, tokens_[b * a_.group + g], all_);
      const float group_advantage = a_.group_advantage.at(b, g);
      for (int64_t d = 0; d < a_.length; ++d, ++i) {
        LossToken token{};
        if (a_.mask.at(b, g, d)) {
          token = loss_token(a_, b, g, d, group_advantage, weight, weight_of_node);
        } else {
          s.ratio[i] = 0;
        }
        s.weight[i] = token.weight;
        s.node_weight[i] = token.node_weight;
        s.group_advantage[i] = token.global;
        s.advantage[i] = token.sibling;
        s.valid += token.valid;
      }
    }
  }

  // Of a sequence with so many tokens.
  double mean_log_ratio(int64_t b, int64_t g, int64_t tokens) const {
    double sum = 0;
    for (int64_t d = 0; d < a_.length; ++d) {
      if (a_.mask.at(b, g, d)) sum += double(a_.logp.at(b, g, d)) - double(a_.old_logp.at(b, g, d));
    }
    return sum / double(tokens);
  }

  TokenTerms terms(const LossToken& token, int64_t i, const Scratch& s, double average) const {
    const double log_ratio =
        a_.averages_ratios() ? average : double(s.logp[i]) - double(old_logp(s)[i]);
    const double difference = a_.ref_logp ? double(s.ref[i]) - double(s.logp[i]) : 0;
    if (fits_float(a_, log_ratio, difference) && fits_float(token.global) && fits_float(token.sibling)) {
      const Ratios<float> r{s.ratio[i], s.difference[i], false, false};
      return token_terms(a_, token, r, [&] { return s.exp_difference[i]; });
    }
    const Ratios<double> exact = exact_ratios(a_, log_ratio, difference);
    return token_terms(a_, token, exact, [&] { return exp(exact.difference); });
  }

  void request(int64_t b, const Scratch& scratch) {
    const double weight_of_node = node_weight(a_, count_[b].sequences, all_);
    Sums sums{};
    for (int64_t g = 0; g < a_.group; ++g) {
      const int64_t tokens = tokens_[b * a_.group + g];
      const double weight = token_weight(a_, tokens, all_);
      const double average = a_.averages_ratios() ? mean_log_ratio(b, g, tokens) : 0;
      const float group_advantage = a_.group_advantage.at(b, g);
      double global = 0, kl = 0;
      for (int64_t d = 0; d < a_.length; ++d) {
        float& gradient = a_.gradient[b * size_ + g * a_.length + d];
        gradient = 0;
        if (!a_.mask.at(b, g, d)) continue;
        const LossToken token = loss_token(a_, b, g, d, group_advantage, weight, weight_of_node);
        const TokenTerms t = terms(token, g * a_.length + d, scratch, average);
        gradient = t.gradient;
        global += t.global;
        kl += t.kl;
        sums[kJoint] += t.joint;
        sums[kRatio] += t.ratio;
        sums[kGlobalClipped] += t.global_clipped;
        if (!token.valid) continue;
        sums[kSibling] += t.sibling;
        sums[kSiblingClipped] += t.sibling_clipped;
        sums[kValid] += 1;
      }
      sums[kGlobal] += weight * global;
      sums[kKl] += weight * kl;
    }
    sums_[b] = sums;
  }

  // The same of plain terms, many tokens at a time.
  void plain_request(int64_t b, Scratch& s) {
    const PlainLoss loss{
        s.ratio.data(), s.group_advantage.data(), s.advantage.data(), s.difference.data(), s.exp_difference.data(),
        s.weight.data(), s.node_weight.data(), float(a_.low), float(a_.high), a_.global_weight, a_.sibling_weight,
        a_.kl_weight, !a_.ref_logp ? 0 : a_.divergence == kK1 ? 1 : a_.divergence == kK2 ? 2 : 3};
    PlainLossSums sums;
    simd().loss_terms(loss, size_, s.gradient.data(), sums);
    std::copy_n(s.gradient.begin(), size_, a_.gradient + b * size_);
    sums_[b][kGlobal] = sums.global;
    sums_[b][kSibling] = sums.sibling;
    sums_[b][kKl] = sums.kl;
    sums_[b][kRatio] = sums.ratio;
    sums_[b][kGlobalClipped] = double(sums.global_clipped);
    sums_[b][kSiblingClipped] = double(sums.sibling_clipped);
    sums_[b][kValid] = double(s.valid);
  }

  const Cpu& device_;
  const SiblingGRPOLossArgs& a_;
  const int64_t size_;           // tokens of a request
  std::vector<int64_t> tokens_;  // [B, G] of a sequence
  std::vector<TokenCounts> count_;
  TokenCounts own_{};
  LossCounts all_{};
  std::vector<Sums> sums_;
};

}  // namespace

void run(const Cpu& device, const SiblingGRPOLossArgs& a) { Loss(device, a).run(); }

}  // namespace vstar

VSTAR_REGISTER(Cpu, sibling_grpo_loss);
