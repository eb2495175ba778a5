"""The steps of beam search between two forwards, by gathers and masks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def advance_beams(
    parent: Tensor,
    token: Tensor,
    node: Tensor,
    sequence: Tensor,
    slot: Tensor,
    evaluated: Tensor | None,
    row: Tensor | None,
    row_slot: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The dispatcher's signature; see :func:`vstar_ops.advance_beams`."""
    width, length = sequence.shape[1:]
    evaluated = torch.full_like(slot, length) if evaluated is None else evaluated
    if row is not None and row_slot is not None:
        has_row = (row >= 0) & (row < len(row_slot))
        with_none = pad(row_slot, (0, 1), value=-1)
        slot = torch.where(has_row, with_none[torch.where(has_row, row, -1)], slot)
        evaluated = torch.where(has_row, length, evaluated)
    live = (node >= 0) & (parent >= 0) & (parent < width)
    above = torch.where(live, parent, width).long()  # behind the last beam stands a dead one
    tokens = pad(sequence, (0, 0, 0, 1), value=-1).gather(1, above[..., None].expand(-1, -1, length))
    return (
        torch.cat([tokens, torch.where(live, token, -1)[..., None]], 2).int(),
        pad(slot, (0, 1), value=-1).gather(1, above).long(),
        torch.where(live, token, 0).long().contiguous(),
        pad(evaluated, (0, 1)).gather(1, above).int(),
    )


def rows_to_run(
    offset: Tensor, node: Tensor, sequence: Tensor, slot: Tensor, evaluated: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The dispatcher's signature; see :func:`vstar_ops.rows_to_run`."""
    length, beams = sequence.shape[2], node.numel()
    index = torch.where((node >= 0) & (node < len(offset) - 1), node, -1).long()
    children = offset[index + 1] - torch.where(index < 0, offset[0], offset[index])
    missing = torch.where(children > 1, length - evaluated.clamp(0, length), 0)  # the dead node has none
    runs = (missing > 0).flatten()
    row = torch.where(runs, runs.cumsum(0) - 1, -1)
    parent = torch.full((beams,), -1, dtype=torch.int64, device=node.device)
    token, place = (parent.new_full((length, beams), fill) for fill in (0, -1))
    num_rows = parent.new_zeros(length, dtype=torch.int32)
    parent[: int(runs.sum())] = slot.flatten()[runs].long()
    for stage in range(length):
        lacks = missing.flatten() >= length - stage
        num_rows[stage] = number = int(lacks.sum())
        token[stage, :number] = sequence[:, :, stage].flatten()[lacks].long()
        place[stage, :number] = row[lacks]
    return row.view(node.shape).int(), parent, token, place, num_rows, missing.sum(1).int()
