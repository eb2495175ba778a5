"""Rewards of candidates. A hit is a matching semantic ID; items that share one count as one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .data import Dataset, Split

Reward = Callable[[Split, Tensor], Tensor]  # (requests [B], candidates[B, G, L]) -> float32 [B, G]
NAMES = ("true", "rule", "ranking")


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


def make_reward(name: str, dataset: Dataset) -> Reward:
    """One of :data:`NAMES`; ``"true"`` needs a data set whose true reward is known."""
    if name == "true":
        true = dataset.reward
        if true is None:
            raise ValueError(f"the true reward of {dataset.name} is not known: choose 'rule' or 'ranking'")
        return lambda split, candidates: true(split.user, candidates)
    if name not in NAMES:
        raise ValueError(f"reward must be one of {NAMES}, got {name!r}")
    function = rule if name == "rule" else ranking
    return lambda split, candidates: function(candidates, split.target)
