"""What the ops are compared with: the best compositions of torch operations that we know."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from vstar_ops import Trie
from vstar_ops.noise import gumbel
from vstar_ops.reference.filters import pack_bits


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

    ``vocab``: log-probabilities by a log_softmax over all columns, as the usual decoder has them. The tables
    of a restricted trie hold what is allowed alone: they must be made anew when that changes.
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


def ved_rows(
    logits: Tensor,
    child_value: Tensor,
    tables: tuple[Tensor, Tensor],
    node: Tensor,
    logp: Tensor,
    value: Tensor,
    seed: Tensor,
    only_leaf: Tensor,
    width: int,
) -> tuple[Tensor | None, ...]:
    """Gather, log_softmax and noise of legal children; top-k of those that stand for a leaf and of others.

    Children in the order of the noise are computed, but equal only up to near ties, and not compared.
    """
    tokens, children = tables[0][node], tables[1][node]
    illegal, columns = tokens < 0, tokens.clamp(min=0)
    z = logits.gather(2, columns).float().masked_fill_(illegal, float("-inf"))
    own = torch.log_softmax(z, -1)
    entropy = -(own.exp() * own.masked_fill(illegal, 0)).sum(-1)
    own += logp.unsqueeze(2)
    leaf = only_leaf[children.clamp(min=0)].masked_fill(illegal, -1)
    noisy = own + gumbel(seed[:, None, None], node.unsqueeze(2), columns).float()
    _, order = noisy.masked_fill(illegal | (leaf >= 0), float("-inf")).topk(width)
    children.gather(2, order), own.gather(2, order)
    score = value.unsqueeze(2) + child_value.gather(2, columns)
    score, order = score.masked_fill(leaf < 0, float("-inf")).topk(width)
    there = score > float("-inf")
    its_leaf = leaf.gather(2, order).masked_fill(~there, -1)
    its_logp = own.gather(2, order).masked_fill(~there, float("-inf"))
    return value, entropy, None, None, None, its_leaf, its_logp, score, there.sum(2)


def expand_dense(logits: Tensor, node: Tensor, cum_logp: Tensor, k: int) -> tuple[Tensor, ...]:
    """log_softmax over all columns, all of them legal, top-k."""
    score = torch.log_softmax(logits.float(), -1).add_(cum_logp.unsqueeze(2)).flatten(1)
    top, index = score.topk(k)
    return top, top, index // logits.shape[2], index % logits.shape[2]


def group_advantage(rewards: Tensor) -> Tensor:
    """Distance to the group's mean in standard deviations."""
    return (rewards - rewards.mean(1, True)) / (rewards.std(1, keepdim=True) + 1e-4)


def levels(tokens: Tensor, packed: bool = True) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Of each level ``parent, token, count [nodes]`` and each candidate's ``node [B * G]``: one ``unique``.

    Parents on the first level are the requests. ``packed`` packs parent and token into one integer, which is
    faster and only right for small tokens; else rows of both are made unique.
    """
    node = torch.arange(len(tokens), device=tokens.device).repeat_interleave(tokens.shape[1])
    columns = int(tokens.max()) + 1 if packed else 0
    for token in tokens.flatten(0, 1).unbind(1):
        if packed:
            keys, node, count = (node * columns + token).unique(return_inverse=True, return_counts=True)
            yield keys // columns, keys % columns, count, node
        else:
            pairs = torch.stack([node, token], 1)
            rows, node, count = pairs.unique(dim=0, return_inverse=True, return_counts=True)
            yield rows[:, 0], rows[:, 1], count, node


def sibling_advantage(tokens: Tensor, rewards: Tensor, packed: bool = False) -> tuple[Tensor, Tensor]:
    """A few ``index_add`` per level; ``packed`` is right for small tokens only."""
    reward, parents = rewards.flatten().double(), len(tokens)
    advantage, valid = [], []

    def totals(index: Tensor, values: Tensor, size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.float64, device=tokens.device).index_add_(0, index, values)

    for parent, _, count, node in levels(tokens, packed):
        mean = totals(node, reward, len(parent)) / count
        siblings = totals(parent, torch.ones_like(mean), parents)
        off = mean - (totals(parent, mean, parents) / siblings)[parent]
        std = (totals(parent, off.square(), parents) / siblings).sqrt()
        advantage.append((off / (std[parent] + 1e-4))[node])
        valid.append((siblings > 1)[parent][node])
        parents = len(parent)
    return torch.stack(advantage, 1).view(tokens.shape).float(), torch.stack(valid, 1).view(tokens.shape)


def prefix_returns(
    tokens: Tensor, embedding: Tensor, target: Tensor, target_embedding: Tensor, weights: tuple[float, ...]
) -> tuple[Tensor, Tensor]:
    """One ``index_add`` of embeddings per level; right for small tokens.

    In float32: a sum needs no division by the bucket's size, the cosine is the same.
    """
    flat, matches = embedding.flatten(0, 1), torch.ones_like(tokens[:, :, 0], dtype=torch.bool)
    returns, similarity = [], []
    for depth, (parent, _, _, node) in enumerate(levels(tokens)):
        total = flat.new_zeros(len(parent), flat.shape[1]).index_add_(0, node, flat)
        total = total[node].view_as(embedding)
        cosine = torch.cosine_similarity(total, target_embedding[:, None], dim=2)
        matches = matches & (tokens[:, :, depth] == target[:, None, depth])
        returns.append(torch.where(matches, weights[depth], -weights[depth] * (1 - cosine)))
        similarity.append(cosine)
    return torch.stack(returns, 2), torch.stack(similarity, 2)


def prefix_tree(tokens: Tensor) -> tuple[Tensor, ...]:
    """One scatter per field and level; right for small tokens.

    Returns parent, token, depth, first, count ``[B, G * L]`` and the candidates' nodes ``[B, G, L]``.
    """
    batch, group, length = tokens.shape
    owner = torch.arange(batch, device=tokens.device)
    candidate = torch.arange(group, device=tokens.device).repeat(batch)
    above, used = torch.full_like(owner, -1), torch.zeros_like(owner)
    parent, token, first = (tokens.new_full((batch, group * length), -1) for _ in range(3))
    depth, count, nodes = torch.zeros_like(parent), torch.zeros_like(parent), []
    for number, (up, last, candidates, node) in enumerate(levels(tokens), 1):
        owner = owner[up]
        size = torch.bincount(owner, minlength=batch)
        # numbered on in the request
        own = torch.arange(len(owner), device=tokens.device) - (size.cumsum(0) - size - used)[owner]
        at = (owner, own)
        parent[at], token[at], depth[at], count[at] = above[up], last, number, candidates
        first[at] = torch.full_like(owner, group).scatter_reduce_(0, node, candidate, "amin")
        above, used = own, used + size
        nodes.append(own[node])
    return parent, token, depth, first, count, torch.stack(nodes, 1).view(tokens.shape)


def advance_beams(
    parent: Tensor, token: Tensor, node: Tensor, sequence: Tensor, slot: Tensor
) -> tuple[Tensor | None, ...]:
    """Gather what the winners' beams hold, mask what is dead."""
    above, dead = parent.clamp(min=0).long(), node < 0
    tokens = sequence.gather(1, above[:, :, None].expand(-1, -1, sequence.shape[2]))
    grown = torch.cat([tokens.masked_fill(dead[:, :, None], -1), token[:, :, None]], 2)
    return grown, slot.gather(1, above).masked_fill(dead, -1), token.clamp(min=0).long(), None


def filter_items(
    trie: Trie, allowed: Tensor, parent: Tensor, leaf: Tensor, row: Tensor, allow: bool
) -> tuple[Tensor, Tensor]:
    """Flags ``[num_items]`` of the items, and of all nodes by one ``amax`` per level; both as bits."""
    allowed = allowed.clone()
    allowed[row[0]] = allow
    alive = torch.zeros(trie.num_nodes, dtype=torch.uint8, device=row.device)
    alive.scatter_reduce_(0, leaf, allowed.byte(), "amax")
    for first, end in zip(trie.level_offset[-2:0:-1], trie.level_offset[:0:-1]):
        alive.scatter_reduce_(0, parent[first:end], alive[first:end].clone(), "amax")
    return pack_bits(alive[None]), pack_bits(allowed[None])


def rows_to_run(
    trie: Trie, node: Tensor, sequence: Tensor, slot: Tensor, evaluated: Tensor
) -> tuple[Tensor | None, ...]:
    """One ``nonzero`` per stage, as many waits of the host."""
    length, lists = sequence.shape[2], []
    branching = trie.num_children(node) > 1
    for stage in range(length):
        picked = (branching & (evaluated <= stage)).nonzero(as_tuple=True)
        lists.append((sequence[..., stage][picked].long(), picked))
    number = len(lists[-1][0])
    row, index = torch.full_like(node, -1), torch.arange(number, device=node.device)
    row[lists[-1][1]] = index.to(row.dtype)

    def padded(values: list[Tensor], fill: int) -> Tensor:
        return torch.stack(
            [torch.nn.functional.pad(x, (0, node.numel() - len(x)), value=fill) for x in values]
        )

    (parent,) = padded([slot[lists[-1][1]]], -1)
    token = padded([x for x, _ in lists], 0)
    place = padded([row[picked].long() for _, picked in lists], -1)
    return row, parent, token, place, None, ((length - evaluated) * branching).sum(1)


def draw_children(
    logp: Tensor, token: Tensor, node: Tensor, sequence: Tensor, row: Tensor, prefix: Tensor, seed: Tensor
) -> tuple[Tensor | None, ...]:
    """Gumbel noise by torch operations, argmax, gather."""
    position = torch.arange(1, sequence.shape[1] + 1, device=logp.device)
    key = seed[:, None] + position * 0x5851F42D4C957F2D
    tokens = token[row].long()
    perturbed = logp[row] + gumbel(key[..., None], prefix[..., None].long(), tokens)
    pick = perturbed.masked_fill(node[row] < 0, -torch.inf).argmax(2, keepdim=True)
    drawn, grown = node[row].gather(2, pick)[..., 0], torch.cat([sequence, tokens.gather(2, pick)], 2)
    return grown, drawn, logp[row].gather(2, pick)[..., 0], (drawn >= 0).sum(1)


def distinct_rows(node: Tensor, token: Tensor, slot: Tensor, row: Tensor) -> tuple[Tensor | None, ...]:
    """``unique`` of packed requests and nodes; all candidates are there."""
    request = torch.arange(len(node), device=node.device)[:, None]
    key, own = torch.unique(request * 2**32 + node, return_inverse=True)
    first = torch.zeros_like(key).scatter_(0, own.flatten(), torch.arange(node.numel(), device=node.device))
    rows = slot[row.flatten()[first]], token.flatten()[first].long(), node.flatten()[first].long()
    parent, tokens, nodes = (
        torch.nn.functional.pad(x, (0, node.numel() - len(key)), value=fill)
        for x, fill in zip(rows, (-1, 0, -1))
    )
    number = torch.bincount(request.expand(node.shape).flatten()[first], minlength=len(node))
    return own, parent, tokens, nodes, number.sum()[None], number


def token_logp(logits: Tensor, target: Tensor) -> Tensor:
    """A table of log-softmax, gather."""
    return torch.log_softmax(logits.float(), 1).gather(1, target[:, None])[:, 0]


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """The same by torch's own fused loss."""
    return -torch.nn.functional.cross_entropy(logits.float(), target, reduction="none")


def memory_pace(logits: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """Reads the logits twice and writes as much once, as forward and backward must."""
    plain = logits.detach()
    return plain.sum(), plain.sum(), torch.empty_like(plain).fill_(1.0)


def token_logp_legal(logits: Tensor, target: Tensor, node: Tensor, tokens: Tensor) -> Tensor:
    """Gather the legal logits, ``tokens [rows, C]`` padded by -1, of which the first is the target's."""
    z = logits.gather(1, tokens.clamp(min=0)).float().masked_fill(tokens < 0, float("-inf"))
    return z.log_softmax(1)[:, 0]


def sibling_grpo_loss(
    logp: Tensor, old: Tensor, ref: Tensor, advantage: Tensor, valid: Tensor, number: Tensor, group: Tensor
) -> Tensor:
    """Clipped objective, k3, node weights; the advantages are given."""
    ratio = torch.exp(logp - old)
    bounded = ratio.clamp(0.8, 1.2)
    a = group[:, :, None]
    whole = torch.minimum(ratio * a, bounded * a).mean()
    weight = valid / number.clamp(min=1)
    nodes = (torch.minimum(ratio * advantage, bounded * advantage) * weight).sum() / group.numel()
    d = ref - logp
    return 1e-3 * (torch.exp(d) - d - 1).mean() - whole - nodes
