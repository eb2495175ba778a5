"""``group_advantage`` in float64 tensor algebra."""

from __future__ import annotations

import torch
from torch import Tensor


def group_advantage(rewards: Tensor, mask: Tensor | None, eps: float, ddof: int, std_floor: float) -> Tensor:
    """The dispatcher's signature; see :func:`vstar_ops.group_advantage`."""
    present = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask
    reward = torch.where(present, rewards.to(torch.float64), 0)
    number = present.sum(1, keepdim=True)
    mean = reward.sum(1, keepdim=True) / number.clamp(min=1)
    off = torch.where(present, reward - mean, 0)
    std = (off.square().sum(1, keepdim=True) / (number - ddof).clamp(min=1)).sqrt()
    first = reward.gather(1, present.to(torch.int8).argmax(1, keepdim=True)) if rewards.shape[1] else mean
    equal = ((reward == first) | ~present).all(1, keepdim=True)
    advantage = torch.where(equal | (number <= ddof), 0, off / (std.clamp(min=std_floor) + eps))
    return advantage.to(torch.float64 if rewards.dtype == torch.float64 else torch.float32)
