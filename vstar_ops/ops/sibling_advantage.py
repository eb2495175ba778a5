"""``sibling_advantage``: advantages among the children of each prefix (V-STAR, Eqs. 17-18)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference
from .._deprecated import renamed_field
from ._checks import (
    FLOATS_OR_DOUBLE,
    check,
    check_choice,
    check_finite_rewards,
    check_int,
    check_mask,
    check_tokens,
    result_dtype,
    standardizer_options,
)
from ._registry import define

_BASELINES = ("sibling", "parent", "leave_one_out")
_SCALES = ("siblings", "group", "none")


class SiblingAdvantage(NamedTuple):
    """The result of :func:`sibling_advantage`; all ``[B, G, L]``."""

    advantage: Tensor
    valid: Tensor
    node: Tensor
    num_candidates: Tensor


SiblingAdvantage.count = renamed_field("num_candidates")  # type: ignore[method-assign]


def _fake(tokens: Tensor, rewards: Tensor, *_: object) -> tuple[Tensor, ...]:
    return (
        tokens.new_empty(tokens.shape, dtype=result_dtype(rewards)),
        tokens.new_empty(tokens.shape, dtype=torch.bool),
        tokens.new_empty(tokens.shape, dtype=torch.int32),
        tokens.new_empty(tokens.shape, dtype=torch.int32),
    )


_op = define(
    reference.sibling_advantage,
    _fake,
    double=("rewards",),
)


def sibling_advantage(
    tokens: Tensor,
    rewards: Tensor,
    mask: Tensor | None = None,
    *,
    eps: float = 1e-4,
    ddof: int = 0,
    std_floor: float = 0.0,
    min_siblings: int = 2,
    baseline: str = "sibling",
    scale: str = "siblings",
) -> SiblingAdvantage:
    r"""Compare each prefix of the candidates with its siblings (Sibling-GRPO, arXiv 2602.10699).

    For the request's candidates through a parent prefix :math:`h` and a child token :math:`v`:
    :math:`\bar R(h, v)` is their mean reward, duplicates counting as separate samples (17);
    :math:`\mu_h, \sigma_h` are mean and standard deviation of :math:`\bar R(h, \cdot)` over the distinct
    children of :math:`h`, each child once; and (18)

    .. math:: A(h, v) = \frac{\bar R(h, v) - \mu_h}{\max(\sigma_h, \text{std\_floor}) + \text{eps}}.

    The advantages of the form ``"centered"`` of :func:`sibling_grpo_loss` are those with
    ``baseline="parent", scale="group", ddof=1``.

    Requests never mix. Prefixes are compared exactly, token by token. A NaN or infinite reward makes every
    advantage that is compared with it NaN: of all children of each prefix that its candidate goes through.
    Below other prefixes nothing changes.

    Args:
        tokens: integers ``[B, G, L]`` of any value: ``G`` candidates per request.
        rewards: float32, bfloat16, float16 or float64 ``[B, G]``.
        mask: bool ``[B, G]``, False for padded candidates, or ``[B, G, L]``, False for padded tokens: a
            masked entry takes no part at its level, whatever its token. A masked token between others still
            tells the prefixes behind it apart.
        eps: added to the standard deviation.
        ddof: 0 for the population, 1 for the sample standard deviation.
        std_floor: lower bound of the standard deviation.
        min_siblings: distinct children (at least 2) that a parent needs to give a signal.
        baseline: what is subtracted: ``"sibling"`` is :math:`\mu_h`; ``"parent"`` the mean reward of the
            candidates through :math:`h`; ``"leave_one_out"`` the mean over the other children.
        scale: what the difference is divided by: ``"siblings"`` as above; ``"group"`` one number per
            request, the same of the standard deviation of its candidates' rewards, so that a reward that is
            not finite concerns all of the request; ``"none"`` is 1.

    Returns:
        A named tuple, each ``[B, G, L]``, entry ``[b, g, l]`` speaking of the prefix of ``l + 1`` tokens:

        - ``advantage`` float32, float64 for float64 rewards, which the reference implementation takes; 0
          where not valid, and exactly 0 where all siblings have equal means.
        - ``valid`` bool: the parent has at least ``min_siblings`` distinct children.
        - ``node`` int32: number of the distinct prefix, dense from 0 within the request, level by level
          and lexicographic within a level; -1 where masked.
        - ``num_candidates`` int32: candidates through the prefix (0 where masked). Weighting each
          candidate by ``1 / num_candidates`` counts each node once, as in Eq. (19).

    Statistics are float64 inside, so that they do not depend on the order of candidates; the result is
    the same bits for any number of threads. No gradient flows: advantages are constants of the loss.

    Raises:
        TypeError, ValueError: an argument's type, shape, device or value, by name.

    Example:
        >>> tokens = torch.tensor([[[1, 5], [1, 6], [2, 5], [2, 5]]])
        >>> out = vstar_ops.sibling_advantage(tokens, torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
        >>> out.advantage[0, :, 0], out.valid[0, 2]
        (tensor([ 0.9996,  0.9996, -0.9996, -0.9996]), tensor([ True, False]))
    """
    tokens = check_tokens("tokens", tokens, (None, None, None), "[B, G, L]")
    shape, device = tuple(tokens.shape), tokens.device
    check("rewards", rewards, shape[:2], "[B, G]", FLOATS_OR_DOUBLE, device)
    check_mask(mask, shape, device)
    check_finite_rewards(rewards, mask)
    check_choice("baseline", baseline, _BASELINES)
    check_choice("scale", scale, _SCALES)
    options = standardizer_options(eps, ddof, std_floor, scaled=scale != "none")
    check_int("min_siblings", min_siblings, 2)
    return SiblingAdvantage(*_op(device, tokens, rewards, mask, *options, min_siblings, baseline, scale))
