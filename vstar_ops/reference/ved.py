"""The steps of value-guided decoding on ``B`` trees at once, as plain tensor algebra.

The dispatcher's signatures; see :mod:`vstar_ops.ops.ved` for what the tensors mean. ``ved_select`` looks at
the host once per traversal, to see whether a tree still needs one.
"""

from __future__ import annotations

import torch
from torch import Tensor

_FLOAT32_MAX = torch.finfo(torch.float32).max


def ved_select(
    trie_node: Tensor,
    parent: Tensor,
    priority: Tensor,
    visits: Tensor,
    next_child: Tensor,
    num_children: Tensor,
    child_node: Tensor,
    child_logp: Tensor,
    size: Tensor,
    budget: Tensor,
    depth: Tensor,
    depth_sum: Tensor,
    depth_count: Tensor,
    levels: int,
    exploration: float,
    paths: int,
    max_idle: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Traverse (V-STAR, Eq. 11), gate, take the next child."""
    batch, capacity = trie_node.shape
    every = torch.arange(batch, device=trie_node.device)
    row_parent = torch.full((batch, paths * levels), -1, dtype=torch.int32, device=trie_node.device)
    row_node = torch.full_like(row_parent, -1)
    row_logp = torch.full_like(row_parent, float("-inf"), dtype=torch.float32)
    pending = torch.zeros_like(size)
    position = torch.arange(capacity, device=trie_node.device)

    for path in range(paths):
        looking = torch.ones(batch, dtype=torch.bool, device=trie_node.device)  # for a traversal that expands
        idle = torch.zeros_like(size)
        while True:
            exists = position < size[:, None]
            _skip_present(trie_node, exists, next_child, num_children, child_node)
            mean = (depth_sum / depth_count.clamp(min=1)).gather(1, depth.long())
            open_ = exists & (next_child < num_children) & (priority.double() >= mean)
            looking &= open_.any(1) & (size + pending < budget)
            ended = looking & (idle > max_idle)
            budget.copy_(torch.where(ended, size + pending, budget))
            looking &= ~ended
            if not bool(looking.any()):
                break

            current, alive, log_total = (
                torch.zeros_like(every),
                looking.clone(),
                visits[:, :1].double().log1p(),
            )
            expanded = torch.zeros_like(looking)
            trail = []
            for level in range(levels + 1):
                trail.append((current, alive.clone()))
                take = alive & open_[every, current] & (size + pending < budget)
                if level < levels:
                    row, at = (
                        path * levels + level,
                        next_child[every, current].long().clamp(max=child_node.shape[2] - 1),
                    )
                    row_parent[:, row] = torch.where(take, current.int(), row_parent[:, row])
                    row_node[:, row] = torch.where(take, child_node[every, current, at], row_node[:, row])
                    row_logp[:, row] = torch.where(take, child_logp[every, current, at], row_logp[:, row])
                    next_child[every, current] += take
                    pending += take
                    expanded |= take
                bound = priority.double() + exploration * (log_total / (visits + 1)).sqrt()
                child = exists & (parent == current[:, None]) & (position > 0)
                bound = bound.masked_fill(~child, float("-inf"))
                tied = child & (bound == bound.max(1, keepdim=True).values)
                alive &= child.any(1)
                lowest = torch.where(tied, trie_node, torch.iinfo(torch.int32).max).argmin(1)
                current = torch.where(alive, lowest, current)
            for index, on_path in trail:
                visits[every, index] += on_path
            idle += 1
            looking &= ~expanded
    return row_parent, row_node, row_logp


def _skip_present(
    node: Tensor, exists: Tensor, next_child: Tensor, num_children: Tensor, child_node: Tensor
) -> None:
    """Move the pointers past children that the initial beam search has put into the tree."""
    last = child_node.shape[2] - 1
    known = node.masked_fill(~exists, -2)
    while True:
        candidate = child_node.gather(2, next_child.long().clamp(max=last)[..., None])  # [B, T, 1]
        present = (candidate == known[:, None]).any(2) & (next_child < num_children) & exists
        if not bool(present.any()):
            return
        next_child += present


def ved_insert(
    trie_node: Tensor,
    parent: Tensor,
    logp: Tensor,
    value: Tensor,
    entropy: Tensor,
    priority: Tensor,
    visits: Tensor,
    next_child: Tensor,
    num_children: Tensor,
    child_node: Tensor,
    child_logp: Tensor,
    leaf_node: Tensor,
    leaf_logp: Tensor,
    leaf_score: Tensor,
    num_leaves: Tensor,
    slot: Tensor,
    size: Tensor,
    depth: Tensor,
    depth_sum: Tensor,
    depth_count: Tensor,
    row_parent: Tensor,
    row_node: Tensor,
    row_logp: Tensor,
    row_slot: Tensor,
    row_value: Tensor,
    row_entropy: Tensor,
    row_num_children: Tensor,
    row_child_node: Tensor,
    row_child_logp: Tensor,
    row_leaf_node: Tensor,
    row_leaf_logp: Tensor,
    row_leaf_score: Tensor,
    row_num_leaves: Tensor,
    logp_weight: float,
    entropy_weight: float,
) -> None:
    """Append evaluated nodes with their priority (V-STAR, Eq. 10), update the sums of their depths."""
    row_value = torch.nan_to_num(row_value, -_FLOAT32_MAX, _FLOAT32_MAX, -_FLOAT32_MAX)
    gain = row_value.double() + entropy_weight * row_entropy.double()
    if logp_weight != 0:
        gain = gain + logp_weight * row_logp.double()
    row_priority = torch.nan_to_num(gain, -_FLOAT32_MAX).clamp(-_FLOAT32_MAX, _FLOAT32_MAX).float()
    pairs = [(trie_node, row_node), (parent, row_parent), (logp, row_logp), (value, row_value)]
    pairs += [(entropy, row_entropy), (priority, row_priority), (num_children, row_num_children)]
    pairs += [(child_node, row_child_node), (child_logp, row_child_logp), (leaf_node, row_leaf_node)]
    pairs += [(leaf_logp, row_leaf_logp), (leaf_score, row_leaf_score), (num_leaves, row_num_leaves)]
    pairs += [(slot, row_slot)]
    capacity = trie_node.shape[1]
    for row in range(row_node.shape[1]):
        (b,) = ((row_node[:, row] >= 0) & (size < capacity)).nonzero(as_tuple=True)
        at, above = size[b].long(), row_parent[b, row].long()
        for array, source in pairs:
            array[b, at] = source[b, row].to(array.dtype)
        visits[b, at] = 0
        next_child[b, at] = 0
        level = torch.where(above >= 0, depth[b, above.clamp(min=0)].long() + 1, 0)
        depth[b, at] = level.int()
        depth_sum[b, level] += row_priority[b, row].double()
        depth_count[b, level] += 1
        size[b] += 1


def ved_candidates(
    trie_node: Tensor,
    logp: Tensor,
    value: Tensor,
    size: Tensor,
    depth: Tensor,
    leaf_node: Tensor,
    leaf_logp: Tensor,
    leaf_score: Tensor,
    num_leaves: Tensor,
    length: int,
    k: int,
    logp_weight: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Evaluated leaves by score, then completions of evaluated prefixes."""
    exists = torch.arange(trie_node.shape[1], device=trie_node.device) < size[:, None]
    leaf = exists & (depth == length)
    own = value.double()
    if logp_weight != 0:
        own = own + logp_weight * logp.double()
    slots = leaf_node.shape[2]
    listed = (torch.arange(slots, device=trie_node.device) < num_leaves[..., None]) & exists[..., None]
    flat = leaf_node.flatten(1)
    present = (flat[..., None] == trie_node.masked_fill(~leaf, -2)[:, None]).any(2)
    listed = listed.flatten(1) & ~present

    def join(of_leaves: Tensor, of_completions: Tensor) -> Tensor:
        return torch.cat([of_leaves, of_completions], 1)

    there, nodes = join(leaf, listed), join(trie_node, leaf_node.flatten(1))
    logps, scores = join(logp, leaf_logp.flatten(1)), join(own.float(), leaf_score.flatten(1))
    tier = join(torch.zeros_like(trie_node), torch.ones_like(leaf_node.flatten(1)))
    prefix = join(trie_node, trie_node[..., None].expand_as(leaf_node).flatten(1))
    order = torch.arange(nodes.shape[1], device=trie_node.device).expand_as(nodes)
    keys = (nodes, -logps.masked_fill(tier == 0, 0), prefix, -scores, tier, (~there).int())
    for key in keys:  # stable sorts, the last key first
        order = order.gather(1, key.gather(1, order).sort(dim=1, stable=True).indices)
    order = torch.nn.functional.pad(order[:, :k], (0, max(k - order.shape[1], 0)))
    count = there.sum(1).clamp(max=k)
    kept = torch.arange(k, device=trie_node.device) < count[:, None]

    def chosen(source: Tensor, fill: float) -> Tensor:
        return torch.where(kept, source.gather(1, order), fill)

    return (
        chosen(nodes, -1).int(),
        chosen(logps, float("-inf")).float(),
        chosen(scores, float("-inf")).float(),
        count.int(),
    )
