"""``expand_topk`` as plain tensor algebra: every legal child is scored, all scores are sorted."""

from __future__ import annotations

import torch
from torch import Tensor

from ..noise import gumbel
from .filters import bits_at

_FLOAT32_MAX = torch.finfo(torch.float32).max
_NEG_INF = float("-inf")


def expand_topk(
    logits: Tensor,
    offset: Tensor,
    token: Tensor,
    alive: Tensor | None,
    node: Tensor,
    row: Tensor | None,
    k: int,
    cum_logp: Tensor | None,
    value: Tensor | None,
    bonus: Tensor | None,
    child_value: Tensor | None,
    seed: Tensor | None,
    logp_weight: float,
    value_weight: float,
    entropy_weight: float,
    temperature: float,
    vocab: bool,
    max_children: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The dispatcher's signature; see :func:`vstar_ops.expand_topk` for what everything means.

    Computes in float64. ``score`` is rounded to float32 before it is sorted (float64 for float64
    logits), so scores that agree in float32 are ties, which the stable sort leaves in (w, v) order.
    """
    if row is not None:
        logits = _rows(logits, row)
        child_value = None if child_value is None else _rows(child_value, row)
    batch, width, columns = logits.shape
    result = torch.float64 if logits.dtype == torch.float64 else torch.float32
    num_nodes, num_edges = offset.numel() - 1, token.numel()

    node = node.to(torch.int64)
    live = (node >= 0) & (node < num_nodes)
    index = torch.where(live, node, 0)
    begin = offset[index].to(torch.int64).unsqueeze(-1)
    end = torch.where(live, offset[index + 1].to(torch.int64), 0).unsqueeze(-1)
    slots = max_children if num_edges and columns else 0
    edge = begin + torch.arange(slots, device=logits.device)  # [B, W, C], C = max_children
    legal = edge < end
    edge = torch.where(legal, edge, 0)
    column = (token[edge] if slots else edge).to(torch.int64)
    legal &= (column >= 0) & (column < columns)
    if alive is not None:
        legal &= is_alive(alive, edge + 1)
    column = torch.where(legal, column, 0)

    scaled = _clean(logits.gather(2, column)).masked_fill(~legal, _NEG_INF)
    shifted, log_sum = _log_softmax_parts(scaled, scaled, temperature)
    logp = shifted - log_sum
    entropy = 0.0 - (logp.exp() * logp.masked_fill(logp == _NEG_INF, 0)).sum(-1).clamp(max=0)
    if vocab:
        shifted, log_sum = _log_softmax_parts(scaled, _clean(logits), temperature)
        logp = shifted - log_sum

    if cum_logp is not None:
        logp = logp + cum_logp.unsqueeze(-1)
    score = torch.zeros_like(logp)
    if logp_weight != 0:
        score = score + logp_weight * logp
    if value_weight != 0:
        if value is not None:
            score = score + value_weight * value.unsqueeze(-1)
        if child_value is not None:
            score = score + value_weight * child_value.gather(2, column)
    if entropy_weight != 0:
        score = score + entropy_weight * entropy.unsqueeze(-1)
    if bonus is not None:
        score = score + bonus.unsqueeze(-1)
    if seed is not None:
        score = score + gumbel(seed.view(-1, 1, 1), node.unsqueeze(-1), column)

    score, logp = score.to(result), logp.to(result)
    wins = legal & (scaled > _NEG_INF) & (logp > _NEG_INF) & (score > _NEG_INF)  # NaN compares false
    score = torch.where(wins, score, _NEG_INF).reshape(batch, width * slots)
    count = wins.sum((1, 2))
    score, order = score.sort(dim=-1, descending=True, stable=True)
    score, order = score[:, :k].contiguous(), order[:, :k]
    missing = k - order.shape[1]
    if missing > 0:
        score = torch.nn.functional.pad(score, (0, missing), value=_NEG_INF)
        order = torch.nn.functional.pad(order, (0, missing))
    exists = torch.arange(k, device=logits.device) < count.unsqueeze(-1)

    def chosen(source: Tensor, fill: float) -> Tensor:
        flat = source.expand(batch, width, slots).reshape(batch, width * slots)
        if width * slots == 0:
            return flat.new_full((batch, k), fill)
        return torch.where(exists, flat.gather(1, order), fill)

    parent = torch.arange(width, device=logits.device).view(1, width, 1)
    return (
        score,
        chosen(logp, _NEG_INF),
        chosen(parent, -1).to(torch.int32),
        chosen(column, -1).to(torch.int32),
        chosen(edge + 1, -1).to(torch.int32),
        count.clamp(max=k).to(torch.int32),
        entropy.to(result),
    )


def is_alive(alive: Tensor, node: Tensor) -> Tensor:
    """Bits of ``[R, words]`` for nodes ``[B, W, C]``; each of ``R`` equal parts of ``B`` has a row."""
    batch = node.shape[0]
    row = torch.arange(batch, device=node.device) * alive.shape[0] // max(batch, 1)
    return bits_at(alive, row.view(-1, 1, 1), node)


def _rows(x: Tensor, row: Tensor) -> Tensor:
    """``x[b, row[b, w]]``; zeros where that is no row."""
    batch, rows, columns = x.shape
    padded = torch.cat([x, x.new_zeros(batch, 1, columns)], 1)
    index = torch.where((row >= 0) & (row < rows), row, rows).to(torch.int64)
    return padded.gather(1, index.unsqueeze(2).expand(*row.shape, columns))


def _clean(logits: Tensor) -> Tensor:
    """NaN reads as -inf, +inf as the largest finite float32."""
    return torch.nan_to_num(logits.to(torch.float64), nan=_NEG_INF, posinf=_FLOAT32_MAX, neginf=_NEG_INF)


def _log_softmax_parts(z: Tensor, domain: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """``(z - m) / temperature`` and ``log sum_domain exp((u - m) / temperature)``, ``m = max(domain)``.

    Where the whole domain is -inf (or empty) the first is -inf and the second 0.
    """
    if domain.shape[-1] == 0:
        return z, z.new_zeros((*z.shape[:-1], 1))
    top = domain.amax(-1, keepdim=True)
    top = torch.where(top == _NEG_INF, 0, top)
    total = ((domain - top) / temperature).exp().sum(-1, keepdim=True)
    return (z - top) / temperature, torch.where(total > 0, total, 1).log()
