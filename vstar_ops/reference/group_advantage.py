"""``group_advantage`` in float64 tensor algebra."""

from __future__ import annotations

import torch
from torch import Tensor


def group_advantage(
    rewards: Tensor, mask: Tensor | None, eps: float, ddof: int, std_floor: float, scaled: bool
) -> Tensor:
    """The dispatcher's signature; see :func:`vstar_ops.group_advantage`."""
    present = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask
    reward = torch.where(present, rewards.to(torch.float64), 0)
    off, std = deviations(reward, present, ddof)
    first = reward.gather(1, present.to(torch.int8).argmax(1, keepdim=True)) if rewards.shape[1] else std
    equal = ((reward == first) | ~present).all(1, keepdim=True) & std.isfinite()
    nothing = equal | (present.sum(1, keepdim=True) < 2) | ~present
    advantage = torch.where(nothing, 0, off / (std.clamp(min=std_floor) + eps) if scaled else off)
    return advantage.to(torch.float64 if rewards.dtype == torch.float64 else torch.float32)


def deviations(reward: Tensor, present: Tensor, ddof: int) -> tuple[Tensor, Tensor]:
    """Of rewards ``[B, G]`` from their request's mean, and their standard deviation ``[B, 1]``.

    All of a request are NaN where one of its rewards is NaN or infinite.
    """
    number = present.sum(1, keepdim=True)
    mean = reward.sum(1, keepdim=True) / number.clamp(min=1)
    finite = (reward.isfinite() | ~present).all(1, keepdim=True)
    off = torch.where(present, reward - torch.where(finite, mean, torch.nan), 0)
    return off, (off.square().sum(1, keepdim=True) / (number - ddof).clamp(min=1)).sqrt()
