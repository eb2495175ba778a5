"""``sibling_advantage``: every candidate of a request against every other, level by level, in float64.

A program takes a block of a request's candidates (the columns of a tile) and runs through all candidates of
the request in chunks (the rows), so that sums over the rows stay within a thread. The number of the prefix
above stands for all tokens above: two candidates share a prefix if they share that number and the token.

A level has two phases: (1) the bucket of each candidate: its size, its mean reward, and how many of its
members come earlier (none: the candidate stands for the node); (2) the nodes against each other: rank,
statistics, result. Up to ``FUSED`` candidates one program a request does all of it in one launch, with a
barrier after each phase; larger groups take two launches a level, a program a block of candidates.

The statistics are taken of the differences to the candidate's own mean, in one pass: equal means differ by
exactly 0, and since that mean is one of the sample, its distance from the centre, squared, is at most n
times the variance, so nothing cancels.

Workspace: float64 ``[2, B, G]``, the earlier members and the mean of each candidate's bucket.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import next_power_of_2

FUSED = 128  # candidates that one program can hold
_BASELINES = {"sibling": 0, "parent": 1, "leave_one_out": 2}
_OTHERS = 16  # rows of a tile
_RUNTIME = ["group", "length", "blocks", "first", "last", "ddof", "min_siblings", "baseline"]
_STRIDES = ["t0", "t1", "t2", "r0", "r1", "m0", "m1"]


def sibling_advantage(
    tokens: Tensor,
    rewards: Tensor,
    mask: Tensor | None,
    eps: float,
    ddof: int,
    std_floor: float,
    min_siblings: int,
    baseline: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The dispatcher's signature; see :func:`vstar_ops.sibling_advantage`."""
    batch, group, length = tokens.shape
    advantage = tokens.new_empty(batch, group, length, dtype=torch.float32)
    valid = tokens.new_empty(batch, group, length, dtype=torch.bool)
    node = tokens.new_empty(batch, group, length, dtype=torch.int32)
    count = torch.empty_like(node)
    if advantage.numel():
        earlier, mean = tokens.new_empty(2, batch, group, dtype=torch.float64)
        enough = min(min_siblings, group + 1)  # any more are as many, and this fits in int32
        _launch(
            tokens, rewards, mask, earlier, mean, advantage, valid, node, count,
            eps, std_floor, ddof, enough, _BASELINES[baseline], statistics=True,
        )  # fmt: skip
    return advantage, valid, node, count


def number_prefixes(
    tokens: Tensor, mask: Tensor | None, earlier: Tensor, order: Tensor, node: Tensor, count: Tensor
) -> None:
    """Only ``node`` and ``count``, and the ``order`` ``[B, G]`` of the candidates by all their tokens.

    Masked candidates come first in that order; the candidates of any prefix are neighbours in it.
    ``earlier`` is workspace ``[B, G]``.
    """
    if node.numel():
        # Nothing reads the rewards, the advantage or their strides.
        _launch(
            tokens, earlier, mask, earlier, order, earlier, earlier, node, count,
            0.0, 0.0, 0, 0, 0, statistics=False,
        )  # fmt: skip


def _launch(
    tokens, rewards, mask, earlier, mean, advantage, valid, node, count,
    eps, std_floor, ddof, min_siblings, baseline, *, statistics,
):  # fmt: skip
    batch, group, length = tokens.shape
    own, warps, fused = _plan(group)
    blocks = triton.cdiv(group, own)
    present = rewards if mask is None else mask
    launches = [(3, 0, length)] if fused else [(p, d, d + 1) for d in range(length) for p in (1, 2)]
    for phases, first, last in launches:
        _siblings[(batch * blocks,)](
            tokens, rewards, present, earlier, mean, advantage, valid, node, count,
            group, length, blocks, first, last, *tokens.stride(), *rewards.stride(), *present.stride(),
            eps, std_floor, ddof, min_siblings, baseline,
            PHASES=phases, STATISTICS=statistics, MASKED=mask is not None, OWN=own, OTHERS=_OTHERS,
            num_warps=warps,
        )  # fmt: skip


def _plan(group: int) -> tuple[int, int, bool]:
    """Candidates a program, its warps, and whether one launch does. Every thread has whole columns."""
    own = min(FUSED, max(16, next_power_of_2(group)))
    return own, max(1, own // 32), group <= FUSED


@triton.jit
def _numbers_above(node, present, b, g, group, length, depth, m0, m1, MASKED: tl.constexpr):
    """The prefix above: 0 for the root, -1 for a masked candidate; past the end the highest number."""
    inside = g < group
    above = tl.where(inside, 0, 2147483647)
    if depth > 0:
        above = tl.load(node + (b * group + g) * length + depth - 1, inside, 2147483647)
    elif MASKED:
        above = tl.where(tl.load(present + b * m0 + g * m1, inside, 1) != 0, above, -1)
    return above


@triton.jit
def _bucket(
    tokens, rewards, present, earlier, mean, node, count, b, g, group, length, depth,
    t0, t1, t2, r0, r1, m0, m1, STATISTICS: tl.constexpr, MASKED: tl.constexpr, OWN: tl.constexpr,
    OTHERS: tl.constexpr,
):  # fmt: skip
    """Phase 1, of the candidates g."""
    above = _numbers_above(node, present, b, g, group, length, depth, m0, m1, MASKED)[None, :]
    token = tl.load(tokens + b * t0 + g * t1 + depth.to(tl.int64) * t2, g < group, 0)[None, :]
    members = tl.zeros((OWN,), tl.int32)
    before = tl.zeros((OWN,), tl.int32)
    total = tl.zeros((OWN,), tl.float64)
    for start in range(0, group, OTHERS):
        j = start + tl.arange(0, OTHERS).to(tl.int64)
        above_j = _numbers_above(node, present, b, j, group, length, depth, m0, m1, MASKED)
        token_j = tl.load(tokens + b * t0 + j * t1 + depth.to(tl.int64) * t2, j < group, 0)
        same = (above_j[:, None] == above) & (token_j[:, None] == token)
        members += tl.sum(same.to(tl.int32), 0)
        before += tl.sum((same & (j[:, None] < g[None, :])).to(tl.int32), 0)
        if STATISTICS:
            reward_j = tl.load(rewards + b * r0 + j * r1, j < group, 0.0).to(tl.float64)
            total += tl.sum(tl.where(same, reward_j[:, None], 0.0), 0)
    here = b * group + g
    there = tl.max(above, 0) >= 0  # one row
    members = tl.where(there, members, 0)
    tl.store(count + here * length + depth, members, g < group)
    tl.store(earlier + here, before, g < group)
    if STATISTICS:
        tl.store(mean + here, total / tl.maximum(members, 1).to(tl.float64), g < group)
