"""``sibling_advantage`` of large groups: every candidate of a request against every other, in float64.

A program takes a block of a request's candidates (the columns of a tile) and runs through all candidates of
the request in chunks (the rows), so that sums over the rows stay within a thread. A level takes two launches:
(1) the bucket of each candidate: its size, its mean reward, and how many of its members come earlier (none:
the candidate represents the bucket's node); (2) the nodes against each other: rank, statistics, result. With
a mask of tokens the nodes are numbered without gaps in the end.

The statistics are taken of the differences to the candidate's own mean, in one pass, as sibling_advantage.py
does. Workspace: int32 and float64 ``[B, G]``, the earlier members and the mean of each bucket.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._array import Array, load_float, load_int
from ._kernel import ADDRESS, ANY, BLOCKS, F64, I32, Specialization, block_for, kernel, workspace

_BLOCK, _CHUNK, _WARPS = 128, 4, 4  # columns and rows of a tile; every thread has whole columns
INT32_MAX = tl.constexpr(2**31 - 1)


def launch_pairs(tokens: Tensor, by_token: bool, node: Tensor, arguments: Sequence[Any]) -> None:
    """Launch what computes ``node`` and the rest, by the arguments of the kernel that sorts."""
    batch, group, length = tokens.shape
    earlier, mean = workspace(tokens.device, *((batch * group, x) for x in (torch.int32, torch.float64)))
    blocks = -(-group // _BLOCK)
    *arguments, statistics = arguments
    for depth, phase in product(range(length), (1, 2)):
        _pairs.launch(
            (batch * blocks,), _WARPS, *arguments, earlier, mean, blocks, depth, statistics, phase, _BLOCK,
            _CHUNK,
        )  # fmt: skip
    if by_token:
        width, warps = block_for(group)
        _renumber.launch((batch,), warps, node, group, length, width)


@triton.jit
def prefixes(tokens, mask, prefix, b, g, group, length, depth):
    """Number of the parent prefix, and token.

    The number is 0 for the root, -1 where masked; past the end the highest number.
    """
    inside = g < group
    parent = tl.where(inside, 0, INT32_MAX)
    if depth > 0:
        parent = tl.load(prefix + (b * group + g) * length + depth - 1, inside, INT32_MAX)
    else:
        parent = tl.where(load_int(mask, b, g, 0, inside, 1) != 0, parent, -1)
    return parent, load_int(tokens, b, g, tl.cast(depth, tl.int64), inside, 0)


@triton.jit
def _buckets(
    tokens, rewards, mask, prefix, earlier, mean, count, b, g, group, length, depth,
    STATISTICS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Phase 1 for the candidates g: ``count``, ``earlier``, ``mean``."""
    parent, token = prefixes(tokens, mask, prefix, b, g, group, length, depth)
    members = tl.zeros((BLOCK,), tl.int32)
    before = tl.zeros((BLOCK,), tl.int32)
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, group, CHUNK):
        j = start + tl.arange(0, CHUNK).to(tl.int64)
        parent_j, token_j = prefixes(tokens, mask, prefix, b, j, group, length, depth)
        same = (parent_j[:, None] == parent[None, :]) & (token_j[:, None] == token[None, :])
        members += tl.sum(same.to(tl.int32), 0)
        before += tl.sum((same & (j[:, None] < g[None, :])).to(tl.int32), 0)
        if STATISTICS:
            reward_j = load_float(rewards, b, j, 0, j < group).to(tl.float64)
            total += tl.sum(tl.where(same, reward_j[:, None], 0.0), 0)
    candidate = b * group + g
    members = tl.where(parent < 0, 0, members)
    tl.store(count + candidate * length + depth, members, g < group)
    tl.store(earlier + candidate, before, g < group)
    if STATISTICS:
        tl.store(mean + candidate, total / tl.maximum(members, 1).to(tl.float64), g < group)


@triton.jit
def _nodes(
    tokens, rewards, mask, prefix, earlier, mean, request, advantage, valid, node, b, g, group, length,
    depth, eps, std_floor, ddof, min_siblings, baseline, scale, STATISTICS: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Phase 2 for the candidates g: ``node``, ``advantage`` and ``valid``."""
    candidate = b * group + g
    parent, token = prefixes(tokens, mask, prefix, b, g, group, length, depth)
    rank = tl.zeros((BLOCK,), tl.int32)
    highest = tl.full((CHUNK,), -1, tl.int32)
    siblings = tl.zeros((BLOCK,), tl.int32)
    family = tl.zeros((BLOCK,), tl.int32)  # candidates below the parent
    family_total = tl.zeros((BLOCK,), tl.float64)
    difference_sum = tl.zeros((BLOCK,), tl.float64)
    squares = tl.zeros((BLOCK,), tl.float64)
    if STATISTICS:
        own_mean = tl.load(mean + candidate, g < group, 0.0)
    for start in range(0, group, CHUNK):
        j = start + tl.arange(0, CHUNK).to(tl.int64)
        parent_j, token_j = prefixes(tokens, mask, prefix, b, j, group, length, depth)
        is_first = (tl.load(earlier + b * group + j, j < group, 1) == 0) & (parent_j >= 0)
        highest = tl.maximum(highest, tl.where(j < group, parent_j, -1))
        same_parent = parent_j[:, None] == parent[None, :]
        less = (parent_j[:, None] < parent[None, :]) | (same_parent & (token_j[:, None] < token[None, :]))
        rank += tl.sum((less & is_first[:, None]).to(tl.int32), 0)
        if STATISTICS:
            reward_j = load_float(rewards, b, j, 0, j < group).to(tl.float64)
            family += tl.sum(same_parent.to(tl.int32), 0)
            family_total += tl.sum(tl.where(same_parent, reward_j[:, None], 0.0), 0)
            sibling = same_parent & is_first[:, None]
            mean_j = tl.load(mean + b * group + j, j < group, 0.0)
            difference = tl.where(sibling, mean_j[:, None] - own_mean[None, :], 0.0)
            siblings += tl.sum(sibling.to(tl.int32), 0)
            difference_sum += tl.sum(difference, 0)
            squares += tl.sum(difference * difference, 0)
    first = tl.where(depth > 0, tl.max(highest, 0) + 1, 0)
    slot = candidate * length + depth
    tl.store(node + slot, tl.where(parent < 0, -1, first + rank), g < group)
    if STATISTICS:
        usable = (parent >= 0) & (siblings >= min_siblings)
        n = tl.maximum(siblings, 1).to(tl.float64)
        free = tl.maximum(siblings - ddof, 1).to(tl.float64)
        std = tl.sqrt(tl.maximum(squares - difference_sum * difference_sum / n, 0.0) / free)
        over = -difference_sum / tl.where(baseline == 2, tl.maximum(n - 1.0, 1.0), n)
        parent_mean = family_total / tl.maximum(family, 1).to(tl.float64)
        over = tl.where(baseline == 1, own_mean - parent_mean, over)
        divisor = tl.full((), 1.0, tl.float64)
        if scale == 1:
            divisor = tl.load(request + b)
        over = over / tl.where(scale == 0, tl.maximum(std, std_floor) + eps, divisor)
        # One sibling that is not finite makes all differences so.
        over = tl.where(tl.abs(difference_sum) < float("inf"), over, float("nan"))
        result = tl.where(usable & (squares != 0.0), over, 0.0)
        tl.store(advantage + slot, result.to(tl.float32), g < group)
        tl.store(valid + slot, usable, g < group)


@kernel
def _pairs(
    tokens: ADDRESS, tokens_type, t0, t1, t2, rewards: ADDRESS, rewards_type, r0, r1, mask: ADDRESS,
    mask_type, m0, m1, prefix: I32, request: ANY, advantage: ANY, valid: ANY, node: I32, count: I32, group,
    length, eps: tl.float64, std_floor: tl.float64, ddof, min_siblings, baseline, scale,
    earlier: I32, mean: F64, blocks, depth, STATISTICS: tl.constexpr, PHASE: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    tokens = Array(tokens, tokens_type, t0, t1, t2)
    rewards = Array(rewards, rewards_type, r0, r1, 0)
    mask = Array(mask, mask_type, m0, m1, 0)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    g = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if PHASE == 1:
        _buckets(
            tokens, rewards, mask, prefix, earlier, mean, count, b, g, group, length, depth, STATISTICS,
            BLOCK, CHUNK,
        )  # fmt: skip
    else:
        _nodes(
            tokens, rewards, mask, prefix, earlier, mean, request, advantage, valid, node, b, g, group,
            length, depth, eps, std_floor, ddof, min_siblings, baseline, scale, STATISTICS, BLOCK, CHUNK,
        )  # fmt: skip


@kernel
def _renumber(node: I32, group, length, BLOCK: tl.constexpr):
    """Let the numbers of each level, which rise by 1, follow those above; one program per request."""
    node += tl.program_id(0).to(tl.int64) * group * length
    step = tl.arange(0, BLOCK).to(tl.int64)
    above = 0
    for level in range(0, length):
        lowest = tl.full((BLOCK,), 2147483647, tl.int32)
        highest = tl.full((BLOCK,), -1, tl.int32)
        for start in range(0, group, BLOCK):
            number = tl.load(node + (start + step) * length + level, start + step < group, -1)
            lowest = tl.minimum(lowest, tl.where(number < 0, 2147483647, number))
            highest = tl.maximum(highest, number)
        least, most = tl.min(lowest, 0), tl.max(highest, 0)
        for start in range(0, group, BLOCK):
            at = node + (start + step) * length + level
            number = tl.load(at, start + step < group, -1)
            tl.store(at, number - least + above, number >= 0)
        above += tl.where(most < 0, 0, most - least + 1)


def pair_specializations(types: Mapping[bool, Mapping[str, str]]) -> Iterator[Specialization]:
    """Everything that is compiled; types with and without statistics."""
    for phase, whole in product((1, 2), (True, False)):
        constants = {"PHASE": phase, "STATISTICS": whole, "BLOCK": _BLOCK, "CHUNK": _CHUNK}
        name = f"sibling_advantage of pairs, phase {phase}{'' if whole else ', numbers only'}"
        yield Specialization(name, _pairs, _WARPS, constants, types[whole])
    block, warps = block_for(BLOCKS[-1])
    yield Specialization("sibling_advantage of pairs, renumbered", _renumber, warps, {"BLOCK": block})
