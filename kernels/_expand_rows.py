"""The first launch of ``expand_topk``: statistics of the rows, and of every segment of children the best.

One program per row (prefix), or several where it is long. It reads the legal logits in blocks and keeps
maximum, sum of exponentials and entropy as it goes; under ``"vocab"`` it also reads all columns, unless all
of them are legal. Children whose tokens are consecutive, as those of a trie's upper levels are, are read in
place; others through the token list. Every thread keeps sums of its own, see _softmax.py.
"""

from __future__ import annotations

from collections import namedtuple

import triton
import triton.language as tl

from ._array import Array, load_float, load_int
from ._floats import cleaned, divided
from ._kernel import ADDRESS, ALIGNED, ANY, F32, I32, NUMBERS, kernel
from ._softmax import LOG2, add, alike, finite, nothing, tile
from ._trie import edges, is_alive

# What a score is made of besides the logits: arrays and numbers.
Terms = namedtuple("Terms", "cum_logp value bonus child_value seed weights")
Weights = namedtuple("Weights", "logp_weight value_weight entropy_weight inv_temperature")
# What the scores of a row's children have in common.
Row = namedtuple("Row", "row_max log_sum cum_logp constant")
# Columns of a row's children: in a list from `begin`; if `near` also `first` and those after it; their bits.
Children = namedtuple("Children", "token begin count first near alive")


@triton.jit
def finish(terms, b, w, inside, row_max, total, moment, vocab_max, vocab_total):
    """The row's part of the scores, and its entropy."""
    safe = tl.where(total > 0, total, 1.0)
    entropy = tl.where(total > 0, tl.maximum(tl.log(safe) - moment / safe, 0.0), 0.0)
    shift = tl.where(vocab_max == float("-inf"), 0.0, vocab_max)
    log_sum = tl.log(tl.where(vocab_total > 0, vocab_total, 1.0))
    constant = load_float(terms.value, b, w, 0, inside) * terms.weights.value_weight
    constant += terms.weights.entropy_weight * entropy
    constant += load_float(terms.bonus, b, w, 0, inside)
    return Row(shift, log_sum, load_float(terms.cum_logp, b, w, 0, inside), constant), entropy


@triton.jit
def store_row(stats, entropies, w, row, entropy, inside):
    at = stats + w * 4
    tl.store(entropies + w, entropy, inside)
    tl.store(at, row.row_max, inside)
    tl.store(at + 1, row.log_sum, inside)
    tl.store(at + 2, row.cum_logp, inside)
    tl.store(at + 3, row.constant, inside)


@triton.jit
def load_row(stats, w, inside):
    at = stats + w * 4
    row_max, log_sum = tl.load(at, inside, 0.0), tl.load(at + 1, inside, 0.0)
    return Row(row_max, log_sum, tl.load(at + 2, inside, 0.0), tl.load(at + 3, inside, 0.0))


@triton.jit
def scored(z, row, extra_score, terms):
    """Score (-inf: no candidate) and log-probability. Without an extra score it never falls as z rises."""
    logp = (divided(z - row.row_max, terms.weights.inv_temperature) - row.log_sum) + row.cum_logp
    weight = terms.weights.logp_weight
    score = (tl.where(weight == 0, 0.0, weight * logp) + row.constant) + extra_score
    return tl.where(logp > float("-inf"), tl.maximum(score, float("-inf")), float("-inf")), logp


@triton.jit
def _log_positive(x):
    """``log_positive`` of csrc/common/gumbel.h."""
    shifted = x.to(tl.int32, bitcast=True) - 0x3F3504F3
    e = (shifted >> 23).to(tl.float32)
    m = ((shifted & 0x007FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    m2 = m * m
    p = m * 7.0376836292e-2 - 1.1514610310e-1
    p = p * m + 1.1676998740e-1
    p = p * m - 1.2420140846e-1
    p = p * m + 1.4249322787e-1
    p = p * m - 1.6668057665e-1
    p = p * m + 2.0000714765e-1
    p = p * m - 2.4999993993e-1
    p = p * m + 3.3333331174e-1
    r = p * m * m2
    r += e * -2.12194440e-4
    r -= m2 * 0.5
    return (m + r) + e * 0.693359375


@triton.jit
def _gumbel(seed, node, token):
    """``gumbel_from_bits`` of csrc/common/gumbel.h over the first word of Philox4x32-10."""
    zero = token * 0
    bits, _, _, _ = tl.philox(seed, node + zero, token, zero, zero)
    u = (bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    rounded = 1.0 - u
    near_zero = tl.div_rn(rounded - 1.0 + u, rounded) - _log_positive(rounded)
    other = (bits ^ 0xFFFFFFFF).to(tl.uint32)
    near_one = -_log_positive((other.to(tl.float32) + 0.5) * 2.3283064365386963e-10)
    return -_log_positive(tl.where(bits < 0x80000000, near_zero, near_one))


@triton.jit
def extra_score_of(terms, b, line, node, column, z):
    """A child's own part of the score: child value and noise."""
    extra_score = tl.zeros(column.shape, tl.float32)
    if terms.child_value.dtype >= 0:
        inside = (z > float("-inf")) & (column * 0 + line >= 0)
        value = load_float(terms.child_value, b, line, column.to(tl.int64), inside)
        extra_score += terms.weights.value_weight * value
    if terms.seed.dtype >= 0:
        seed = load_int(terms.seed, b, 0, 0, True, 0)
        extra_score += _gumbel(seed, node.to(tl.int32), column.to(tl.int32))
    return extra_score


@triton.jit
def _children_of(offset, token, alive, node, num_nodes, num_edges, max_children, readable):
    begin, end = edges(offset, node, num_nodes, num_edges)
    begin, count = begin.to(tl.int64), tl.minimum(end - begin, max_children)
    first = tl.load(token + begin, count > 0, 0)
    last = tl.load(token + begin + count - 1, count > 0, 0)
    # A multiple of 16 lets a thread read several logits at once.
    near = (last - first + 1 == count) & (first >= 0) & (first % 16 == 0) & (first + count <= readable)
    return Children(token, begin, count, first, near, alive)


@triton.jit
def _load_children(logits, s2, children, columns, readable, c, FILTER: tl.constexpr):
    """Columns and logits of the children ``c`` of a row; those that are not there, or not alive, are -inf."""
    rounded = (children.count + 15) // 16 * 16
    if children.near & (children.first + rounded <= readable):
        column = tl.multiple_of(children.first, 16) + c
        z = tl.load(logits + column.to(tl.int64) * s2, c < rounded, 0.0).to(tl.float32)
        inside = c < children.count
    else:
        column = tl.load(children.token + children.begin + c, c < children.count, -1)
        inside = (column >= 0) & (column < columns)
        z = tl.load(logits + column.to(tl.int64) * s2, inside & (column < readable), 0.0).to(tl.float32)
    if FILTER:
        inside &= is_alive(children.alive, children.begin + 1 + c, inside)
    return column, cleaned(z, inside)


@triton.jit
def _store_segments(best, x, start, segments, BLOCK: tl.constexpr, SEGMENT: tl.constexpr):
    """Write the largest number of each segment of a tile."""
    at = start // SEGMENT + tl.arange(0, BLOCK // SEGMENT)
    most = tl.reshape(tl.max(x, 1), (BLOCK // SEGMENT, x.shape[0] * SEGMENT // BLOCK))
    tl.store(best + at, tl.max(most, 1), at < segments)


@triton.jit
def _whole_tiles(low, high, BLOCK: tl.constexpr):
    """Numbers of the first tile, of the first that ends behind ``high``, and one past the last."""
    first = low // BLOCK
    return first, tl.maximum(first, high // BLOCK), tl.maximum(first, tl.cdiv(high, BLOCK))


@triton.jit
def _sums(most, mass, weighted, inv_temperature):
    """Maximum of a row, -inf if there is nothing, and its sums as ``_join_tile`` takes them."""
    most, mass, weighted = alike(most, mass, weighted, inv_temperature)
    total = tl.sum(mass, 0)
    return tl.where(total > 0, most, float("-inf")), total, tl.sum(weighted, 0) * LOG2


@triton.jit
def _vocab_stats(logits, s2, low, high, columns, readable, inv_temperature, c, BLOCK: tl.constexpr):
    """Maximum and sum of exponentials of a row's columns."""
    first, whole, last = _whole_tiles(low, high, BLOCK)
    whole = tl.where(readable > 0, whole, first)
    most, mass, unused = nothing(c.shape[0])
    for turn in range(first, whole):
        column = turn * BLOCK + c
        z = finite(tl.load(logits + column.to(tl.int64) * s2).to(tl.float32))
        most, mass, unused = add(z, most, mass, unused, inv_temperature)
    for turn in range(whole, last):
        column = turn * BLOCK + c
        z = tl.load(logits + column.to(tl.int64) * s2, column < readable, 0.0).to(tl.float32)
        most, mass, unused = add(cleaned(z, column < columns), most, mass, unused, inv_temperature)
    vocab_max, vocab_total, _ = _sums(most, mass, unused, inv_temperature)
    return vocab_max, vocab_total


@kernel
def expand_rows(
    logits: ANY, s0: ALIGNED, s1: ALIGNED, s2: ALIGNED, index: ADDRESS, index_type, i0, i1, num_rows,
    cum_logp: ADDRESS, cum_logp_type, a0, a1, value: ADDRESS, value_type, v0, v1, bonus: ADDRESS, bonus_type,
    o0, o1, child_value: ADDRESS, child_value_type, c0, c1, c2, seed: ADDRESS, seed_type, seed_stride,
    weights: NUMBERS, offset: I32, token: I32, alive: I32, words, shared, node: ADDRESS, node_type, n0, n1,
    stats: F32, trie: I32, best: F32, part: F32, entropies: F32, width, columns, num_nodes, num_edges,
    max_children, vocab, segments, splits, chunk, column_chunk, FILTER: tl.constexpr, EXTRA: tl.constexpr,
    BLOCK: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    terms = Terms(
        Array(cum_logp, cum_logp_type, a0, a1, 0), Array(value, value_type, v0, v1, 0),
        Array(bonus, bonus_type, o0, o1, 0), Array(child_value, child_value_type, c0, c1, c2),
        Array(seed, seed_type, seed_stride, 0, 0), weights,
    )  # fmt: skip
    r, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, w = r // width, r % width
    LANES: tl.constexpr = 128 // logits.dtype.element_ty.primitive_bitwidth
    c = tile(BLOCK // LANES, LANES, True)
    line = w
    if index_type >= 0:
        line = load_int(Array(index, index_type, i0, i1, 0), b, w, 0, True, -1)
        line = tl.where((line >= 0) & (line < num_rows), line, -1)
    logits += b * s0 + line * s1
    readable = tl.where(line >= 0, columns, 0)
    best += r * segments
    here = load_int(Array(node, node_type, n0, n1, 0), b, w, 0, True, -1)
    alive += b // shared * words
    children = _children_of(offset, token, alive, here, num_nodes, num_edges, max_children, readable)
    count = children.count
    if split == 0:
        tl.store(trie + r * 4, children.begin.to(tl.int32))
        tl.store(trie + r * 4 + 1, count)
        tl.store(trie + r * 4 + 2, here.to(tl.int32))
        tl.store(trie + r * 4 + 3, line.to(tl.int32))
    low = split * chunk
    high = tl.minimum(low + chunk, count)
    column_low = split * column_chunk
    column_high = tl.minimum(column_low + column_chunk, columns)
    stats_low, stats_high = low, high
    if EXTRA:  # every program of the row needs the statistics of all of it
        stats_low, stats_high, column_low, column_high = low * 0, count, low * 0, columns

    # Whole tiles of neighbors are read 16 bytes at a time.
    first, whole, last = _whole_tiles(stats_low, stats_high, BLOCK)
    whole = tl.where(children.near, whole, first)
    most, mass, weighted = nothing(BLOCK // LANES)
    for turn in range(first, whole):
        column = tl.multiple_of(children.first, 16) + turn * BLOCK + c
        z = finite(tl.load(logits + column.to(tl.int64) * s2).to(tl.float32))
        if FILTER:
            z = tl.where(is_alive(alive, children.begin + 1 + turn * BLOCK + c, c >= 0), z, float("-inf"))
        if not EXTRA:
            _store_segments(best, z, turn * BLOCK, segments, BLOCK, SEGMENT)
        most, mass, weighted = add(z, most, mass, weighted, weights.inv_temperature)
    for turn in range(whole, last):
        _, z = _load_children(logits, s2, children, columns, readable, turn * BLOCK + c, FILTER)
        if not EXTRA:
            _store_segments(best, z, turn * BLOCK, segments, BLOCK, SEGMENT)
        most, mass, weighted = add(z, most, mass, weighted, weights.inv_temperature)
    row_max, total, moment = _sums(most, mass, weighted, weights.inv_temperature)
    vocab_max, vocab_total = row_max, total
    if (vocab != 0) & (FILTER | (count != columns)):
        vocab_max, vocab_total = _vocab_stats(
            logits, s2, column_low, column_high, columns, readable, weights.inv_temperature, c, BLOCK
        )

    if EXTRA | (splits == 1):
        row, entropy = finish(terms, b, w, True, row_max, total, moment, vocab_max, vocab_total)
        store_row(stats, entropies, r, row, entropy, split == 0)
        if EXTRA:
            for start in range(low, high, BLOCK):
                column, z = _load_children(logits, s2, children, columns, readable, start + c, FILTER)
                extra_score = extra_score_of(terms, b, line, here, column, z)
                score, _ = scored(z, row, extra_score, terms)
                _store_segments(best, score, start, segments, BLOCK, SEGMENT)
    else:
        part += (r * splits + split) * 6
        tl.store(part, row_max)
        tl.store(part + 1, total)
        tl.store(part + 2, moment)
        tl.store(part + 3, vocab_max)
        tl.store(part + 4, vocab_total)
        tl.store(part + 5, 0.0)

    # The segments that no block has reached.
    reached = tl.maximum(low, low + tl.cdiv(tl.maximum(high - low, 0), BLOCK) * BLOCK)
    for start in range(reached, low + chunk, BLOCK):
        at = start // SEGMENT + tl.arange(0, BLOCK // SEGMENT)
        tl.store(best + at, tl.full((BLOCK // SEGMENT,), float("-inf"), tl.float32), at < segments)
