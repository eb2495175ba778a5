"""``sibling_advantage``: the candidates of a request are sorted, level by level, in one program, in float64.

In the order of parent prefix and token a node's candidates are neighbors, and so are the nodes of siblings.
All that a level asks for are then sums over neighbors: a scan that starts anew at each node, or at each
family, and holds the sum at the last one. The number of the parent prefix stands for all tokens before. With
a mask of tokens all prefixes are numbered first, as a masked token has no node but tells the prefixes behind
it apart.

A key holds parent, token and place in one int64, which sorts stably, where all tokens lie in [0, 2^38).
Otherwise the candidates are sorted twice, by the lower half of the token and then by parent and upper half.

The statistics are taken of the differences to the mean of the family's first node, in one pass: equal means
differ by exactly 0, and since that mean is one of the sample, its distance from the center, squared, is at
most n times the variance, so nothing cancels.

=====================  =====
candidates, rounded    warps
=====================  =====
16, 32, 64             1
128                    2
256                    4
512                    8
=====================  =====

256 and 512 take twice as many for numbers alone: else registers spill. More candidates are compared with each
other, see _pairs.py. Workspace: for ``scale="group"`` float64 ``[B]``, what a request is divided by; with a
mask of tokens int32 ``[B, G, L]``, the numbers of all prefixes.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._array import Array, load_float, strided
from ._kernel import ADDRESS, ANY, BLOCKS, F64, I32, Specialization, block_for, kernel, workspace
from ._pairs import INT32_MAX, launch_pairs, pair_specializations, prefixes
from .group_advantage import divisor_of, statistics

_SIZES = ((16, 1), (32, 1), (64, 1), (128, 2), (256, 4), (512, 8))
_PLACES, _TOKENS = tl.constexpr(512), tl.constexpr(2**38)  # a key holds a place and a token below these
_BASELINES = {"sibling": 0, "parent": 1, "leave_one_out": 2}
_SCALES = {"siblings": 0, "group": 1, "none": 2}


def sibling_advantage(tokens, rewards, mask, eps, ddof, std_floor, min_siblings, baseline, scale):
    """The dispatcher's signature; see :func:`vstar_ops.sibling_advantage`."""
    batch, group, length = tokens.shape
    advantage = torch.empty(batch, group, length, device=tokens.device)
    valid = torch.empty_like(advantage, dtype=torch.bool)
    node = torch.empty_like(advantage, dtype=torch.int32)
    count = torch.empty_like(node)
    if advantage.numel():
        (request,) = workspace(tokens.device, (batch if scale == "group" else 0, torch.float64))
        if scale == "group":
            block, warps = block_for(group)
            present = mask.any(2) if _by_token(mask) else mask
            _request_divisors.launch(
                (batch,), warps, *strided(rewards, 2), *strided(present, 2), request, group, eps, std_floor,
                ddof, BLOCK=block,
            )  # fmt: skip
        enough = min(min_siblings, group + 1)  # any more are as many, and this fits in int32
        _launch(
            tokens, rewards, mask, request, advantage, valid, node, count, eps, std_floor, ddof, enough,
            _BASELINES[baseline], _SCALES[scale], True,
        )  # fmt: skip
    return advantage, valid, node, count


def number_prefixes(tokens: Tensor, mask: Tensor | None, node: Tensor, count: Tensor) -> None:
    """Only ``node`` and ``count``."""
    # Nothing reads the rewards, nothing writes the advantage.
    _launch(tokens, None, mask, node, node, node, node, count, 0.0, 0.0, 0, 0, 0, 0, False)


def _by_token(mask: Tensor | None) -> bool:
    return mask is not None and mask.dim() == 3


def _launch(tokens, rewards, mask, request, advantage, valid, node, count, *rest):
    batch, group, length = tokens.shape
    prefix, by_token = node, _by_token(mask)
    if by_token:
        prefix = torch.empty_like(node)
        number_prefixes(tokens, None, prefix, count)
        # The number of a prefix is read by the tokens behind it alone.
        prefix[:, :, :-1].masked_fill_(~mask[:, :, 1:], -1)
        mask = mask[:, :, 0]
    arguments = (
        *strided(tokens, 3), *strided(rewards, 2), *strided(mask, 2), prefix, request, advantage, valid, node,
        count, group, length, *rest,
    )  # fmt: skip
    if group > _SIZES[-1][0]:
        launch_pairs(tokens, by_token, node, arguments)
    else:
        block, warps = next(size for size in _SIZES if group <= size[0])
        _siblings.launch((batch,), _warps(block, warps, rest[-1]), *arguments, block)


def _warps(block: int, warps: int, statistics: bool) -> int:
    return warps if statistics or block < 256 else 2 * warps


@triton.jit
def _sorted(family, token, BLOCK: tl.constexpr):
    """The candidates in the order of family, at most 2^9, and token; equal ones stay in order."""
    place = tl.arange(0, BLOCK)
    order = place
    small = (tl.min(token, 0) >= 0) & (tl.max(token, 0) < _TOKENS)
    for turn in range(tl.where(small, 1, 0), 2):
        word = tl.gather(token, order, 0)
        upper = tl.where(small, word, (word >> 32) + 0x80000000)
        upper += tl.gather(family, order, 0).to(tl.int64) * _TOKENS
        key = tl.where(turn == 0, word & 0xFFFFFFFF, upper) * _PLACES + place
        order = tl.gather(order, (tl.sort(key) % _PLACES).to(tl.int32), 0)
    return order


@triton.jit
def _larger(x1, y1, x2, y2):
    return tl.maximum(x1, x2), tl.maximum(y1, y2)


@triton.jit
def _smaller(x1, y1, x2, y2):
    return tl.minimum(x1, x2), tl.minimum(y1, y2)


@triton.jit
def _sum_anew(new1, x1, new2, x2):
    return new1 | new2, tl.where(new2 != 0, x2, x1 + x2)


@triton.jit
def _sums_anew(new1, x1, y1, new2, x2, y2):
    return new1 | new2, tl.where(new2 != 0, x2, x1 + x2), tl.where(new2 != 0, y2, y1 + y2)


@triton.jit
def _total(x, new, last):
    """The sum over all that belong together: ``new`` at the first of them, and where the last one is."""
    _, sums = tl.associative_scan((new.to(tl.int32), x), 0, _sum_anew)
    return tl.gather(sums, last, 0)


@triton.jit
def _advantages(
    reward, members, new, new_family, last, family, family_last, rank, divisor, eps, std_floor, ddof,
    min_siblings, baseline, scale,
):  # fmt: skip
    """Of the sorted candidates, and where they have enough siblings."""
    mean = _total(reward, new, last) / members.to(tl.float64)
    away = mean - tl.gather(mean, family, 0)
    once = tl.where(new, away, 0.0)
    _, sums, squares = tl.associative_scan((new_family.to(tl.int32), once, once * once), 0, _sums_anew)
    total, squares = tl.gather(sums, family_last, 0), tl.gather(squares, family_last, 0)
    siblings = tl.gather(rank, family_last, 0) - tl.gather(rank, family, 0) + 1
    n = tl.maximum(siblings, 1).to(tl.float64)
    free = tl.maximum(siblings - ddof, 1).to(tl.float64)
    std = tl.sqrt(tl.maximum(squares * n - total * total, 0.0) / (n * free))
    divisor = tl.where(scale == 0, tl.maximum(std, std_floor) + eps, divisor)
    difference = away * n - total
    over, others = difference, tl.where(baseline == 2, tl.maximum(n - 1.0, 1.0), n)
    if baseline == 1:
        over = mean - _total(reward, new_family, family_last) / (family_last - family + 1).to(tl.float64)
        others = n * 0.0 + 1.0
    over = over / (others * divisor)
    # One sibling that is not finite makes all differences so.
    over = tl.where(tl.abs(difference) < float("inf"), over, float("nan"))
    enough = siblings >= min_siblings
    return tl.where(enough & (squares != 0.0), over, 0.0), enough


@kernel
def _siblings(
    tokens: ADDRESS, tokens_type, t0, t1, t2, rewards: ADDRESS, rewards_type, r0, r1, mask: ADDRESS,
    mask_type, m0, m1, prefix: I32, request: ANY, advantage: ANY, valid: ANY, node: I32, count: I32, group,
    length, eps: tl.float64, std_floor: tl.float64, ddof, min_siblings, baseline, scale,
    STATISTICS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tokens = Array(tokens, tokens_type, t0, t1, t2)
    rewards = Array(rewards, rewards_type, r0, r1, 0)
    mask = Array(mask, mask_type, m0, m1, 0)
    b = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    before, after = tl.maximum(place - 1, 0), tl.minimum(place + 1, BLOCK - 1)
    if STATISTICS:
        divisor = tl.load(request + b, scale == 1, 1.0)
    first_node = 0
    for depth in range(0, length):
        parent, token = prefixes(tokens, mask, prefix, b, place.to(tl.int64), group, length, depth)
        there = (parent >= 0) & (place < group)
        lowest = tl.min(tl.where(there, parent, INT32_MAX), 0)
        name = tl.where(there, parent - lowest, BLOCK)  # those without a node come last
        token = tl.where(there, token, 0)
        order = _sorted(name, token, BLOCK)
        name, token = tl.gather(name, order, 0), tl.gather(token, order, 0)
        there = name < BLOCK
        new_family = (place == 0) | (name != tl.gather(name, before, 0))
        new = new_family | (token != tl.gather(token, before, 0))
        ends = (place == BLOCK - 1) | (tl.gather(new.to(tl.int32), after, 0) != 0)
        family_ends = (place == BLOCK - 1) | (tl.gather(new_family.to(tl.int32), after, 0) != 0)
        family, first = tl.associative_scan(
            (tl.where(new_family, place, 0), tl.where(new, place, 0)), 0, _larger
        )
        family_last, last = tl.associative_scan(
            (tl.where(family_ends, place, BLOCK), tl.where(ends, place, BLOCK)), 0, _smaller, reverse=True
        )
        rank = tl.cumsum((new & there).to(tl.int32), 0) - 1
        candidate = b * group + order
        slot = candidate * length + depth
        inside = order < group
        tl.store(node + slot, tl.where(there, first_node + rank, -1), inside)
        tl.store(count + slot, tl.where(there, last - first + 1, 0), inside)
        first_node += tl.max(rank, 0) + 1
        if STATISTICS:
            reward = load_float(rewards, b, order.to(tl.int64), 0, there).to(tl.float64)
            result, enough = _advantages(
                reward, last - first + 1, new, new_family, last, family, family_last, rank, divisor, eps,
                std_floor, ddof, min_siblings, baseline, scale,
            )  # fmt: skip
            tl.store(advantage + slot, tl.where(there, result, 0.0).to(tl.float32), inside)
            tl.store(valid + slot, there & enough, inside)
        tl.debug_barrier()  # other threads read the numbers as those of parents


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
        True: {"request": "*fp64", "advantage": "*fp32", "valid": "*u1"},
        False: dict.fromkeys(("request", "advantage", "valid"), "*i32"),
    }
    for (block, warps), whole in product(_SIZES, (True, False)):
        name = f"sibling_advantage {block}{'' if whole else ', numbers only'}"
        constants = {"STATISTICS": whole, "BLOCK": block}
        yield Specialization(name, _siblings, _warps(block, warps, whole), constants, types[whole])
    yield from pair_specializations(types)
    for block, warps in map(block_for, BLOCKS):
        name = f"sibling_advantage {block}, scale of a request"
        yield Specialization(name, _request_divisors, warps, {"BLOCK": block})
