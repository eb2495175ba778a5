r"""The policy and its objectives, in torch, differentiable (arXiv 2602.10699, Eqs. 15-19).

The policy is the trie-constrained one, in decoding and here alike: a token's probability is normalised
over the legal children of its prefix. So a token without alternative has log-probability 0 and no
gradient, and its prefix need not be run.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..decoding import PrefixModel
from ..ops import SiblingAdvantage
from ..trie import Trie


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


def candidate_logp(model: PrefixModel, context: Any, trie: Trie, candidates: Tensor) -> Tensor:
    """Log-probability of every token of every candidate, ``[B, G, L]``, differentiable.

    A row of logits depends on the request and the parent prefix only, so each distinct prefix is run once,
    each prompt once, and prefixes below which nothing branches not at all. Tokens of padded candidates
    (-1) and forced tokens get exactly 0.

    Args:
        context: a batch of ``B`` prompts, as the model takes them.
        candidates: ints ``[B, G, L]``, legal sequences or rows of -1.
    """
    return candidate_scores(model, context, trie, candidates).logp


def candidate_scores(
    model: Any,
    context: Any,
    trie: Trie,
    candidates: Tensor,
    *,
    values: bool = False,
    action_values: bool = False,
) -> CandidateScores:
    """:func:`candidate_logp`, and with ``values`` V of every prefix, all of one walk.

    Values need every prefix run, the whole candidates as well; without them only those below which the trie
    branches. ``value[..., l]`` and ``action_value[..., l]`` speak of the prefix of ``l + 1`` tokens: V of its
    own forward, and V + Q of its parent's. 0 for padded candidates.
    """
    length = candidates.shape[2]
    nodes = torch.stack([trie.lookup(candidates[..., :depth]).long() for depth in range(length + 1)], 2)
    nodes[candidates[..., 0] < 0] = -1
    branches = trie.num_children(nodes) > 1
    # A prefix is run if it, or one below it, branches; all are if they are to be valued.
    needed = nodes >= 0 if values else branches.flip(2).cumsum(2).flip(2) > 0
    request = torch.arange(len(candidates), device=candidates.device)[:, None].expand_as(candidates[..., 0])

    logits, state = model.prefill(context)
    row = slots = request  # [B, G]: each candidate's row of logits, and the slot of its prefix
    logps, own, by_parent = [], [], []
    for depth in range(length + 1):
        node, run = nodes[..., depth], needed[..., depth]
        if depth > 0:
            token = candidates[..., depth - 1].long()
            if action_values:
                present = node >= 0
                above = slots[present]
                q = model.value(state, above).detach()
                q = q + model.child_value(state, above).gather(1, token[present][:, None])[:, 0]
                by_parent.append(q.new_zeros(slots.shape).masked_scatter(present, q))
            key, inverse = torch.unique((request * trie.num_nodes + node)[run], return_inverse=True)
            first = torch.empty_like(key).scatter_(0, inverse, torch.arange(len(inverse), device=key.device))
            logits, slot = model.extend(state, slots[run][first], token[run][first])
            row = torch.zeros_like(slots).masked_scatter(run, inverse)
            slots = torch.zeros_like(slots).masked_scatter(run, slot[inverse])
            if values:
                v = model.value(state, slots[run])
                own.append(v.new_zeros(slots.shape).masked_scatter(run, v))
        if depth < length:
            column, branch = logits.new_zeros(slots.shape), branches[..., depth]
            if branch.any():
                logp, _ = legal_logp(logits[row[branch]], trie, node[branch], nodes[..., depth + 1][branch])
                column = column.masked_scatter(branch, logp)
            logps.append(column)
    return CandidateScores(
        torch.stack(logps, 2),
        torch.stack(own, 2) if values else None,
        torch.stack(by_parent, 2) if action_values else None,
    )


def surrogate(
    logp: Tensor, old_logp: Tensor, advantage: Tensor, clip: tuple[float, float] | None = None
) -> Tensor:
    r"""``A rho`` with ``rho = exp(logp - old_logp)``, or PPO's pessimistic bound of it.

    ``clip = (low, high)`` bounds rho to ``[1 - low, 1 + high]``.
    """
    ratio = torch.exp(logp - old_logp)
    if clip is None:
        return ratio * advantage
    return torch.minimum(ratio * advantage, ratio.clamp(1 - clip[0], 1 + clip[1]) * advantage)


def grpo_term(
    logp: Tensor,
    old_logp: Tensor,
    advantage: Tensor,
    mask: Tensor,
    clip: tuple[float, float] | None = None,
) -> Tensor:
    """The global term: mean over a sequence's tokens, then over all candidates that are there.

    ``logp``, ``old_logp`` are ``[B, G, L]``; ``advantage``, ``mask`` are ``[B, G]``.
    """
    value = surrogate(logp, old_logp, advantage[..., None].to(logp.dtype), clip).mean(2)
    return (value * mask).sum() / mask.sum().clamp(min=1)


def sibling_term(
    logp: Tensor,
    old_logp: Tensor,
    sibling: SiblingAdvantage,
    mask: Tensor,
    clip: tuple[float, float] | None = None,
    *,
    weighting: str = "node",
) -> Tensor:
    r"""Eq. 19, :math:`\frac1G \sum_\ell \sum_h \sum_v A(h, v) \rho(v | x, h)`, and the mean over requests.

    Every node counts once: each of the ``count`` candidates through it carries ``1 / count``
    (``weighting="candidate"`` lets every candidate carry 1). Shapes as :func:`grpo_term`.
    """
    if weighting not in ("node", "candidate"):
        raise ValueError(f"weighting must be 'node' or 'candidate', got {weighting!r}")
    valid = sibling.valid & mask[..., None]
    weight = valid.to(logp.dtype)
    if weighting == "node":
        weight = weight / sibling.count.clamp(min=1)
    value = surrogate(logp, old_logp, sibling.advantage.to(logp.dtype), clip) * weight
    return (value.sum((1, 2)) / mask.sum(1).clamp(min=1)).mean()


def kl_term(logp: Tensor, reference_logp: Tensor, mask: Tensor) -> Tensor:
    """The k3 estimate of KL(policy || reference), ``exp(d) - d - 1`` with ``d = reference - policy``.

    Averaged as in :func:`grpo_term`; 0 where both agree, never negative.
    """
    d = reference_logp - logp
    return ((torch.exp(d) - d - 1).mean(2) * mask).sum() / mask.sum().clamp(min=1)
