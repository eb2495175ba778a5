"""Top-k sampling: independent candidates, drawn token by token."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._deprecated import renamed_arguments, renamed_field
from ..noise import gumbel
from ..ops import expand_topk
from ..ops._checks import check_int, check_seeds
from ..trie import Trie
from .protocol import PrefixModel


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
) -> SampleResult:
    """Draw candidates from the policy, token by token, out of the ``top_k`` most probable legal ones.

    Candidates are independent, so the same one may come several times. Each distinct prefix is run once.

    Args:
        model, context, trie: as for :func:`beam_search`.
        num_candidates: ``K``, drawn for each request.
        top_k: tokens that a draw chooses from; the probabilities are those of the policy, renormalized.
        temperature: divides the logits.
        seed: int64 seeds ``[B]``, one per request, or one int for seeds derived from it and ``b``.

    Returns:
        A named tuple:

        - ``sequence`` int32 ``[B, K, L]``, ``node`` int32 ``[B, K]``
        - ``logp`` float32 ``[B, K]``, under the policy, without the truncation
        - ``num_valid`` int32 ``[B]``, always ``K`` unless the catalogue is empty, or a prefix was drawn after
          which no legal token has a finite logit: such a draw is lost. Slots past it hold -1 and -inf
        - ``forward_tokens`` int32 ``[B]``: distinct prefixes evaluated, the root included

    Raises:
        TypeError, ValueError: an argument's type, shape, device or value, by name.
    """
    for name, number in (("num_candidates", num_candidates), ("top_k", top_k)):
        check_int(name, number, 1)
    logits, state = model.prefill(context)
    batch, device = len(logits), logits.device
    seeds = check_seeds("seed", seed, batch, device)
    # Far apart for each candidate, whatever the requests' own seeds are; int64 wraps around.
    noise = (
        seeds[:, None] + torch.arange(1, num_candidates + 1, device=device) * 0x5851F42D4C957F2D
    ).flatten()
    request = torch.arange(batch, device=device).repeat_interleave(num_candidates)
    node = torch.zeros(batch * num_candidates, dtype=torch.int64, device=device)
    logp = torch.zeros(batch * num_candidates, device=device)
    # Each distinct prefix is one row of logits: the row of every candidate, and one candidate of every row.
    row, slot = request, torch.arange(batch, device=device)
    first = slot * num_candidates
    forward_tokens = torch.ones(batch, dtype=torch.int64, device=device)
    for depth in range(trie.length):
        out = expand_topk(logits[:, None], trie, node[first, None], top_k, temperature=temperature)
        perturbed = out.logp[row] + gumbel(noise[:, None], node[:, None], out.token[row].long())
        pick = perturbed.masked_fill(out.node[row] < 0, -torch.inf).argmax(1, keepdim=True)
        logp += out.logp[row].gather(1, pick)[:, 0]
        parent = slot[row]
        node = out.node[row].gather(1, pick)[:, 0].long().masked_fill(node < 0, -1)
        if depth + 1 < trie.length:
            live = (node >= 0).nonzero()[:, 0]
            if len(live) == 0:
                break
            key, its_row = torch.unique((request * trie.num_nodes + node)[live], return_inverse=True)
            row = torch.zeros_like(node).index_copy_(0, live, its_row)  # a lost candidate may look at any
            first = torch.zeros_like(key).scatter_(0, its_row, live)
            logits, slot = model.extend(state, parent[first], trie.token[node[first] - 1].long())
            forward_tokens += torch.bincount(request[first], minlength=batch)
    node, logp = (x.view(batch, num_candidates) for x in (node.int(), logp.masked_fill(node < 0, -torch.inf)))
    order = (node < 0).int().argsort(dim=1, stable=True)
    node, logp = node.gather(1, order), logp.gather(1, order)
    return SampleResult(trie.sequences(node), node, logp, (node >= 0).sum(1).int(), forward_tokens.int())
