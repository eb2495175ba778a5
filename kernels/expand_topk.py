"""``expand_topk`` in two launches: statistics of the rows, then a selection in each request.

``_rows``: a program a row (prefix). It reads the legal logits in blocks and keeps maximum, sum of
exponentials and entropy as it goes; under ``"vocab"`` it also reads all columns, unless all of them are
legal. Children whose tokens are consecutive, as those of a trie's upper levels are, are read in place;
others through the token list.
Of every ``segment`` consecutive children it keeps the largest logit. Few long rows are shared by several
programs, whose statistics the second launch joins; with terms of each child's own (noise, action values) a
segment keeps its best *score*, so every program of a row then reads the row's logits twice.

``_select``: a program a request. The k best segments hold the k best children: a child outside of them is
beaten by one of each, because the score rises with the logit and ties go to the earlier segment. So it takes
the k best segments, scores their children and takes the k best of those. Both selections stream blocks of
int64 keys (order-preserving bits of the score, then the position) past a sorted list of the best so far.

========================  =======  ========  =====
longest row               block    segment   warps
========================  =======  ========  =====
256 children or columns   256      16        1
2,048                     2,048    128       4
more                      4,096    128       8
========================  =======  ========  =====

One workspace: 16 bytes of statistics and 12 of trie data a row, 4 bytes a segment, 20 a shared row's part,
8 a selected segment. More than 2,048 winners a request, or 2^31 children in one request's rows, run on the
reference. Multiplications and additions are not fused: both launches must give a score the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv, next_power_of_2

from ..reference import expand_topk as _reference
from ._array import array, load_float, load_int
from ._order import from_ordered, ordered
from ._specialization import FLOATS, OPTIONS, Specialization

_BLOCKS = ((256, 16, 1), (2048, 128, 4), (4096, 128, 8))  # children a block, a segment; warps
_FEW, _MANY, _MORE = (256, 2), (512, 8), (1024, 8)  # keys a block of the selection, warps
_MOST_WINNERS = 2048
_PROGRAMS = 512  # rows are shared until there are about as many; fixed, so that no result depends on the GPU
_CUM, _VALUE, _BONUS, _CHILD, _GUMBEL = (tl.constexpr(1 << i) for i in range(5))
_LOWEST = tl.constexpr(-(2**63))  # the key of what is no candidate


def expand_topk(
    logits: Tensor,
    offset: Tensor,
    token: Tensor,
    node: Tensor,
    k: int,
    cum_logp: Tensor | None,
    value: Tensor | None,
    bonus: Tensor | None,
    child_value: Tensor | None,
    seed: Tensor | None,
    logp_weight: float,
    value_weight: float,
    entropy_weight: float,
    temperature: float,
    vocab: bool,
    max_children: int,
) -> tuple[Tensor, ...]:
    """The dispatcher's signature; see :func:`vstar_ops.expand_topk`."""
    batch, width, columns = logits.shape
    winners = min(k, width * max_children)
    if winners > _MOST_WINNERS or width * max_children >= 2**31:
        return _reference(
            logits, offset, token, node, k, cum_logp, value, bonus, child_value, seed, logp_weight,
            value_weight, entropy_weight, temperature, vocab, max_children,
        )  # fmt: skip
    device = logits.device
    score, logp = (torch.empty(batch, k, device=device) for _ in range(2))
    parent, chosen, child = (torch.empty(batch, k, dtype=torch.int32, device=device) for _ in range(3))
    count = torch.empty(batch, dtype=torch.int32, device=device)
    entropy = torch.empty(batch, width, device=device)
    outputs = score, logp, parent, chosen, child, count, entropy
    if batch == 0:
        return outputs
    if value_weight == 0:
        value = child_value = None
    own_terms = seed is not None or child_value is not None or logp_weight < 0
    max_children = max(max_children, 1)
    longest = max(columns if vocab else 0, max_children)
    block, segment, warps = _tile(longest)
    segments, rows = cdiv(max_children, segment), batch * width
    splits = max(1, min(cdiv(longest, block), _PROGRAMS // max(rows, 1)))
    parts = 0 if own_terms or splits == 1 else splits
    list_size, keys, select_warps = _selection(winners, width * segments)
    segment_count = min(list_size, width * segments)

    sizes = (8 * batch * list_size, 16 * rows, 12 * rows, 4 * rows * segments, 20 * rows * parts)
    workspace = torch.empty(sum(sizes), dtype=torch.uint8, device=device).split(sizes)
    picked = workspace[0].view(torch.int64)
    stats, best, part = (workspace[i].view(torch.float32) for i in (1, 3, 4))
    edges = workspace[2].view(torch.int32)

    given = [(_CUM, cum_logp), (_VALUE, value), (_BONUS, bonus), (_CHILD, child_value), (_GUMBEL, seed)]
    flags = sum(flag.value for flag, x in given if x is not None)
    terms = [score if x is None else x for x in (cum_logp, value, bonus)]
    beams = [stride for x in terms for stride in x.stride()]
    actions = (0, 0, 0) if child_value is None else child_value.stride()
    seeds = picked if seed is None else seed
    weights = logp_weight, value_weight, entropy_weight, 1.0 / temperature
    common = (
        *logits.stride(), token, *array(child_value), *actions, seeds, seeds.stride(0), *terms, *beams, flags,
        width, columns, token.numel(), max_children, *weights,
    )  # fmt: skip
    if rows:
        _rows[(rows, splits)](
            logits, *common, offset, *array(node), *node.stride(), offset.numel() - 1, int(vocab), segments,
            splits, _chunk(max_children, splits, block), _chunk(columns, splits, block), stats, edges, best,
            part, entropy,
            OWN_TERMS=own_terms, BLOCK=block, SEGMENT=segment, num_warps=warps, **OPTIONS,
        )  # fmt: skip
    _select[(batch,)](
        *array(logits), *common, segments, segment, segment_count, parts, int(own_terms), stats, edges,
        best, part, picked, *outputs, k, LIST=list_size, KEYS=keys, num_warps=select_warps,
        **OPTIONS,
    )  # fmt: skip
    return outputs


def _tile(longest: int) -> tuple[int, int, int]:
    return next((tile for tile in _BLOCKS if longest <= tile[0]), _BLOCKS[-1])


def _selection(winners: int, segments: int) -> tuple[int, int, int]:
    """Length of the list of the best, keys a block, warps."""
    size = max(16, next_power_of_2(winners))
    if size <= 64 and segments <= 4 * _FEW[0]:
        return size, *_FEW
    keys, warps = _MANY if size < _MANY[0] else _MORE
    return max(64, size), max(size, keys), warps


def _chunk(total: int, splits: int, block: int) -> int:
    return cdiv(cdiv(total, splits), block) * block


@triton.jit
def _clean(z):
    """NaN reads as -inf, +inf as the largest finite float32."""
    z = tl.where(z != z, float("-inf"), z)
    return tl.where(z > 3.4028234663852886e38, 3.4028234663852886e38, z)


@triton.jit
def _join(top, total, moment, top2, total2, moment2, inverse):
    """Statistics of two disjoint sets: max z; sums of exp(x) and x exp(x), x = (z - max) / temperature."""
    new = tl.maximum(top, top2)
    off = tl.where(total > 0, (top - new) * inverse, 0.0)
    off2 = tl.where(total2 > 0, (top2 - new) * inverse, 0.0)
    scale, scale2 = tl.exp(off), tl.exp(off2)
    moment = tl.where(scale > 0, (moment + total * off) * scale, 0.0)
    moment2 = tl.where(scale2 > 0, (moment2 + total2 * off2) * scale2, 0.0)
    return new, total * scale + total2 * scale2, moment + moment2


@triton.jit
def _block_stats(z, inverse):
    top = tl.max(z, 0)
    x = (z - tl.where(top == float("-inf"), 0.0, top)) * inverse
    power = tl.exp(x)
    return top, tl.sum(power, 0), tl.sum(tl.where(power > 0, power * x, 0.0), 0)


@triton.jit
def _finish(top, total, moment, vocab_top, vocab_total):
    """What ``_score`` subtracts from the logits, and the entropy."""
    safe = tl.where(total > 0, total, 1.0)
    entropy = tl.where(total > 0, tl.maximum(tl.log(safe) - moment / safe, 0.0), 0.0)
    shift = tl.where(vocab_top == float("-inf"), 0.0, vocab_top)
    return shift, tl.log(tl.where(vocab_total > 0, vocab_total, 1.0)), entropy


@triton.jit
def _row_terms(
    cum_logp, value, bonus, a0, a1, v0, v1, o0, o1, flags, b, w, inside, entropy, value_weight, entropy_weight
):  # fmt: skip
    """The log-probability of a prefix, and what its children's scores have in common besides."""
    cum = tl.load(cum_logp + b * a0 + w * a1, inside & ((flags & _CUM) != 0), 0.0)
    constant = tl.load(value + b * v0 + w * v1, inside & ((flags & _VALUE) != 0), 0.0) * value_weight
    constant += entropy_weight * entropy
    constant += tl.load(bonus + b * o0 + w * o1, inside & ((flags & _BONUS) != 0), 0.0)
    return cum, constant


@triton.jit
def _score(z, shift, log_sum, cum, constant, own, logp_weight, inverse):
    """Score (-inf: no candidate) and log-probability. Without ``own`` terms it never falls as z rises."""
    logp = ((z - shift) * inverse - log_sum) + cum
    score = (tl.where(logp_weight == 0, 0.0, logp_weight * logp) + constant) + own
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
def _own_terms(
    child_value, child_type, c0, c1, c2, seed, seed_stride, flags, value_weight, b, w, node, column, inside
):  # fmt: skip
    """A child's own terms of the score: action value and noise."""
    own = tl.zeros(column.shape, tl.float32)
    if (flags & _CHILD) != 0:
        own += value_weight * load_float(
            child_value, child_type, b * c0 + w * c1 + column.to(tl.int64) * c2, inside
        )
    if (flags & _GUMBEL) != 0:
        own += _gumbel(tl.load(seed + b * seed_stride), node.to(tl.int32), column.to(tl.int32))
    return own


@triton.jit
def _load_row(logits, s2, token, begin, count, first, consecutive, columns, c):
    """Columns and logits of the children ``c`` of a row; those that do not exist are -inf."""
    column = c
    if consecutive:
        # The alignment lets a thread read several logits at once.
        column = tl.multiple_of(first, 16) + c
    else:
        column = tl.load(token + begin + c, c < count, -1)
    inside = (c < count) & (column >= 0) & (column < columns)
    z = tl.load(logits + column.to(tl.int64) * s2, inside, float("-inf")).to(tl.float32)
    return column, inside, _clean(z)


# Only the logits' strides are worth a kernel of their own where they are 1 or a multiple of 16.
_PLAIN = (
    "child_value", "child_type", "c0", "c1", "c2", "seed_stride", "a0", "a1", "v0", "v1", "o0", "o1", "flags",
    "width", "columns", "num_edges", "max_children", "segments",
)  # fmt: skip


@triton.jit(
    do_not_specialize=[
        *_PLAIN, "node", "node_type", "n0", "n1", "num_nodes", "vocab", "splits", "chunk", "column_chunk"
    ]
)  # fmt: skip
def _rows(
    logits, s0, s1, s2, token, child_value: tl.int64, child_type, c0, c1, c2, seed, seed_stride, cum_logp,
    value, bonus, a0, a1, v0, v1, o0, o1, flags, width, columns, num_edges, max_children, logp_weight,
    value_weight, entropy_weight, inverse, offset, node: tl.int64, node_type, n0, n1, num_nodes, vocab,
    segments, splits, chunk, column_chunk, stats, edges, best, part, entropies,
    OWN_TERMS: tl.constexpr, BLOCK: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, w = row // width, row % width
    step = tl.arange(0, BLOCK)
    logits += b * s0 + w * s1

    here = load_int(node, node_type, b * n0 + w * n1, True, -1)
    live = (here >= 0) & (here < num_nodes)
    here = tl.where(live, here, 0)
    begin = tl.load(offset + here, live, 0).to(tl.int64)
    end = tl.load(offset + here + 1, live, 0).to(tl.int64)
    sound = (begin >= 0) & (end <= num_edges) & (begin <= end)  # a damaged trie is not followed
    count = tl.minimum(tl.where(sound, end - begin, 0), max_children).to(tl.int32)
    first = tl.load(token + begin, count > 0, 0)
    last = tl.load(token + begin + count - 1, count > 0, 0)
    consecutive = (last - first + 1 == count) & (first >= 0) & (first % 16 == 0)

    low = split * chunk
    high = tl.minimum(low + chunk, count)
    stats_low, stats_high = low, high
    if OWN_TERMS:
        stats_low, stats_high = low * 0, count
    top, total, moment = float("-inf"), 0.0, 0.0
    for start in range(stats_low, stats_high, BLOCK):
        _, _, z = _load_row(logits, s2, token, begin, count, first, consecutive, columns, start + step)
        top2, total2, moment2 = _block_stats(z, inverse)
        top, total, moment = _join(top, total, moment, top2, total2, moment2, inverse)
        if not OWN_TERMS:
            at = start // SEGMENT + tl.arange(0, BLOCK // SEGMENT)
            top_of = tl.max(tl.reshape(z, (BLOCK // SEGMENT, SEGMENT)), 1)
            tl.store(best + row * segments + at, top_of, at < segments)

    vocab_top, vocab_total = top, total
    if (vocab != 0) & (count != columns):
        vocab_top, vocab_total, unused = float("-inf"), 0.0, 0.0
        column_low = split * column_chunk
        column_high = tl.minimum(column_low + column_chunk, columns)
        if OWN_TERMS:
            column_low, column_high = column_low * 0, column_high * 0 + columns
        for start in range(column_low, column_high, BLOCK):
            z = _clean(
                tl.load(logits + (start + step).to(tl.int64) * s2, start + step < columns, float("-inf")).to(
                    tl.float32
                )
            )
            top2, total2, moment2 = _block_stats(z, inverse)
            vocab_top, vocab_total, unused = _join(
                vocab_top, vocab_total, unused, top2, total2, moment2, inverse
            )

    if split == 0:
        tl.store(edges + row * 3, begin.to(tl.int32))
        tl.store(edges + row * 3 + 1, count.to(tl.int32))
        tl.store(edges + row * 3 + 2, here.to(tl.int32))
    if OWN_TERMS | (splits == 1):
        shift, log_sum, entropy = _finish(top, total, moment, vocab_top, vocab_total)
        cum, constant = _row_terms(
            cum_logp, value, bonus, a0, a1, v0, v1, o0, o1, flags, b, w, True, entropy, value_weight,
            entropy_weight,
        )  # fmt: skip
        if split == 0:
            tl.store(entropies + row, entropy)
            tl.store(stats + row * 4, shift)
            tl.store(stats + row * 4 + 1, log_sum)
            tl.store(stats + row * 4 + 2, cum)
            tl.store(stats + row * 4 + 3, constant)
        if OWN_TERMS:
            for start in range(low, high, BLOCK):
                column, inside, z = _load_row(
                    logits, s2, token, begin, count, first, consecutive, columns, start + step
                )
                own = _own_terms(
                    child_value, child_type, c0, c1, c2, seed, seed_stride, flags, value_weight, b, w, here,
                    column, inside,
                )  # fmt: skip
                score, _ = _score(z, shift, log_sum, cum, constant, own, logp_weight, inverse)
                at = start // SEGMENT + tl.arange(0, BLOCK // SEGMENT)
                top_of = tl.max(tl.reshape(score, (BLOCK // SEGMENT, SEGMENT)), 1)
                tl.store(best + row * segments + at, top_of, at < segments)
    else:
        part += (row * splits + split) * 5
        tl.store(part, top)
        tl.store(part + 1, total)
        tl.store(part + 2, moment)
        tl.store(part + 3, vocab_top)
        tl.store(part + 4, vocab_total)

    # The segments that no block has reached.
    reached = tl.maximum(low, low + tl.cdiv(tl.maximum(high - low, 0), BLOCK) * BLOCK)
    for start in range(reached, low + chunk, BLOCK):
        at = start // SEGMENT + tl.arange(0, BLOCK // SEGMENT)
        tl.store(
            best + row * segments + at, tl.full((BLOCK // SEGMENT,), float("-inf"), tl.float32), at < segments
        )


@triton.jit
def _key(score, position):
    """An integer that orders candidates: score descending, then position ascending; the larger is better."""
    key = (ordered(score).to(tl.int64) << 32) | (0xFFFFFFFF - position.to(tl.int64))
    return tl.where(score > float("-inf"), key, _LOWEST)


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
def _children(
    logits, logits_type, s0, s1, s2, token, columns, edges, b, w, c, inside
):  # fmt: skip
    """Edge, column and logit (-inf: there is none) of children ``c`` of the rows ``w`` of a request."""
    begin = tl.load(edges + w * 3, inside, 0).to(tl.int64)
    inside &= c < tl.load(edges + w * 3 + 1, inside, 0)
    column = tl.load(token + begin + c, inside, -1)
    inside &= (column >= 0) & (column < columns)
    z = _clean(load_float(logits, logits_type, b * s0 + w * s1 + column.to(tl.int64) * s2, inside))
    return begin + c, column, tl.where(inside, z, float("-inf"))


@triton.jit
def _row_stats(stats, w, inside):
    """What ``_rows`` or the joining of its parts has stored: shift, log_sum, cum, constant."""
    at = stats + w * 4
    shift, log_sum = tl.load(at, inside, 0.0), tl.load(at + 1, inside, 0.0)
    return shift, log_sum, tl.load(at + 2, inside, 0.0), tl.load(at + 3, inside, 0.0)


@triton.jit(
    do_not_specialize=[
        *_PLAIN, "logits", "logits_type", "s0", "s1", "s2", "segment", "segment_count", "parts", "own_terms",
        "k",
    ]
)  # fmt: skip
def _select(
    logits: tl.int64, logits_type, s0, s1, s2, token, child_value: tl.int64, child_type, c0, c1, c2, seed,
    seed_stride, cum_logp, value, bonus, a0, a1, v0, v1, o0, o1, flags, width, columns, num_edges,
    max_children, logp_weight, value_weight, entropy_weight, inverse, segments, segment, segment_count, parts,
    own_terms, stats, edges, best, part, picked, out_score, out_logp, out_parent, out_token, out_child,
    out_count, entropies, k,
    LIST: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    step = tl.arange(0, KEYS)
    slot = tl.arange(0, LIST)
    stats += b * width * 4
    edges += b * width * 3
    best += b * width * segments
    picked += b * LIST
    entropies += b * width
    part += b * width * parts * 5

    if parts > 0:  # several programs a row: join what they found
        for start in range(0, width, KEYS):
            w = (start + step).to(tl.int64)
            inside = w < width
            top = tl.full((KEYS,), float("-inf"), tl.float32)
            total = tl.zeros((KEYS,), tl.float32)
            moment = tl.zeros((KEYS,), tl.float32)
            vocab_top = tl.full((KEYS,), float("-inf"), tl.float32)
            vocab_total = tl.zeros((KEYS,), tl.float32)
            unused = tl.zeros((KEYS,), tl.float32)
            for split in range(0, parts):
                at = part + (w * parts + split) * 5
                top2, total2 = tl.load(at, inside, float("-inf")), tl.load(at + 1, inside, 0.0)
                moment2 = tl.load(at + 2, inside, 0.0)
                top, total, moment = _join(top, total, moment, top2, total2, moment2, inverse)
                top2, total2 = tl.load(at + 3, inside, float("-inf")), tl.load(at + 4, inside, 0.0)
                vocab_top, vocab_total, unused = _join(
                    vocab_top, vocab_total, unused, top2, total2, unused * 0.0, inverse
                )
            shift, log_sum, entropy = _finish(top, total, moment, vocab_top, vocab_total)
            cum, constant = _row_terms(
                cum_logp, value, bonus, a0, a1, v0, v1, o0, o1, flags, b, w, inside, entropy, value_weight,
                entropy_weight,
            )  # fmt: skip
            tl.store(entropies + w, entropy, inside)
            tl.store(stats + w * 4, shift, inside)
            tl.store(stats + w * 4 + 1, log_sum, inside)
            tl.store(stats + w * 4 + 2, cum, inside)
            tl.store(stats + w * 4 + 3, constant, inside)
        tl.debug_barrier()  # they are read by other threads of this program

    # First the segments, then the children of the best ones. One loop, so that the sorting network, which is
    # most of the kernel, is compiled once.
    kept = tl.full((LIST,), _LOWEST, tl.int64)
    total_segments, total_children = width * segments, segment_count * segment
    first_rounds = tl.cdiv(total_segments, KEYS)
    for turn in range(0, first_rounds + tl.cdiv(total_children, KEYS)):
        if turn == first_rounds:
            tl.store(picked + slot, kept)
            tl.debug_barrier()  # they are read by other threads of this program
            kept = tl.full((LIST,), _LOWEST, tl.int64)
        if turn < first_rounds:
            i = turn * KEYS + step
            inside = i < total_segments
            score = tl.load(best + i, inside, float("-inf"))
            if own_terms == 0:
                w = (i // segments).to(tl.int64)
                shift, log_sum, cum, constant = _row_stats(stats, w, inside)
                score, _ = _score(score, shift, log_sum, cum, constant, 0.0, logp_weight, inverse)
            keys = _key(score, i)
        else:
            i = (turn - first_rounds) * KEYS + step
            key = tl.load(picked + i // segment, i < total_children, _LOWEST)
            inside = key != _LOWEST
            which = tl.where(inside, _position(key), 0)
            c = (which % segments) * segment + i % segment
            w = (which // segments).to(tl.int64)
            _, column, z = _children(
                logits, logits_type, s0, s1, s2, token, columns, edges, b, w, c, inside
            )  # fmt: skip
            inside &= z > float("-inf")
            node = tl.load(edges + w * 3 + 2, inside, 0)
            own = _own_terms(
                child_value, child_type, c0, c1, c2, seed, seed_stride, flags, value_weight, b, w, node,
                column, inside,
            )  # fmt: skip
            shift, log_sum, cum, constant = _row_stats(stats, w, inside)
            score, _ = _score(z, shift, log_sum, cum, constant, own, logp_weight, inverse)
            keys = _key(score, w.to(tl.int32) * max_children + c)
        kept = _keep_best(kept, keys, LIST)

    exists = (kept != _LOWEST) & (slot < k)
    position = tl.where(exists, _position(kept), 0)
    c = position % max_children
    w = (position // max_children).to(tl.int64)
    edge, column, z = _children(logits, logits_type, s0, s1, s2, token, columns, edges, b, w, c, exists)
    shift, log_sum, cum, constant = _row_stats(stats, w, exists)
    _, logp = _score(z, shift, log_sum, cum, constant, 0.0, logp_weight, inverse)
    to, written = b * k + slot, slot < k
    tl.store(
        out_score + to, tl.where(exists, from_ordered((kept >> 32).to(tl.int32)), float("-inf")), written
    )
    tl.store(out_logp + to, tl.where(exists, logp, float("-inf")), written)
    tl.store(out_parent + to, tl.where(exists, w, -1).to(tl.int32), written)
    tl.store(out_token + to, tl.where(exists, column, -1).to(tl.int32), written)
    tl.store(out_child + to, tl.where(exists, edge + 1, -1).to(tl.int32), written)
    tl.store(out_count + b, tl.sum(exists.to(tl.int32), 0))
    for start in range(LIST, k, KEYS):  # more are asked for than there are children
        rest, missing = b * k + start + step, start + step < k
        tl.store(out_score + rest, tl.full((KEYS,), float("-inf"), tl.float32), missing)
        tl.store(out_logp + rest, tl.full((KEYS,), float("-inf"), tl.float32), missing)
        tl.store(out_parent + rest, tl.full((KEYS,), -1, tl.int32), missing)
        tl.store(out_token + rest, tl.full((KEYS,), -1, tl.int32), missing)
        tl.store(out_child + rest, tl.full((KEYS,), -1, tl.int32), missing)


def specializations() -> Iterator[Specialization]:
    """Everything that is compiled for logits whose last stride is 1 and whose others are multiples of 16."""
    floats = ("cum_logp", "value", "bonus", "stats", "best", "part", "entropies", "out_score", "out_logp")
    ints = ("offset", "token", "edges", "out_parent", "out_token", "out_child", "out_count")
    numbers = ("logp_weight", "value_weight", "entropy_weight", "inverse")
    types = dict.fromkeys(floats, "*fp32") | dict.fromkeys(ints, "*i32") | dict.fromkeys(numbers, "fp32")
    types |= dict.fromkeys(("node", "child_value"), "i64") | {"seed": "*i64", "picked": "*i64"}
    rows = {**types, "s0": "i32:16", "s1": "i32:16"}
    for (dtype, logits), (block, segment, warps), own in product(FLOATS.items(), _BLOCKS, (False, True)):
        constants = {"OWN_TERMS": own, "BLOCK": block, "SEGMENT": segment, "s2": 1}
        name = f"expand_topk rows {block}{', own terms' * own}, {dtype}"
        yield Specialization(name, _rows, {**rows, "logits": logits}, constants, warps)
    for winners, segments in product((1 << i for i in range(4, _MOST_WINNERS.bit_length())), (1, 2**20)):
        size, keys, warps = _selection(winners, segments)
        if size == winners and (size <= 64 or segments == 1):  # each once
            name = f"expand_topk select {size} of {keys}"
            constants = {"LIST": size, "KEYS": keys}
            yield Specialization(name, _select, {**types, "logits": "i64"}, constants, warps)
