"""The whole of ``sibling_grpo_loss`` in float64, sequence by sequence; autograd differentiates it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops import SiblingAdvantage


def whole_loss(
    logp: Tensor,
    sibling: SiblingAdvantage,
    group: Tensor,
    *,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    mask: Tensor | None = None,
    global_weight: float = 1.0,
    sibling_weight: float = 1.0,
    kl_weight: float = 1e-3,
    clip: tuple[float, float] | None = None,
    dual_clip: float | None = None,
    clip_terms: str = "separate",
    importance_sampling_level: str = "token",
    log_ratio_bound: float | None = None,
    kl: str = "k3",
    weighting: str = "node",
    depth_weights: Sequence[float] | None = None,
    loss_type: str = "grpo",
    horizon: int | None = None,
    normalizer: Sequence[int] | None = None,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """``sibling_grpo_loss`` of float64 ``logp``, sequence by sequence; autograd differentiates the loss.

    Also the sums of its terms' addends without their signs: a sum is as exact as its addends are large, which
    may cancel.

    A policy's ratio to itself now, ``exp(x - x.detach())``, is 1 with the derivative 1.
    """
    batch, group_size, length = logp.shape
    there = torch.ones_like(logp, dtype=torch.bool)
    if mask is not None:
        there = mask if mask.dim() == 3 else mask[:, :, None].expand(logp.shape)
    lengths = there.sum(2).tolist()
    sequences = [sum(n > 0 for n in row) for row in lengths]
    own = (batch, batch * group_size, sum(sequences), sum(map(sum, lengths)))
    requests, candidates, all_sequences, all_tokens = (max(n, 1) for n in normalizer or own)
    bound = math.inf if log_ratio_bound is None else log_ratio_bound

    def surrogate(rho: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        value = plain = rho * a
        if clip is not None:
            value = torch.minimum(value, _bounded(rho, 1 - clip[0], 1 + clip[1]) * a)
        if dual_clip is not None:
            value = torch.where(a < 0, torch.maximum(value, dual_clip * a), value)
        return value, value != plain

    zero = logp.sum() * 0
    total = dict.fromkeys(("global_term", "sibling_term", "kl", "ratio", "joint"), zero)
    size, cuts = dict.fromkeys(total, 0.0), {"global": 0, "sibling": 0, "valid": 0}

    def add(name: str, addends: Tensor) -> None:
        total[name] = total[name] + addends.sum()
        size[name] += float(addends.detach().abs().sum())

    for b in range(batch):
        for g in range(group_size):
            at = [d for d in range(length) if there[b, g, d]]
            if not at:
                continue
            token_weight, node_weight = {
                "grpo": (1 / (len(at) * all_sequences), 1 / (requests * sequences[b])),
                "bnpo": (1 / all_tokens, 1 / all_sequences),
                "dr_grpo": (1 / (candidates * (horizon or length)), 1 / candidates),
            }[loss_type]
            x, valid = logp[b, g, at], sibling.valid[b, g, at]
            log_ratio = x - (x.detach() if old_logp is None else old_logp[b, g, at])
            if importance_sampling_level == "sequence":
                log_ratio = log_ratio.detach().mean() + x - x.detach()
            rho = _bounded(log_ratio, -bound, bound).exp()
            whole = group[b, g].double().expand(len(at))
            apart = torch.where(valid, sibling.advantage[b, g, at].double(), 0)
            if weighting == "node":
                node_weight = node_weight / sibling.num_candidates[b, g, at].double().clamp(min=1)
            if depth_weights is not None:
                node_weight = node_weight * torch.tensor(depth_weights, dtype=torch.float64)[at]
            if clip_terms == "joint":
                a = global_weight * token_weight * whole + sibling_weight * node_weight * apart
                value, cut = surrogate(rho, a)
                factor, sibling_cut = torch.where(a == 0, rho, value / a), cut
                one, two = factor * whole, factor * apart
                add("joint", value)
            else:
                (one, cut), (two, sibling_cut) = surrogate(rho, whole), surrogate(rho, apart)
            add("global_term", token_weight * one)
            add("sibling_term", node_weight * two)
            add("ratio", rho)
            cuts["global"] += int(cut.sum())
            cuts["sibling"] += int((sibling_cut & valid).sum())
            cuts["valid"] += int(valid.sum())
            if ref_logp is not None:
                d = _bounded(ref_logp[b, g, at] - x, -bound, bound)
                estimate = {"k1": -d, "k2": d * d / 2, "k3": d.expm1() - d}[kl]
                add("kl", token_weight * estimate)

    objective = total.pop("joint")
    if clip_terms == "separate":
        objective = global_weight * total["global_term"] + sibling_weight * total["sibling_term"]
    tokens = max(own[3], 1)
    size["ratio"] /= tokens
    weights = {"kl": kl_weight, "global_term": global_weight, "sibling_term": sibling_weight}
    size["loss"] = sum(abs(weight) * size[name] for name, weight in weights.items())
    want = {
        "loss": kl_weight * total["kl"] - objective,
        **total,
        "ratio": total["ratio"] / tokens,
        "global_clip_fraction": torch.tensor(cuts["global"] / tokens),
        "sibling_clip_fraction": torch.tensor(cuts["sibling"] / max(cuts["valid"], 1)),
        "valid_fraction": torch.tensor(cuts["valid"] / tokens),
    }
    return want, size


def _bounded(x: Tensor, low: float, high: float) -> Tensor:
    """``x.clamp(low, high)`` whose derivative on the bounds is 1; torch's has become 0 in 2.14."""
    return torch.where(x < low, low, torch.where(x > high, high, x))
