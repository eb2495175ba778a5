"""The steps of top-k sampling between two forwards, by comparing all with all."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..noise import derive_seeds, gumbel


def draw_children(
    logp: Tensor,
    token: Tensor,
    node: Tensor,
    sequence: Tensor,
    row: Tensor | None,
    prefix: Tensor | None,
    cum_logp: Tensor | None,
    seed: Tensor | None,
    base_seed: int,
    pack: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The dispatcher's signature; see :func:`vstar_ops.draw_children`. Computes in float64."""
    (batch, candidates, _), (rows, children), device = sequence.shape, logp.shape, logp.device
    if row is None:
        row = torch.arange(batch, device=device)[:, None].expand(batch, candidates)
    own = torch.where((row >= 0) & (row < rows), row, rows).long()  # behind the lists stands an empty one
    # and behind every list an entry that nobody can draw
    logps = pad(logp.double(), (0, 1, 0, 1), value=float("-inf"))[own]
    tokens, nodes = (pad(x.long(), (0, 1, 0, 1), value=-1)[own] for x in (token, node))
    seeds = derive_seeds(base_seed, batch, device) if seed is None else seed
    key = seeds[:, None] + torch.arange(1, candidates + 1, device=device) * 0x5851F42D4C957F2D
    prefix = torch.zeros_like(key) if prefix is None else prefix.long()
    perturbed = logps + gumbel(key[..., None], prefix[..., None], tokens)
    drawable = (nodes >= 0) & (logps > float("-inf"))  # NaN compares false
    perturbed = torch.where(drawable, perturbed, float("-inf"))
    best = drawable & (perturbed == perturbed.amax(2, keepdim=True))
    entry = torch.where(best, torch.arange(children + 1, device=device), children).amin(2, keepdim=True)
    tokens, nodes, logps = (x.gather(2, entry) for x in (tokens, nodes, logps))
    lost = nodes < 0
    if cum_logp is not None:
        logps = logps + cum_logp.double()[..., None]
    logps = torch.where(lost, float("-inf"), logps)
    sequence, num_valid = torch.cat([torch.where(lost, -1, sequence), tokens], 2), (~lost).sum((1, 2))
    if pack:
        order = lost.int().argsort(dim=1, stable=True)
        sequence = sequence.gather(1, order.expand(sequence.shape))
        nodes, logps = nodes.gather(1, order), logps.gather(1, order)
    return sequence.int(), nodes[..., 0].int(), logps[..., 0].to(logp.dtype), num_valid.int()


def distinct_rows(
    node: Tensor, token: Tensor, slot: Tensor, row: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The dispatcher's signature; see :func:`vstar_ops.distinct_rows`. O(B K^2)."""
    batch, candidates = node.shape
    if row is None:
        row = torch.arange(batch, device=node.device)[:, None].expand(batch, candidates)
    position = torch.arange(candidates, device=node.device)
    earlier = (node[:, None] == node[..., None]) & (position < position[:, None])
    first = (node >= 0) & ~earlier.any(2)
    number = first.sum(1)
    smaller = (first[:, None] & (node[:, None] < node[..., None])).sum(2)
    own = torch.where(node >= 0, smaller + (number.cumsum(0) - number)[:, None], -1)
    parent = torch.full((node.numel(),), -1, dtype=torch.int64, device=node.device)
    row_token, row_node = torch.zeros_like(parent), torch.full_like(parent, -1)
    known = torch.where((row >= 0) & (row < len(slot)), row, -1).long()
    parent[own[first]] = pad(slot, (0, 1), value=-1)[known][first].long()
    row_token[own[first]], row_node[own[first]] = token[first].long(), node[first].long()
    rows = number.sum()[None]
    return own.int().contiguous(), parent, row_token, row_node.int(), rows.int(), number.int()
