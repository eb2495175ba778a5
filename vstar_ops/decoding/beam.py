"""Exact trie-constrained beam search on top of ``expand_topk``."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops import expand_topk
from ..trie import Trie
from .protocol import PrefixModel


class BeamResult(NamedTuple):
    """Candidates of :func:`beam_search`, best first; ``L`` tokens each."""

    sequence: Tensor
    node: Tensor
    logp: Tensor
    count: Tensor
    forward_tokens: Tensor


@torch.no_grad()
def beam_search(
    model: PrefixModel,
    context: Any,
    trie: Trie,
    width: int,
    *,
    normalize: str = "legal",
    temperature: float = 1.0,
    skip_forced: bool = True,
) -> BeamResult:
    """The ``width`` most probable legal sequences that a beam of that width finds.

    ``L`` rounds of :func:`vstar_ops.expand_topk`; the last level is scored but never evaluated.

    Args:
        model: see :class:`PrefixModel`.
        context: a batch of ``B`` prompts, as the model takes them.
        trie: the catalogue, on the model's device.
        width: ``K``, beams a request and candidates returned.
        normalize: ``"legal"`` (the policy restricted to legal tokens) or ``"vocab"``.
        temperature: divides the logits.
        skip_forced: do not run the model on a prefix with a single legal child: under ``"legal"`` that
            child has log-probability 0 whatever the logits are, so the result is the same. A skipped
            prefix is run later only if a longer one needs it. Reads the number of rows on the host; turn
            it off for constant shapes. Without effect under ``"vocab"``.

    Returns:
        A named tuple:

        - ``sequence`` int32 ``[B, K, L]``, ``node`` int32 ``[B, K]`` (leaves), ``logp`` float32 ``[B, K]``,
          ordered by log-probability, ties as in ``expand_topk``; slots past ``count`` hold -1 and -inf
        - ``count`` int32 ``[B]``: candidates that exist; fewer than ``K`` only where the catalogue is smaller
        - ``forward_tokens`` int32 ``[B]``: tokens the model evaluated after the prompt, the prompt's last
          position (the root) included: ``1 + 2 K`` at most for ``L = 3``

    Raises:
        TypeError, ValueError: as :func:`vstar_ops.expand_topk`.
    """
    skip_forced = skip_forced and normalize == "legal"
    logits, state = model.prefill(context)
    batch = logits.shape[0]
    integers = {"dtype": torch.int64, "device": logits.device}
    frontier = logits.unsqueeze(1)
    node = torch.zeros(batch, 1, **integers)
    cum_logp = torch.zeros(batch, 1, device=logits.device)
    sequence = torch.zeros(batch, 1, 0, **integers)
    slot = torch.arange(batch, **integers).unsqueeze(1)  # of the longest evaluated prefix of each beam
    evaluated = torch.zeros(batch, 1, **integers)  # and its length
    forward_tokens = torch.ones(batch, **integers)
    count = torch.ones(batch, dtype=torch.int32, device=logits.device)

    for depth in range(trie.length):
        if depth > 0:
            needed = trie.num_children(node) > 1 if skip_forced else node >= 0
            frontier = torch.empty(batch, node.shape[1], logits.shape[1], dtype=logits.dtype, device=node.device)
            for length in range(depth):  # more than one turn only where a skipped prefix is caught up
                rows = needed & (evaluated == length)
                picked = rows.nonzero(as_tuple=True) if skip_forced else (rows >= 0).nonzero(as_tuple=True)
                if length < depth - 1 and not (skip_forced and len(picked[0])):
                    continue
                parent = torch.where(rows[picked], slot[picked], -1)
                new_logits, new_slot = model.extend(state, parent, sequence[..., length][picked])
                slot[picked], evaluated[picked] = new_slot, length + 1
                forward_tokens += rows.sum(1)
                if length == depth - 1:
                    frontier[picked] = new_logits
            if skip_forced:  # any finite logit makes a single child certain
                only = trie.token[trie.offset[node.clamp(min=0)].clamp(max=trie.token.numel() - 1)]
                forced = (~needed & (node >= 0)).nonzero(as_tuple=True)
                frontier[(*forced, only[forced].long())] = 0
        out = expand_topk(
            frontier, trie, node, width, cum_logp=cum_logp, normalize=normalize, temperature=temperature
        )
        parent = out.parent.clamp(min=0).to(torch.int64)
        sequence = sequence.gather(1, parent.unsqueeze(2).expand(-1, -1, depth))
        sequence = torch.cat([sequence, out.token.to(torch.int64).unsqueeze(2)], 2)
        slot, evaluated = slot.gather(1, parent), evaluated.gather(1, parent)
        node, cum_logp, count = out.node.to(torch.int64), out.logp, out.count

    sequence = sequence.masked_fill(node.unsqueeze(2) < 0, -1).to(torch.int32)
    return BeamResult(sequence, node.to(torch.int32), cum_logp, count, forward_tokens.to(torch.int32))
