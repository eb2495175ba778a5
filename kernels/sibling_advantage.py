"""``sibling_advantage``: every candidate of a request against every other, level by level, in float64.

A program takes a block of a request's candidates (the columns of a tile) and runs through all candidates of
the request in chunks (the rows), so that sums over the rows stay within a thread. The number of the parent
prefix stands for all tokens before: two candidates share a prefix if they share that number and the token.
With a mask of tokens all prefixes are numbered first, as a masked token has no node but tells the prefixes
behind it apart; in the end the nodes are numbered without gaps.

A level has two phases: (1) the bucket of each candidate: its size, its mean reward, and how many of its
members come earlier (none: the candidate represents the bucket's node); (2) the nodes against each other:
rank, statistics, result. Up to ``FUSED`` candidates one program per request does all of it in one launch,
with a barrier after each phase; larger groups take two launches per level, one program per block of
candidates.

The statistics are taken of the differences to the candidate's own mean, in one pass: equal means differ by
exactly 0, and since that mean is one of the sample, its distance from the center, squared, is at most n
times the variance, so nothing cancels.

Workspace: float64 ``[2, B, G]``, the earlier members and the mean of each candidate's bucket; for
``scale="group"`` float64 ``[B]``, what a request is divided by. With a mask of tokens int32 ``[B, G, L]``
more, the numbers of all prefixes.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._array import Array, load_float, load_int, strided
from ._kernel import ADDRESS, ANY, BLOCKS, F64, I32, Specialization, block_for, kernel, workspace
from .group_advantage import divisor_of, statistics

FUSED = 128  # candidates that one program can hold
_BASELINES = {"sibling": 0, "parent": 1, "leave_one_out": 2}
_SCALES = {"siblings": 0, "group": 1, "none": 2}
_INT32_MAX = tl.constexpr(2**31 - 1)


def sibling_advantage(tokens, rewards, mask, eps, ddof, std_floor, min_siblings, baseline, scale):
    """The dispatcher's signature; see :func:`vstar_ops.sibling_advantage`."""
    batch, group, length = tokens.shape
    advantage = tokens.new_empty(batch, group, length, dtype=torch.float32)
    valid = tokens.new_empty(batch, group, length, dtype=torch.bool)
    node = tokens.new_empty(batch, group, length, dtype=torch.int32)
    count = torch.empty_like(node)
    if advantage.numel():
        per_request = batch if scale == "group" else 0
        earlier, mean, request = workspace(
            tokens.device, *((size, torch.float64) for size in (batch * group, batch * group, per_request))
        )
        if scale == "group":
            block, warps = block_for(group)
            present = mask.any(2) if by_token(mask) else mask
            _request_divisors.launch(
                (batch,), warps,
                *strided(rewards, 2), *strided(present, 2), request, group, eps, std_floor, ddof, BLOCK=block,
            )  # fmt: skip
        enough = min(min_siblings, group + 1)  # any more are as many, and this fits in int32
        _launch(
            tokens, rewards, mask, earlier, mean, request, advantage, valid, node, count, eps=eps,
            std_floor=std_floor, ddof=ddof, min_siblings=enough, baseline=_BASELINES[baseline],
            scale=_SCALES[scale], STATISTICS=True,
        )  # fmt: skip
    return advantage, valid, node, count


def number_prefixes(tokens: Tensor, mask: Tensor | None, earlier: Any, node: Tensor, count: Any) -> None:
    """Only ``node`` and ``count``; of workspace int32 ``[B, G]``."""
    # Nothing reads the rewards, nothing writes the mean and the advantage.
    _launch(
        tokens, None, mask, earlier, earlier, earlier, earlier, earlier, node, count, eps=0.0, std_floor=0.0,
        ddof=0, min_siblings=0, baseline=0, scale=0, STATISTICS=False,
    )  # fmt: skip


def by_token(mask: Tensor | None) -> bool:
    """Whether it is a mask of tokens."""
    return mask is not None and mask.dim() == 3


def _launch(tokens, rewards, mask, earlier, mean, request, advantage, valid, node, count, **rest):
    batch, group, length = tokens.shape
    prefix, masked = node, by_token(mask)
    if masked:
        prefix = torch.empty_like(node)
        number_prefixes(tokens, None, earlier.view(torch.int32), prefix, count)
        # The number of a prefix is read by the tokens behind it alone.
        prefix[:, :, :-1].masked_fill_(~mask[:, :, 1:], -1)
        mask = mask[:, :, 0]
    block, chunk, warps, fused = _plan(group)
    blocks = -(-group // block)
    launches = [(3, 0, length)] if fused else [(p, d, d + 1) for d in range(length) for p in (1, 2)]
    for phases, first, last in launches:
        _siblings.launch(
            (batch * blocks,), warps,
            *strided(tokens, 3), *strided(rewards, 2), *strided(mask, 2), prefix, earlier, mean, request,
            advantage, valid, node, count, group, length, blocks, first, last, **rest, PHASES=phases,
            BLOCK=block, CHUNK=chunk,
        )  # fmt: skip
    if masked:
        width, warps = block_for(group)
        _renumber.launch((batch,), warps, node, group, length, BLOCK=width)


def _plan(group: int) -> tuple[int, int, int, bool]:
    """Columns and rows of a tile, warps, and whether one launch does. Every thread has whole columns."""
    block, fused = min(FUSED, max(16, 1 << (group - 1).bit_length())), group <= FUSED
    return block, 16 if fused else 4, max(1, block // 32), fused


@triton.jit
def _prefixes(tokens, mask, prefix, b, g, group, length, depth):
    """Number of the parent prefix, and token.

    The number is 0 for the root, -1 where masked; past the end the highest number.
    """
    inside = g < group
    parent = tl.where(inside, 0, _INT32_MAX)
    if depth > 0:
        parent = tl.load(prefix + (b * group + g) * length + depth - 1, inside, _INT32_MAX)
    else:
        parent = tl.where(load_int(mask, b, g, 0, inside, 1) != 0, parent, -1)
    return parent, load_int(tokens, b, g, tl.cast(depth, tl.int64), inside, 0)


@triton.jit
def _buckets(
    tokens, rewards, mask, prefix, earlier, mean, count, b, g, group, length, depth,
    STATISTICS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Phase 1 for the candidates g: ``count``, ``earlier``, ``mean``."""
    parent, token = _prefixes(tokens, mask, prefix, b, g, group, length, depth)
    members = tl.zeros((BLOCK,), tl.int32)
    before = tl.zeros((BLOCK,), tl.int32)
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, group, CHUNK):
        j = start + tl.arange(0, CHUNK).to(tl.int64)
        parent_j, token_j = _prefixes(tokens, mask, prefix, b, j, group, length, depth)
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
    parent, token = _prefixes(tokens, mask, prefix, b, g, group, length, depth)
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
        parent_j, token_j = _prefixes(tokens, mask, prefix, b, j, group, length, depth)
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
def _siblings(
    tokens: ADDRESS, tokens_type, t0, t1, t2, rewards: ADDRESS, rewards_type, r0, r1, mask: ADDRESS,
    mask_type, m0, m1, prefix: I32, earlier: ANY, mean: ANY, request: ANY, advantage: ANY,
    valid: ANY, node: I32, count: I32, group, length, blocks, first, last, eps: tl.float64,
    std_floor: tl.float64, ddof, min_siblings, baseline, scale, PHASES: tl.constexpr,
    STATISTICS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    tokens = Array(tokens, tokens_type, t0, t1, t2)
    rewards = Array(rewards, rewards_type, r0, r1, 0)
    mask = Array(mask, mask_type, m0, m1, 0)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    g = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    for depth in range(first, last):
        if PHASES & 1:
            _buckets(
                tokens, rewards, mask, prefix, earlier, mean, count, b, g, group, length, depth, STATISTICS,
                BLOCK, CHUNK,
            )  # fmt: skip
        if PHASES == 3:
            tl.debug_barrier()
        if PHASES & 2:
            _nodes(
                tokens, rewards, mask, prefix, earlier, mean, request, advantage, valid, node, b, g,
                group, length, depth, eps, std_floor, ddof, min_siblings, baseline, scale,
                STATISTICS, BLOCK, CHUNK,
            )  # fmt: skip
        if PHASES == 3:
            tl.debug_barrier()


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


@kernel
def _request_divisors(
    rewards: ADDRESS, rewards_type, r0, r1, mask: ADDRESS, mask_type, m0, m1, request: F64, group,
    eps: tl.float64, std_floor: tl.float64, ddof, BLOCK: tl.constexpr,
):  # fmt: skip
    """What ``scale="group"`` divides by, one program per request."""
    rewards, mask = Array(rewards, rewards_type, r0, r1, 0), Array(mask, mask_type, m0, m1, 0)
    b = tl.program_id(0).to(tl.int64)
    _, std, _ = statistics(rewards, mask, b, group, ddof, BLOCK)
    tl.store(request + b, divisor_of(std, std_floor, eps))


def specializations() -> Iterator[Specialization]:
    """Everything that is compiled."""
    types = {
        True: {"earlier": "*fp64", "mean": "*fp64", "request": "*fp64", "advantage": "*fp32", "valid": "*u1"},
        False: dict.fromkeys(("earlier", "mean", "request", "advantage", "valid"), "*i32"),
    }
    for group in (16, 32, 64, FUSED, FUSED + 1):
        block, chunk, warps, fused = _plan(group)
        for phases, whole in product((3,) if fused else (1, 2), (True, False)):
            constants = {"PHASES": phases, "STATISTICS": whole, "BLOCK": block, "CHUNK": chunk}
            what = "" if whole else ", numbers only"
            name = f"sibling_advantage {block}{'' if fused else f', phase {phases}'}{what}"
            yield Specialization(name, _siblings, warps, constants, types[whole])
    for block, warps in map(block_for, BLOCKS):
        name = f"sibling_advantage {block}, scale of a request"
        yield Specialization(name, _request_divisors, warps, {"BLOCK": block})
        yield Specialization(f"sibling_advantage {block}, renumbered", _renumber, warps, {"BLOCK": block})
