"""``group_advantage``: a program a request, its rewards in chunks that stay in the first-level cache.

Three sweeps (mean and equality, sum of squares, result) in float64. One launch, no workspace.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import next_power_of_2

from ._array import array, load_float, load_int
from ._specialization import OPTIONS, Specialization


def group_advantage(rewards: Tensor, mask: Tensor | None, eps: float, ddof: int, std_floor: float) -> Tensor:
    """The dispatcher's signature; see :func:`vstar_ops.group_advantage`."""
    batch, group = rewards.shape
    advantage = torch.empty(batch, group, device=rewards.device)
    if advantage.numel():
        block, warps = _block(group)
        present = (0, 0) if mask is None else mask.stride()
        _group_advantage[(batch,)](
            *array(rewards), *array(mask), advantage, group, *rewards.stride(), *present, eps, std_floor,
            ddof, BLOCK=block, num_warps=warps, **OPTIONS,
        )  # fmt: skip
    return advantage


def _block(group: int) -> tuple[int, int]:
    """Rewards a chunk, and warps."""
    size = min(1024, max(32, next_power_of_2(group)))
    return size, max(1, size // 256)


@triton.jit
def _load(rewards, rewards_type, present, present_type, b, g, inside, r0, r1, m0, m1):
    """Rewards as float64 and whether they take part; those that do not are never looked at."""
    inside = inside & (load_int(present, present_type, b * m0 + g * m1, inside, 1) != 0)
    return load_float(rewards, rewards_type, b * r0 + g * r1, inside).to(tl.float64), inside


@triton.jit(
    do_not_specialize=[
        "rewards", "rewards_type", "present", "present_type", "group", "r0", "r1", "m0", "m1", "ddof"
    ]
)  # fmt: skip
def _group_advantage(
    rewards: tl.int64, rewards_type, present: tl.int64, present_type, advantage, group, r0, r1, m0, m1,
    eps: tl.float64, std_floor: tl.float64, ddof, BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    step = tl.arange(0, BLOCK).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float64)
    count = tl.zeros((BLOCK,), tl.int32)
    top = tl.full((BLOCK,), float("-inf"), tl.float64)
    bottom = tl.full((BLOCK,), float("inf"), tl.float64)
    for start in range(0, group, BLOCK):
        g = start + step
        x, there = _load(rewards, rewards_type, present, present_type, b, g, g < group, r0, r1, m0, m1)
        total += x
        count += there.to(tl.int32)
        top = tl.where(there & (x > top), x, top)
        bottom = tl.where(there & (x < bottom), x, bottom)
    n = tl.sum(count, 0)
    signal = (n > ddof) & (tl.max(top, 0) != tl.min(bottom, 0))
    mean = tl.sum(total, 0) / tl.maximum(n, 1).to(tl.float64)
    squares = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, group, BLOCK):
        g = start + step
        x, there = _load(rewards, rewards_type, present, present_type, b, g, g < group, r0, r1, m0, m1)
        squares += tl.where(there, (x - mean) * (x - mean), 0.0)
    std = tl.sqrt(tl.sum(squares, 0) / tl.maximum(n - ddof, 1).to(tl.float64))
    scale = tl.maximum(std, std_floor) + eps
    for start in range(0, group, BLOCK):
        g = start + step
        x, there = _load(rewards, rewards_type, present, present_type, b, g, g < group, r0, r1, m0, m1)
        result = tl.where(there & signal, (x - mean) / scale, 0.0)
        tl.store(advantage + b * group + g, result.to(tl.float32), g < group)


def specializations() -> Iterator[Specialization]:
    """Everything that is compiled."""
    types = {"rewards": "i64", "present": "i64", "advantage": "*fp32", "eps": "fp64", "std_floor": "fp64"}
    for group in (32, 64, 128, 256, 512, 1024):
        block, warps = _block(group)
        yield Specialization(f"group_advantage {block}", _group_advantage, types, {"BLOCK": block}, warps)
