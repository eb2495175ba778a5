"""``group_advantage``: GRPO's advantage of a candidate within its group."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ._checks import check_rewards, standardizer_options
from ._registry import define

_op = define(
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
    r"""Standardize rewards within each request's candidates, as GRPO does.

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
    check_rewards(rewards, (None, None), mask)
    return _op(rewards.device, rewards, mask, *standardizer_options(eps, ddof, std_floor))
