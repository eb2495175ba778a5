"""``group_advantage``: GRPO's advantage of a candidate within its group."""

from __future__ import annotations

from torch import Tensor

from .. import reference
from ._checks import (
    FLOATS_OR_DOUBLE,
    check,
    check_choice,
    check_finite_rewards,
    check_mask,
    result_dtype,
    standardizer_options,
)
from ._registry import define

_op = define(
    reference.group_advantage,
    lambda rewards, *_: rewards.new_empty(rewards.shape, dtype=result_dtype(rewards)),
    double=("rewards",),
)


def group_advantage(
    rewards: Tensor,
    mask: Tensor | None = None,
    *,
    eps: float = 1e-4,
    ddof: int = 1,
    std_floor: float = 0.0,
    scale: str = "group",
) -> Tensor:
    r"""Standardize rewards within each request's candidates, as GRPO does.

    .. math:: A_g = \frac{R_g - \text{mean}(R)}{\max(\text{std}(R), \text{std\_floor}) + \text{eps}}

    over the candidates of the same request that are not masked. A NaN or infinite reward makes every
    advantage that is compared with it NaN: all of its request, unless fewer than two candidates are present.

    Args:
        rewards: float32, bfloat16, float16 or float64 ``[B, G]``.
        mask: bool ``[B, G]``, False for padded candidates, which take no part and get 0.
        eps: added to the standard deviation.
        ddof: 1 for the sample standard deviation (GRPO's), 0 for the population's.
        std_floor: lower bound of the standard deviation.
        scale: ``"group"`` as above, or ``"none"``: :math:`R_g - \text{mean}(R)`, not divided.

    Returns:
        float32 ``[B, G]``, float64 for float64 rewards, which the reference implementation takes. Exactly 0
        where all rewards of a request are equal, or fewer than two are present. Statistics are float64
        inside; the same bits for any number of threads. No gradient flows.

    Raises:
        TypeError, ValueError: an argument's type, shape, device or value, by name.

    Example:
        >>> vstar_ops.group_advantage(torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.35, 0.35, 0.35, 0.35]]))
        tensor([[ 1.4997, -0.4999, -0.4999, -0.4999],
                [ 0.0000,  0.0000,  0.0000,  0.0000]])
    """
    check("rewards", rewards, (None, None), "[B, G]", FLOATS_OR_DOUBLE)
    check_mask(mask, tuple(rewards.shape), rewards.device)
    check_finite_rewards(rewards, mask)
    check_choice("scale", scale, ("group", "none"))
    scaled = scale != "none"
    options = standardizer_options(eps, ddof, std_floor, scaled=scaled)
    return _op(rewards.device, rewards, mask, *options, scaled)
