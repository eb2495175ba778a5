"""Exact trie-constrained beam search on top of ``expand_topk``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._deprecated import renamed_arguments, renamed_field
from ..ops import ExpandTopK, expand_topk
from ..ops._checks import check_int, validating
from ..trie import Trie
from .protocol import PrefixModel, can_skip_forced, check_finite_logits, check_normalize


class BeamResult(NamedTuple):
    """Candidates of :func:`beam_search`, best first; ``L`` tokens each."""

    sequence: Tensor
    node: Tensor
    logp: Tensor
    num_valid: Tensor
    forward_tokens: Tensor


BeamResult.count = renamed_field("num_valid")  # type: ignore[method-assign]


@renamed_arguments(width="beam_width")
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
        normalize: ``"legal"`` (the policy restricted to legal tokens) or ``"vocab"``, which needs the logits
            of all columns.
        temperature: divides the logits.
        skip_forced: do not run a prefix with a single legal child, whose log-probability under ``"legal"``
            is 0 by any finite logit. Only for models that promise such logits (``finite_logits``, see
            :class:`PrefixModel`), so that the result is the same. A skipped prefix is run later if a
            longer one needs it. Reads the number of rows on the host; turn it off for constant shapes.
            Without effect under ``"vocab"``.

    Returns:
        A named tuple:

        - ``sequence`` int32 ``[B, K, L]``, ``node`` int32 ``[B, K]`` (leaves), ``logp`` float32 ``[B, K]``,
          ordered by log-probability, ties as in ``expand_topk``; slots past ``num_valid`` hold -1 and -inf
        - ``num_valid`` int32 ``[B]``: candidates that exist, fewer than ``K`` if the catalogue is smaller
        - ``forward_tokens`` int32 ``[B]``: tokens the model evaluated after the prompt, the prompt's last
          position (the root) included: ``1 + 2 K`` at most for ``L = 3``

    Raises:
        TypeError, ValueError: as :func:`vstar_ops.expand_topk`. Under :func:`vstar_ops.validation` also a
            model that has broken its promise of finite logits where it was run.
    """
    check_int("beam_width", beam_width, 1)
    check_normalize(model, normalize)
    skip_forced = skip_forced and can_skip_forced(model, normalize)
    logits, state = model.prefill(context)
    batch, device = len(logits), logits.device
    root = torch.zeros(batch, 1, dtype=torch.int64, device=device)
    empty = torch.empty(batch, 1, 0, dtype=torch.int32, device=device)
    beams = _Beams(model, state, trie, root, empty, torch.arange(batch, device=device)[:, None], root)
    frontier, row = logits[:, None], None
    logp = torch.zeros(batch, 1, device=device)
    forward_tokens = torch.ones(batch, dtype=torch.int64, device=device)
    for depth in range(trie.length):
        if depth > 0:
            frontier, row, spent = beams.run_branching(depth, logits) if skip_forced else beams.run_all()
            forward_tokens += spent
        out = expand_topk(
            frontier,
            trie,
            beams.node,
            beam_width,
            row=row,
            cum_logp=logp,
            normalize=normalize,
            temperature=temperature,
        )
        if skip_forced and validating():
            legal = trie.num_children(beams.node).sum(1).clamp(max=beam_width)
            check_finite_logits(out.num_valid, legal)
        beams.move(out)
        logp = out.logp
    return BeamResult(beams.sequence, out.node, logp, out.num_valid, forward_tokens.int())


@dataclass
class _Beams:
    """Prefixes of one length, int64 ``[B, W]``, and how far the model has seen each of them."""

    model: PrefixModel
    state: Any
    trie: Trie
    node: Tensor
    sequence: Tensor  # int32 [B, W, length], -1 of dead beams
    slot: Tensor  # of the longest evaluated prefix
    evaluated: Tensor  # its length

    def move(self, out: ExpandTopK) -> None:
        """To the winners."""
        parent = out.parent.clamp(min=0).long()
        above = self.sequence.gather(1, parent[:, :, None].expand(-1, -1, self.sequence.shape[2]))
        self.sequence = torch.cat([above.masked_fill(out.node[:, :, None] < 0, -1), out.token[:, :, None]], 2)
        self.node = out.node.long()
        self.slot, self.evaluated = self.slot.gather(1, parent), self.evaluated.gather(1, parent)

    def run_all(self) -> tuple[Tensor, None, Tensor]:
        """Logits ``[B, W, V]`` of all prefixes, and the tokens spent ``[B]``. Its shapes are constant."""
        live = self.node >= 0
        parent, token = self.slot.masked_fill(~live, -1), self.sequence[..., -1].clamp(min=0).long()
        logits, slot = self.model.extend(self.state, parent.flatten(), token.flatten())
        self.slot = slot.view_as(self.node)
        return logits.unflatten(0, self.node.shape), None, live.sum(1)

    def run_branching(self, depth: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits ``[R, V]`` of prefixes with several legal children, their rows ``[B, W]``, the spent tokens.

        They may grow out of skipped ones, which are caught up first, one length after the other. Other
        prefixes have no row.
        """
        branching = self.trie.num_children(self.node) > 1
        logits, row = like[:0], torch.full_like(self.node, -1)
        spent = torch.zeros_like(self.node[:, 0])
        for length in range(depth):
            rows = branching & (self.evaluated == length)
            picked = rows.nonzero(as_tuple=True)
            if len(picked[0]) == 0:
                continue
            token = self.sequence[..., length][picked].long()
            logits, slot = self.model.extend(self.state, self.slot[picked], token)
            self.slot[picked], self.evaluated[picked] = slot, length + 1
            spent += rows.sum(1)
            if length == depth - 1:
                row[picked] = torch.arange(len(logits), device=row.device)
        return logits, row, spent
