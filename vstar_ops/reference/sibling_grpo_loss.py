"""``sibling_grpo_loss`` and its gradient, term by term in float64 tensor algebra."""

from __future__ import annotations

import torch
from torch import Tensor


def sibling_grpo_loss(
    logp: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    advantage: Tensor,
    valid: Tensor,
    count: Tensor,
    group_advantage: Tensor,
    mask: Tensor | None,
    depth_weight: Tensor | None,
    normalizer: Tensor | None,
    global_weight: float,
    sibling_weight: float,
    kl_weight: float,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
    log_ratio_bound: float,
    horizon: int,
    choices: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The dispatcher's signature; see :func:`vstar_ops.sibling_grpo_loss`.

    ``choices`` are those of ``loss_type``, ``kl``, ``weighting``, ``importance_sampling_level`` and
    ``clip_terms``, in this order.

    Returns the loss, the seven terms in the order of its result, and the gradient of ``logp``.
    """
    loss_type, kl, weighting, level, clip_terms = choices.split()
    result = torch.float64 if logp.dtype == torch.float64 else torch.float32
    present = torch.ones_like(logp, dtype=torch.bool) if mask is None else mask
    used = valid & present

    def there(x: Tensor, where: Tensor = present) -> Tensor:
        return torch.where(where, x.to(torch.float64), 0)

    token_weight, node_weight = _weights(present, normalizer, loss_type, horizon)
    if weighting == "node":
        node_weight = node_weight / count.clamp(min=1)
    if depth_weight is not None:
        node_weight = node_weight * depth_weight.to(torch.float64)
    token_weight, node_weight = there(token_weight), there(node_weight, used)

    log_ratio = there(logp) - there(logp if old_logp is None else old_logp)
    if level == "sequence":
        mean = log_ratio.sum(2, keepdim=True) / present.sum(2, keepdim=True).clamp(min=1)
        log_ratio = there(mean)
    held = log_ratio.abs() > log_ratio_bound  # does not change with logp
    ratio = log_ratio.clamp(-log_ratio_bound, log_ratio_bound).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)

    def surrogate(a: Tensor) -> tuple[Tensor, Tensor]:
        """What multiplies an advantage, the ratio or a bound in its place, and where it is a bound."""
        cut = clipped * a < ratio * a
        factor = torch.where(cut, clipped, ratio)
        capped = (a < 0) & (factor * a < dual_clip * a)
        return torch.where(capped, dual_clip, factor), cut | capped

    whole, apart = there(group_advantage.unsqueeze(2)), there(advantage, used)
    global_share = global_weight * token_weight
    sibling_share = sibling_weight * node_weight if sibling_weight else torch.zeros_like(node_weight)
    joint = clip_terms == "joint"
    if joint:
        both = _weighted(global_share, whole) + _weighted(sibling_share, apart)
        factor, cut = surrogate(both)
        over_sequences, over_nodes, objective = (_times(factor, a) for a in (whole, apart, both))
        gradient, global_cut, sibling_cut = torch.where(cut | held, 0, objective), cut, cut
    else:
        factor, global_cut = surrogate(whole)
        over_sequences = _times(factor, whole)
        factor, sibling_cut = surrogate(apart)
        over_nodes = _times(factor, apart)
        gradient = _weighted(global_share, torch.where(global_cut | held, 0, over_sequences))
        gradient = gradient + _weighted(sibling_share, torch.where(sibling_cut | held, 0, over_nodes))
    divergence = torch.zeros_like(ratio)
    if ref_logp is not None:
        divergence, slope = _divergence(there(ref_logp) - there(logp), log_ratio_bound, kl)
        gradient = gradient - _weighted(kl_weight * token_weight, slope)

    global_term = (token_weight * over_sequences).sum()
    sibling_term = _weighted(node_weight, over_nodes).sum()
    kl_term = (token_weight * divergence).sum()
    loss = kl_weight * kl_term if kl_weight else torch.zeros_like(kl_term)
    if joint:
        loss = loss - objective.sum()
    else:
        parts = (global_weight, global_term), (sibling_weight, sibling_term)
        loss = loss - sum(weight * term for weight, term in parts if weight)
    number = present.sum().clamp(min=1)
    terms = [
        *(global_term, sibling_term, kl_term),
        *(torch.where(present, ratio, 0).sum() / number, (global_cut & present).sum() / number),
        *((sibling_cut & used).sum() / used.sum().clamp(min=1), used.sum() / number),
    ]
    return loss.to(result), torch.stack([x.to(result) for x in terms]), (0.0 - gradient).to(result)


def _weights(
    present: Tensor, normalizer: Tensor | None, loss_type: str, horizon: int
) -> tuple[Tensor, Tensor]:
    """How much a token of a sequence counts, and how much a node of a request."""
    batch, group, _ = present.shape
    tokens = present.sum(2, keepdim=True).to(torch.float64)
    sequences = (tokens > 0).sum(1, keepdim=True).to(torch.float64)
    if normalizer is None:
        sizes = tokens.new_tensor([batch, batch * group])
        normalizer = torch.cat([sizes, torch.stack([sequences.sum(), tokens.sum()])])
    requests, candidates, all_sequences, all_tokens = normalizer.to(torch.float64).unbind()
    if loss_type == "grpo":
        numbers = tokens.clamp(min=1) * all_sequences.clamp(min=1), sequences.clamp(min=1) * requests
    elif loss_type == "bnpo":
        numbers = all_tokens, all_sequences
    else:
        numbers = candidates * horizon, candidates
    over_tokens, over_nodes = (1 / x.clamp(min=1) for x in numbers)
    return over_tokens, over_nodes


def _divergence(difference: Tensor, bound: float, kl: str) -> tuple[Tensor, Tensor]:
    """The estimate of the KL divergence from ``ref_logp - logp``, and its derivative by ``logp``."""
    d = difference.clamp(-bound, bound)
    value, slope = {
        "k1": (-d, torch.ones_like(d)), "k2": (d * d / 2, -d), "k3": (d.expm1() - d, -d.expm1()),
    }[kl]  # fmt: skip
    return value, torch.where(difference.abs() > bound, 0, slope)


def _weighted(weight: Tensor, x: Tensor) -> Tensor:
    """A weight of 0 turns a term off, even one that is infinite."""
    return torch.where(weight == 0, 0, weight * x)


def _times(factor: Tensor, advantage: Tensor) -> Tensor:
    """An advantage of 0 has no term, even if the ratio is infinite."""
    return torch.where((advantage == 0) & ~factor.isnan(), 0, factor * advantage)
