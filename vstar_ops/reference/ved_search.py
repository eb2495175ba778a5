"""Value-guided efficient decoding of one request, one prefix after the other, in plain Python.

What :func:`vstar_ops.decoding.ved` must do, written down as V-STAR states it (arXiv 2602.10699, Eqs. 10-14):
objects and lists, no batching. It is installed so that it can be read and compared with.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..noise import gumbel
from ..trie import Trie

if TYPE_CHECKING:
    from ..decoding import VEDConfig


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
    child_value: dict[int, float]
    draws: list[int]  # those of them that are ever evaluated, in the order in which they are drawn
    visits: int = 0
    children: list[Node] = field(default_factory=list)
    expanded: set[int] = field(default_factory=set)  # children that are in the tree, or will be next

    def bound(self, root: Node, exploration: float) -> float:
        """U(s), Eq. 11."""
        return self.priority + exploration * math.sqrt(math.log(root.visits + 1) / (self.visits + 1))


@dataclass
class Leaf:
    """A candidate, or a prefix that may become one."""

    node: int
    logp: float
    score: float


def ved_search(
    model: Any, context: Any, trie: Trie, num_candidates: int, config: VEDConfig, *, seed: int = 0
) -> tuple[list[Leaf], list[Node]]:
    """Search one request; arguments as in :func:`vstar_ops.decoding.ved`.

    Args:
        context: a batch of one prompt.
        seed: the request's own seed, as an element of ``ved``'s ``seed[B]``.

    Returns:
        The candidates, best first, and all evaluated nodes in the order of their evaluation.
    """
    search = _Search(model, trie, config, seed, config.forward_budget(trie.length, num_candidates))
    search.plant(context)
    while selected := search.select():
        for parent, child in selected:
            search.extend(parent, child)
    return search.candidates(num_candidates), search.tree


class _Search:
    def __init__(self, model: Any, trie: Trie, config: VEDConfig, seed: int, budget: int) -> None:
        self.model, self.trie, self.config = model, trie, config
        self.seed, self.budget = seed, budget
        self.levels = trie.length if config.evaluate_leaves else trie.length - 1
        certain = config.normalize == "legal" and getattr(model, "finite_logits", False)
        self.skip_forced = config.skip_forced and certain and not config.evaluate_leaves
        self.child_weight = config.value_weight or 1.0
        self.edges: list[int] = trie.offset.tolist()
        self.tree: list[Node] = []

    def plant(self, context: Any) -> None:
        """Step 1, the initial beam search."""
        config = self.config
        logits, self.state = self.model.prefill(context)
        frontier = [self.evaluate(0, None, 0.0, logits[0], 0)]
        width = min(config.beam_width, max(1, (self.budget - 1) // max(self.levels, 1)))
        reserved = 1
        for _ in range(self.levels):
            width = min(width, self.budget - reserved)
            reserved += width
            extensions = [
                (i, beam, self.extension(beam, child))
                for i, beam in enumerate(frontier)
                for child in beam.child_logp
            ]
            extensions.sort(key=lambda e: (-e[2].logp, e[0], e[2].node))
            best = self.beams(extensions, width - config.num_value_beams)
            if config.num_value_beams:
                extensions.sort(key=lambda e: (-e[2].score, e[0], e[2].node))
                best += [e for e in self.beams(extensions, width) if e not in best]
            frontier = [self.extend(parent, extension.node) for _, parent, extension in best[: max(width, 0)]]

    def beams(self, extensions: list[tuple[int, Node, Leaf]], count: int) -> list[tuple[int, Node, Leaf]]:
        """The first ``count``, without those that stand for a leaf."""
        if not self.skip_forced:
            return extensions[: max(count, 0)]
        listed = extensions[: max(count, 0) * self.config.LISTED_PER_BEAM]
        return [e for e in listed if self.leaf_of(e[2].node) is None][: max(count, 0)]

    def leaf_of(self, node: int) -> int | None:
        """The leaf that a prefix stands for: itself, or with ``skip_forced`` the only one below it."""
        while self.skip_forced and self.edges[node + 1] - self.edges[node] == 1:
            node = self.edges[node] + 1
        return node if node >= self.trie.level_offset[-2] else None

    def extend(self, parent: Node, child: int) -> Node:
        """Step 4, for one new child."""
        token, slot = self.trie.token[child - 1].long(), torch.tensor([parent.slot])
        logits, slot = self.model.extend(self.state, slot, token[None])
        node = self.evaluate(child, parent, self.logp_of(parent, child), logits[0], int(slot[0]))
        parent.children.append(node)
        parent.expanded.add(child)
        return node

    def evaluate(self, node: int, parent: Node | None, logp: float, logits: Tensor, slot: int) -> Node:
        """The node of a prefix that the model has seen; it joins the tree."""
        config, at = self.config, torch.tensor([slot])
        value = 0.0
        if config.value_weight != 0:
            value = _float32(config.value_weight * _float32(self.model.value(self.state, at)[0].item()))
        children = [int(c) for c in self.trie.children(node).node.tolist() if c >= 0]
        tokens = self.trie.token[torch.tensor(children, dtype=torch.int64) - 1].long()
        logits = logits.double() / config.temperature
        legal_logp = logits[tokens].log_softmax(0)
        entropy = -(legal_logp.exp() * legal_logp).sum().item() if len(children) > 1 else 0.0
        child_logp = legal_logp if config.normalize == "legal" else logits.log_softmax(0)[tokens]
        noise = gumbel(torch.tensor(self.seed), torch.tensor(node), tokens)
        draws = [children[i] for i in (child_logp + noise).argsort(descending=True).tolist()]
        if self.skip_forced:
            draws = [child for child in draws if self.leaf_of(child) is None]
        child_value = (
            self.model.child_value(self.state, at)[0][tokens].tolist() if config.child_values else []
        )
        priority = value + config.entropy_weight * _float32(entropy)  # Eq. 10
        if config.logp_weight != 0:
            priority += config.logp_weight * _float32(logp)
        result = Node(
            node, parent, parent.depth + 1 if parent else 0, logp, slot, value, entropy, _float32(priority),
            dict(zip(children, child_logp.tolist())), dict(zip(children, child_value)), draws,
        )  # fmt: skip
        self.tree.append(result)
        return result

    def logp_of(self, parent: Node, child: int) -> float:
        return parent.logp + parent.child_logp[child]

    def extension(self, parent: Node, child: int) -> Leaf:
        """A child that was not evaluated, and what ranks it."""
        return Leaf(child, self.logp_of(parent, child), self.worth(parent, child))

    def worth(self, parent: Node, child: int) -> float:
        """What ranks a child that was not evaluated; a child value counts only with ``child_values``."""
        worth = parent.value + self.config.logp_weight * self.logp_of(parent, child)
        return worth + self.child_weight * parent.child_value.get(child, 0.0)

    def select(self) -> list[tuple[Node, int]]:
        """Steps 2 and 3: the new children of a round, with their parents."""
        selected: list[tuple[Node, int]] = []
        for _ in range(self.config.traversals_per_round):
            for _ in range(self.config.max_idle + 1):
                room = self.budget - len(self.tree) - len(selected)
                if room == 0 or not any(self.next_child(s) is not None and self.passes(s) for s in self.tree):
                    return selected
                if found := self.traverse()[:room]:
                    break
            else:
                self.budget = len(self.tree) + len(selected)
                return selected
            for parent, child in found:
                parent.expanded.add(child)
            selected += found
        return selected

    def traverse(self) -> list[tuple[Node, int]]:
        """One walk from the root, and what it would expand."""
        root, exploration = self.tree[0], self.config.exploration
        path = [root]
        while path[-1].children:
            path.append(max(path[-1].children, key=lambda s: (s.bound(root, exploration), -s.node)))
        found = [(s, child) for s in path if self.passes(s) and (child := self.next_child(s)) is not None]
        for s in path:
            s.visits += 1
        return found

    def next_child(self, s: Node) -> int | None:
        if s.depth >= self.levels or (s.depth == 0 and not self.config.expand_root):
            return None
        return next((child for child in s.draws if child not in s.expanded), None)

    def passes(self, s: Node) -> bool:
        """The gate: G is at least the mean of the depth."""
        same = [other.priority for other in self.tree if other.depth == s.depth]
        return s.priority >= math.fsum(same) / len(same)

    def candidates(self, k: int) -> list[Leaf]:
        """The policy's own, those of distinct prefixes, the others."""
        most = self.config.max_leaves_per_prefix
        found = self.ranked(by_logp=True)[: self.config.num_policy_candidates]
        for leaf in (self.ranked(most=most) if most is not None else []) + self.ranked():
            if all(leaf.node != other.node for other in found):
                found.append(leaf)
        return found[:k]

    def ranked(self, *, by_logp: bool = False, most: int | None = None) -> list[Leaf]:
        """Evaluated leaves, then others: by log pi alone, or at most ``most`` below each prefix."""
        length, weight = self.trie.length, self.config.logp_weight
        leaves = [
            Leaf(s.node, s.logp, s.logp if by_logp else s.value + weight * s.logp)
            for s in self.tree
            if s.depth == length
        ]
        leaves.sort(key=lambda leaf: (-_float32(leaf.score), leaf.node))
        others: list[tuple[Node, Leaf]] = []
        for s in self.tree:
            below = []
            for child in s.child_logp:
                if (node := self.leaf_of(child)) is not None:
                    logp = self.logp_of(s, child)
                    below.append(Leaf(node, logp, logp if by_logp else self.worth(s, child)))
            by_score = self.config.child_values and not by_logp
            below.sort(key=lambda leaf: (-leaf.score if by_score else -leaf.logp, leaf.node))
            others += [(s, leaf) for leaf in below[:most] if leaf.node not in s.expanded]
        others.sort(key=lambda o: (-_float32(o[1].score), o[0].node, -o[1].logp, o[1].node))
        return leaves + [leaf for _, leaf in others]


def _float32(x: float) -> float:
    return torch.tensor(x, dtype=torch.float32).item()
