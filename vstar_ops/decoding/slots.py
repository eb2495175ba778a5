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
        parent: int64 ``[n]``, the slots that they extend.
        request, rank, position: int64 ``[n]``: the request of a row, its column among the new ones, and the
            number of tokens before its own.
        seen: bool ``[n, S + width]``, the columns that a row sees.
        slot: int64 ``[N]``, the new slots, -1 for unused rows.
        batch: ``B``.
        width: the most new rows of a request; others have padding behind theirs.
    """

    row: Tensor
    parent: Tensor
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
        """Make a slot for a child of every slot of ``parent[N]``; None if all rows are unused (-1).

        Rows ``parent[B, P]`` of a request each are all new columns, also unused ones, which see what a child
        of the root would: no shape depends on them, and the host waits for nothing.
        """
        if parent.ndim == 2:
            return self._add_by_request(parent)
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

        slot[row] = self._append(request, position, seen, width)
        return NewRows(row, above, request, rank, position, seen, slot, self.batch, width)

    def _add_by_request(self, parent: Tensor) -> NewRows:
        batch, width = parent.shape
        used, root = parent >= 0, torch.arange(batch, device=parent.device)[:, None].expand_as(parent)
        above, request = torch.where(used, parent.long(), root).flatten(), root.flatten()
        row = torch.arange(batch * width, device=parent.device)
        position, rank = self.position[above] + 1, row % width
        own = torch.eye(width, dtype=torch.bool, device=parent.device).repeat(batch, 1)
        seen = torch.cat([self.visible[above], own], 1)
        slot = torch.where(used.flatten(), self._append(request, position, seen, width), -1)
        return NewRows(row, above, request, rank, position, seen, slot, batch, width)

    def _append(self, request: Tensor, position: Tensor, seen: Tensor, width: int) -> Tensor:
        """Keep new slots, ``width`` columns; returns their numbers."""
        first = len(self.request)
        self.visible = torch.cat([F.pad(self.visible, (0, width)), seen])
        self.request = torch.cat([self.request, request])
        self.position = torch.cat([self.position, position])
        return torch.arange(first, first + len(request), device=request.device)
