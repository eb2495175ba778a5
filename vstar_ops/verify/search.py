"""The steps of the tree search in plain Python, one tree after the other, as their docstrings have them.

A search is a dictionary of numpy arrays, the fields of ``SearchTrees`` by name, which change in place.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from .oracles import FLOAT32_MAX, float32

Arrays = dict[str, np.ndarray]


def select(trees: Arrays, *, exploration: float, traversals: int, max_idle: int) -> Arrays:
    """The rows of ``ved_select``, after which ``visits``, ``next_child`` and ``budget`` have changed."""
    batch, levels = len(trees["size"]), trees["depth_sum"].shape[1] - 1
    shape = batch, traversals * levels
    rows = {
        "parent": np.full(shape, -1, np.int32),
        "node": np.full(shape, -1, np.int32),
        "logp": np.full(shape, -math.inf, np.float32),
    }
    for b in range(batch):
        tree = {name: array[b] for name, array in trees.items()}
        pending = 0
        for path in range(traversals):
            for depth, s in enumerate(_expanded(tree, trees["budget"][b:], pending, exploration, max_idle)):
                if s is None:
                    continue
                at, child = path * levels + depth, tree["next_child"][s]
                rows["parent"][b, at], rows["node"][b, at] = s, tree["child_node"][s, child]
                rows["logp"][b, at] = tree["child_logp"][s, child]
                tree["next_child"][s] += 1
                pending += 1
    return rows


def _expanded(
    tree: Arrays, budget: np.ndarray, pending: int, exploration: float, max_idle: int
) -> list[int | None]:
    """By depth, the nodes of the next path that give a child; those of the first that gives any."""
    size = int(tree["size"])
    for idle in range(max_idle + 2):
        can = set(_can_expand(tree, size))
        room = int(budget[0]) - size - pending
        if not can or room <= 0:
            return []
        if idle > max_idle:
            budget[0] = size + pending
            return []
        path = [0]
        while children := [s for s in range(1, size) if tree["parent"][s] == path[-1]]:
            path.append(max(children, key=lambda s: (_bound(tree, s, exploration), -tree["node"][s])))
        tree["visits"][path] += 1
        found: list[int | None] = []
        for s in path:
            gives = s in can and room > 0 and len(found) < len(tree["depth_sum"]) - 1
            room -= gives
            found.append(s if gives else None)
        if any(s is not None for s in found):
            return found
    raise AssertionError


def _can_expand(tree: Arrays, size: int) -> Iterator[int]:
    """Nodes with an unexpanded child whose G is at least the mean of their depth."""
    for s in range(size):
        while (n := tree["next_child"][s]) < tree["num_children"][s] and (
            tree["child_node"][s, n] in tree["node"][:size]
        ):
            tree["next_child"][s] += 1
        depth = tree["depth"][s]
        mean = tree["depth_sum"][depth] / max(tree["depth_count"][depth], 1)
        if n < tree["num_children"][s] and tree["priority"][s] >= mean:
            yield s


def _bound(tree: Arrays, s: int, exploration: float) -> float:
    root, own = int(tree["visits"][0]), int(tree["visits"][s])
    return float(tree["priority"][s]) + exploration * math.sqrt(math.log1p(root) / (own + 1))


def insert(
    trees: Arrays, rows: Arrays, evaluation: Arrays, *, entropy_weight: float, logp_weight: float
) -> None:
    """``ved_insert``."""
    given = {**evaluation, **rows}
    for b, r in np.argwhere(rows["node"] >= 0):
        n = int(trees["size"][b])
        if n == trees["node"].shape[1]:
            continue
        for name, array in given.items():
            trees[name][b, n] = array[b, r]
        value = float(given["value"][b, r])
        value = -FLOAT32_MAX if math.isnan(value) else min(max(value, -FLOAT32_MAX), FLOAT32_MAX)
        gain = value + entropy_weight * float(given["entropy"][b, r])
        if logp_weight != 0:
            gain += logp_weight * float(given["logp"][b, r])
        gain = -FLOAT32_MAX if math.isnan(gain) else min(max(gain, -FLOAT32_MAX), FLOAT32_MAX)
        parent = int(given["parent"][b, r])
        depth = int(trees["depth"][b, parent]) + 1 if parent >= 0 else 0
        trees["value"][b, n], trees["priority"][b, n] = value, float32(gain)
        trees["visits"][b, n] = trees["next_child"][b, n] = 0
        trees["depth"][b, n] = depth
        trees["depth_sum"][b, depth] += float32(gain)
        trees["depth_count"][b, depth] += 1
        trees["size"][b] += 1


def candidates(trees: Arrays, length: int, k: int, *, logp_weight: float) -> Arrays:
    """``ved_candidates``: ``node``, ``logp``, ``score`` and ``num_valid``."""
    batch = len(trees["size"])
    out = {
        "node": np.full((batch, k), -1),
        "logp": np.full((batch, k), -math.inf),
        "score": np.full((batch, k), -math.inf),
        "num_valid": np.zeros(batch, np.int64),
    }
    for b in range(batch):
        tree = {name: array[b] for name, array in trees.items()}
        nodes = range(int(tree["size"]))
        leaves = [s for s in nodes if tree["depth"][s] == length]
        found = []
        for s in leaves:
            logp, score = float(tree["logp"][s]), float(tree["value"][s])
            score = float32(score + logp_weight * logp if logp_weight != 0 else score)
            found.append((0, -score, int(tree["node"][s]), 0.0, 0, logp))
        evaluated = {int(tree["node"][s]) for s in leaves}
        for s in nodes:
            for j in range(int(tree["num_leaves"][s])):
                leaf, logp = int(tree["leaf_node"][s, j]), float(tree["leaf_logp"][s, j])
                if leaf not in evaluated:
                    found.append(
                        (1, -float(tree["leaf_score"][s, j]), int(tree["node"][s]), -logp, leaf, logp)
                    )
        found = sorted(found)[:k]
        out["num_valid"][b] = len(found)
        for i, (tier, score, node, _, leaf, logp) in enumerate(found):
            out["node"][b, i] = leaf if tier else node
            out["logp"][b, i], out["score"][b, i] = logp, -score
    return out


def inputs(trees: Arrays, token: np.ndarray, rows: Arrays) -> Arrays:
    """``ved_inputs``."""
    shape = rows["node"].shape
    out = {"slot": np.full(shape, -1), "token": np.zeros(shape, np.int64), "unused": rows["node"] < 0}
    for b, p in np.argwhere(rows["node"] >= 0):
        parent, node = int(rows["parent"][b, p]), int(rows["node"][b, p])
        if 0 <= parent < trees["slot"].shape[1]:
            out["slot"][b, p] = trees["slot"][b, parent]
        if 1 <= node <= len(token):
            out["token"][b, p] = token[node - 1]
    return out


def beams(
    trees: Arrays, rows: Arrays, lists: list[Arrays], num_first: int, width: int, leaf: np.ndarray | None
) -> Arrays:
    """``ved_beams``; ``leaf`` says which nodes stand for a leaf."""
    batch = len(trees["size"])
    out: Arrays = {x: np.full((batch, width), -1) for x in ("parent", "node")}
    out["logp"] = np.full((batch, width), -math.inf)
    for b in range(batch):
        start, n = int(trees["size"][b]) - int((rows["node"][b] >= 0).sum()), 0
        for found, most in zip(lists, (num_first, width)):
            for node, parent, logp in zip(*(found[x][b] for x in ("node", "parent", "logp"))):
                skipped = leaf is not None and 0 <= node < len(leaf) and leaf[node] >= 0
                if node < 0 or skipped or n >= min(most, width):
                    continue
                if found is lists[0] or node not in out["node"][b, : min(n, num_first)]:
                    out["parent"][b, n], out["node"][b, n], out["logp"][b, n] = start + parent, node, logp
                    n += 1
    return out
