r"""The objective in plain torch: its terms one by one (arXiv 2602.10699, Eqs. 15-19)."""

from __future__ import annotations

import torch
from torch import Tensor

from vstar_ops import SiblingAdvantage


def surrogate(
    logp: Tensor, old_logp: Tensor, advantage: Tensor, clip: tuple[float, float] | None = None
) -> Tensor:
    r"""``A rho`` with ``rho = exp(logp - old_logp)``, or PPO's pessimistic bound of it.

    ``clip = (low, high)`` bounds rho to ``[1 - low, 1 + high]``.
    """
    ratio = torch.exp(logp - old_logp)
    if clip is None:
        return ratio * advantage
    return torch.minimum(ratio * advantage, ratio.clamp(1 - clip[0], 1 + clip[1]) * advantage)


def grpo_term(
    logp: Tensor,
    old_logp: Tensor,
    advantage: Tensor,
    mask: Tensor,
    clip: tuple[float, float] | None = None,
) -> Tensor:
    """The global term: mean over a sequence's tokens, then over all candidates that are there.

    ``logp``, ``old_logp`` are ``[B, G, L]``; ``advantage``, ``mask`` are ``[B, G]``.
    """
    value = surrogate(logp, old_logp, advantage[..., None].to(logp.dtype), clip).mean(2)
    return (value * mask).sum() / mask.sum().clamp(min=1)


def sibling_term(
    logp: Tensor,
    old_logp: Tensor,
    sibling: SiblingAdvantage,
    mask: Tensor,
    clip: tuple[float, float] | None = None,
    *,
    weighting: str = "node",
) -> Tensor:
    r"""Eq. 19, :math:`\frac1G \sum_\ell \sum_h \sum_v A(h, v) \rho(v | x, h)`, and the mean over requests.

    Every node counts once: each of the ``count`` candidates through it carries ``1 / count``
    (``weighting="candidate"`` lets every candidate carry 1). Shapes as :func:`grpo_term`.
    """
    if weighting not in ("node", "candidate"):
        raise ValueError(f"weighting must be 'node' or 'candidate', got {weighting!r}")
    valid = sibling.valid & mask[..., None]
    weight = valid.to(logp.dtype)
    if weighting == "node":
        weight = weight / sibling.num_candidates.clamp(min=1)
    value = surrogate(logp, old_logp, sibling.advantage.to(logp.dtype), clip) * weight
    return (value.sum((1, 2)) / mask.sum(1).clamp(min=1)).mean()


def kl_term(logp: Tensor, reference_logp: Tensor, mask: Tensor) -> Tensor:
    """The k3 estimate of KL(policy || reference), ``exp(d) - d - 1`` with ``d = reference - policy``.

    Averaged as in :func:`grpo_term`; 0 where both agree, never negative.
    """
    d = reference_logp - logp
    return ((torch.exp(d) - d - 1).mean(2) * mask).sum() / mask.sum().clamp(min=1)
