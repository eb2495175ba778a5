"""``prefix_tree`` by scattering all candidates' prefixes to the nodes that ``sibling_advantage`` numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from .sibling_advantage import sibling_advantage


def prefix_tree(
    tokens: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The dispatcher's signature; see :func:`vstar_ops.prefix_tree`. O(B G^2 L)."""
    batch, group, length = tokens.shape
    capacity, device = group * length, tokens.device
    zeros = torch.zeros(batch, group, device=device)
    _, _, node, counts = sibling_advantage(tokens, zeros, mask, 1.0, 0, 0.0, 2, "sibling", "none")

    # One slot more than there are nodes takes what masked candidates would write.
    def unset(value: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.full((batch, capacity + 1), value, dtype=dtype, device=device)

    parent, token, depth = unset(-1), unset(-1, tokens.dtype), unset(0)
    first, count = unset(group), unset(0)
    candidate = torch.arange(group, dtype=torch.int32, device=device).expand(batch, group)
    above = torch.full_like(candidate, -1)
    for level in range(length):
        slot = torch.where(node[..., level] < 0, capacity, node[..., level]).long()
        # All candidates through a node write the same, and the least of their numbers is kept.
        parent.scatter_(1, slot, above)
        token.scatter_(1, slot, tokens[..., level])
        depth.scatter_(1, slot, torch.full_like(candidate, level + 1))
        first.scatter_reduce_(1, slot, candidate, "amin")
        count.scatter_(1, slot, counts[..., level])
        above = node[..., level]
    fields = (parent, token, depth, first, count)
    parent, token, depth, first, count = (x[:, :capacity].contiguous() for x in fields)
    used = count > 0
    first = torch.where(used, first, -1)
    return parent, token, depth, first, count, node, used.sum(1, dtype=torch.int32)
