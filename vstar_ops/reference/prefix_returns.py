"""``prefix_returns`` by comparing every candidate of a request with every other, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from .sibling_advantage import sibling_advantage, tokens_there


def prefix_returns(
    tokens: Tensor,
    embedding: Tensor,
    target: Tensor,
    target_embedding: Tensor,
    mask: Tensor | None,
    weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The dispatcher's signature; see :func:`vstar_ops.prefix_returns`. O(B G^2 (L + E))."""
    batch, group, length = tokens.shape
    result = torch.float64 if embedding.dtype == torch.float64 else torch.float32
    there = tokens_there(tokens, mask)
    item = embedding.double()
    wanted = target_embedding.double()
    zeros = torch.zeros(batch, group, device=tokens.device)
    _, _, node, count = sibling_advantage(tokens, zeros, mask, 1.0, 0, 0.0, 2, "sibling", "none")

    returns = torch.zeros(batch, group, length, dtype=result, device=tokens.device)
    similarity = torch.zeros_like(returns)
    for depth in range(length):
        present = there[:, :, depth]
        same = (node[:, :, None, depth] == node[:, None, :, depth]) & present[:, None]
        # A product with a mask would turn the NaN of one bucket into NaN of all.
        total = (
            torch.stack([torch.where(same[:, g, :, None], item, 0).sum(1) for g in range(group)], 1)
            if group
            else item
        )
        norm = total.norm(dim=2) * wanted.norm(dim=1)[:, None]
        cosine = torch.where(norm == 0, 0, (total * wanted[:, None]).sum(2) / norm).to(result)
        matches = (tokens[:, :, : depth + 1] == target[:, None, : depth + 1]).all(2)
        value = torch.where(matches, weights[depth], -weights[depth] * (1 - cosine.double()))
        returns[:, :, depth] = torch.where(present, value, 0)
        similarity[:, :, depth] = torch.where(present, cosine, 0)
    return returns, similarity, node, count
