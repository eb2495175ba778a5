"""What a policy says of candidates, differentiable.

The policy is the trie-constrained one, in decoding and here alike: a token's probability is normalized
over the legal children of its prefix. So a token without alternative has log-probability 0 and no
gradient, and its prefix need not be run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..packing import PackedRows
from ..trie import Trie
from .model import PackedScores


def legal_logp(logits: Tensor, token: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities over legal children.

    Args:
        logits: ``[N, V]``.
        token: int64 ``[N, C]``, the tokens of the legal children, -1 where there are no more.
        place: int64 ``[N]``, which of them was taken.

    Returns:
        ``[N]`` log-probability of the taken child, and ``[N]`` mean log-probability of all legal children
        (what label smoothing needs).
    """
    legal = token >= 0
    chosen = logits.gather(1, token.clamp(min=0)).masked_fill(~legal, -torch.inf).log_softmax(1)
    mean = chosen.masked_fill(~legal, 0).sum(1) / legal.sum(1)
    return chosen.gather(1, place[:, None])[:, 0], mean


class CandidateScores(NamedTuple):
    """What a model says of candidates, each ``[B, G, L]``; None where not asked for."""

    logp: Tensor
    value: Tensor | None
    value_from_parent: Tensor | None


@dataclass(frozen=True)
class CandidateRows:
    """A batch of candidates behind their prompts, laid out once to be scored by any number of models.

    Attributes:
        rows: what is run: one row per prompt with all its candidates, or one row per candidate.
        trie: the catalogue.
        child: int64, shaped as ``rows.tokens``: the trie's node after each token.
        shape: ``[B, G, L]``.
        values: whether all prefixes are run, so that all have a value.
    """

    rows: PackedRows
    trie: Trie
    child: Tensor
    shape: torch.Size
    values: bool

    def scores(self, run: Callable[[PackedRows], PackedScores]) -> CandidateScores:
        """``run`` is :meth:`SIDTransformer.packed`; see :func:`candidate_scores`."""
        rows, (logits, value, child_value) = self.rows, run(self.rows)
        logp = rows.logp(logits, self.trie, F.pad(rows.of_nodes(self.child), (1, 0))).view(self.shape)
        if not self.values or value is None:
            return CandidateScores(logp, None, None)
        own = rows.unpack(value, rows.own).view(self.shape)
        if child_value is None:
            return CandidateScores(logp, own, None)
        parent = rows.unpack(value.detach(), rows.source)
        return CandidateScores(logp, own, (parent + rows.chosen(child_value)).view(self.shape))


def candidate_rows(
    model: Any,
    context: Any,
    trie: Trie,
    candidates: Tensor,
    *,
    values: bool = False,
    leaves: bool = True,
    pack: bool = True,
    compact: bool = True,
) -> CandidateRows:
    """Lay out candidates for :meth:`CandidateRows.scores`; arguments as for :func:`candidate_scores`.

    ``compact=False`` leaves room for all prefixes there could be, as :func:`vstar_ops.packing.pack_prompts`
    does, and the host waits for nothing.
    """
    shape = candidates.shape
    if not pack:
        context = context.repeat_interleave(shape[1], 0)
        candidates = candidates.flatten(0, 1)[:, None]
    candidates = candidates.long()
    present = candidates[..., 0] >= 0
    nodes = torch.stack([trie.lookup(candidates[..., :depth]).long() for depth in range(shape[2] + 1)], 2)
    nodes = nodes.masked_fill(~present[..., None], -1)
    # Without values, only prefixes that branch or lead to one that does need to be run.
    needed = nodes >= 0 if values or not pack else trie.num_children(nodes) > 1
    rows = model.pack(
        context, candidates, present, needed[..., 1:], leaves=values and leaves, compact=compact
    )
    return CandidateRows(rows, trie, nodes[..., 1:], shape, values)


def candidate_scores(
    model: Any,
    context: Any,
    trie: Trie,
    candidates: Tensor,
    *,
    values: bool = False,
    child_values: bool = False,
    leaves: bool = True,
    pack: bool = True,
) -> CandidateScores:
    """Log-probability of every token of every candidate, ``[B, G, L]``, differentiable.

    With ``values`` also V of every prefix, all in one pass.

    A row of logits depends on the request and the parent prefix only. So each prompt is run once, with the
    tree of its candidates' prefixes behind it; prefixes below which nothing branches are not run at all.
    Tokens of padded candidates (-1) and forced tokens get exactly 0.

    Values need every prefix to be run, with ``leaves`` the whole candidates as well. ``value[..., l]`` and
    ``value_from_parent[..., l]`` are about the prefix of ``l + 1`` tokens: V of the prefix itself, and, with
    ``child_values``, V of its parent plus the child value. Both are 0 for padded candidates; without
    ``leaves``, ``value`` is also 0 for whole candidates.

    Args:
        model: see :class:`SIDTransformer`.
        context: a batch of ``B`` prompts, as the model takes them.
        candidates: ints ``[B, G, L]``, legal sequences or rows of -1.
        pack: False for the conventional way, one row of prompt and tokens per candidate.

    Raises:
        ValueError: ``values`` of a model without a value head, or ``child_values`` without ``values``.
    """
    if (values or child_values) and model.value_head is None:
        raise ValueError("values: the model has no value head: call add_value_head()")
    if child_values and not values:
        raise ValueError("child_values needs values=True, got values=False")
    rows = candidate_rows(model, context, trie, candidates, values=values, leaves=leaves, pack=pack)
    return rows.scores(lambda packed: model.packed(packed, child_values=child_values))
