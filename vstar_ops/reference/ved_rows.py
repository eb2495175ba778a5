"""What surrounds the model's forward of a round of value-guided decoding, as plain tensor algebra.

The dispatcher's signatures; see :mod:`vstar_ops.ops.ved_rows` for what the tensors mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .expand_topk import expand_topk


def ved_inputs(
    tree_slot: Tensor, token: Tensor, parent: Tensor, node: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The slots and tokens that the model extends, and which rows are unused."""
    used = node >= 0
    inside = used & (parent >= 0) & (parent < tree_slot.shape[1])
    slot = tree_slot.gather(1, torch.where(inside, parent, 0).long())
    edge = node.long() - 1
    there = (edge >= 0) & (edge < len(token))
    if len(token):
        edge = token[torch.where(there, edge, 0)].long()
    return torch.where(inside, slot, -1), torch.where(there, edge, 0), ~used


def ved_evaluate(
    logits: Tensor,
    offset: Tensor,
    token: Tensor,
    alive: Tensor | None,
    only_leaf: Tensor | None,
    node: Tensor,
    logp: Tensor,
    value: Tensor | None,
    child_value: Tensor | None,
    seed: Tensor,
    children: int,
    leaves: int,
    value_weight: float,
    child_weight: float,
    logp_weight: float,
    temperature: float,
    vocab: bool,
    max_children: int,
    first_closed: int,
    first_leaf: int,
    expand_root: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Both lists are ``expand_topk`` of every row alone, of which some children are kept."""
    batch, rows, columns = logits.shape
    each, all_children = (batch * rows, 1), max(1, max_children)
    leaf_of = only_leaf
    if leaf_of is None:
        leaf_of = torch.arange(len(token) + 1, dtype=torch.int32, device=logits.device)
        leaf_of = leaf_of.masked_fill(leaf_of < first_leaf, -1)

    def ranked(x: Tensor | None, seeds: Tensor | None, by_logp: float) -> tuple[Tensor, ...]:
        score, its_logp, _, _, child, _, entropy = expand_topk(
            logits.reshape(*each, columns), offset, token, alive, node.reshape(each), None,
            all_children, logp.reshape(each), None, None, x, seeds, by_logp, child_weight, 0.0, temperature,
            vocab, max_children,
        )  # fmt: skip
        return score, its_logp, child, entropy

    _, its_logp, child, entropy = ranked(None, seed.repeat_interleave(rows), 1.0)
    open_ = (node < first_closed) & (expand_root | (node != 0))
    drawn = (child >= 0) & open_.reshape(each)
    if only_leaf is not None:
        drawn &= leaf_of[child.clamp(min=0).long()] < 0
    child_node, child_logp = _first(drawn, children, (child, -1), (its_logp, -torch.inf))

    own = torch.zeros_like(logp) if value is None else value_weight * value.float()
    if child_value is None:
        _, its_logp, child, _ = ranked(None, None, 1.0)
        score = logp_weight * its_logp if logp_weight != 0 else torch.zeros_like(its_logp)
    else:
        x = child_value.reshape(*each, columns)
        score, its_logp, child, _ = ranked(x, None, logp_weight)
    leaf = leaf_of[child.clamp(min=0).long()].masked_fill(child < 0, -1)
    lists = (leaf, -1), (its_logp, -torch.inf), (own.reshape(each) + score, -torch.inf)
    leaf_node, leaf_logp, leaf_score = _first(leaf >= 0, leaves, *lists)

    def shaped(x: Tensor) -> Tensor:
        return x.reshape(batch, rows, *x.shape[1:])

    return (
        own, shaped(entropy[:, 0]), shaped((child_node >= 0).sum(1).int()), shaped(child_node),
        shaped(child_logp), shaped(leaf_node), shaped(leaf_logp), shaped(leaf_score),
        shaped((leaf_node >= 0).sum(1).int()),
    )  # fmt: skip


def _first(kept: Tensor, width: int, *lists: tuple[Tensor, float]) -> list[Tensor]:
    """Of each list ``[N, K]`` the first ``width`` entries that are kept, then what its unused places hold."""
    kept, *rest = (
        torch.nn.functional.pad(x, (0, width), value=unused) for x, unused in ((kept, False), *lists)
    )
    order = torch.sort((~kept).byte(), dim=1, stable=True).indices[:, :width]
    there = torch.arange(width, device=kept.device) < kept.sum(1, keepdim=True)
    return [torch.where(there, x.gather(1, order), unused) for x, (_, unused) in zip(rest, lists)]


def ved_beams(
    node: Tensor,
    parent: Tensor,
    logp: Tensor,
    num_first: int,
    other_node: Tensor | None,
    other_parent: Tensor | None,
    other_logp: Tensor | None,
    only_leaf: Tensor | None,
    above: Tensor,
    size: Tensor,
    width: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Those of the first list, then those of the other that are not among them."""

    def without_leaves(x: Tensor) -> Tensor:
        if only_leaf is None:
            return x
        inside = (x >= 0) & (x < len(only_leaf))
        return x.masked_fill(inside & (only_leaf[torch.where(inside, x, 0).long()] >= 0), -1)

    node = without_leaves(node)
    every = _first(node >= 0, num_first, (node, -1), (parent, -1), (logp, -torch.inf))
    if other_node is not None and other_parent is not None and other_logp is not None:
        other_node = without_leaves(other_node)
        again = (other_node[:, :, None] == every[0][:, None]).any(2)
        others = other_node.masked_fill(again, -1), other_parent, other_logp
        every = [torch.cat(pair, 1) for pair in zip(every, others)]
    node, parent, logp = _first(every[0] >= 0, width, *zip(every, (-1, -1, -torch.inf)))
    start = size - (above >= 0).sum(1, dtype=torch.int32)
    return node, torch.where(node >= 0, parent + start[:, None], -1), logp
