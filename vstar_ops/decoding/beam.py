"""Exact trie-constrained beam search on top of ``expand_topk``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops import expand_topk
from ..ops._library import check_int
from ..trie import Trie
from .protocol import PrefixModel


class BeamResult(NamedTuple):
    """Candidates of :func:`beam_search`, best first; ``L`` tokens each."""

    sequence: Tensor
    node: Tensor
    logp: Tensor
    num_valid: Tensor
    forward_tokens: Tensor


@torch.no_grad()
def beam_search(
    model: PrefixModel,
    context: Any,
    trie: Trie,
    beam_width: int,
    *,
    normalize: str = "legal",
    temperature: float = 1.0,
    skip_forced: bool = True,
) -> BeamResult:
    """The ``beam_width`` most probable legal sequences that a beam of that width finds.

    ``L`` rounds of :func:`vstar_ops.expand_topk`; the last level is scored but never evaluated.

    Args:
        model: see :class:`PrefixModel`.
        context: a batch of ``B`` prompts, as the model takes them.
        trie: the catalogue, on the model's device.
        beam_width: ``K``, beams per request, and candidates returned.
        normalize: ``"legal"`` (the policy restricted to legal tokens) or ``"vocab"``.
        temperature: divides the logits.
        skip_forced: do not run the model on a prefix with a single legal child: under ``"legal"`` that
            child has log-probability 0 whatever the logits are, so the result is the same. A skipped
            prefix is run later only if a longer one needs it. Reads the number of rows on the host; turn
            it off for constant shapes. Without effect under ``"vocab"``.

    Returns:
        A named tuple:

        - ``sequence`` int32 ``[B, K, L]``, ``node`` int32 ``[B, K]`` (leaves), ``logp`` float32 ``[B, K]``,
          ordered by log-probability, ties as in ``expand_topk``; slots past ``num_valid`` hold -1 and -inf
        - ``num_valid`` int32 ``[B]``: candidates that exist, fewer than ``K`` if the catalogue is smaller
        - ``forward_tokens`` int32 ``[B]``: tokens the model evaluated after the prompt, the prompt's last
          position (the root) included: ``1 + 2 K`` at most for ``L = 3``

    Raises:
        TypeError, ValueError: as :func:`vstar_ops.expand_topk`.
    """
    check_int("beam_width", beam_width, 1)
    skip_forced = skip_forced and normalize == "legal"
    logits, state = model.prefill(context)
    batch = logits.shape[0]
    node = torch.zeros(batch, 1, dtype=torch.int64, device=logits.device)
    cum_logp = torch.zeros(batch, 1, device=logits.device)
    beams = _Beams(
        sequence=node.new_zeros(batch, 1, 0),
        slot=torch.arange(batch, device=logits.device).unsqueeze(1),
        evaluated=torch.zeros_like(node),
    )
    frontier = logits.unsqueeze(1)
    forward_tokens = torch.ones_like(node[:, 0])
    count = torch.ones(batch, dtype=torch.int32, device=logits.device)

    for depth in range(trie.length):
        if depth > 0 and skip_forced:
            needed = trie.num_children(node) > 1
            frontier, spent = _evaluate(model, state, beams, needed, logits)
            _make_certain(frontier, trie, node.masked_fill(needed, -1))
            forward_tokens += spent
        elif depth > 0:
            parent = beams.slot.masked_fill(node < 0, -1)
            frontier, slot = model.extend(state, parent.flatten(), beams.sequence[..., -1].flatten())
            frontier, beams.slot = frontier.unflatten(0, node.shape), slot.view_as(node)
            forward_tokens += (node >= 0).sum(1)
        out = expand_topk(
            frontier, trie, node, beam_width, cum_logp=cum_logp, normalize=normalize, temperature=temperature
        )
        beams.choose(out.parent.clamp(min=0).to(torch.int64), out.token.to(torch.int64))
        node, cum_logp, count = out.node.to(torch.int64), out.logp, out.num_valid

    sequence = beams.sequence.masked_fill(node.unsqueeze(2) < 0, -1)
    return BeamResult(
        sequence.to(torch.int32), node.to(torch.int32), cum_logp, count, forward_tokens.to(torch.int32)
    )


@dataclass
class _Beams:
    """The prefixes of the frontier, int64 ``[B, W, depth]``, and how far the model has seen each of them."""

    sequence: Tensor
    slot: Tensor  # [B, W], of the longest evaluated prefix
    evaluated: Tensor  # [B, W], its length

    def choose(self, parent: Tensor, token: Tensor) -> None:
        depth = self.sequence.shape[2]
        kept = self.sequence.gather(1, parent.unsqueeze(2).expand(-1, -1, depth))
        self.sequence = torch.cat([kept, token.unsqueeze(2)], 2)
        self.slot, self.evaluated = self.slot.gather(1, parent), self.evaluated.gather(1, parent)


def _evaluate(
    model: PrefixModel, state: Any, beams: _Beams, needed: Tensor, like: Tensor
) -> tuple[Tensor, Tensor]:
    """Logits ``[B, W, V]`` of the needed prefixes, the others unset, and the tokens spent ``[B]``.

    A needed prefix may grow out of skipped ones: those are caught up first, one length after the other.
    """
    depth = beams.sequence.shape[2]
    frontier = like.new_empty(*needed.shape, like.shape[1])
    spent = torch.zeros_like(beams.slot[:, 0])
    for length in range(depth):
        rows = needed & (beams.evaluated == length)
        picked = rows.nonzero(as_tuple=True)
        if len(picked[0]) == 0:
            continue
        logits, slot = model.extend(state, beams.slot[picked], beams.sequence[..., length][picked])
        beams.slot[picked], beams.evaluated[picked] = slot, length + 1
        spent += rows.sum(1)
        if length == depth - 1:
            frontier[picked] = logits
    return frontier, spent


def _make_certain(frontier: Tensor, trie: Trie, node: Tensor) -> None:
    """Give the single child of each live node any finite logit: it is certain whatever the logit is."""
    live = (node >= 0).nonzero(as_tuple=True)
    single = trie.token[trie.offset[node[live]].to(torch.int64).clamp(max=max(trie.num_nodes - 2, 0))]
    frontier[(*live, single.to(torch.int64))] = 0
