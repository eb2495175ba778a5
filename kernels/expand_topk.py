"""``expand_topk`` in two launches: statistics of the rows, _expand_rows.py, then a selection in each request.

Of every ``segment`` consecutive children the first launch keeps the largest logit. A row of more than 8
blocks is shared by several programs, whose statistics the second launch joins. Where children have an extra
score of their own (noise, child values) a segment keeps its best *score*, so every program of a row then
reads the row's logits twice, and rows are shared only where they are few.

``_select``: one program per request. The k best segments hold the k best children: a child outside of them is
beaten by one of each, because the score rises with the logit and ties go to the earlier segment. So it takes
the k best segments and perhaps some more, scores their children, and takes those that are as good as the k-th
segment: the k best and few others, which alone are sorted. See _select.py.

========================  =======  ========  =====
longest row               block    segment   warps
========================  =======  ========  =====
256 children or columns   256      16        1
more                      1,024    128       2
========================  =======  ========  =====

One workspace: 16 bytes of statistics and 16 of places per row, 4 bytes per segment, 24 per part of a shared
row, 32 per key of a selection's block. A request has at most 2,048 winners and fewer than 2^31 children.
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
from ._array import Array, load_float, strided
from ._expand_rows import (
    Row,
    Terms,
    Weights,
    expand_rows,
    extra_score_of,
    finish,
    load_row,
    scored,
    store_row,
)
from ._floats import InverseTemperature, cleaned, divided, from_ordered, inverse_of
from ._kernel import ADDRESS, F32, FLOATS, I32, NUMBERS, Specialization, kernel, workspace
from ._select import NONE, append, key, number_of, shorten, spread
from ._trie import filter_of, is_alive

_TILES = ((256, 16, 1), (1024, 128, 2))  # children per block and per segment; warps
# Of a selection: candidates that are sorted, most children of a request and of a segment, keys of a block,
# warps. Other warps and a smaller list spill registers on one architecture or another.
_ANY = 2**31
_SELECTIONS = (
    (256, 1024, 16, 512, 2), (256, _ANY, 128, 4096, 16), (512, _ANY, 128, 4096, 16),
    (1024, _ANY, 128, 4096, 16), (2048, _ANY, 128, 4096, 16),
)  # fmt: skip
_BLOCKS = tl.constexpr(2)  # of a selection's list
_MOST_WINNERS = 2048
_SHARE = 8  # blocks of a row that a program takes; fixed, so that no sum depends on the batch
_PROGRAMS = 512  # where the programs of a row do not share the sums, there are about as many; fixed as well


def expand_topk(
    logits, offset, token, alive, node, row, k, cum_logp, value, bonus, child_value, seed, logp_weight,
    value_weight, entropy_weight, temperature, vocab, max_children,
):  # fmt: skip
    """The dispatcher's signature; see :func:`vstar_ops.expand_topk`."""
    batch, width = node.shape
    columns, device = logits.shape[2], logits.device
    if value_weight == 0:
        value = child_value = None
    extra = seed is not None or child_value is not None or logp_weight < 0
    plan = _plan(batch, width, columns, k, vocab, max_children, extra, alive is not None)
    score = torch.empty(batch, k, device=device)
    parent = torch.empty_like(score, dtype=torch.int32)
    logp, chosen, child = torch.empty_like(score), torch.empty_like(parent), torch.empty_like(parent)
    count, entropy = parent.new_empty(batch), score.new_empty(batch, width)
    outputs = score, logp, parent, chosen, child, count, entropy
    if batch == 0:
        return outputs
    memory, bits = workspace(device, *plan.workspace), filter_of(alive, batch, token)
    terms = (
        *strided(cum_logp, 2), *strided(value, 2), *strided(bonus, 2), *strided(child_value, 3),
        *strided(seed, 1), Weights(logp_weight, value_weight, entropy_weight, inverse_of(temperature)),
    )  # fmt: skip
    if width:
        expand_rows.launch(
            plan.grid, plan.warps, logits, *logits.stride(), *strided(row, 2), logits.shape[1], *terms,
            offset, token, *bits, *strided(node, 2), *memory[:4], entropy, width, columns, offset.numel() - 1,
            token.numel(), *plan.rows,
        )  # fmt: skip
    _select.launch(
        (batch,), plan.select_warps, *strided(logits, 3), *terms, token, *bits, *memory[:4],
        memory[4].data_ptr(), *outputs, width, columns, *plan.select,
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
def _plan(batch, width, columns, k, vocab, max_children, extra, filters=False) -> Plan:
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
    room, keys, select_warps = _selection(winners, children, segment)
    chunk, column_chunk = (-(-total // (splits * block)) * block for total in (max_children, columns))
    return Plan(
        workspace=(
            (4 * rows, torch.float32), (4 * rows, torch.int32), (rows * segments, torch.float32),
            (6 * rows * parts, torch.float32), (2 * _BLOCKS.value * batch * keys, torch.int64),
        ),
        grid=(rows, splits),
        warps=_warps(warps, extra, filters),
        rows=(
            max_children, int(vocab), segments, splits, chunk, column_chunk, filters, extra, block, segment,
        ),
        select_warps=select_warps,
        select=(max_children, segments, parts, int(extra), k, winners, filters, segment, room, keys),
    )  # fmt: skip


def _warps(warps: int, extra: bool, filters: bool) -> int:
    """Of the rows; one alone would spill a register with both."""
    return 2 if extra and filters else warps


def _selection(winners: int, children: int, segment: int) -> tuple[int, int, int]:
    """Candidates that are sorted, of which there may be somewhat more than winners; keys per block; warps."""
    return next(
        (room, keys, warps)
        for room, most, longest, keys, warps in _SELECTIONS
        if children <= most and segment <= longest and (winners <= room // 2 or 1024 <= room >= winners)
    )


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
        row, entropy = finish(terms, b, w, inside, row_max, total, moment, vocab_max, vocab_total)
        store_row(stats, entropies, w, row, entropy, inside)
    tl.debug_barrier()  # they are read by other threads of this program


# Where a row's children are: first edge, number, line of the logits, node.
Places = namedtuple("Places", "begin count line node")


@triton.jit
def _load_places(trie, w, inside):
    at = trie + w * 4
    begin, count = tl.load(at, inside, 0).to(tl.int64), tl.load(at + 1, inside, 0)
    return Places(begin, count, tl.load(at + 3, inside, -1).to(tl.int64), tl.load(at + 2, inside, 0))


@triton.jit
def _child(logits, token, alive, places, b, c, columns, FILTER: tl.constexpr):
    """Column and logit (-inf: there is none, or it is not alive) of the children ``c`` of rows."""
    # What lies outside is moved inside: with a mask per child, they would be read one after the other.
    column = tl.load(token + places.begin + tl.minimum(c, places.count - 1), places.count > 0, -1)
    near = tl.maximum(tl.minimum(column, columns - 1), 0).to(tl.int64)
    readable = tl.where(columns > 0, places.count, 0) > 0
    z = load_float(logits, b, places.line, near, readable & (places.line >= 0))
    there = (c < places.count) & (column >= 0) & (column < columns)
    if FILTER:
        there &= is_alive(alive, places.begin + 1 + c, there)
    return column, cleaned(z, there)


@triton.jit
def _segment_keys(best, stats, terms, i, total, segments, extra):
    """Keys of the segments ``i`` of a request."""
    inside = i < total
    score = tl.load(best + i, inside, float("-inf"))
    if extra == 0:
        row = load_row(stats, (i // segments).to(tl.int64), inside)
        score, _ = scored(score, row, 0.0, terms)
    return key(score, i)


@triton.jit
def _child_keys(
    logits, token, alive, trie, stats, picked, first, picks, terms, b, columns, max_children, segments,
    FILTER: tl.constexpr, SEGMENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Keys of the children of selected segments, from ``first`` on; a column has children of one segment."""
    LANES: tl.constexpr = SEGMENT // 8
    lane = tl.arange(0, BLOCK // 8)
    pick = first + lane // LANES
    inside = pick < picks
    which = tl.where(inside, number_of(tl.load(picked + pick, inside, -1)), 0)
    w = (which // segments).to(tl.int64)
    row, places = load_row(stats, w, inside), _load_places(trie, w, inside)
    row = Row(
        spread(row.row_max, BLOCK), spread(row.log_sum, BLOCK), spread(row.cum_logp, BLOCK),
        spread(row.constant, BLOCK),
    )  # fmt: skip
    places = Places(
        spread(places.begin, BLOCK), spread(places.count, BLOCK), spread(places.line, BLOCK),
        spread(places.node, BLOCK),
    )  # fmt: skip
    c = spread((which % segments) * SEGMENT + lane % LANES, BLOCK)
    c += tl.arange(0, BLOCK) // (BLOCK // 8) * LANES
    column, z = _child(logits, token, alive, places, b, c, columns, FILTER)
    extra_score = extra_score_of(terms, b, places.line, places.node, column, z)
    score, _ = scored(z, row, extra_score, terms)
    return key(score, spread(w.to(tl.int32) * max_children, BLOCK) + c)


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
    c2, seed: ADDRESS, seed_type, seed_stride, weights: NUMBERS, token: I32, alive: I32, words, shared,
    stats: F32, trie: I32, best: F32, part: F32, memory: ADDRESS, out_score: F32, out_logp: F32,
    out_parent: I32, out_token: I32, out_child: I32, out_count: I32, entropies: F32, width, columns,
    max_children, segments, parts, extra, k, winners, FILTER: tl.constexpr, SEGMENT: tl.constexpr,
    ROOM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    terms = Terms(
        Array(cum_logp, cum_logp_type, a0, a1, 0), Array(value, value_type, v0, v1, 0),
        Array(bonus, bonus_type, o0, o1, 0), Array(child_value, child_value_type, c0, c1, c2),
        Array(seed, seed_type, seed_stride, 0, 0), weights,
    )  # fmt: skip
    logits = Array(logits, logits_type, s0, s1, s2)
    b = tl.program_id(0).to(tl.int64)
    stats += b * width * 4
    trie += b * width * 4
    best += b * width * segments
    alive += b // shared * words
    if parts > 0:
        part += b * width * parts * 6
        _join_parts(part, stats, entropies + b * width, terms, b, width, parts, 16, 16)

    # First the segments, then the children of the best ones. One loop: what it calls is compiled once.
    LIST: tl.constexpr = _BLOCKS * BLOCK
    # An address, of unknown alignment: keys that are read two at once lie over the threads in another way.
    memory = memory.to(tl.pointer_type(tl.int64)) + b * (2 * LIST)
    all_segments = width * segments
    segment_turns = tl.cdiv(all_segments, BLOCK)
    zero = all_segments * 0
    turn, turns, kept, count, picks, bound = zero, segment_turns, zero, zero, zero, zero.to(tl.int64) + NONE
    while turn < turns:
        if turn < segment_turns:
            i = turn * BLOCK + tl.arange(0, BLOCK)
            keys = _segment_keys(best, stats, terms, i, all_segments, segments, extra)
        else:
            first = (turn - segment_turns) * (BLOCK // SEGMENT)
            keys = _child_keys(
                logits, token, alive, trie, stats, memory, first, picks, terms, b, columns, max_children,
                segments, FILTER, SEGMENT, BLOCK,
            )  # fmt: skip
        count = append(memory + kept, count, keys, bound, BLOCK)
        turn += 1
        if (turn == segment_turns) | (turn == turns) | (count > LIST - BLOCK):
            room = tl.where(turn <= segment_turns, tl.minimum(ROOM, winners + winners // 4 + 16), ROOM)
            bound, count = shorten(memory + kept, count, bound, winners, room, BLOCK)
            if turn == segment_turns:
                turns += tl.cdiv(count, BLOCK // SEGMENT)
                kept, picks, count = kept + LIST, count, zero
                # A winner's score is not below that of the k-th segment.
                bound = tl.maximum(((bound + 1) >> 32 << 32) - 1, NONE)
    slot = tl.arange(0, ROOM)
    best_keys = ~tl.sort(~tl.load(memory + kept + slot, slot < count, NONE))
    exists = (slot < winners) & (best_keys > NONE)
    number = tl.where(exists, number_of(best_keys), 0)
    c = number % max_children
    w = (number // max_children).to(tl.int64)
    row, places = load_row(stats, w, exists), _load_places(trie, w, exists)
    column, z = _child(logits, token, alive, places, b, c, columns, FILTER)
    _, logp = scored(z, row, 0.0, terms)
    score = from_ordered((best_keys >> 32).to(tl.int32))
    _write(
        out_score, out_logp, out_parent, out_token, out_child, b * k + slot, slot < k, exists, score, logp, w,
        column, places.begin + c + 1,
    )  # fmt: skip
    tl.store(out_count + b, tl.minimum(count, winners))
    for start in range(ROOM, k, BLOCK):  # more are asked for than there are children
        rest, nothing = start + tl.arange(0, BLOCK), tl.zeros((BLOCK,), tl.int32)
        _write(
            out_score, out_logp, out_parent, out_token, out_child, b * k + rest, rest < k, nothing != 0, 0.0,
            0.0, nothing, nothing, nothing,
        )  # fmt: skip


def specializations() -> Iterator[Specialization]:
    """Everything that is compiled for logits whose last stride is 1 and whose others are multiples of 16."""
    weights = Weights("fp32", "fp32", "fp32", InverseTemperature("fp32", "fp32"))
    two = False, True
    for (dtype, logits), (block, segment, warps), extra, bits in product(FLOATS.items(), _TILES, two, two):
        constants = {"FILTER": bits, "EXTRA": extra, "BLOCK": block, "SEGMENT": segment, "s2": 1}
        name = f"expand_topk rows {block}{', extra score' * extra}, {dtype}{', filter' * bits}"
        types = {"logits": logits, "weights": weights}
        yield Specialization(name, expand_rows, _warps(warps, extra, bits), constants, types)
    for (room, _, longest, keys, warps), (_, segment, _), bits in product(_SELECTIONS, _TILES, two):
        if segment > longest:
            continue
        name = f"expand_topk select {room} of {keys}, segments of {segment}{', filter' * bits}"
        constants = {"FILTER": bits, "SEGMENT": segment, "ROOM": room, "BLOCK": keys}
        yield Specialization(name, _select, warps, constants, {"weights": weights})
