"""Rewards of candidates. A hit is a matching semantic ID; items that share one count as one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .config import REWARDS
from .data import Dataset, Split

Reward = Callable[[Split, Tensor], Tensor]  # (requests [B], candidates[B, G, L]) -> float32 [B, G]


def hits(candidates: Tensor, target: Tensor) -> Tensor:
    """bool ``[B, G]``: which of ``candidates[B, G, L]`` are ``target[B, L]``."""
    return (candidates == target[:, None]).all(-1)


def rule(candidates: Tensor, target: Tensor) -> Tensor:
    """1 for the exact item, else 0; float32 ``[B, G]``."""
    return hits(candidates, target).float()


def ranking(candidates: Tensor, target: Tensor) -> Tensor:
    """:func:`rule`, and where the request has a hit a penalty for every miss, the larger the higher it ranks.

    A miss at position ``i`` gets ``-d_i / sum(d)`` with ``d_i = 1 / log2(i + 2)``. Candidates are in the
    order of their rank; padded ones (tokens -1) neither get nor share in the penalty.
    """
    hit = hits(candidates, target)
    present = candidates[..., 0] >= 0
    discount = 1 / torch.log2(torch.arange(candidates.shape[1], device=candidates.device) + 2.0) * present
    penalty = discount / discount.sum(1, keepdim=True).clamp(min=1e-12)
    return hit.float() - penalty * (hit.any(1, keepdim=True) & ~hit)


def prefix(candidates: Tensor, target: Tensor) -> Tensor:
    """The share of the target's tokens that a candidate begins with; float32 ``[B, G]``.

    It tells near misses apart, where :func:`rule` is 0 for most groups.
    """
    return (candidates == target[:, None]).cumprod(-1).float().mean(-1)


def reward_name(name: str | None, dataset: Dataset) -> str:
    """``name``, or what None stands for: the true reward where it is known."""
    return name or ("true" if dataset.reward else "ranking")


def make_reward(name: str, dataset: Dataset) -> Reward:
    """The reward of one of the names :data:`REWARDS`.

    Raises:
        ValueError: the name is not known, or is ``"true"`` for a data set whose true reward is not known.
    """
    if name not in REWARDS:
        raise ValueError(f"reward must be one of {', '.join(REWARDS)}, got {name!r}")
    if name == "true":
        true = dataset.reward
        if true is None:
            raise ValueError(f"the true reward of {dataset.name} is not known: choose one by the click")
        return lambda split, candidates: true(split.user, candidates)
    function = {"rule": rule, "ranking": ranking, "prefix": prefix}[name]
    return lambda split, candidates: function(candidates, split.target)
