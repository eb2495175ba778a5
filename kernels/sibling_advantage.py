"""``sibling_advantage``: every candidate of a request against every other, level by level, in float64.

A program takes a block of a request's candidates (the columns of a tile) and runs through all candidates of
the request in chunks (the rows), so that sums over the rows stay within a thread. The number of the prefix
above stands for all tokens above: two candidates share a prefix if they share that number and the token.

A level has two phases: (1) the bucket of each candidate: its size, its mean reward, and how many of its
members come earlier (none: the candidate stands for the node); (2) the nodes against each other: rank,
statistics, result. Up to ``FUSED`` candidates one program a request does all of it in one launch, with a
barrier after each phase; larger groups take two launches a level, a program a block of candidates.

The statistics are taken of the differences to the candidate's own mean, in one pass: equal means differ by
exactly 0, and since that mean is one of the sample, its distance from the center, squared, is at most n
times the variance, so nothing cancels.

Workspace: float64 ``[2, B, G]``, the earlier members and the mean of each candidate's bucket.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import next_power_of_2

from ._array import array, load_float, load_int
from ._specialization import OPTIONS, Specialization

FUSED = 128  # candidates that one program can hold
_BASELINES = {"sibling": 0, "parent": 1, "leave_one_out": 2}


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

    Masked candidates come first in that order; the candidates of any prefix are neighbors in it.
    ``earlier`` is workspace ``[B, G]``.
    """
    if node.numel():
        # Nothing reads the rewards, nothing writes the advantage.
        _launch(
            tokens, None, mask, earlier, order, earlier, earlier, node, count,
            0.0, 0.0, 0, 0, 0, statistics=False,
        )  # fmt: skip


def _launch(
    tokens, rewards, mask, earlier, mean, advantage, valid, node, count,
    eps, std_floor, ddof, min_siblings, baseline, *, statistics,
):  # fmt: skip
    batch, group, length = tokens.shape
    own, others, warps, fused = _plan(group)
    blocks = triton.cdiv(group, own)
    given, present = ((0, 0) if x is None else x.stride() for x in (rewards, mask))
    launches = [(3, 0, length)] if fused else [(p, d, d + 1) for d in range(length) for p in (1, 2)]
    for phases, first, last in launches:
        _siblings[(batch * blocks,)](
            *array(tokens), *array(rewards), *array(mask), earlier, mean, advantage, valid, node, count,
            group, length, blocks, first, last, *tokens.stride(), *given, *present,
            eps, std_floor, ddof, min_siblings, baseline,
            PHASES=phases, STATISTICS=statistics, OWN=own, OTHERS=others, num_warps=warps, **OPTIONS,
        )  # fmt: skip


def _plan(group: int) -> tuple[int, int, int, bool]:
    """Columns and rows of a tile, warps, and whether one launch does. Every thread has whole columns."""
    own, fused = min(FUSED, max(16, next_power_of_2(group))), group <= FUSED
    return own, 16 if fused else 4, max(1, own // 32), fused


@triton.jit
def _numbers_above(node, present, present_type, b, g, group, length, depth, m0, m1):
    """The prefix above: 0 for the root, -1 for a masked candidate; past the end the highest number."""
    inside = g < group
    above = tl.where(inside, 0, 2147483647)
    if depth > 0:
        above = tl.load(node + (b * group + g) * length + depth - 1, inside, 2147483647)
    else:
        above = tl.where(load_int(present, present_type, b * m0 + g * m1, inside, 1) != 0, above, -1)
    return above


@triton.jit
def _buckets(
    tokens, tokens_type, rewards, rewards_type, present, present_type, earlier, mean, node, count, b, g,
    group, length, depth, t0, t1, t2, r0, r1, m0, m1,
    STATISTICS: tl.constexpr, OWN: tl.constexpr, OTHERS: tl.constexpr,
):  # fmt: skip
    """Phase 1 for the candidates g: ``count``, ``earlier``, ``mean``."""
    column = b * t0 + tl.cast(depth, tl.int64) * t2
    above = _numbers_above(node, present, present_type, b, g, group, length, depth, m0, m1)
    token = load_int(tokens, tokens_type, column + g * t1, g < group, 0)
    members = tl.zeros((OWN,), tl.int32)
    before = tl.zeros((OWN,), tl.int32)
    total = tl.zeros((OWN,), tl.float64)
    for start in range(0, group, OTHERS):
        j = start + tl.arange(0, OTHERS).to(tl.int64)
        above_j = _numbers_above(node, present, present_type, b, j, group, length, depth, m0, m1)
        token_j = load_int(tokens, tokens_type, column + j * t1, j < group, 0)
        same = (above_j[:, None] == above[None, :]) & (token_j[:, None] == token[None, :])
        members += tl.sum(same.to(tl.int32), 0)
        before += tl.sum((same & (j[:, None] < g[None, :])).to(tl.int32), 0)
        if STATISTICS:
            reward_j = load_float(rewards, rewards_type, b * r0 + j * r1, j < group).to(tl.float64)
            total += tl.sum(tl.where(same, reward_j[:, None], 0.0), 0)
    here = b * group + g
    members = tl.where(above < 0, 0, members)
    tl.store(count + here * length + depth, members, g < group)
    tl.store(earlier + here, before, g < group)
    if STATISTICS:
        tl.store(mean + here, total / tl.maximum(members, 1).to(tl.float64), g < group)


@triton.jit
def _nodes(
    tokens, tokens_type, rewards, rewards_type, present, present_type, earlier, mean, advantage, valid, node,
    b, g, group, length, depth, t0, t1, t2, r0, r1, m0, m1, eps, std_floor, ddof, min_siblings, baseline,
    STATISTICS: tl.constexpr, OWN: tl.constexpr, OTHERS: tl.constexpr,
):  # fmt: skip
    """Phase 2 for the candidates g: ``node``, ``advantage`` and ``valid``, or at the last level the order."""
    column = b * t0 + tl.cast(depth, tl.int64) * t2
    here = b * group + g
    above = _numbers_above(node, present, present_type, b, g, group, length, depth, m0, m1)
    token = load_int(tokens, tokens_type, column + g * t1, g < group, 0)
    rank = tl.zeros((OWN,), tl.int32)
    smaller = tl.zeros((OWN,), tl.int32)  # candidates with a smaller prefix; rank counts such nodes
    highest = tl.full((OTHERS,), -1, tl.int32)
    siblings = tl.zeros((OWN,), tl.int32)
    family = tl.zeros((OWN,), tl.int32)
    family_total = tl.zeros((OWN,), tl.float64)
    shift = tl.zeros((OWN,), tl.float64)
    squares = tl.zeros((OWN,), tl.float64)
    if STATISTICS:
        own_mean = tl.load(mean + here, g < group, 0.0)
    for start in range(0, group, OTHERS):
        j = start + tl.arange(0, OTHERS).to(tl.int64)
        above_j = _numbers_above(node, present, present_type, b, j, group, length, depth, m0, m1)
        token_j = load_int(tokens, tokens_type, column + j * t1, j < group, 0)
        stands = (tl.load(earlier + b * group + j, j < group, 1) == 0) & (above_j >= 0)
        highest = tl.maximum(highest, tl.where(j < group, above_j, -1))
        same_parent = above_j[:, None] == above[None, :]
        less = (above_j[:, None] < above[None, :]) | (same_parent & (token_j[:, None] < token[None, :]))
        rank += tl.sum((less & stands[:, None]).to(tl.int32), 0)
        if STATISTICS:
            reward_j = load_float(rewards, rewards_type, b * r0 + j * r1, j < group).to(tl.float64)
            family += tl.sum(same_parent.to(tl.int32), 0)
            family_total += tl.sum(tl.where(same_parent, reward_j[:, None], 0.0), 0)
            child = same_parent & stands[:, None]
            mean_j = tl.load(mean + b * group + j, j < group, 0.0)
            difference = tl.where(child, mean_j[:, None] - own_mean[None, :], 0.0)
            siblings += tl.sum(child.to(tl.int32), 0)
            shift += tl.sum(difference, 0)
            squares += tl.sum(difference * difference, 0)
        else:
            smaller += tl.sum(less.to(tl.int32), 0)
    first = tl.where(depth > 0, tl.max(highest, 0) + 1, 0)
    slot = here * length + depth
    tl.store(node + slot, tl.where(above < 0, -1, first + rank), g < group)
    if STATISTICS:
        n = tl.maximum(siblings, 1).to(tl.float64)
        free = tl.maximum(siblings - ddof, 1).to(tl.float64)
        std = tl.sqrt(tl.maximum(squares - shift * shift / n, 0.0) / free)
        over = -shift / tl.where(baseline == 2, tl.maximum(n - 1.0, 1.0), n)
        parent = family_total / tl.maximum(family, 1).to(tl.float64)
        over = tl.where(baseline == 1, own_mean - parent, over)
        usable = (above >= 0) & (siblings >= min_siblings)
        result = tl.where(usable & (squares != 0.0), over / (tl.maximum(std, std_floor) + eps), 0.0)
        tl.store(advantage + slot, result.to(tl.float32), g < group)
        tl.store(valid + slot, usable, g < group)
    elif depth == length - 1:
        place = smaller + tl.load(earlier + here, g < group, 0).to(tl.int32)
        tl.store(mean + b * group + place, g.to(tl.int32), g < group)


@triton.jit(
    do_not_specialize=[
        "tokens", "tokens_type", "rewards", "rewards_type", "present", "present_type", "group", "length",
        "blocks", "first", "last", "t0", "t1", "t2", "r0", "r1", "m0", "m1", "ddof", "min_siblings",
        "baseline",
    ]
)  # fmt: skip
def _siblings(
    tokens: tl.int64, tokens_type, rewards: tl.int64, rewards_type, present: tl.int64, present_type, earlier,
    mean, advantage, valid, node, count, group, length, blocks, first, last, t0, t1, t2, r0, r1, m0, m1,
    eps: tl.float64, std_floor: tl.float64, ddof, min_siblings, baseline,
    PHASES: tl.constexpr, STATISTICS: tl.constexpr, OWN: tl.constexpr, OTHERS: tl.constexpr,
):  # fmt: skip
    b = (tl.program_id(0) // blocks).to(tl.int64)
    g = (tl.program_id(0) % blocks).to(tl.int64) * OWN + tl.arange(0, OWN)
    for depth in range(first, last):
        if PHASES & 1:
            _buckets(
                tokens, tokens_type, rewards, rewards_type, present, present_type, earlier, mean, node, count,
                b, g, group, length, depth, t0, t1, t2, r0, r1, m0, m1, STATISTICS, OWN, OTHERS,
            )  # fmt: skip
        if PHASES == 3:
            tl.debug_barrier()
        if PHASES & 2:
            _nodes(
                tokens, tokens_type, rewards, rewards_type, present, present_type, earlier, mean, advantage,
                valid, node, b, g, group, length, depth, t0, t1, t2, r0, r1, m0, m1, eps, std_floor, ddof,
                min_siblings, baseline, STATISTICS, OWN, OTHERS,
            )  # fmt: skip
        if PHASES == 3:
            tl.debug_barrier()


def specializations() -> Iterator[Specialization]:
    """Everything that is compiled."""
    inputs = dict.fromkeys(("tokens", "rewards", "present"), "i64")
    for group in (16, 32, 64, FUSED, FUSED + 1):
        own, others, warps, fused = _plan(group)
        for phases, statistics in product((3,) if fused else (1, 2), (True, False)):
            scratch = "*fp64" if statistics else "*i32"
            types = dict.fromkeys(("earlier", "mean", "advantage", "valid"), scratch) | inputs
            types |= {"node": "*i32", "count": "*i32", "eps": "fp64", "std_floor": "fp64"}
            types |= {"advantage": "*fp32", "valid": "*u1"} if statistics else {}
            constants = {"PHASES": phases, "STATISTICS": statistics, "OWN": own, "OTHERS": others}
            what = "" if statistics else ", numbers only"
            name = f"sibling_advantage {own}{'' if fused else f', phase {phases}'}{what}"
            yield Specialization(name, _siblings, types, constants, warps)
