"""``token_logp`` and its gradient, in float64 tensor algebra."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .expand_topk import is_alive

_FLOAT32_MAX = torch.finfo(torch.float32).max
_NEG_INF = float("-inf")


def token_logp(
    logits: Tensor,
    targets: Tensor,
    offset: Tensor | None,
    token: Tensor | None,
    alive: Tensor | None,
    node: Tensor | None,
    temperature: float,
    max_children: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The dispatcher's signature; see :func:`vstar_ops.token_logp`.

    ``logits`` ``[B, W, V]``, ``[B, V]`` or ``[V]``, ``targets`` with or without a last axis ``T``. After
    ``logp`` and ``entropy`` come the two numbers a row from which the gradient finds all probabilities again:
    the largest logit ``top`` and ``log_mass``, :math:`\\log p_v = (z_v - top) / \\tau - log\\_mass`.
    """
    rows, shape = logits.shape[:-1], targets.shape
    logits, targets, node = as_table(logits, rows), as_table(targets, rows, last=True), as_table(node, rows)
    column, legal = _domain(logits, offset, token, alive, node, max_children)
    result = torch.float64 if logits.dtype == torch.float64 else torch.float32
    if column.shape[2] == 0:
        chosen = torch.where(targets < 0, 0.0, _NEG_INF).to(result).reshape(shape)
        nothing = logits.new_zeros(rows, dtype=result)
        return chosen, nothing, nothing + _NEG_INF, nothing.clone()
    z = _clean(logits.gather(2, column)).masked_fill(~legal, _NEG_INF)
    top = z.amax(2, keepdim=True)
    finite_top = torch.where(top == _NEG_INF, 0, top)
    mass = ((z - finite_top) / temperature).exp().sum(2, keepdim=True)
    log_mass = torch.where(mass > 0, mass, 1).log()
    logp = (z - finite_top) / temperature - log_mass
    entropy = 0.0 - (logp.exp() * logp.masked_fill(logp == _NEG_INF, 0)).sum(2).clamp(max=0)

    position, found = _positions(targets, column, legal, trie=node is not None)
    chosen = torch.where(found, logp.gather(2, position), _NEG_INF)
    chosen = torch.where(targets < 0, 0, chosen).reshape(shape)
    outputs = chosen, *(x.reshape(rows) for x in (entropy, top, log_mass))
    return tuple(x.to(result) for x in outputs)  # type: ignore[return-value]


def token_logp_backward(
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    logits: Tensor,
    targets: Tensor,
    offset: Tensor | None,
    token: Tensor | None,
    alive: Tensor | None,
    node: Tensor | None,
    logp: Tensor,
    entropy: Tensor,
    top: Tensor,
    log_mass: Tensor,
    temperature: float,
    max_children: int,
) -> Tensor:
    r"""The gradient of the logits, zero outside the domain.

    .. math:: \frac{\partial}{\partial z_v} = \frac1\tau \Big[\sum_{t: y_t = v} g_t - p_v \sum_t g_t
        - g_H \, p_v (\log p_v + H)\Big],

    over the targets that are in the domain and have a finite logit.
    """
    rows, shape = logits.shape[:-1], logits.shape
    logits, targets, logp = (as_table(x, rows, last=True) for x in (logits, targets, logp))
    grad_logp, grad_entropy = as_table(grad_logp, rows, last=True), as_table(grad_entropy, rows)
    node, entropy, top, log_mass = (as_table(x, rows) for x in (node, entropy, top, log_mass))
    dense = torch.zeros(logits.shape, dtype=torch.float64, device=logits.device)
    column, legal = _domain(logits, offset, token, alive, node, max_children)
    if column.shape[2] == 0:
        return dense.to(logits.dtype).reshape(shape)
    z = _clean(logits.gather(2, column)).masked_fill(~legal, _NEG_INF)
    finite_top = torch.where(top == _NEG_INF, 0, top).to(torch.float64).unsqueeze(2)
    all_logp = (z - finite_top) / temperature - log_mass.to(torch.float64).unsqueeze(2)
    p = all_logp.exp()
    gradient = torch.zeros_like(p)
    if grad_logp is not None:
        position, found = _positions(targets, column, legal, trie=node is not None)
        weight = torch.where(found & (logp > _NEG_INF), grad_logp.to(torch.float64), 0)
        gradient = gradient.scatter_add_(2, position, weight) - p * weight.sum(2, keepdim=True)
    if grad_entropy is not None:
        surprise = torch.where(p > 0, all_logp, 0) + entropy.to(torch.float64).unsqueeze(2)
        gradient = gradient - grad_entropy.to(torch.float64).unsqueeze(2) * p * surprise
    gradient = torch.where(z > _NEG_INF, gradient / temperature, 0)
    return dense.scatter_add_(2, column, gradient).to(logits.dtype).reshape(shape)


def as_table(x: Any, rows: Sequence[int], *, last: bool = False) -> Any:
    """``[*rows]`` or ``[*rows, n]`` as ``[B, W]`` or ``[B, W, n]``: one row per request, or one in all.

    With ``last`` the last axis is made where there is none.
    """
    if x is None:
        return None
    if last and x.dim() == len(rows):
        x = x.unsqueeze(-1)
    for axis in range(len(rows), 2):
        x = x.unsqueeze(axis)
    return x


def _domain(
    logits: Tensor,
    offset: Tensor | None,
    token: Tensor | None,
    alive: Tensor | None,
    node: Tensor | None,
    max_children: int,
) -> tuple[Tensor, Tensor]:
    """Columns ``[B, W, C]`` over which a row is normalized, and which of these entries exist."""
    batch, width, columns = logits.shape
    if offset is None or token is None or node is None:
        column = torch.arange(columns, device=logits.device).expand(batch, width, columns)
        return column, torch.ones_like(column, dtype=torch.bool)
    node = node.to(torch.int64)
    live = (node >= 0) & (node < offset.numel() - 1)
    index = torch.where(live, node, 0)
    begin = offset[index].to(torch.int64).unsqueeze(2)
    end = torch.where(live, offset[index + 1].to(torch.int64), 0).unsqueeze(2)
    slots = max_children if token.numel() and columns else 0
    edge = begin + torch.arange(slots, device=logits.device)
    legal = edge < end
    edge = torch.where(legal, edge, 0)
    column = (token[edge] if slots else edge).to(torch.int64)
    legal = legal & (column >= 0) & (column < columns)
    if alive is not None:
        legal &= is_alive(alive, edge + 1)
    return torch.where(legal, column, 0), legal


def _positions(targets: Tensor, column: Tensor, legal: Tensor, *, trie: bool) -> tuple[Tensor, Tensor]:
    """Where in its row's domain each target ``[B, W, T]`` is, 0 where it is not; and whether it is."""
    if not trie:
        found = (targets >= 0) & (targets < column.shape[2])
        return torch.where(found, targets, 0).to(torch.int64), found
    hit = legal.unsqueeze(2) & (column.unsqueeze(2) == targets.unsqueeze(3))
    return hit.to(torch.int8).argmax(3), hit.any(3)


def _clean(logits: Tensor) -> Tensor:
    """NaN reads as -inf, +inf as the largest finite float32."""
    return torch.nan_to_num(logits.to(torch.float64), nan=_NEG_INF, posinf=_FLOAT32_MAX, neginf=_NEG_INF)
