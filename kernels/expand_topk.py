"""``expand_topk`` in two launches: statistics of the rows, then a selection in each request.

``_rows``: one program per row (prefix). It reads the legal logits in blocks and keeps maximum, sum of
exponentials and entropy as it goes; under ``"vocab"`` it also reads all columns, unless all of them are
legal. Children whose tokens are consecutive, as those of a trie's upper levels are, are read in place;
others through the token list. Every thread keeps sums of its own, see _softmax.py.
Of every ``segment`` consecutive children it keeps the largest logit. A row of more than 8 blocks is shared by
several programs, whose statistics the second launch joins. Where children have an extra score of their own
(noise, child values) a segment keeps its best *score*, so every program of a row then reads the row's logits
twice, and rows are shared only where they are few.

``_select``: one program per request. The k best segments hold the k best children: a child outside of them is
beaten by one of each, because the score rises with the logit and ties go to the earlier segment. So it takes
the k best segments, scores their children and takes the k best of those. Both selections stream blocks of
int64 keys (order-preserving bits of the score, then the position) past a sorted list of the best so far.

========================  =======  ========  =====
longest row               block    segment   warps
========================  =======  ========  =====
256 children or columns   256      16        1
more                      1,024    128       2
========================  =======  ========  =====

One workspace: 16 bytes of statistics and 16 of places per row, 4 bytes per segment, 24 per part of a
shared row, 8 per selected segment. A request has at most 2,048 winners and fewer than 2^31 children.
Multiplications and additions are not fused: both launches must give a score the same bits.
"""

from __future__ import annotations

import functools
from collections import namedtuple
from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .._triton import Unsupported
from ._array import Array, load_float, load_int, strided
from ._floats import LOWEST, InverseTemperature, cleaned, divided, from_ordered, inverse_of, ordered
from ._kernel import ADDRESS, ALIGNED, ANY, F32, FLOATS, I32, I64, NUMBERS, Specialization, kernel, workspace
from ._softmax import LOG2, add, alike, finite, nothing, tile
from ._trie import edges

_TILES = ((256, 16, 1), (1024, 128, 2))  # children per block and per segment; warps
# Keys per block of the selection, warps. Other warps spill registers on one architecture or another.
_FEW, _MANY, _MORE = (256, 2), (512, 8), (1024, 8)
_MOST_WINNERS = 2048
_SHARE = 8  # blocks of a row that a program takes; fixed, so that no sum depends on the batch
_PROGRAMS = 512  # where the programs of a row do not share the sums, there are about as many; fixed as well


def expand_topk(
    logits, offset, token, alive, node, row, k, cum_logp, value, bonus, child_value, seed, logp_weight,
    value_weight, entropy_weight, temperature, vocab, max_children,
):  # fmt: skip
    """The dispatcher's signature; see :func:`vstar_ops.expand_topk`."""
    if alive is not None:
        raise Unsupported("expand_topk: the Triton backend takes no restricted trie")
    batch, width = node.shape
    columns, device = logits.shape[2], logits.device
    if value_weight == 0:
        value = child_value = None
    extra = seed is not None or child_value is not None or logp_weight < 0
    plan = _plan(batch, width, columns, k, vocab, max_children, extra)
    score = torch.empty((batch, k), device=device)
    parent = torch.empty((batch, k), dtype=torch.int32, device=device)
    logp, chosen, child = torch.empty_like(score), torch.empty_like(parent), torch.empty_like(parent)
    count, entropy = parent.new_empty(batch), score.new_empty((batch, width))
    outputs = score, logp, parent, chosen, child, count, entropy
    if batch == 0:
        return outputs
    memory = workspace(device, *plan.workspace)
    terms = (
        *strided(cum_logp, 2), *strided(value, 2), *strided(bonus, 2), *strided(child_value, 3),
        *strided(seed, 1), Weights(logp_weight, value_weight, entropy_weight, inverse_of(temperature)),
    )  # fmt: skip
    if width:
        _rows.launch(
            plan.grid, plan.warps, logits, *logits.stride(), *strided(row, 2), logits.shape[1], *terms,
            offset, token, *strided(node, 2), *memory[:4], entropy, width, columns, offset.numel() - 1,
            token.numel(), *plan.rows,
        )  # fmt: skip
    _select.launch(
        (batch,), plan.select_warps, *strided(logits, 3), *terms, token, *memory, *outputs, width, columns,
        *plan.select,
    )  # fmt: skip
    return outputs


class Plan(NamedTuple):
    """What of a call follows from sizes and options alone: workspace, grid, warps, last arguments."""

    workspace: tuple[tuple[int, torch.dtype], ...]
    grid: tuple[int, int]
    warps: int
    rows: tuple[int, ...]
    select_warps: int
    select: tuple[int, ...]


@functools.lru_cache(1024)
def _plan(batch, width, columns, k, vocab, max_children, extra) -> Plan:
    children = width * max_children
    winners = min(k, children)
    if winners > _MOST_WINNERS:
        most = f"at most {_MOST_WINNERS:,} winners"
        raise Unsupported(f"expand_topk: the Triton backend takes {most}, got {winners:,}")
    if children >= 2**31:
        most = "fewer than 2^31 children per request"
        raise Unsupported(f"expand_topk: the Triton backend takes {most}, got {children:,}")
    rows, max_children = batch * width, max(max_children, 1)
    longest = max(columns if vocab else 0, max_children)
    block, segment, warps = next((tile for tile in _TILES if longest <= tile[0]), _TILES[-1])
    segments = -(-max_children // segment)
    blocks = -(-longest // block)
    splits = max(1, min(blocks, _PROGRAMS // max(rows, 1))) if extra else -(-blocks // _SHARE)
    parts = 0 if extra or splits == 1 else splits
    size, keys, select_warps = _selection(winners, width * segments)
    chunk, column_chunk = (-(-total // (splits * block)) * block for total in (max_children, columns))
    return Plan(
        workspace=(
            (4 * rows, torch.float32), (4 * rows, torch.int32), (rows * segments, torch.float32),
            (6 * rows * parts, torch.float32), (batch * size, torch.int64),
        ),
        grid=(rows, splits),
        warps=warps,
        rows=(max_children, int(vocab), segments, splits, chunk, column_chunk, extra, block, segment),
        select_warps=select_warps,
        select=(
            max_children, segments, segment, min(size, width * segments), parts, int(extra), k, size, keys,
        ),
    )  # fmt: skip


def _selection(winners: int, segments: int) -> tuple[int, int, int]:
    """Length of the list of the best, keys per block, warps."""
    size = max(16, 1 << (winners - 1).bit_length())
    if size <= 64 and segments <= 4 * _FEW[0]:
        return size, *_FEW
    keys, warps = _MANY if size < _MANY[0] else _MORE
    return max(64, size), max(size, keys), 16 if size == 256 else warps


# What a score is made of besides the logits: arrays and numbers.
Terms = namedtuple("Terms", "cum_logp value bonus child_value seed weights")
Weights = namedtuple("Weights", "logp_weight value_weight entropy_weight inv_temperature")
# What the scores of a row's children have in common.
Row = namedtuple("Row", "row_max log_sum cum_logp constant")
# Legal columns of a row: in a list from `begin`; if `near` also `first` and those after it.
Children = namedtuple("Children", "token begin count first near")


@triton.jit
def _finish(terms, b, w, inside, row_max, total, moment, vocab_max, vocab_total):
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
def _store_row(stats, entropies, w, row, entropy, inside):
    at = stats + w * 4
    tl.store(entropies + w, entropy, inside)
    tl.store(at, row.row_max, inside)
    tl.store(at + 1, row.log_sum, inside)
    tl.store(at + 2, row.cum_logp, inside)
    tl.store(at + 3, row.constant, inside)


@triton.jit
def _load_row(stats, w, inside):
    at = stats + w * 4
    row_max, log_sum = tl.load(at, inside, 0.0), tl.load(at + 1, inside, 0.0)
    return Row(row_max, log_sum, tl.load(at + 2, inside, 0.0), tl.load(at + 3, inside, 0.0))


@triton.jit
def _score(z, row, extra_score, terms):
    """Score (-inf: no candidate) and log-probability. Without an extra score it never falls as z rises."""
    logp = (divided(z - row.row_max, terms.weights.inv_temperature) - row.log_sum) + row.cum_logp
    weight = terms.weights.logp_weight
    score = (tl.where(weight == 0, 0.0, weight * logp) + row.constant) + extra_score
    wins = (z > float("-inf")) & (logp > float("-inf")) & (score > float("-inf"))
    return tl.where(wins, score, float("-inf")), logp


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
def _extra_score(terms, b, line, node, column, inside):
    """A child's own part of the score: child value and noise."""
    extra_score = tl.zeros(column.shape, tl.float32)
    if terms.child_value.dtype >= 0:
        inside &= column * 0 + line >= 0
        value = load_float(terms.child_value, b, line, column.to(tl.int64), inside)
        extra_score += terms.weights.value_weight * value
    if terms.seed.dtype >= 0:
        seed = load_int(terms.seed, b, 0, 0, True, 0)
        extra_score += _gumbel(seed, node.to(tl.int32), column.to(tl.int32))
    return extra_score


@triton.jit
def _children_of(offset, token, node, num_nodes, num_edges, max_children, readable):
    begin, end = edges(offset, node, num_nodes, num_edges)
    begin, count = begin.to(tl.int64), tl.minimum(end - begin, max_children)
    first = tl.load(token + begin, count > 0, 0)
    last = tl.load(token + begin + count - 1, count > 0, 0)
    # A multiple of 16 lets a thread read several logits at once.
    near = (last - first + 1 == count) & (first >= 0) & (first % 16 == 0) & (first + count <= readable)
    return Children(token, begin, count, first, near)


@triton.jit
def _load_children(logits, s2, children, columns, readable, c):
    """Columns and logits of the children ``c`` of a row; those that do not exist are -inf."""
    rounded = (children.count + 15) // 16 * 16
    if children.near & (children.first + rounded <= readable):
        column = tl.multiple_of(children.first, 16) + c
        z = tl.load(logits + column.to(tl.int64) * s2, c < rounded, 0.0).to(tl.float32)
        inside = c < children.count
    else:
        column = tl.load(children.token + children.begin + c, c < children.count, -1)
        inside = (column >= 0) & (column < columns)
        z = tl.load(logits + column.to(tl.int64) * s2, inside & (column < readable), 0.0).to(tl.float32)
    return column, inside, cleaned(z, inside)


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
def _rows(
    logits: ANY, s0: ALIGNED, s1: ALIGNED, s2: ALIGNED, index: ADDRESS, index_type, i0, i1, num_rows,
    cum_logp: ADDRESS, cum_logp_type, a0, a1, value: ADDRESS, value_type, v0, v1, bonus: ADDRESS, bonus_type,
    o0, o1, child_value: ADDRESS, child_value_type, c0, c1, c2, seed: ADDRESS, seed_type, seed_stride,
    weights: NUMBERS, offset: I32, token: I32, node: ADDRESS, node_type, n0, n1, stats: F32, trie: I32,
    best: F32, part: F32, entropies: F32, width, columns, num_nodes, num_edges, max_children, vocab,
    segments, splits, chunk, column_chunk, EXTRA: tl.constexpr, BLOCK: tl.constexpr, SEGMENT: tl.constexpr,
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
    children = _children_of(offset, token, here, num_nodes, num_edges, max_children, readable)
    count = children.count
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
        if not EXTRA:
            _store_segments(best, z, turn * BLOCK, segments, BLOCK, SEGMENT)
        most, mass, weighted = add(z, most, mass, weighted, weights.inv_temperature)
    for turn in range(whole, last):
        _, _, z = _load_children(logits, s2, children, columns, readable, turn * BLOCK + c)
        if not EXTRA:
            _store_segments(best, z, turn * BLOCK, segments, BLOCK, SEGMENT)
        most, mass, weighted = add(z, most, mass, weighted, weights.inv_temperature)
    row_max, total, moment = _sums(most, mass, weighted, weights.inv_temperature)
    vocab_max, vocab_total = row_max, total
    if (vocab != 0) & (count != columns):
        vocab_max, vocab_total = _vocab_stats(
            logits, s2, column_low, column_high, columns, readable, weights.inv_temperature, c, BLOCK
        )

    if split == 0:
        tl.store(trie + r * 4, children.begin.to(tl.int32))
        tl.store(trie + r * 4 + 1, count)
        tl.store(trie + r * 4 + 2, here.to(tl.int32))
        tl.store(trie + r * 4 + 3, line.to(tl.int32))
    if EXTRA | (splits == 1):
        row, entropy = _finish(terms, b, w, True, row_max, total, moment, vocab_max, vocab_total)
        _store_row(stats, entropies, r, row, entropy, split == 0)
        if EXTRA:
            for start in range(low, high, BLOCK):
                column, inside, z = _load_children(logits, s2, children, columns, readable, start + c)
                extra_score = _extra_score(terms, b, line, here, column, inside)
                score, _ = _score(z, row, extra_score, terms)
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


@triton.jit
def _key(score, position):
    """An integer that orders candidates: score descending, then position ascending; the larger is better."""
    key = (ordered(score).to(tl.int64) << 32) | (0xFFFFFFFF - position.to(tl.int64))
    return tl.where(score > float("-inf"), key, LOWEST)


@triton.jit
def _position(key):
    return (-1 - key).to(tl.int32)


@triton.jit
def _keep_best(kept, keys, LIST: tl.constexpr):
    """The best of a descending list and more keys, as such a list."""
    if tl.max(keys, 0) > tl.min(kept, 0):
        # The larger of a descending and an ascending list, entry by entry, are the best of both, as a
        # sequence that falls and then rises; log2(LIST) rounds of exchanges sort that.
        slot = tl.arange(0, LIST)
        kept = tl.maximum(kept, tl.gather(tl.topk(keys, LIST), LIST - 1 - slot, 0))
        half = LIST // 2
        while half > 0:
            other = tl.gather(kept, slot ^ half, 0)
            kept = tl.where((slot & half) == 0, tl.maximum(kept, other), tl.minimum(kept, other))
            half = half // 2
    return kept


@triton.jit
def _join_tile(joined, at, inside, inv_temperature):
    """Join maximum and sums of the parts ``[R, P]`` of rows with what the rows had."""
    row_max, total, moment = joined
    maxima, totals = tl.load(at, inside, float("-inf")), tl.load(at + 1, inside, 0.0)
    joint = tl.maximum(row_max, tl.max(maxima, 1))
    shift = tl.where(total > 0, divided(row_max - joint, inv_temperature), 0.0)
    shifts = tl.where(totals > 0, divided(maxima - joint[:, None], inv_temperature), 0.0)
    scale, scales = tl.exp(shift), tl.exp(shifts)
    moments = (tl.load(at + 2, inside, 0.0) + totals * shifts) * scales
    moment = tl.where(scale > 0, (moment + total * shift) * scale, 0.0)
    moment += tl.sum(tl.where(scales > 0, moments, 0.0), 1)
    return joint, total * scale + tl.sum(totals * scales, 1), moment


@triton.jit
def _join_parts(part, stats, entropies, terms, b, width, parts, ROWS: tl.constexpr, PARTS: tl.constexpr):
    """Join what several programs per row have found. Ends with a barrier."""
    for start in range(0, width, ROWS):
        w = (start + tl.arange(0, ROWS)).to(tl.int64)
        inside = w < width
        zero = tl.zeros((ROWS,), tl.float32)
        legal = zero + float("-inf"), zero, zero
        vocab = legal
        for first in range(0, parts, PARTS):
            split = first + tl.arange(0, PARTS)
            there = inside[:, None] & (split < parts)[None, :]
            at = part + (w[:, None] * parts + split[None, :]) * 6
            legal = _join_tile(legal, at, there, terms.weights.inv_temperature)
            vocab = _join_tile(vocab, at + 3, there, terms.weights.inv_temperature)
        row_max, total, moment = legal
        vocab_max, vocab_total, _ = vocab
        row, entropy = _finish(terms, b, w, inside, row_max, total, moment, vocab_max, vocab_total)
        _store_row(stats, entropies, w, row, entropy, inside)
    tl.debug_barrier()  # they are read by other threads of this program


@triton.jit
def _child(logits, token, trie, b, w, c, columns, inside):
    """Edge, column, logit (-inf: there is none) and its line of children ``c`` of the rows ``w``."""
    begin = tl.load(trie + w * 4, inside, 0).to(tl.int64)
    inside &= c < tl.load(trie + w * 4 + 1, inside, 0)
    column = tl.load(token + begin + c, inside, -1)
    inside &= (column >= 0) & (column < columns)
    line = tl.load(trie + w * 4 + 3, inside, -1).to(tl.int64)
    z = load_float(logits, b, line, column.to(tl.int64), line >= 0)
    return begin + c, column, cleaned(z, inside), line


@triton.jit
def _segment_keys(best, stats, terms, i, total, segments, extra):
    """Keys of the segments ``i`` of a request."""
    inside = i < total
    score = tl.load(best + i, inside, float("-inf"))
    if extra == 0:
        row = _load_row(stats, (i // segments).to(tl.int64), inside)
        score, _ = _score(score, row, 0.0, terms)
    return _key(score, i)


@triton.jit
def _child_keys(
    logits, token, trie, stats, picked, terms, b, i, total, columns, max_children, segments, segment,
):  # fmt: skip
    """Keys of the children ``i`` of the selected segments."""
    key = tl.load(picked + i // segment, i < total, LOWEST)
    inside = key != LOWEST
    which = tl.where(inside, _position(key), 0)
    c = (which % segments) * segment + i % segment
    w = (which // segments).to(tl.int64)
    _, column, z, line = _child(logits, token, trie, b, w, c, columns, inside)
    inside &= z > float("-inf")
    node = tl.load(trie + w * 4 + 2, inside, 0)
    extra_score = _extra_score(terms, b, line, node, column, inside)
    score, _ = _score(z, _load_row(stats, w, inside), extra_score, terms)
    return _key(score, w.to(tl.int32) * max_children + c)


@triton.jit
def _write(
    out_score, out_logp, out_parent, out_token, out_child, at, inside, exists, score, logp, parent, column,
    child,
):  # fmt: skip
    """Write winners; -inf and -1 where there is none."""
    tl.store(out_score + at, tl.where(exists, score, float("-inf")), inside)
    tl.store(out_logp + at, tl.where(exists, logp, float("-inf")), inside)
    tl.store(out_parent + at, tl.where(exists, parent, -1).to(tl.int32), inside)
    tl.store(out_token + at, tl.where(exists, column, -1).to(tl.int32), inside)
    tl.store(out_child + at, tl.where(exists, child, -1).to(tl.int32), inside)


@kernel
def _select(
    logits: ADDRESS, logits_type, s0, s1, s2, cum_logp: ADDRESS, cum_logp_type, a0, a1, value: ADDRESS,
    value_type, v0, v1, bonus: ADDRESS, bonus_type, o0, o1, child_value: ADDRESS, child_value_type, c0, c1,
    c2, seed: ADDRESS, seed_type, seed_stride, weights: NUMBERS, token: I32, stats: F32, trie: I32,
    best: F32, part: F32, picked: I64, out_score: F32, out_logp: F32, out_parent: I32, out_token: I32,
    out_child: I32, out_count: I32, entropies: F32, width, columns, max_children, segments, segment,
    segment_count, parts, extra, k, LIST: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    terms = Terms(
        Array(cum_logp, cum_logp_type, a0, a1, 0), Array(value, value_type, v0, v1, 0),
        Array(bonus, bonus_type, o0, o1, 0), Array(child_value, child_value_type, c0, c1, c2),
        Array(seed, seed_type, seed_stride, 0, 0), weights,
    )  # fmt: skip
    logits = Array(logits, logits_type, s0, s1, s2)
    b = tl.program_id(0).to(tl.int64)
    step = tl.arange(0, KEYS)
    slot = tl.arange(0, LIST)
    stats += b * width * 4
    trie += b * width * 4
    best += b * width * segments
    picked += b * LIST
    if parts > 0:
        part += b * width * parts * 6
        _join_parts(part, stats, entropies + b * width, terms, b, width, parts, 16, 16)

    # First the segments, then the children of the best ones. One loop, so that the sorting network, which is
    # most of the kernel, is compiled once.
    kept = tl.full((LIST,), LOWEST, tl.int64)
    total_segments, total_children = width * segments, segment_count * segment
    first_rounds = tl.cdiv(total_segments, KEYS)
    for turn in range(0, first_rounds + tl.cdiv(total_children, KEYS)):
        if turn == first_rounds:
            tl.store(picked + slot, kept)
            tl.debug_barrier()  # they are read by other threads of this program
            kept = tl.full((LIST,), LOWEST, tl.int64)
        if turn < first_rounds:
            i = turn * KEYS + step
            keys = _segment_keys(best, stats, terms, i, total_segments, segments, extra)
        else:
            i = (turn - first_rounds) * KEYS + step
            keys = _child_keys(
                logits, token, trie, stats, picked, terms, b, i, total_children, columns, max_children,
                segments, segment,
            )  # fmt: skip
        kept = _keep_best(kept, keys, LIST)

    exists = (kept != LOWEST) & (slot < k)
    position = tl.where(exists, _position(kept), 0)
    c = position % max_children
    w = (position // max_children).to(tl.int64)
    edge, column, z, _ = _child(logits, token, trie, b, w, c, columns, exists)
    _, logp = _score(z, _load_row(stats, w, exists), 0.0, terms)
    score = from_ordered((kept >> 32).to(tl.int32))
    _write(
        out_score, out_logp, out_parent, out_token, out_child, b * k + slot, slot < k, exists, score, logp, w,
        column, edge + 1,
    )  # fmt: skip
    tl.store(out_count + b, tl.sum(exists.to(tl.int32), 0))
    for start in range(LIST, k, KEYS):  # more are asked for than there are children
        rest, nothing = start + step, tl.zeros((KEYS,), tl.int32)
        _write(
            out_score, out_logp, out_parent, out_token, out_child, b * k + rest, rest < k, nothing != 0, 0.0,
            0.0, nothing, nothing, nothing,
        )  # fmt: skip


def specializations() -> Iterator[Specialization]:
    """Everything that is compiled for logits whose last stride is 1 and whose others are multiples of 16."""
    weights = Weights("fp32", "fp32", "fp32", InverseTemperature("fp32", "fp32"))
    for (dtype, logits), (block, segment, warps), extra in product(FLOATS.items(), _TILES, (False, True)):
        constants = {"EXTRA": extra, "BLOCK": block, "SEGMENT": segment, "s2": 1}
        name = f"expand_topk rows {block}{', extra score' * extra}, {dtype}"
        yield Specialization(name, _rows, warps, constants, {"logits": logits, "weights": weights})
    for winners, segments in product((1 << i for i in range(4, _MOST_WINNERS.bit_length())), (1, 2**20)):
        size, keys, warps = _selection(winners, segments)
        if size == winners and (size <= 64 or segments == 1):  # each once
            name = f"expand_topk select {size} of {keys}"
            constants = {"LIST": size, "KEYS": keys}
            yield Specialization(name, _select, warps, constants, {"weights": weights})
