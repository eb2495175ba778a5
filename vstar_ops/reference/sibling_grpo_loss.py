"""``sibling_grpo_loss`` and its gradient, term by term in float64 tensor algebra."""

from __future__ import annotations

import torch
from torch import Tensor

GRPO, BNPO, DR_GRPO = range(3)


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
    global_weight: float,
    sibling_weight: float,
    kl_weight: float,
    clip_low: float,
    clip_high: float,
    kl: int,
    by_node: bool,
    loss_type: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The dispatcher's signature; see :func:`vstar_ops.sibling_grpo_loss`.

    Returns the loss, the seven terms in the order of its result, and the gradient of ``logp``.
    """
    batch, group, length = logp.shape
    result = torch.float64 if logp.dtype == torch.float64 else torch.float32
    present = torch.ones_like(logp, dtype=torch.bool) if mask is None else mask

    def there(x: Tensor) -> Tensor:
        return torch.where(present, x.to(torch.float64), 0)

    # How much a token of a sequence counts, and how much a node of a request.
    tokens = present.sum(2, keepdim=True).to(torch.float64)
    sequences = (tokens > 0).sum(1, keepdim=True).to(torch.float64)
    if loss_type == GRPO:
        token_weight = 1 / (tokens.clamp(min=1) * sequences.sum().clamp(min=1))
        node_weight = 1 / (sequences.clamp(min=1) * max(batch, 1))
    elif loss_type == BNPO:
        token_weight = 1 / tokens.sum().clamp(min=1)
        node_weight = 1 / sequences.sum().clamp(min=1)
    else:
        token_weight = tokens.new_tensor(1 / max(batch * group * length, 1))
        node_weight = tokens.new_tensor(1 / max(batch * group, 1))
    token_weight = token_weight * present
    used = valid & present
    node_weight = node_weight * used
    if by_node:
        node_weight = node_weight / count.clamp(min=1)
    if depth_weight is not None:
        node_weight = node_weight * depth_weight.to(torch.float64)

    ratio = torch.ones_like(there(logp)) if old_logp is None else (there(logp) - there(old_logp)).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)

    def surrogate(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """PPO's bound, its derivative by ``logp``, and where it is cut."""
        cut = clipped * a < ratio * a
        return torch.where(cut, clipped * a, ratio * a), torch.where(cut, 0, ratio * a), cut

    over_sequences, global_slope, global_cut = surrogate(there(group_advantage.unsqueeze(2)))
    over_nodes, sibling_slope, sibling_cut = surrogate(there(advantage))
    gradient = global_weight * token_weight * global_slope + sibling_weight * node_weight * sibling_slope
    divergence = torch.zeros_like(ratio)
    if ref_logp is not None:
        d = there(ref_logp) - there(logp)
        divergence, slope = ((-d, torch.ones_like(d)), (d * d / 2, -d), (d.expm1() - d, -d.expm1()))[kl]
        gradient = gradient - kl_weight * token_weight * slope

    global_term = (token_weight * over_sequences).sum()
    sibling_term = (node_weight * over_nodes).sum()
    kl_term = (token_weight * divergence).sum()
    loss = kl_weight * kl_term - global_weight * global_term - sibling_weight * sibling_term
    number = present.sum().clamp(min=1)
    terms = [
        *(global_term, sibling_term, kl_term),
        *(torch.where(present, ratio, 0).sum() / number, (global_cut & present).sum() / number),
        *((sibling_cut & used).sum() / used.sum().clamp(min=1), used.sum() / number),
    ]
    return loss.to(result), torch.stack([x.to(result) for x in terms]), (0.0 - gradient).to(result)
