"""``group_advantage``: GRPO's advantage of a candidate within its group."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ._library import FLOATS, check, define, finite, pick, validating

define(
    "group_advantage",
    "(Tensor rewards, Tensor? mask, float eps, int ddof, float std_floor) -> Tensor",
    reference.group_advantage,
    lambda rewards, *_: rewards.new_empty(rewards.shape, dtype=torch.float32),
)


def group_advantage(
    rewards: Tensor,
    mask: Tensor | None = None,
    *,
    eps: float = 1e-4,
    ddof: int = 1,
    std_floor: float = 0.0,
) -> Tensor:
    r"""Standardise rewards within each request's candidates, as GRPO does.

    .. math:: A_g = \frac{R_g - \text{mean}(R)}{\max(\text{std}(R), \text{std\_floor}) + \text{eps}}

    over the candidates of the same request that are not masked.

    Args:
        rewards: float32, bfloat16 or float16 ``[B, G]``.
        mask: bool ``[B, G]``, False for padded candidates, which take no part and get 0.
        eps: added to the standard deviation.
        ddof: 1 for the sample standard deviation (GRPO's), 0 for the population's.
        std_floor: lower bound of the standard deviation.

    Returns:
        float32 ``[B, G]``. Exactly 0 where all rewards of a request are equal, or fewer than ``ddof + 1``
        are present. Statistics are float64 inside; the same bits for any number of threads. No gradient
        flows.

    Raises:
        TypeError, ValueError: an argument's type, shape, device or value, by name.

    Example:
        >>> vstar_ops.group_advantage(torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.35, 0.35, 0.35, 0.35]]))
        tensor([[ 1.4997, -0.4999, -0.4999, -0.4999],
                [ 0.0000,  0.0000,  0.0000,  0.0000]])
    """
    rewards = check("rewards", rewards, (None, None), "[B, G]", FLOATS)
    if mask is not None:
        check("mask", mask, tuple(rewards.shape), "[B, G]", (torch.bool,), rewards.device)
    if finite("eps", eps) < 0:
        raise ValueError(f"eps must be >= 0, got {eps}")
    if finite("std_floor", std_floor) < 0:
        raise ValueError(f"std_floor must be >= 0, got {std_floor}")
    if eps == 0 and std_floor == 0:
        raise ValueError("eps and std_floor must not both be 0, the standard deviation may be 0")
    if ddof not in (0, 1):
        raise ValueError(f"ddof must be 0 or 1, got {ddof!r}")
    if validating() and not bool(torch.isfinite(rewards if mask is None else rewards[mask]).all()):
        raise ValueError("rewards must be finite, got NaN or infinity")
    op = pick("group_advantage", reference.group_advantage, rewards.device)
    return op(rewards, mask, float(eps), ddof, float(std_floor))
