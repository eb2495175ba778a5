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


def legal_logp(logits: Tensor, trie: Trie, node: Tensor, child: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities over legal children.

    Args:
        logits: ``[N, V]``.
        node: ints ``[N]``, the prefix of each row.
        child: ints ``[N]``, the node reached from it.

    Returns:
        ``[N]`` log-probability of ``child``, and ``[N]`` mean log-probability of all legal children
        (what label smoothing needs).
    """
    token = trie.children(node).token.long()  # [N, widest]
    legal = token >= 0
    chosen = logits.gather(1, token.clamp(min=0)).masked_fill(~legal, -torch.inf).log_softmax(1)
    edge = child.long() - 1 - trie.offset[node.long()]
    mean = chosen.masked_fill(~legal, 0).sum(1) / legal.sum(1)
    return chosen.gather(1, edge[:, None])[:, 0], mean


class CandidateScores(NamedTuple):
    """What a model says of candidates, each ``[B, G, L]``; None where not asked for."""

    logp: Tensor
    value: Tensor | None
    action_value: Tensor | None


@dataclass(frozen=True)
class CandidateRows:
    """A batch of candidates behind their prompts, laid out once to be scored by any number of models.

    Attributes:
        rows: what is run: a row a prompt with all its candidates, or a row a candidate.
        trie: the catalogue.
        child: int64, shaped as ``rows.tokens``: the trie's node after each token.
        shape: ``[B, G, L]``.
    """

    rows: PackedRows
    trie: Trie
    child: Tensor
    shape: torch.Size

    def scores(
        self, run: Callable[[PackedRows], PackedScores], *, values: bool = False, action_values: bool = False
    ) -> CandidateScores:
        """``run`` is :meth:`SIDTransformer.packed`; see :func:`candidate_scores`."""
        rows, trie = self.rows, self.trie
        logits, value, child_value = run(rows)
        logp = rows.logp(logits, trie, F.pad(rows.of_nodes(self.child), (1, 0)))
        own = q = None
        if values:
            own = rows.unpack(_there(value, "value"), rows.own).view(self.shape)
        if action_values:
            above = rows.unpack(_there(value, "value").detach(), rows.source)
            q = (above + rows.chosen(_there(child_value, "child_value"))).view(self.shape)
        return CandidateScores(logp.view(self.shape), own, q)


def _there(x: Tensor | None, name: str) -> Tensor:
    if x is None:
        raise ValueError(f"the model gives no {name}: call add_value_head() for values")
    return x


def candidate_rows(
    model: Any,
    context: Any,
    trie: Trie,
    candidates: Tensor,
    *,
    values: bool = False,
    leaves: bool = True,
    pack: bool = True,
) -> CandidateRows:
    """Lay out candidates for :meth:`CandidateRows.scores`; arguments as :func:`candidate_scores`."""
    shape = candidates.shape
    if not pack:
        context = context.repeat_interleave(shape[1], 0)
        candidates = candidates.flatten(0, 1)[:, None]
    candidates = candidates.long()
    present = candidates[..., 0] >= 0
    nodes = torch.stack([trie.lookup(candidates[..., :depth]).long() for depth in range(shape[2] + 1)], 2)
    nodes = nodes.masked_fill(~present[..., None], -1)
    # Without values only prefixes that branch, or lead to one that does, need be run.
    needed = nodes >= 0 if values or not pack else trie.num_children(nodes) > 1
    rows = model.pack(context, candidates, present, needed[..., 1:], leaves=values and leaves)
    return CandidateRows(rows, trie, nodes[..., 1:], shape)


def candidate_logp(model: Any, context: Any, trie: Trie, candidates: Tensor) -> Tensor:
    """The log-probabilities of :func:`candidate_scores` alone."""
    return candidate_scores(model, context, trie, candidates).logp


def candidate_scores(
    model: Any,
    context: Any,
    trie: Trie,
    candidates: Tensor,
    *,
    values: bool = False,
    action_values: bool = False,
    leaves: bool = True,
    pack: bool = True,
) -> CandidateScores:
    """Log-probability of every token of every candidate, ``[B, G, L]``, differentiable; with ``values`` V of
    every prefix, all of one pass.

    A row of logits depends on the request and the parent prefix only. So each prompt is run once, with the
    tree of its candidates' prefixes behind it; prefixes below which nothing branches are not run at all.
    Tokens of padded candidates (-1) and forced tokens get exactly 0.

    Values need every prefix run, with ``leaves`` the whole candidates as well. ``value[..., l]`` and
    ``action_value[..., l]`` speak of the prefix of ``l + 1`` tokens: V of its own forward, and V + Q of its
    parent's. 0 for padded candidates, and without ``leaves`` also ``value`` of whole candidates.

    Args:
        model: see :class:`SIDTransformer`.
        context: a batch of ``B`` prompts, as the model takes them.
        candidates: ints ``[B, G, L]``, legal sequences or rows of -1.
        pack: False for the conventional way, a row of prompt and tokens for each candidate.
    """
    laid_out = candidate_rows(model, context, trie, candidates, values=values, leaves=leaves, pack=pack)
    return laid_out.scores(
        lambda rows: model.packed(rows, action_values=action_values),
        values=values,
        action_values=action_values,
    )
