"""What the ops are compared with: the best compositions of torch operations that we know."""

from __future__ import annotations

import torch
from torch import Tensor

from vstar_ops import SiblingAdvantage, Trie


def child_tables(trie: Trie, depth: int) -> tuple[Tensor, Tensor]:
    """``token, child [nodes + 1, C]`` of the nodes of one depth, -1 past the last child; made once.

    The last row is what a missing beam, -1, reads: one child, which its log-probability of -inf excludes.
    """
    first, end = trie.level_offset[depth], trie.level_offset[depth + 1]
    children = trie.children(torch.arange(first, end, device=trie.token.device))
    token = torch.full((trie.num_nodes + 1, children.token.shape[1]), -1, device=trie.token.device)
    child = token.clone()
    token[first:end], child[first:end] = children.token.long(), children.node.long()
    token[-1, 0] = 0
    return token, child


def expand_legal(
    logits: Tensor,
    tables: tuple[Tensor, Tensor],
    node: Tensor,
    cum_logp: Tensor,
    value: Tensor,
    k: int,
    vocab: bool = False,
) -> tuple[Tensor | None, ...]:
    """Gather the legal logits, log_softmax, entropy, score, top-k.

    ``vocab``: log-probabilities by a log_softmax over all columns, as the usual decoder has them.
    """
    tokens, children = tables[0][node], tables[1]
    illegal, columns = tokens < 0, tokens.clamp(min=0)
    z = logits.gather(2, columns).float().masked_fill_(illegal, float("-inf"))
    logp = torch.log_softmax(z, -1)
    entropy = -(logp.exp() * logp.masked_fill(illegal, 0)).sum(-1)
    if vocab:
        logp = torch.log_softmax(logits.float(), -1).gather(2, columns)
        logp = logp.masked_fill_(illegal, float("-inf"))
    logp += cum_logp.unsqueeze(2)
    score = (logp + (value + 0.1 * entropy).unsqueeze(2)).flatten(1)
    top, index = score.topk(k)
    parent = index // tokens.shape[2]
    token = tokens.flatten(1).gather(1, index)
    child = children[node.gather(1, parent), index % tokens.shape[2]]
    return top, logp.flatten(1).gather(1, index), parent, token, child, None, entropy


def expand_dense(logits: Tensor, cum_logp: Tensor, k: int) -> tuple[Tensor, ...]:
    """log_softmax over all columns, all of them legal, top-k."""
    score = torch.log_softmax(logits.float(), -1).add_(cum_logp.unsqueeze(2)).flatten(1)
    top, index = score.topk(k)
    return top, top, index // logits.shape[2], index % logits.shape[2]


def sibling_advantage(tokens: Tensor, rewards: Tensor, packed: bool = False) -> tuple[Tensor, Tensor]:
    """Vectorized over all requests: one ``unique`` and a few ``index_add`` a level.

    ``packed=False`` makes rows of (parent prefix, token) unique, which holds for any token values.
    ``packed=True`` packs the two into one integer, which is faster and only right for small tokens.
    """
    batch, group, length = tokens.shape
    reward = rewards.flatten().double()
    prefix, parents = torch.arange(batch, device=tokens.device).repeat_interleave(group), batch
    columns = int(tokens.max()) + 1 if packed else 0
    advantage, valid = [], []

    def totals(index: Tensor, values: Tensor, size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.float64, device=tokens.device).index_add_(0, index, values)

    for depth in range(length):
        token = tokens[:, :, depth].flatten()
        if packed:
            unique, node = (prefix * columns + token).unique(return_inverse=True)
            parent = unique // columns
        else:
            rows, node = torch.stack([prefix, token], 1).unique(dim=0, return_inverse=True)
            parent = rows[:, 0]
        mean = totals(node, reward, len(parent)) / totals(node, torch.ones_like(reward), len(parent))
        siblings = totals(parent, torch.ones_like(mean), parents)
        off = mean - (totals(parent, mean, parents) / siblings)[parent]
        std = (totals(parent, off.square(), parents) / siblings).sqrt()
        advantage.append((off / (std[parent] + 1e-4))[node])
        valid.append((siblings > 1)[parent][node])
        prefix, parents = node, len(parent)
    shape = (batch, group, length)
    return torch.stack(advantage, 1).view(shape).float(), torch.stack(valid, 1).view(shape)


def prefix_returns(
    tokens: Tensor, embedding: Tensor, target: Tensor, target_embedding: Tensor, weights: tuple[float, ...]
) -> tuple[Tensor, Tensor]:
    """Packed keys, ``unique`` and one ``index_add`` of embeddings a level; right for small tokens.

    In float32: a sum needs no division by the bucket's size, the cosine is the same.
    """
    batch, group, length = tokens.shape
    columns = int(tokens.max()) + 1
    prefix = torch.arange(batch, device=tokens.device).repeat_interleave(group)
    flat, matches = embedding.flatten(0, 1), torch.ones(batch, group, dtype=torch.bool, device=tokens.device)
    returns, similarity = [], []
    for depth in range(length):
        unique, prefix = (prefix * columns + tokens[:, :, depth].flatten()).unique(return_inverse=True)
        total = flat.new_zeros(len(unique), flat.shape[1]).index_add_(0, prefix, flat)
        total = total[prefix].view_as(embedding)
        cosine = torch.cosine_similarity(total, target_embedding[:, None], dim=2)
        matches = matches & (tokens[:, :, depth] == target[:, None, depth])
        returns.append(torch.where(matches, weights[depth], -weights[depth] * (1 - cosine)))
        similarity.append(cosine)
    return torch.stack(returns, 2), torch.stack(similarity, 2)


def prefix_tree(tokens: Tensor) -> tuple[Tensor, ...]:
    """Packed keys and one ``unique`` a level (right for small tokens), then one scatter a field.

    Returns parent, token, depth, first, count ``[B, G * L]`` and the candidates' nodes ``[B, G, L]``.
    """
    batch, group, length = tokens.shape
    columns = int(tokens.max()) + 1
    owner = torch.arange(batch, device=tokens.device)
    prefix = owner.repeat_interleave(group)
    candidate = torch.arange(group, device=tokens.device).repeat(batch)
    above, used = torch.full_like(owner, -1), torch.zeros_like(owner)
    parent, token, first = (tokens.new_full((batch, group * length), -1) for _ in range(3))
    depth, count, nodes = torch.zeros_like(parent), torch.zeros_like(parent), []
    for level in range(length):
        key = prefix * columns + tokens[:, :, level].flatten()
        unique, prefix, number = key.unique(return_inverse=True, return_counts=True)
        up = unique // columns
        owner = owner[up]
        size = torch.bincount(owner, minlength=batch)
        # numbered on in the request
        own = torch.arange(len(unique), device=tokens.device) - (size.cumsum(0) - size - used)[owner]
        least = torch.full_like(unique, group).scatter_reduce_(0, prefix, candidate, "amin")
        at = (owner, own)
        fields = ((parent, above[up]), (token, unique % columns), (first, least), (count, number))
        for field, values in (*fields, (depth, torch.full_like(unique, level + 1))):
            field[at] = values
        above, used = own, used + size
        nodes.append(own[prefix])
    return parent, token, depth, first, count, torch.stack(nodes, 1).view(tokens.shape)


def token_logp(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """A table of log-softmax, gather; the log-probabilities and the gradient of their sum."""
    logp = torch.log_softmax(logits.float(), 1).gather(1, target[:, None])[:, 0]
    return logp.detach(), torch.autograd.grad(logp.sum(), logits)[0]


def token_logp_legal(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Gather the legal logits, ``tokens [rows, C]`` padded by -1, of which the first is the target's."""
    z = logits.gather(1, tokens.clamp(min=0)).float().masked_fill(tokens < 0, float("-inf"))
    logp = z.log_softmax(1)[:, 0]
    return logp.detach(), torch.autograd.grad(logp.sum(), logits)[0]


def cross_entropy(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The same by torch's own fused loss."""
    logp = -torch.nn.functional.cross_entropy(logits.float(), target, reduction="none")
    return logp.detach(), torch.autograd.grad(logp.sum(), logits)[0]


def sibling_grpo_loss(
    logp: Tensor, old_logp: Tensor, ref_logp: Tensor, sibling: SiblingAdvantage, group: Tensor
) -> tuple[Tensor, Tensor]:
    """Clipped objective, k3, node weights, and the gradient by autograd; the advantages are given."""
    ratio = torch.exp(logp - old_logp)
    bounded = ratio.clamp(0.8, 1.2)
    a, s = group[:, :, None], sibling.advantage
    whole = torch.minimum(ratio * a, bounded * a).mean()
    weight = sibling.valid / sibling.num_candidates.clamp(min=1)
    nodes = (torch.minimum(ratio * s, bounded * s) * weight).sum() / group.numel()
    d = ref_logp - logp
    loss = 1e-3 * (torch.exp(d) - d - 1).mean() - whole - nodes
    return loss.detach(), torch.autograd.grad(loss, logp)[0]
