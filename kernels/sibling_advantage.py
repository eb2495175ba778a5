"""``sibling_advantage``: a program a request, which compares its candidates in square tiles, level by level.

Candidates of one prefix are those with the same parent (the number of their prefix one level up, read back from
the output) and the same token; the first of them leads. Pass 1 finds for each candidate how many share its
prefix, their mean reward and whether it leads; pass 2 the statistics over the leaders below its parent, and
its rank among all leaders, which numbers the prefixes; pass 3 the squares. Sums are float64, along a row of
tiles in a fixed order. One launch. The work grows with the square of G, the bytes do not.

========  ======  =====
G         tile    warps
========  ======  =====
up to 16  16x16   1
more      32x32   4
========  ======  =====

One workspace: 12 bytes a candidate, its prefix's mean and whether it leads.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._specialisation import FLOATS, INTS, Specialisation

_TILES = ((16, 1), (32, 4))  # side, warps
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
    shape, device = tokens.shape, tokens.device
    advantage = torch.empty(shape, device=device)
    valid = torch.empty(shape, dtype=torch.bool, device=device)
    node, count = (torch.empty(shape, dtype=torch.int32, device=device) for _ in range(2))
    if tokens.numel():
        _launch(
            tokens, rewards, mask, node, count, advantage, valid, eps, std_floor, ddof, min_siblings,
            _BASELINES[baseline], numbers_only=False,
        )  # fmt: skip
    return advantage, valid, node, count


def number_prefixes(tokens: Tensor, mask: Tensor | None, node: Tensor, count: Tensor) -> None:
    """Fill ``node`` and ``count`` alone, without statistics."""
    _launch(tokens, node, mask, node, count, node, node, 0.0, 0.0, 0, 0, 0, numbers_only=True)


def _launch(
    tokens: Tensor,
    rewards: Tensor,
    mask: Tensor | None,
    node: Tensor,
    count: Tensor,
    advantage: Tensor,
    valid: Tensor,
    eps: float,
    std_floor: float,
    ddof: int,
    min_siblings: int,
    baseline: int,
    numbers_only: bool,
) -> None:
    batch, group, length = tokens.shape
    side, warps = _TILES[0 if group <= _TILES[0][0] else 1]
    workspace = torch.empty(12 * batch * group, dtype=torch.uint8, device=tokens.device)
    mean, leads = workspace.split((8 * batch * group, 4 * batch * group))
    present = tokens if mask is None else mask
    _sibling_advantage[(batch,)](
        tokens, rewards, present, mean.view(torch.float64), leads.view(torch.int32), node, count, advantage,
        valid, group, length, *tokens.stride(), *rewards.stride()[:2], *present.stride()[:2], eps, std_floor,
        ddof, min_siblings, baseline,
        MASKED=mask is not None, NUMBERS_ONLY=numbers_only, SIDE=side, num_warps=warps,
    )  # fmt: skip


@triton.jit
def _candidates(
    tokens, present, node, b, g, depth, group, length, t0, t1, t2, m0, m1, MASKED: tl.constexpr
):  # fmt: skip
    """Tokens of some candidates at a depth, their parents (-1: takes no part), and who takes part."""
    there = g < group
    if MASKED:
        there &= tl.load(present + b * m0 + g * m1, there, 0) != 0
    token = tl.load(tokens + b * t0 + g * t1 + depth * t2, there, 0).to(tl.int64)
    parent = tl.load(node + (b * group + g) * length + depth - 1, there & (depth > 0), 0)
    return token, tl.where(there, parent, -1), there


@triton.jit(
    do_not_specialize=[
        "group",
        "length",
        "t0",
        "t1",
        "t2",
        "r0",
        "r1",
        "m0",
        "m1",
        "ddof",
        "min_siblings",
        "baseline",
    ]
)
def _sibling_advantage(
    tokens, rewards, present, means, leads, node, count, advantage, valid, group, length, t0, t1, t2, r0, r1,
    m0, m1, eps: tl.float64, std_floor: tl.float64, ddof, min_siblings, baseline,
    MASKED: tl.constexpr, NUMBERS_ONLY: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    step = tl.arange(0, SIDE).to(tl.int64)
    means += b * group
    leads += b * group
    first = 0  # number of the level's first prefix
    for depth in range(0, length):
        leaders = 0
        for start in range(0, group, SIDE):
            i = start + step
            token, parent, there = _candidates(
                tokens, present, node, b, i, depth, group, length, t0, t1, t2, m0, m1, MASKED
            )
            total = tl.zeros((SIDE,), tl.float64)
            number = tl.zeros((SIDE,), tl.int32)
            earlier = tl.zeros((SIDE,), tl.int32)
            for other in range(0, group, SIDE):
                j = other + step
                token2, parent2, there2 = _candidates(
                    tokens, present, node, b, j, depth, group, length, t0, t1, t2, m0, m1, MASKED
                )
                same = (parent[:, None] == parent2[None, :]) & (token[:, None] == token2[None, :])
                same &= there[:, None] & there2[None, :]
                number += tl.sum(same.to(tl.int32), 1)
                earlier += tl.sum((same & (j[None, :] < i[:, None])).to(tl.int32), 1)
                if not NUMBERS_ONLY:
                    reward = tl.load(rewards + b * r0 + j * r1, there2, 0.0).to(tl.float64)
                    total += tl.sum(tl.where(same, reward[None, :], 0.0), 1)
            lead = there & (earlier == 0)
            leaders += tl.sum(lead.to(tl.int32), 0)
            tl.store(leads + i, lead.to(tl.int32), i < group)
            tl.store(count + (b * group + i) * length + depth, number, i < group)
            if not NUMBERS_ONLY:
                tl.store(means + i, total / tl.maximum(number, 1).to(tl.float64), i < group)
        tl.debug_barrier()  # what other threads have stored is read

        for start in range(0, group, SIDE):
            i = start + step
            token, parent, there = _candidates(
                tokens, present, node, b, i, depth, group, length, t0, t1, t2, m0, m1, MASKED
            )
            rank = tl.zeros((SIDE,), tl.int32)
            number = tl.zeros((SIDE,), tl.int32)
            members = tl.zeros((SIDE,), tl.int32)
            total = tl.zeros((SIDE,), tl.float64)
            weighted = tl.zeros((SIDE,), tl.float64)
            top = tl.full((SIDE,), float("-inf"), tl.float64)
            bottom = tl.full((SIDE,), float("inf"), tl.float64)
            for other in range(0, group, SIDE):
                j = other + step
                token2, parent2, there2 = _candidates(
                    tokens, present, node, b, j, depth, group, length, t0, t1, t2, m0, m1, MASKED
                )
                lead2 = tl.load(leads + j, j < group, 0) != 0
                siblings = (parent[:, None] == parent2[None, :]) & lead2[None, :]
                below = (parent2[None, :] < parent[:, None]) & lead2[None, :]
                below |= siblings & (token2[None, :] < token[:, None])
                rank += tl.sum(below.to(tl.int32), 1)
                if not NUMBERS_ONLY:
                    mean2 = tl.load(means + j, lead2, 0.0)
                    count2 = tl.load(count + (b * group + j) * length + depth, lead2, 0)
                    number += tl.sum(siblings.to(tl.int32), 1)
                    members += tl.sum(tl.where(siblings, count2[None, :], 0), 1)
                    total += tl.sum(tl.where(siblings, mean2[None, :], 0.0), 1)
                    share = mean2 * count2.to(tl.float64)
                    weighted += tl.sum(tl.where(siblings, share[None, :], 0.0), 1)
                    here = tl.max(tl.where(siblings, mean2[None, :], float("-inf")), 1)
                    top = tl.where(here > top, here, top)
                    here = tl.min(tl.where(siblings, mean2[None, :], float("inf")), 1)
                    bottom = tl.where(here < bottom, here, bottom)
            at = (b * group + i) * length + depth
            tl.store(node + at, tl.where(there, first + rank, -1), i < group)
            if not NUMBERS_ONLY:
                mean = total / tl.maximum(number, 1).to(tl.float64)
                squares = tl.zeros((SIDE,), tl.float64)
                for other in range(0, group, SIDE):
                    j = other + step
                    _, parent2, there2 = _candidates(
                        tokens, present, node, b, j, depth, group, length, t0, t1, t2, m0, m1, MASKED
                    )
                    lead2 = tl.load(leads + j, j < group, 0) != 0
                    siblings = (parent[:, None] == parent2[None, :]) & lead2[None, :]
                    off = tl.load(means + j, lead2, 0.0)[None, :] - mean[:, None]
                    squares += tl.sum(tl.where(siblings, off * off, 0.0), 1)
                std = tl.sqrt(squares / tl.maximum(number - ddof, 1).to(tl.float64))
                own = tl.load(means + i, there, 0.0)
                base = mean
                if baseline == 1:
                    base = weighted / tl.maximum(members, 1).to(tl.float64)
                if baseline == 2:
                    others = tl.maximum(number - 1, 1).to(tl.float64)
                    base = (mean * number.to(tl.float64) - own) / others
                signal = there & (number >= min_siblings)
                result = (own - base) / (tl.where(std < std_floor, std_floor, std) + eps)
                result = tl.where(signal & (top != bottom), result, 0.0)
                tl.store(advantage + at, result.to(tl.float32), i < group)
                tl.store(valid + at, signal, i < group)
        first += leaders
        tl.debug_barrier()  # the next level reads the numbers, and overwrites means and leaders


def specialisations() -> Iterator[Specialisation]:
    """Everything that is compiled."""
    common = {"present": "*i1", "means": "*fp64", "leads": "*i32", "node": "*i32", "count": "*i32"}
    common |= {"eps": "fp64", "std_floor": "fp64"}
    for (side, warps), masked, (width, tokens) in product(_TILES, (False, True), INTS.items()):
        types = {**common, "tokens": tokens}
        if not masked:
            types["present"] = tokens
        constants = {"MASKED": masked, "NUMBERS_ONLY": False, "SIDE": side}
        name = f"{side}x{side}, {width} tokens{', masked' * masked}"
        for dtype, rewards in FLOATS.items():
            given = {**types, "rewards": rewards, "advantage": "*fp32", "valid": "*i1"}
            yield Specialisation(
                f"sibling_advantage {name}, {dtype}", _sibling_advantage, given, constants, warps
            )
        given = {**types, "rewards": "*i32", "advantage": "*i32", "valid": "*i32"}
        constants = {**constants, "NUMBERS_ONLY": True}
        yield Specialisation(f"prefix_returns numbers {name}", _sibling_advantage, given, constants, warps)
