"""``group_advantage``: one program per request; its rewards are read in chunks that stay in the L1 cache.

Three sweeps (mean and equality, sum of squares, result) in float64. One launch, no workspace.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._array import Array, load_float, load_int, strided
from ._kernel import ADDRESS, BLOCKS, F32, Specialization, block_for, kernel


def group_advantage(
    rewards: Tensor, mask: Tensor | None, eps: float, ddof: int, std_floor: float, scaled: bool
) -> Tensor:
    """The dispatcher's signature; see :func:`vstar_ops.group_advantage`."""
    batch, group = rewards.shape
    advantage = torch.empty(batch, group, device=rewards.device)
    if advantage.numel():
        block, warps = block_for(group)
        _group_advantage.launch(
            (batch,), warps,
            advantage, *strided(rewards, 2), *strided(mask, 2), group, eps, std_floor, ddof,
            int(scaled), BLOCK=block,
        )  # fmt: skip
    return advantage


@triton.jit
def _load(rewards, mask, b, g, group):
    """Rewards as float64 and whether they take part; those that do not are never looked at."""
    inside = g < group
    valid = inside & (load_int(mask, b, g, 0, inside, 1) != 0)
    return load_float(rewards, b, g, 0, valid).to(tl.float64), valid


@triton.jit
def statistics(rewards, mask, b, group, ddof, BLOCK: tl.constexpr):
    """Mean and standard deviation of a request's rewards, NaN unless all are finite; whether they differ."""
    step = tl.arange(0, BLOCK).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float64)
    count = tl.zeros((BLOCK,), tl.int32)
    largest = tl.full((BLOCK,), float("-inf"), tl.float64)
    smallest = tl.full((BLOCK,), float("inf"), tl.float64)
    for start in range(0, group, BLOCK):
        x, valid = _load(rewards, mask, b, start + step, group)
        total += x
        count += valid.to(tl.int32)
        largest = tl.where(valid & (x > largest), x, largest)
        smallest = tl.where(valid & (x < smallest), x, smallest)
    n = tl.sum(count, 0)
    mean = tl.sum(total, 0) / tl.maximum(n, 1).to(tl.float64)
    finite = tl.abs(mean) < float("inf")
    mean = tl.where(finite, mean, float("nan"))
    squares = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, group, BLOCK):
        x, valid = _load(rewards, mask, b, start + step, group)
        squares += tl.where(valid, (x - mean) * (x - mean), 0.0)
    std = tl.sqrt(tl.sum(squares, 0) / tl.maximum(n - ddof, 1).to(tl.float64))
    return mean, std, (n >= 2) & ((tl.max(largest, 0) != tl.min(smallest, 0)) | (finite == 0))


@triton.jit
def divisor_of(std, std_floor, eps):
    """What is divided by; NaN for NaN."""
    return tl.where(std == std, tl.maximum(std, std_floor) + eps, float("nan"))


@kernel
def _group_advantage(
    advantage: F32, rewards: ADDRESS, rewards_type, r0, r1, mask: ADDRESS, mask_type, m0, m1, group,
    eps: tl.float64, std_floor: tl.float64, ddof, scaled, BLOCK: tl.constexpr,
):  # fmt: skip
    rewards, mask = Array(rewards, rewards_type, r0, r1, 0), Array(mask, mask_type, m0, m1, 0)
    b = tl.program_id(0).to(tl.int64)
    mean, std, differ = statistics(rewards, mask, b, group, ddof, BLOCK)
    divisor = tl.where(scaled != 0, divisor_of(std, std_floor, eps), 1.0)
    for start in range(0, group, BLOCK):
        g = start + tl.arange(0, BLOCK).to(tl.int64)
        x, valid = _load(rewards, mask, b, g, group)
        result = tl.where(valid & differ, (x - mean) / divisor, 0.0)
        tl.store(advantage + b * group + g, result.to(tl.float32), g < group)


def specializations() -> Iterator[Specialization]:
    """Everything that is compiled."""
    for block, warps in map(block_for, BLOCKS):
        yield Specialization(f"group_advantage {block}", _group_advantage, warps, {"BLOCK": block})
