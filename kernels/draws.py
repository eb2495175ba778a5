"""The steps of top-k sampling between two forwards, two launches each.

``draw_children`` takes one program per candidate, which adds noise to its list, block by block, and then one
per request, which places the results. ``distinct_rows`` takes one program per request twice: to find the
first candidate of every prefix, and to number the prefixes behind those of the requests before. The one
workspace holds an int32 per candidate: the entry that was drawn, or whether it is a first one.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._array import Array, load_float, load_int, strided
from ._kernel import ADDRESS, F32, I32, I64, LONG, Specialization, kernel, workspace

_LIST, _PLACE, _COMPARE = {"BLOCK": 64}, {"BLOCK": 64}, {"BLOCK": 32, "CHUNK": 32}


def draw_children(
    logp, token, node, sequence, row, prefix, cum_logp, seed, base_seed, pack,
):  # fmt: skip
    """The dispatcher's signature; see :func:`vstar_ops.draw_children`."""
    batch, candidates, length = sequence.shape
    out_sequence = sequence.new_empty(batch, candidates, length + 1, dtype=torch.int32)
    out_node, out_logp = (
        out_sequence.new_empty(batch, candidates, dtype=x) for x in (torch.int32, logp.dtype)
    )
    num_valid = out_sequence.new_empty(batch)
    (choice,) = workspace(logp.device, (batch * candidates, torch.int32))
    lists = *strided(logp, 2), *strided(token, 2), *strided(node, 2)
    if out_node.numel():
        _draw.launch(
            (batch * candidates,), 1,
            *lists, *strided(row, 2), *strided(prefix, 2), *strided(seed, 1), base_seed, choice, candidates,
            *logp.shape, **_LIST,
        )  # fmt: skip
    if batch:
        _place.launch(
            (batch,), 1,
            *lists, *strided(row, 2), *strided(sequence, 3), *strided(cum_logp, 2), choice, out_sequence,
            out_node, out_logp, num_valid, candidates, length, int(pack), **_PLACE,
        )  # fmt: skip
    return out_sequence, out_node, out_logp, num_valid


@triton.jit
def _split_mix(seed, n):
    """The n-th output of SplitMix64, n from 0; see csrc/common/gumbel.h."""
    x = (seed + (n + 1) * -0x61C8864680B583EB).to(tl.uint64, bitcast=True)
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return (x ^ (x >> 31)).to(tl.int64, bitcast=True)


@triton.jit
def _gumbel(seed, node, token):
    """``exact_gumbel`` of csrc/common/gumbel.h over the first word of Philox4x32-10."""
    zero = token * 0
    bits, _, _, _ = tl.philox(seed, node + zero, token, zero, zero)
    complement = (bits ^ 0xFFFFFFFF).to(tl.uint32).to(tl.float64)
    return -tl.log(-tl.log((complement + 0.5) * 2.3283064365386963e-10))


@kernel
def _draw(
    logp: ADDRESS, logp_type, l0, l1, token: ADDRESS, token_type, t0, t1, node: ADDRESS, node_type, n0, n1,
    row: ADDRESS, row_type, r0, r1, prefix: ADDRESS, prefix_type, p0, p1, seed: ADDRESS, seed_type, s0,
    base_seed: LONG, choice: I32, candidates, rows, children, BLOCK: tl.constexpr,
):  # fmt: skip
    logp, token = Array(logp, logp_type, l0, l1, 0), Array(token, token_type, t0, t1, 0)
    node = Array(node, node_type, n0, n1, 0)
    at = tl.program_id(0).to(tl.int64)
    b, k = at // candidates, at % candidates
    its_row = load_int(Array(row, row_type, r0, r1, 0), b, k, 0, row_type >= 0, 0)
    if row_type < 0:
        its_row = b
    its_prefix = load_int(Array(prefix, prefix_type, p0, p1, 0), b, k, 0, prefix_type >= 0, 0)
    if prefix_type < 0:
        its_prefix = b * 0
    its_seed = load_int(Array(seed, seed_type, s0, 0, 0), b, 0, 0, seed_type >= 0, 0)
    if seed_type < 0:
        its_seed = _split_mix(base_seed.to(tl.int64), b)
    key = its_seed + (k + 1) * 0x5851F42D4C957F2D
    best_score, best = tl.full((BLOCK,), float("-inf"), tl.float64), tl.full((BLOCK,), 2147483647, tl.int32)
    for start in range(0, children, BLOCK):
        c = start + tl.arange(0, BLOCK)
        line = its_row + c.to(tl.int64) * 0
        inside = (line >= 0) & (line < rows) & (c < children)
        drawable = inside & (load_int(node, line, c.to(tl.int64), 0, inside, -1) >= 0)
        of_list = load_float(logp, line, c.to(tl.int64), 0, drawable)
        drawable &= of_list > float("-inf")
        its_token = load_int(token, line, c.to(tl.int64), 0, drawable, 0)
        score = of_list.to(tl.float64) + _gumbel(key, its_prefix.to(tl.int32), its_token.to(tl.int32))
        better = drawable & ((best == 2147483647) | (score > best_score))
        best_score, best = tl.where(better, score, best_score), tl.where(better, c, best)
    top = tl.max(best_score, 0)
    entry = tl.min(tl.where(best_score == top, best, 2147483647), 0)
    tl.store(choice + at, tl.where(entry == 2147483647, -1, entry))


@kernel
def _place(
    logp: ADDRESS, logp_type, l0, l1, token: ADDRESS, token_type, t0, t1, node: ADDRESS, node_type, n0, n1,
    row: ADDRESS, row_type, r0, r1, sequence: ADDRESS, sequence_type, q0, q1, q2, cum_logp: ADDRESS,
    cum_logp_type, u0, u1, choice: I32, out_sequence: I32, out_node: I32, out_logp: F32, num_valid: I32,
    candidates, length, pack, BLOCK: tl.constexpr,
):  # fmt: skip
    logp, token = Array(logp, logp_type, l0, l1, 0), Array(token, token_type, t0, t1, 0)
    node, row = Array(node, node_type, n0, n1, 0), Array(row, row_type, r0, r1, 0)
    sequence = Array(sequence, sequence_type, q0, q1, q2)
    cum_logp = Array(cum_logp, cum_logp_type, u0, u1, 0)
    b = tl.program_id(0).to(tl.int64)
    base = b * candidates
    valid = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, candidates, BLOCK):
        k = start + tl.arange(0, BLOCK).to(tl.int64)
        valid += (tl.load(choice + base + k, k < candidates, -1) >= 0).to(tl.int32)
    total = tl.sum(valid, 0)
    tl.store(num_valid + b, total)
    found = total * 0
    for start in range(0, candidates, BLOCK):
        k = start + tl.arange(0, BLOCK).to(tl.int64)
        inside, request = k < candidates, b + k * 0
        c = tl.load(choice + base + k, inside, -1).to(tl.int64)
        live = c >= 0
        before = found + tl.cumsum(live.to(tl.int32), 0) - live.to(tl.int32)
        to = base + k
        if pack != 0:
            to = base + tl.where(live, before, total + k - before)
        line = load_int(row, request, k, 0, live, 0)
        if row.dtype < 0:
            line = request
        tl.store(out_node + to, load_int(node, line, c, 0, live, -1).to(tl.int32), inside)
        its_logp = load_float(cum_logp, request, k, 0, live) + load_float(logp, line, c, 0, live)
        tl.store(out_logp + to, tl.where(live, its_logp, float("-inf")), inside)
        for i in range(0, length):
            its_token = load_int(sequence, request, k, i, live, -1)
            tl.store(out_sequence + to * (length + 1) + i, its_token.to(tl.int32), inside)
        last = load_int(token, line, c, 0, live, -1)
        tl.store(out_sequence + to * (length + 1) + length, last.to(tl.int32), inside)
        found += tl.sum(live.to(tl.int32), 0)


def distinct_rows(
    node: Tensor, token: Tensor, slot: Tensor, row: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The dispatcher's signature; see :func:`vstar_ops.distinct_rows`."""
    batch, candidates = node.shape
    out_row = node.new_empty(node.shape, dtype=torch.int32)
    out_node, num_rows, num_tokens = (out_row.new_empty(size) for size in (node.numel(), 1, batch))
    out_parent, out_token = (torch.empty_like(out_node, dtype=torch.int64) for _ in range(2))
    (first,) = workspace(node.device, (node.numel(), torch.int32))
    if batch:
        _first_candidates.launch(
            (batch,), 1,
            *strided(node, 2), first, num_tokens, candidates, **_COMPARE
        )  # fmt: skip
    _distinct_rows.launch(
        (max(batch, 1),), 1,
        *strided(node, 2), *strided(token, 2), *strided(slot, 1), *strided(row, 2), first, out_row,
        out_parent, out_token, out_node, num_rows, num_tokens, batch, candidates, len(slot), **_COMPARE,
    )  # fmt: skip
    return out_row, out_parent, out_token, out_node, num_rows, num_tokens


@kernel
def _first_candidates(
    node: ADDRESS, node_type, n0, n1, first: I32, num_tokens: I32, candidates, BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    node = Array(node, node_type, n0, n1, 0)
    b = tl.program_id(0).to(tl.int64)
    distinct = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, candidates, BLOCK):
        k = start + tl.arange(0, BLOCK).to(tl.int64)
        mine = load_int(node, b + k * 0, k, 0, k < candidates, -1)
        earlier = tl.zeros((BLOCK,), tl.int32)
        for begin in range(0, start + BLOCK, CHUNK):
            j = begin + tl.arange(0, CHUNK).to(tl.int64)
            other = load_int(node, b + j * 0, j, 0, j < candidates, -1)
            same = (other[:, None] == mine[None, :]) & (j[:, None] < k[None, :])
            earlier += tl.sum(same.to(tl.int32), 0)
        is_first = ((mine >= 0) & (earlier == 0)).to(tl.int32)
        tl.store(first + b * candidates + k, is_first, k < candidates)
        distinct += is_first
    tl.store(num_tokens + b, tl.sum(distinct, 0))


@kernel
def _distinct_rows(
    node: ADDRESS, node_type, n0, n1, token: ADDRESS, token_type, t0, t1, slot: ADDRESS, slot_type, s0,
    row: ADDRESS, row_type, r0, r1, first: I32, out_row: I32, out_parent: I64, out_token: I64, out_node: I32,
    num_rows: I32, num_tokens: I32, batch, candidates, slots, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    node, token = Array(node, node_type, n0, n1, 0), Array(token, token_type, t0, t1, 0)
    slot, row = Array(slot, slot_type, s0, 0, 0), Array(row, row_type, r0, r1, 0)
    b = tl.program_id(0).to(tl.int64)
    earlier, every = tl.zeros((BLOCK,), tl.int32), tl.zeros((BLOCK,), tl.int32)
    for start in range(0, batch, BLOCK):
        i = start + tl.arange(0, BLOCK)
        number = tl.load(num_tokens + i, i < batch, 0)
        every += number
        earlier += tl.where(i < b, number, 0)
    offset, rows = tl.sum(earlier, 0), tl.sum(every, 0)
    if b == 0:
        tl.store(num_rows, rows)
    number = tl.where(b < batch, candidates, 0)
    for start in range(0, number, BLOCK):
        k = start + tl.arange(0, BLOCK).to(tl.int64)
        inside, request, at = k < candidates, b + k * 0, b * candidates + k
        mine = load_int(node, request, k, 0, inside, -1)
        smaller = tl.zeros((BLOCK,), tl.int32)
        for begin in range(0, candidates, CHUNK):
            j = begin + tl.arange(0, CHUNK).to(tl.int64)
            other = load_int(node, b + j * 0, j, 0, j < candidates, -1)
            counts = (tl.load(first + b * candidates + j, j < candidates, 0) > 0)[:, None]
            smaller += tl.sum((counts & (other[:, None] < mine[None, :])).to(tl.int32), 0)
        its_row = offset + smaller
        tl.store(out_row + at, tl.where(mine >= 0, its_row, -1), inside)
        is_first = tl.load(first + at, inside, 0) > 0
        above = load_int(row, request, k, 0, is_first, -1)
        if row.dtype < 0:
            above = request
        known = is_first & (above >= 0) & (above < slots)
        tl.store(out_parent + its_row, load_int(slot, above, 0, 0, known, -1), is_first)
        tl.store(out_token + its_row, load_int(token, request, k, 0, is_first, 0), is_first)
        tl.store(out_node + its_row, mine.to(tl.int32), is_first)
        unused = inside & (at >= rows)
        tl.store(out_parent + at, tl.full((BLOCK,), -1, tl.int64), unused)
        tl.store(out_token + at, tl.zeros((BLOCK,), tl.int64), unused)
        tl.store(out_node + at, tl.full((BLOCK,), -1, tl.int32), unused)


def specializations() -> Iterator[Specialization]:
    """Everything that is compiled."""
    yield Specialization("draw_children", _draw, 1, _LIST)
    yield Specialization("draw_children, placing", _place, 1, _PLACE)
    yield Specialization("distinct_rows, first candidates", _first_candidates, 1, _COMPARE)
    yield Specialization("distinct_rows", _distinct_rows, 1, _COMPARE)
