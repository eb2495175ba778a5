"""Top-k sampling: independent candidates, drawn token by token."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._deprecated import renamed_arguments, renamed_field
from ..ops import distinct_rows, draw_children, expand_topk
from ..ops._checks import check_alive, check_int
from ..reference.filters import bits_at
from ..trie import Trie, pick, ragged
from .protocol import PrefixModel, check_model, extend_by_request


class SampleResult(NamedTuple):
    """Candidates of :func:`topk_sampling`, in the order of their drawing; ``L`` tokens each."""

    sequence: Tensor
    node: Tensor
    logp: Tensor
    num_valid: Tensor
    forward_tokens: Tensor


SampleResult.count = renamed_field("num_valid")  # type: ignore[method-assign]


@renamed_arguments(candidates="num_candidates", top="top_k")
@torch.no_grad()
def topk_sampling(
    model: PrefixModel,
    context: Any,
    trie: Trie,
    num_candidates: int = 16,
    *,
    top_k: int = 50,
    temperature: float = 1.0,
    seed: Tensor | int = 0,
    constant_shapes: bool = False,
) -> SampleResult:
    """Draw candidates from the policy, token by token, out of the ``top_k`` most probable legal ones.

    Candidates are independent, so the same one may come several times. Each distinct prefix is run once.

    Args:
        model, context, trie: as for :func:`beam_search`.
        num_candidates: ``K``, drawn for each request.
        top_k: tokens that a draw chooses from; the probabilities are those of the policy, renormalized.
        temperature: divides the logits.
        seed: int64 seeds ``[B]``, one per request, or one int for seeds derived from it and ``b``.
        constant_shapes: run every candidate's prefix, also those that are the same, so that the host has
            nothing to wait for. The candidates are those that are drawn without it.

    Returns:
        A named tuple:

        - ``sequence`` int32 ``[B, K, L]``, ``node`` int32 ``[B, K]``
        - ``logp`` float32 ``[B, K]``, under the policy, without the truncation
        - ``num_valid`` int32 ``[B]``, always ``K`` unless nothing is allowed, or a prefix was drawn after
          which no legal token has a finite logit: such a draw is lost. Slots past it hold -1 and -inf
        - ``forward_tokens`` int32 ``[B]``: prefixes evaluated, the root included; distinct ones unless shapes
          are constant

    Raises:
        TypeError, ValueError: an argument's type, shape, device or value, by name.
    """
    for name, number in (("num_candidates", num_candidates), ("top_k", top_k)):
        check_int(name, number, 1)
    check_model(model, trie)
    logits, state = model.prefill(context)
    batch, device = len(logits), logits.device
    # Each distinct prefix is one row of logits: its node, and its slot; the root of request b is in slot b.
    node, slot = torch.zeros(batch, dtype=torch.int32, device=device), torch.arange(batch, device=device)
    sequence = node.new_empty(batch, num_candidates, 0)
    row = prefix = logp = None  # of the candidates
    check_alive(trie, batch)
    per_request = trie.alive is not None and len(trie.alive) > 1
    # Rows belong to any requests, so that filters of these are applied to logits and not by the trie.
    plain, request = trie.unrestricted if per_request else trie, slot
    forward_tokens = torch.ones_like(node)
    for depth in range(trie.length):
        last = depth + 1 == trie.length
        if per_request:
            width = trie.max_children if constant_shapes else None
            logits = _without_banned(logits, trie, node, request, width)
        out = expand_topk(logits[:, None], plain, node[:, None], top_k, temperature=temperature)
        children = out.logp, out.token, out.node
        drawn = draw_children(
            *children, sequence, row=row, prefix=prefix, cum_logp=logp, seed=seed, pack=last
        )
        if last:
            break
        sequence, prefix, logp = drawn.sequence, drawn.node, drawn.logp.float()
        if constant_shapes:
            parent = (slot[:, None] if depth == 0 else slot).expand_as(prefix).masked_fill(prefix < 0, -1)
            logits, slot = extend_by_request(model, state, parent, sequence[..., -1].long().clamp(min=0))
            logits, node = logits.flatten(0, 1), prefix.flatten()
            row = torch.arange(node.numel(), device=device).view_as(prefix)
            request = row.flatten() // num_candidates
            forward_tokens += drawn.num_valid
            continue
        rows = distinct_rows(prefix, sequence[..., -1], slot, row=row)
        number = int(rows.num_rows)  # the host waits for it, once per level
        row, node, slot = rows.row, rows.node[:number], rows.parent[:number]
        request = _requests(row, number) if per_request else slot
        logits = logits[:0]
        if number > 0:
            logits, slot = model.extend(state, slot, rows.token[:number])
        forward_tokens += rows.num_tokens
    return SampleResult(drawn.sequence, drawn.node, drawn.logp.float(), drawn.num_valid, forward_tokens)


def _without_banned(logits: Tensor, trie: Trie, node: Tensor, request: Tensor, width: int | None) -> Tensor:
    """``logits[R, V]``, -inf for the children of each row's node that the filter of its request bans.

    ``width`` is that of the lists of children; None for the longest one, which the host waits for.
    """
    assert trie.alive is not None
    edge, present = ragged(*trie._edges(node.long()), width)
    token, child = pick(trie.token, edge, present), torch.where(present, edge + 1, 0)
    banned = present & ~bits_at(trie.alive, request[:, None], child)
    columns = logits.shape[1]
    mask = torch.zeros(len(logits), columns + 1, dtype=torch.bool, device=logits.device)
    mask.scatter_(1, torch.where(banned, token, columns).long(), True)
    return logits.masked_fill(mask[:, :columns], -torch.inf)


def _requests(row: Tensor, number: int) -> Tensor:
    """The request that each of so many rows belongs to, int64; ``row[B, K]`` says whose rows they are."""
    request = torch.zeros(number + 1, dtype=torch.int64, device=row.device)
    own = torch.arange(len(row), device=row.device)[:, None].expand(row.shape)
    request.scatter_(0, torch.where(row >= 0, row, number).flatten().long(), own.flatten())
    return request[:number]
