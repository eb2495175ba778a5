// expand_topk on the CPU, in one pass over the legal logits.
//
// A task is a request, or a block of a request's prefixes when there are fewer requests than threads would
// like. Its prefixes are scored in batches of a few thousand children, which stay in the cache: gather the
// legal logits, reduce maximum, mass and entropy, write the scores one row after the other. A first threshold
// comes from the maxima of k classes of the batch; what beats it goes to the selector, which keeps at least
// the k best and raises the threshold whenever it is full. Keys carry the enumeration order, so the
// selection follows the total order whatever the partition.
//
// Requests with few children, as on deep levels, are scored several at a time, so that the softmaxes of their short rows
// fill whole vectors, and all of their children are ranked.

#include "torch/expand_topk.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "cpu/memory.h"
#include "cpu/prefix_row.h"
#include "cpu/selector.h"
#include "torch/cpu.h"

namespace vstar {
namespace {

constexpr float kInf = INFINITY;
constexpr int64_t kWork = 2048;  // logits that are worth another thread: a few microseconds

// Consecutive requests whose prefixes have been looked up: several with few children each, or one.
struct Group {
  int64_t begin, end;
  bool few;
  std::vector<EdgeRange> ranges;  // [requests, W]
};

struct Scratch {
  Group group, next;
  std::vector<PrefixRow> rows;
  std::vector<float> d, extra, score;
  std::vector<int32_t> index;
  Selector selector;

  void reserve(int64_t children, int64_t prefixes) {
    if (int64_t(rows.size()) < prefixes) rows.resize(prefixes);
    const size_t size = size_t(children) + 16;  // loops work on whole vectors
    if (score.size() >= size) return;
    d.resize(size);
    extra.resize(size);
    score.resize(size);
    index.resize(size);
  }
};

class Expansion {
 public:
  explicit Expansion(const ExpandTopKArgs& args) : a(args) {}

  // Look up the children of n prefixes from `begin` on. Returns how many there are.
  int64_t look_up(int64_t b, int64_t begin, EdgeRange* ranges, int64_t n) const {
    int64_t total = 0;
    for (int64_t i = 0; i < n; ++i) {
      const EdgeRange range = a.trie.edges_within(a.node.at(b, begin + i), a.columns);
      ranges[i].begin = range.begin;  // not as a whole, which would be read again before it is written
      ranges[i].end = range.end;
      total += range.end - range.begin;
    }
    return total;
  }

  // Look up the first requests of [begin, last), as many as are scored together, and start to fetch their logits.
  void prepare(int64_t begin, int64_t last, Group& group) const {
    const bool alone = a.trie.alive_stride != 0;  // other requests have other nodes alive
    const auto ranges_of = [&](int64_t b) { return group.ranges.data() + (b - begin) * a.width; };
    group.begin = group.end = begin;
    int64_t size = 0;
    do {
      const size_t needed = size_t((group.end - begin + 1) * a.width);
      if (group.ranges.size() < needed) group.ranges.resize(needed);
      const int64_t children = look_up(group.end, 0, ranges_of(group.end), a.width);
      const bool few = children <= kMostRanked;
      if (!few && group.end > begin) break;  // it comes next
      group.few = few;
      size += 1 + a.width + children;
    } while (++group.end < last && group.few && !alone && size < kGroup);
    for (int64_t b = begin; b < group.end; ++b) prefetch(b, 0, ranges_of(b), a.width);
  }

  // Start to fetch what n prefixes from `begin` on need.
  void prefetch(int64_t b, int64_t begin, const EdgeRange* ranges, int64_t n) const {
    for (int64_t i = 0; i < n; ++i) prefetch(b, begin + i, ranges[i]);
  }

  // Leave the k best children of the n prefixes from `begin` on in the scratch's selector.
  void run(int64_t b, int64_t begin, const EdgeRange* ranges, int64_t n, Scratch& scratch) const {
    int64_t total = 0, widest = 0;
    for (int64_t i = 0; i < n; ++i) {
      total += ranges[i].end - ranges[i].begin;
      widest = std::max(widest, ranges[i].end - ranges[i].begin);
    }
    // At most `total` children can win, however large k is: this bounds the buffers.
    Selector& selector = scratch.selector;
    selector.reset(std::min(a.k, std::max<int64_t>(total, 1)));
    scratch.reserve(std::min(total, kBatch + widest), n);
    int64_t batched = 0, rows = 0;
    for (int64_t i = 0; i < n; ++i) {
      add_row(b, begin + i, ranges[i], i + 1 < n, scratch.rows.data(), rows, batched);
      if (batched < kBatch && i + 1 < n) continue;
      softmaxes(b, rows, scratch);
      if (finish(b, scratch.rows.data(), rows, selector.threshold())) {
        if (scores_rise(selector.threshold())) {
          select_rows(rows, scratch);
        } else {
          score(b, scratch.rows.data(), rows, selector.threshold(), scratch);
          select(batched, rows, scratch);
        }
      }
      if (i + 1 < n) selector.tighten();
      batched = rows = 0;
    }
  }

  // Write the winners of a group of requests with few children.
  void run_few(const Group& group, Scratch& scratch) const {
    scratch.reserve(kGroup + kMostRanked, (group.end - group.begin) * a.width);
    PrefixRow* const row = scratch.rows.data();
    int32_t row_of[kGroup + kMostRanked + 16];  // of each child
    struct Ends {
      int64_t row, child;
    } ends[kGroup + 1];  // of each request
    ends[0] = {0, 0};
    int64_t rows = 0, children = 0;
    for (int64_t b = group.begin, i = 0; b < group.end; ++b) {
      for (int64_t w = 0; w < a.width; ++w, ++i) {
        const EdgeRange range = group.ranges[i];
        // Some too many, in place of a loop whose end nobody can predict.
        for (int64_t j = 0; j < range.end - range.begin; j += 16) std::fill_n(row_of + children + j, 16, int32_t(rows));
        add_row(b, w, range, false, row, rows, children);
      }
      ends[b - group.begin + 1] = {rows, children};
    }
    softmaxes(group.begin, rows, scratch);
    for (int64_t b = group.begin; b < group.end; ++b) {
      const Ends *const first = ends + (b - group.begin), *const last = first + 1;
      finish(b, row + first->row, last->row - first->row, -kInf);
      score(b, row + first->row, last->row - first->row, -kInf, scratch);
    }
    // In a loop of its own: to read scores as vectors right after they are written would wait for them.
    for (int64_t b = group.begin; b < group.end; ++b) {
      const int64_t first = ends[b - group.begin].child, n = ends[b - group.begin + 1].child - first;
      int32_t order[kMostRanked];
      simd().rank(scratch.score.data() + first, n, order);
      int64_t found = 0;
      for (const int64_t most = std::min(n, a.k); found < most; ++found) {
        const int64_t position = first + order[found];
        const float its_score = scratch.score[position] + 0.0f;  // -0 is 0, as from the selector
        if (its_score == -kInf) break;
        const PrefixRow& parent = row[row_of[position]];
        store(b, found, its_score, logp(parent, position, scratch), parent.parent, edge(parent, position));
      }
      store_rest(b, found);
    }
  }

  // Write the winners of request b.
  void store(int64_t b, Selector& selector) const {
    const int64_t found = selector.finish([&](int64_t rank, float score, const Candidate& candidate) {
      store(b, rank, score, candidate.logp, candidate.parent, candidate.edge);
    });
    store_rest(b, found);
  }

 private:
  static constexpr int64_t kBatch = 4096;  // children
  static constexpr int64_t kGroup = 128;   // prefixes and children of requests that are scored together
  static constexpr int64_t kShort = 512;   // children; longer rows are fetched by the hardware and `ahead`

  // The row of a prefix, if it has children.
  void add_row(
      int64_t b, int64_t w, EdgeRange range, bool has_successor, PrefixRow* all, int64_t& rows, int64_t& batched) const {
    const int64_t n = range.end - range.begin;
    a.entropy[b * a.width + w] = 0.0f;
    if (n == 0) return;
    PrefixRow& row = all[rows++];  // filled in place: a copy would wait for these stores
    row.logits = address(a.logits, b, w);
    row.ahead = n > kShort && has_successor ? address(a.logits, b, w + 1) : nullptr;
    row.token = a.trie.token + range.begin;
    row.children = n;
    row.position = batched;
    row.parent = int32_t(w);
    row.cum_logp = a.cum_logp.at_or(0.0f, b, w);
    row.log_mass = 0;
    batched += n;
  }

  // A prefix's row of logits or child values; null: all of them are 0.
  const char* address(const FloatView& view, int64_t b, int64_t w) const {
    const int64_t row = a.row_of(b, w);
    return row >= 0 ? view.address(b, row) : nullptr;
  }

  // Start to fetch the logits of a short row, and which of its children are alive. Rows lie far apart, so each begins with a
  // cache miss.
  void prefetch(int64_t b, int64_t w, EdgeRange range) const {
    if (range.begin == range.end) return;
    if (a.trie.alive) {
      const int32_t* const bits = a.trie.alive_of(b).bits;
      touch(bits + ((range.begin + 1) >> 5));
      touch(bits + (range.end >> 5));
    }
    const int64_t size = element_size(a.logits.type) * a.logits.stride[2];
    const char* row = address(a.logits, b, w);
    if (!row) return;
    const int64_t n = range.end - range.begin;
    const int32_t* const token = a.trie.token + range.begin;
    if (n <= 3) {  // without a loop whose end nobody can predict
      for (const int64_t i : {int64_t(0), n >> 1, n - 1}) __builtin_prefetch(row + token[i] * size);
      return;
    }
    const char *const first = row + token[0] * size, *const last = row + token[n - 1] * size;
    if (n > kShort || last < first) return;
    if (n * 64 <= last - first) {  // fewer children than lines
      for (int64_t i = 0; i < n; ++i) __builtin_prefetch(row + token[i] * size);
    } else {
      for (const char* line = first; line <= last; line += 64) __builtin_prefetch(line);
    }
  }

  bool has_extra() const { return a.child_value || a.seed; }

  // Whether a threshold for scores is one for d too.
  bool scores_rise(float threshold) const { return threshold > -kInf && a.logp_weight > 0 && !has_extra(); }

  // Sums over the legal logits of rows, of request b or of others with the same nodes alive.
  void softmaxes(int64_t b, int64_t count, Scratch& scratch) const {
    loops_of(a.logits).legal_softmaxes(
        scratch.rows.data(), count, a.logits.stride[2], a.inv_temperature, a.trie.alive_of(b), scratch.d.data());
  }

  // Entropies of rows, and what their scores have in common; false if no child can beat the threshold.
  bool finish(int64_t b, PrefixRow* rows, int64_t count, float threshold) const {
    bool can_win = false;
    for (int64_t r = 0; r < count; ++r) {
      PrefixRow& row = rows[r];
      const int64_t w = row.parent;
      const float entropy = finish_row(row, a.logits, a.columns, a.vocab, a.trie.alive, a.inv_temperature);
      a.entropy[b * a.width + w] = entropy;
      row.constant = a.constant(b, w, entropy);
      can_win = can_win || has_extra() || a.logp_weight < 0 || !(best_score(row, a.logp_weight) <= threshold);
    }
    return can_win;
  }

  // Scores of all children of rows of request b.
  void score(int64_t b, const PrefixRow* rows, int64_t count, float threshold, Scratch& scratch) const {
    const SimdLoops& loops = simd();
    const float* d = scratch.d.data();
    float* scores = scratch.score.data();
    if (has_extra()) {
      for (int64_t r = 0; r < count; ++r) {
        loops.score_rows(rows + r, 1, d, extras(b, rows[r], scratch), a.logp_weight, threshold, scores);
      }
    } else {
      loops.score_rows(rows, count, d, nullptr, a.logp_weight, threshold, scores);
    }
  }

  // Child values and noise of one prefix's children.
  const float* extras(int64_t b, const PrefixRow& row, Scratch& scratch) const {
    float* extra = scratch.extra.data();
    const int64_t w = row.parent;
    const char* const child_values = a.child_value ? address(a.child_value, b, w) : nullptr;
    if (child_values) {
      loops_of(a.child_value).gather_scaled(
          child_values, a.child_value.stride[2], row.token, row.children, a.value_weight, extra);
    } else {
      std::fill_n(extra, row.children, 0.0f);
    }
    if (a.seed) {
      simd().add_noise(extra, row.token, row.children, uint64_t(a.seed.at(b)), uint32_t(a.node.at(b, w)));
    }
    return extra;
  }

  // Push what can win of the batch.
  void select(int64_t batched, int64_t rows, Scratch& scratch) const {
    Selector& selector = scratch.selector;
    const float* score = scratch.score.data();
    float threshold = selector.threshold();
    if (threshold == -kInf) threshold = just_below(simd().reached_by(score, batched, selector.k()));  // ties may win
    const int64_t found = simd().filter(score, batched, threshold, scratch.index.data());
    int64_t r = 0;
    for (int64_t i = 0; i < found; ++i) {
      const int64_t position = scratch.index[i];
      while (r + 1 < rows && scratch.rows[r + 1].position <= position) ++r;
      push(scratch.rows[r], position, score[position], scratch);
    }
  }

  // The same where scores_rise(): what does not reach the threshold is not scored.
  void select_rows(int64_t rows, Scratch& scratch) const {
    const Selector& selector = scratch.selector;
    for (int64_t r = 0; r < rows; ++r) {
      const PrefixRow& row = scratch.rows[r];
      if (best_score(row, a.logp_weight) <= selector.threshold()) continue;
      const float* const d = scratch.d.data() + row.position;
      const int64_t found = simd().filter_row(
          row, d, a.logp_weight, selector.threshold(), scratch.index.data(), scratch.score.data());
      for (int64_t i = 0; i < found; ++i) push(row, row.position + scratch.index[i], scratch.score[i], scratch);
    }
  }

  // Offer the child at a position of the batch to the selector.
  void push(const PrefixRow& row, int64_t position, float score, Scratch& scratch) const {
    scratch.selector.push(score, {logp(row, position, scratch), row.parent, edge(row, position)});
  }

  float logp(const PrefixRow& row, int64_t position, const Scratch& scratch) const {
    return row.cum_logp + (scratch.d[position] - row.log_mass);
  }
  int32_t edge(const PrefixRow& row, int64_t position) const {
    return int32_t(row.token - a.trie.token + (position - row.position));
  }

  void store(int64_t b, int64_t rank, float score, float logp, int32_t parent, int32_t edge) const {
    a.store(b, rank, score, logp, parent, a.trie.token[edge], edge);
  }
  // Behind the winners.
  void store_rest(int64_t b, int64_t found) const {
    for (int64_t i = found; i < a.k; ++i) a.store_none(b, i);
    a.num_valid[b] = int32_t(found);
  }

  const ExpandTopKArgs& a;
};

// Behind a pointer, because the address of a thread-local object is looked up at every use.
Scratch& scratch() {
  static thread_local std::unique_ptr<Scratch> buffers;
  if (!buffers) buffers = std::make_unique<Scratch>();
  return *buffers;
}

// One task per request.
void run_requests(const Cpu& device, const ExpandTopKArgs& a, int64_t row_work) {
  const Expansion expansion(a);
  device.parallel_for(a.batch, kWork, row_work * a.width, [&](int64_t first, int64_t last) {
    Scratch& mine = scratch();
    expansion.prepare(first, last, mine.next);
    for (int64_t b = first; b < last; b = mine.group.end) {
      std::swap(mine.group, mine.next);
      const Group& group = mine.group;
      if (group.end < last) expansion.prepare(group.end, last, mine.next);
      if (group.few) {
        expansion.run_few(group, mine);
      } else {
        expansion.run(b, 0, group.ranges.data(), a.width, mine);
        expansion.store(b, mine.selector);
      }
    }
  });
}

// One task per block of a request's prefixes.
void run_blocks(const Cpu& device, const ExpandTopKArgs& a, int64_t row_work, int64_t blocks) {
  struct Winner {
    float score;
    Candidate candidate;
  };
  const Expansion expansion(a);
  const int64_t block_width = (a.width + blocks - 1) / blocks;
  std::vector<std::vector<Winner>> winners(a.batch * blocks);
  device.parallel_for(a.batch * blocks, kWork, row_work * block_width, [&](int64_t first, int64_t last) {
    Scratch& mine = scratch();
    for (int64_t task = first; task < last; ++task) {
      const int64_t b = task / blocks, begin = std::min(a.width, task % blocks * block_width);
      std::vector<EdgeRange>& ranges = mine.group.ranges;
      const int64_t n = std::min(a.width - begin, block_width);
      if (int64_t(ranges.size()) < n) ranges.resize(n);
      expansion.look_up(b, begin, ranges.data(), n);
      expansion.prefetch(b, begin, ranges.data(), n);
      expansion.run(b, begin, ranges.data(), n, mine);
      std::vector<Winner>& sorted = winners[task];
      sorted.resize(std::min(a.k, mine.selector.size()));
      mine.selector.finish([&](int64_t rank, float score, const Candidate& candidate) {
        sorted[rank] = {score, candidate};
      });
    }
  });
  for (int64_t b = 0; b < a.batch; ++b) {
    // Blocks in order of w, each sorted with its ties in enumeration order: pushing them one after the
    // other leaves equal scores in enumeration order again.
    int64_t limit = 1;
    for (int64_t i = 0; i < blocks; ++i) limit += int64_t(winners[b * blocks + i].size());
    Selector& selector = scratch().selector;
    selector.reset(std::min(a.k, limit));
    for (int64_t i = 0; i < blocks; ++i) {
      for (const Winner& winner : winners[b * blocks + i]) selector.push(winner.score, winner.candidate);
    }
    expansion.store(b, selector);
  }
}

}  // namespace

static bool fits(const Cpu&, const ExpandTopKArgs&) { return true; }

void run(const Cpu& device, const ExpandTopKArgs& a) {
  const int64_t row_work = a.vocab ? a.columns : std::min<int64_t>(a.max_children, 32);
  const int64_t threads = device.num_threads();
  int64_t blocks = 1;
  if (threads > 1 && a.batch > 0 && a.batch < 4 * threads) {
    blocks = std::min(a.width, (4 * threads + a.batch - 1) / a.batch);
  }
  if (blocks > 1) {
    run_blocks(device, a, row_work, blocks);
  } else {
    run_requests(device, a, row_work);
  }
}

}  // namespace vstar

VSTAR_REGISTER(Cpu, expand_topk);
