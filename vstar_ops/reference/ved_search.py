"""Value-guided efficient decoding of one request, one prefix after the other, in plain Python.

What :func:`vstar_ops.decoding.ved` must do, written down as V-STAR states it (arXiv 2602.10699, Eqs. 10-14):
objects, lists, no batching. It ships to be read and to be compared with; see ``ved`` for the options.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..noise import gumbel
from ..trie import Trie


@dataclass
class Node:
    """An evaluated prefix."""

    node: int  # of the trie
    parent: Node | None
    depth: int
    logp: float  # of the whole prefix
    slot: int  # of the model
    value: float
    entropy: float
    priority: float  # G
    child_logp: dict[int, float]  # legal children (trie nodes) and their log-probability given the prefix
    action_value: dict[int, float]
    draws: list[int]  # the same children, in the order in which they are drawn
    visits: int = 0
    children: list[Node] = field(default_factory=list)

    def bound(self, root: Node, exploration: float) -> float:
        """U(s), Eq. 11."""
        return self.priority + exploration * math.sqrt(math.log(root.visits + 1) / (self.visits + 1))


@dataclass
class Leaf:
    """A candidate."""

    node: int
    logp: float
    score: float


def ved_search(
    model: Any,
    context: Any,
    trie: Trie,
    candidates: int = 16,
    *,
    budget: int = 33,
    width: int = 8,
    entropy_weight: float = 0.1,
    exploration: float = 1.0,
    value_weight: float = 1.0,
    logp_weight: float = 0.0,
    evaluate_leaves: bool = True,
    action_values: bool = False,
    guided: int = 0,
    expand_root: bool = True,
    skip_forced: bool = False,
    completions: int = 0,
    own: int = 0,
    max_idle: int = 1000,
    seed: int = 0,
) -> tuple[list[Leaf], list[Node]]:
    """Search one request; arguments as in :func:`vstar_ops.decoding.ved`, with one path a round.

    Args:
        context: a batch of one prompt.
        seed: the request's own seed, as an element of ``ved``'s ``seed[B]``.

    Returns:
        The candidates, best first, and all evaluated nodes in the order of their evaluation.
    """
    logits, state = model.prefill(context)
    length, levels = trie.length, trie.length if evaluate_leaves else trie.length - 1
    tree: list[Node] = []

    def evaluate(node: int, parent: Node | None, logp: float, logits: Tensor, slot: int) -> Node:
        depth = parent.depth + 1 if parent else 0
        value = 0.0
        if value_weight != 0:
            value = _float32(value_weight * _float32(model.value(state, torch.tensor([slot]))[0].item()))
        children = [int(c) for c in trie.children(node).node.tolist() if c >= 0]
        tokens = (
            trie.token[torch.tensor(children, dtype=torch.int64) - 1].long()
            if children
            else torch.empty(0).long()
        )
        child_logp = logits[tokens].double().log_softmax(0)
        entropy = -(child_logp.exp() * child_logp).sum().item() if len(children) > 1 else 0.0
        noise = gumbel(torch.tensor(seed), torch.tensor(node), tokens)
        draws = [children[i] for i in (child_logp + noise).argsort(descending=True).tolist()]
        q = model.child_value(state, torch.tensor([slot]))[0][tokens].tolist() if action_values else []
        gain = value + entropy_weight * _float32(entropy)
        if logp_weight != 0:
            gain += logp_weight * _float32(logp)
        result = Node(
            node, parent, depth, logp, slot, value, entropy, _float32(gain),
            dict(zip(children, child_logp.tolist())), dict(zip(children, q)), draws,
        )  # fmt: skip
        tree.append(result)
        if parent:
            parent.children.append(result)
        return result

    def extend(parent: Node, child: int) -> tuple[Node, Tensor]:
        token = trie.token[child - 1].long()
        row, slot = model.extend(state, torch.tensor([parent.slot]), token[None])
        return evaluate(child, parent, parent.logp + parent.child_logp[child], row[0], int(slot[0])), row[0]

    def is_forced(parent: Node) -> bool:
        return skip_forced and evaluate_leaves and parent.depth == length - 1 and len(parent.child_logp) == 1

    def worth(parent: Node, child: int) -> float:
        """Of a prefix before it is evaluated."""
        logp = parent.logp + parent.child_logp[child]
        return logp_weight * logp + parent.value + (value_weight or 1.0) * parent.action_value[child]

    # 1. The initial beam search.
    frontier = [evaluate(0, None, 0.0, logits[0], 0)]
    width = min(width, max(1, (budget - 1) // max(levels, 1)))
    reserved = 1
    for _ in range(levels):
        width = min(width, budget - reserved)
        reserved += width
        extensions = [(i, child) for i, p in enumerate(frontier) for child in p.child_logp]
        extensions.sort(key=lambda e: (-(frontier[e[0]].logp + frontier[e[0]].child_logp[e[1]]), *e))
        by_logp = max(width - guided, 0)
        others = extensions[by_logp:]
        if guided:
            others.sort(key=lambda e: (-worth(frontier[e[0]], e[1]), *e))
        best = [(frontier[i], c) for i, c in (extensions[:by_logp] + others)[: max(width, 0)]]
        frontier = [extend(parent, child)[0] for parent, child in best if not is_forced(parent)]

    # 2 to 4. Rounds of one traversal.
    root, idle = tree[0], 0

    def next_child(s: Node) -> int | None:
        if s.depth >= levels or (s is root and not expand_root) or is_forced(s):
            return None
        expanded = {child.node for child in s.children}
        return next((c for c in s.draws if c not in expanded), None)

    def passes(s: Node) -> bool:
        same = [other.priority for other in tree if other.depth == s.depth]
        return s.priority >= math.fsum(same) / len(same)

    while len(tree) < budget and any(next_child(s) is not None and passes(s) for s in tree):
        if idle > max_idle:
            break
        path = [root]
        while path[-1].children:
            path.append(max(path[-1].children, key=lambda s: (s.bound(root, exploration), -s.node)))
        chosen = [(s, child) for s in path if passes(s) and (child := next_child(s)) is not None]
        for s in path:
            s.visits += 1
        for s, child in chosen[: budget - len(tree)]:
            extend(s, child)
        idle = 0 if chosen else idle + 1

    # The candidates.
    def ranked(by_logp: bool = False, most: int | None = None) -> list[Leaf]:
        """Evaluated leaves, then others; by log pi alone, or at most so many below each prefix."""
        weight, w = (1.0, 0.0) if by_logp else (logp_weight, 1.0)
        leaves = [Leaf(s.node, s.logp, w * s.value + weight * s.logp) for s in tree if s.depth == length]
        others: list[tuple[Node, Leaf]] = []
        for s in tree:
            if s.depth != length - 1:
                continue
            below = []
            for child, lp in s.child_logp.items():
                score = w * s.value + weight * (s.logp + lp)
                if action_values and not by_logp:
                    score += (value_weight or 1.0) * s.action_value[child]
                below.append(Leaf(child, s.logp + lp, score))
            below.sort(key=lambda leaf: (-leaf.score if action_values else -leaf.logp, leaf.node))
            expanded = {child.node for child in s.children}
            for leaf in below[:most]:
                if is_forced(s):
                    leaves.append(leaf)
                elif leaf.node not in expanded:
                    others.append((s, leaf))
        leaves.sort(key=lambda leaf: (-_float32(leaf.score), leaf.node))
        others.sort(key=lambda o: (-_float32(o[1].score), o[0].node, -o[1].logp, o[1].node))
        return leaves + [leaf for _, leaf in others]

    found = ranked(by_logp=True)[:own]
    for leaf in (ranked(most=completions) if completions else []) + ranked():
        if all(leaf.node != other.node for other in found):
            found.append(leaf)
    return found[:candidates], tree


def _float32(x: float) -> float:
    return torch.tensor(x, dtype=torch.float32).item()
