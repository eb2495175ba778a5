"""``sibling_advantage`` by comparing every candidate of a request with every other, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from .group_advantage import deviations


def sibling_advantage(
    tokens: Tensor,
    rewards: Tensor,
    mask: Tensor | None,
    eps: float,
    ddof: int,
    std_floor: float,
    min_siblings: int,
    baseline: str,
    scale: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The dispatcher's signature; see :func:`vstar_ops.sibling_advantage`. O(B G^2 L)."""
    batch, group, length = tokens.shape
    result = torch.float64 if rewards.dtype == torch.float64 else torch.float32
    there = tokens_there(tokens, mask)
    candidates = there.any(2)
    reward = torch.where(candidates, rewards.to(torch.float64), 0)
    broken = ~reward.isfinite()
    _, group_std = deviations(reward, candidates, ddof)

    # alike[b, i, j]: candidates i and j share the prefix; less[b, i, j]: i's prefix sorts before j's.
    alike = torch.ones(batch, group, group, dtype=torch.bool, device=tokens.device)
    less = torch.zeros_like(alike)
    earlier = torch.ones(group, group, dtype=torch.bool, device=tokens.device).tril(-1)
    first_id = torch.zeros(batch, 1, dtype=torch.int64, device=tokens.device)
    columns = []
    for depth in range(length):
        here, present = tokens[:, :, depth], there[:, :, depth]
        both = present.unsqueeze(2) & present.unsqueeze(1)
        siblings = alike & both
        less = less | (alike & (here.unsqueeze(2) < here.unsqueeze(1)))
        alike = alike & (here.unsqueeze(2) == here.unsqueeze(1))
        same = alike & both
        stands_for_node = present & ~(same & earlier).any(2)  # the first candidate through a prefix

        count = same.sum(2)
        # A product with a mask would turn the NaN of one node into NaN of all.
        total = (same.to(torch.float64) @ torch.where(broken, 0, reward).unsqueeze(2)).squeeze(2)
        node_mean = torch.where((same & broken.unsqueeze(1)).any(2), torch.nan, total / count.clamp(min=1))
        distinct = siblings & stands_for_node.unsqueeze(1)  # [b, i, j]: node j is a child of i's parent
        number = distinct.sum(2)
        children = node_mean.unsqueeze(1).expand_as(distinct)
        mean = torch.where(distinct, children, 0).sum(2) / number.clamp(min=1)
        variance = torch.where(distinct, (children - mean.unsqueeze(2)) ** 2, 0).sum(2)
        std = (variance / (number - ddof).clamp(min=1)).sqrt()
        if baseline == "parent":
            weighted = torch.where(distinct, children * count.unsqueeze(1), 0).sum(2)
            base = weighted / siblings.sum(2).clamp(min=1)
        elif baseline == "leave_one_out":
            base = (mean * number - node_mean) / (number - 1).clamp(min=1)
        else:
            base = mean
        inf = float("inf")
        top = torch.where(distinct, children, -inf).amax(2) if group else mean
        bottom = torch.where(distinct, children, inf).amin(2) if group else mean
        valid = present & (number >= min_siblings)
        advantage = node_mean - base
        if scale != "none":
            advantage = advantage / ((std if scale == "siblings" else group_std).clamp(min=std_floor) + eps)
        advantage = torch.where(valid & (top != bottom), advantage, 0)

        rank = (less & stands_for_node.unsqueeze(2)).sum(1)
        node = torch.where(present, first_id + rank, -1)
        first_id = first_id + stands_for_node.sum(1, keepdim=True)
        columns.append((advantage.to(result), valid, node.to(torch.int32), count.to(torch.int32)))
    if not columns:
        empty = tokens.new_empty(batch, group, 0)
        return empty.to(result), empty.to(torch.bool), empty.to(torch.int32), empty.to(torch.int32)
    advantage, valid, node, count = (torch.stack(parts, 2) for parts in zip(*columns))
    return advantage, valid, node, count


def tokens_there(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """A mask of candidates ``[B, G]`` or of tokens ``[B, G, L]`` as one of tokens."""
    if mask is None:
        return torch.ones_like(tokens, dtype=torch.bool)
    return mask if mask.dim() == 3 else mask.unsqueeze(2).expand(tokens.shape)
