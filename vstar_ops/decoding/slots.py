"""The evaluated prefixes of a :class:`PrefixModel` whose cache is laid out by request.

Keys and values of a layer are ``[B, heads, S, head_dim]``: first the prompt of each request, then one column
for every evaluated prefix. A slot is described by the columns of its request that it sees, so nothing in
the cache is ever copied or reordered for a prefix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class NewRows:
    """``n`` prefixes to evaluate, laid out as ``[B, width]`` columns behind those in use.

    Attributes:
        row: int64 ``[n]``, which of the ``N`` rows asked for these are.
        request, rank, position: int64 ``[n]``: the request of a row, its column among the new ones, and the
            number of tokens before its own.
        seen: bool ``[n, S + width]``, the columns that a row sees.
        slot: int64 ``[N]``, the new slots, -1 for unused rows.
        batch: ``B``.
        width: the most new rows of a request; others have padding behind theirs.
    """

    row: Tensor
    request: Tensor
    rank: Tensor
    position: Tensor
    seen: Tensor
    slot: Tensor
    batch: int
    width: int

    def laid_out(self, x: Tensor) -> Tensor:
        """``[B, width, ...]`` of ``x[n, ...]``; 0 in padding."""
        out = x.new_zeros(self.batch, self.width, *x.shape[1:])
        return out.index_put((self.request, self.rank), x)

    def mask(self) -> Tensor:
        """bool ``[B, width, S + width]``: what each new column sees. Padding sees itself."""
        mask = self.laid_out(self.seen)
        mask[:, :, -self.width :] |= torch.eye(self.width, dtype=torch.bool, device=mask.device)
        return mask


@dataclass
class Slots:
    """What the slots see.

    Attributes:
        visible: bool ``[slots, S]``: what the parent sees, and the slot's own column.
        request, position: int64 ``[slots]``: its request, and the number of tokens before its own.
        batch: ``B``.
    """

    visible: Tensor
    request: Tensor
    position: Tensor
    batch: int

    def add(self, parent: Tensor) -> NewRows | None:
        """Make a slot for a child of every slot of ``parent[N]``; None if all rows are unused (-1)."""
        row = (parent >= 0).nonzero()[:, 0]  # the host waits for their number, and below for the width
        slot = torch.full_like(parent, -1, dtype=torch.int64)
        above = parent[row].long()
        if len(above) == 0:
            return None
        request, position = self.request[above], self.position[above] + 1
        counts = torch.zeros(self.batch, dtype=torch.int64, device=row.device)
        counts.scatter_add_(0, request, torch.ones_like(request))
        order = torch.argsort(request, stable=True)
        start = counts.cumsum(0) - counts
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order), device=order.device) - start[request[order]]
        width = int(counts.max())
        own = torch.arange(width, device=rank.device) == rank[:, None]
        seen = torch.cat([self.visible[above], own], 1)

        first = len(self.request)
        slot[row] = torch.arange(first, first + len(above), device=slot.device)
        self.visible = torch.cat([F.pad(self.visible, (0, width)), seen])
        self.request = torch.cat([self.request, request])
        self.position = torch.cat([self.position, position])
        return NewRows(row, request, rank, position, seen, slot, self.batch, width)
