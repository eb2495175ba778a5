"""The winners of ``expand_topk`` against its oracle."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from ..trie import Trie
from . import oracles
from .calls import Call
from .judge import Results, Verdict, Want, limit_of

FIELDS = (".score", ".logp", ".parent", ".token", ".node")


class Children(NamedTuple):
    """The children of each node of a trie, ``(token, node)``, as its arrays have them."""

    children: list[list[tuple[int, int]]]

    @classmethod
    def of(cls, trie: Trie) -> Children:
        offset, token = trie.offset.tolist(), trie.token.tolist()
        return cls([[(token[e], e + 1) for e in range(*ends)] for ends in zip(offset, offset[1:])])

    @classmethod
    def of_requests(cls, trie: Trie, batch: int) -> list[Children]:
        """For each request those that a restricted trie leaves."""
        every = cls.of(trie)
        if trie.alive is None:
            return [every] * batch
        words = trie.alive.tolist()

        def left(word: list[int]) -> Children:
            alive = [word[n // 32] >> n % 32 & 1 for n in range(trie.num_nodes)]
            return cls([[child for child in row if alive[child[1]]] for row in every.children])

        found = [left(word) for word in words]
        return found * batch if len(found) == 1 else found

    def columns(self, node: int) -> list[int]:
        return [v for v, _ in self.children[node]] if 0 <= node < len(self.children) else []


def expand_topk(call: Call, arguments: dict[str, Any]) -> Callable[[Results], Verdict]:
    """What compares results with the best in order, save where scores nearly tie, and with the entropies."""
    a, logits, k = dict(arguments), call.arguments["logits"], arguments["k"]
    double = logits.dtype == torch.float64
    tries = Children.of_requests(a.pop("trie"), len(a["node"]))
    seeds, limit = a.pop("gumbel_seed"), limit_of(logits, 1e-5)
    row = a.pop("row")
    if row is not None:
        for name in ("logits", "child_value"):
            if a[name] is not None:
                padded = np.concatenate([a[name], np.zeros((1, a[name].shape[1]))])
                a[name] = padded[np.where((row >= 0) & (row < len(a[name])), row, len(a[name]))]
    del a["k"]
    if isinstance(seeds, int):
        seeds = oracles.splitmix64(seeds, len(a["node"]))
    rounded = float if double else oracles.float32
    with np.errstate(all="ignore"):
        ranked, entropy = oracles.expand_topk(**a, trie=tries, gumbel_seeds=seeds, rounded=rounded)

    def compare(got: Results) -> Verdict:
        verdict = Verdict()
        verdict.floats(".entropy", got[".entropy"], Want(entropy, 1.0, limit))
        verdict.exactly(".num_valid", got[".num_valid"], [min(k, len(every)) for every in ranked])
        if any(tuple(got[name].shape) != (len(ranked), k) for name in FIELDS):
            verdict.choice(".token.shape", tuple(got[".token"].shape), (len(ranked), k))
            return verdict
        for b, every in enumerate(ranked):
            _winners_of(
                verdict, {name: got[name][b].tolist() for name in FIELDS}, b, every[:k], every, k, limit
            )
        return verdict

    return compare


def _winners_of(
    verdict: Verdict,
    got: dict[str, list[Any]],
    b: int,
    best: list[oracles.Candidate],
    every: list[oracles.Candidate],
    k: int,
    limit: float,
) -> None:
    """The winners of one request."""
    index = {(c.parent, c.token): c for c in every}
    place: dict[tuple[int, int], int] = {}
    for i in range(k):
        at = {name: f"{name}[{b}, {i}].item()" for name in FIELDS}
        score, logp, parent, token, node = (got[name][i] for name in at)
        if i >= len(best):
            for name, padding in zip(at, (-math.inf, -math.inf, -1, -1, -1)):
                if got[name][i] != padding:
                    verdict.choice(at[name], got[name][i], padding)
            continue
        want, own = best[i], index.get((parent, token))
        allowed = limit * max(want.scale, own.scale if own else 0)
        first, second = (".parent", ".token")[:: 1 if parent != want.parent else -1]
        differs = at[first], got[first][i], getattr(want, first[1:])
        if own is None or (parent, token) in place or not _near(own.score, want.score, allowed):
            if differs[1] == differs[2]:  # the right one, for the second time
                differs = at[second], (parent, token), "no child twice"
            verdict.choice(*differs)
            continue
        place[parent, token] = i
        if node != own.node:
            verdict.choice(at[".node"], node, own.node)
        for name, is_, x, scale in (
            (".score", score, own.score, max(own.scale, want.scale)),
            (".logp", logp, own.logp, max(1.0, abs(own.logp), own.scale)),
        ):
            verdict.floats("", torch.tensor(is_, dtype=torch.float64), Want(float(x), scale, limit))
            if verdict.problems and verdict.problems[-1].where == ".item()":
                verdict.problems[-1] = verdict.problems[-1]._replace(where=at[name])
        before = (got[".score"][i - 1], -got[".parent"][i - 1], -got[".token"][i - 1]) if i else None
        if before is not None and before < (score, -parent, -token):
            verdict.choice(*differs if differs[1] != differs[2] else (at[".score"], score, before[0]))
    _twins(verdict, b, best, every, place)


def _twins(
    verdict: Verdict,
    b: int,
    best: list[oracles.Candidate],
    every: list[oracles.Candidate],
    place: dict[tuple[int, int], int],
) -> None:
    """Children of a prefix that cannot be told apart, save by noise, stand in the order of their tokens."""
    first: dict[Any, oracles.Candidate] = {}
    for c in sorted(every, key=lambda c: (c.parent, c.token)):
        key = c.parent, c.twin, c.score
        before = first.get(key)
        if before is not None and (i := place.get((c.parent, c.token))) is not None:
            j = place.get((before.parent, before.token))
            if j is None or j > i:
                verdict.choice(f".token[{b}, {i}].item()", c.token, before.token)
        first[key] = c


def ved_evaluate(call: Call, a: dict[str, Any]) -> Callable[[Results], Verdict]:
    """What compares both lists of every row with what belongs to them in order, and the other results."""
    logits, trie, rows, trees = (a[name] for name in ("logits", "trie", "rows", "trees"))
    children, count, limit = Children.of(trie), math.prod(logits.shape[:2]), 1e-5
    levels, value = trees.depth_sum.shape[1] - 1, np.zeros(rows.node.shape)
    if a["value"] is not None:
        value = a["value_weight"] * a["value"]
    each = {
        "logits": logits.reshape(count, 1, logits.shape[2]),
        "trie": [x for x in Children.of_requests(trie, len(logits)) for _ in range(logits.shape[1])],
        "node": rows.node.reshape(count, 1),
    }
    each |= {"cum_logp": rows.logp.reshape(count, 1)} | {x: a[x] for x in ("temperature", "normalize")}
    rank: dict[str, Any] = {}
    if a["child_value"] is not None:
        rank = {
            "child_value": a["child_value"].reshape(count, 1, logits.shape[2]),
            "logp_weight": a["logp_weight"],
        }
        rank["value_weight"] = a["value_weight"] or 1.0

    def leaf_of(node: int, follow: bool) -> int | None:
        while follow and len(children.children[node]) == 1:
            ((_, node),) = children.children[node]
        return node if node >= trie.level_offset[-2] else None

    with np.errstate(all="ignore"):
        drawn, entropy = oracles.expand_topk(**each, gumbel_seeds=a["seeds"].repeat(rows.node.shape[1]))
        listed, _ = oracles.expand_topk(**each, **rank)
    for n, node in enumerate(rows.node.reshape(count)):
        is_open = node < trie.level_offset[levels] and (node != 0 or a["expand_root"])
        skip = a["skip_forced"]
        drawn[n] = [c for c in drawn[n] if is_open and (not skip or leaf_of(c.node, True) is None)]
        listed[n] = [c._replace(node=leaf) for c in listed[n] if (leaf := leaf_of(c.node, skip)) is not None]

    def compare(got: Results) -> Verdict:
        verdict = Verdict()
        verdict.exactly(".slot", got[".slot"], a["slot"])
        verdict.floats(".value", got[".value"], Want(value, np.maximum(np.abs(value), 1.0), limit))
        verdict.floats(".entropy", got[".entropy"], Want(entropy.reshape(rows.node.shape), 1.0, limit))
        for kind, number, every in (("child", "children", drawn), ("leaf", "leaves", listed)):
            node, logp = got[f".{kind}_node"], got[f".{kind}_logp"]
            width = getattr(trees, f"{kind}_node").shape[2]
            counts = np.array([min(width, len(x)) for x in every]).reshape(rows.node.shape)
            verdict.exactly(f".num_{number}", got[f".num_{number}"], counts)
            if tuple(node.shape) != (*rows.node.shape, width):
                verdict.choice(f".{kind}_node.shape", tuple(node.shape), (*rows.node.shape, width))
                continue
            own = [_entries(verdict, f".{kind}_node", node, i, x, limit) for i, x in enumerate(every)]
            of_logp = np.array([[x.logp for x in row] for row in own]).reshape(node.shape)
            verdict.floats(f".{kind}_logp", logp, Want(of_logp, _scale(of_logp), limit))
            if kind == "leaf":
                score = (
                    of_logp * a["logp_weight"]
                    if a["logp_weight"] != 0
                    else np.where(of_logp == -np.inf, of_logp, 0)
                )
                if rank:
                    score = np.array([[x.score for x in row] for row in own]).reshape(node.shape)
                scale = np.array([[x.scale for x in row] for row in own]).reshape(node.shape)
                score = np.where(of_logp == -np.inf, of_logp, value[:, :, None] + score)
                verdict.floats(
                    ".leaf_score", got[".leaf_score"], Want(score, np.maximum(scale, _scale(score)), limit)
                )
        return verdict

    return compare


NOTHING = oracles.Candidate(-math.inf, -math.inf, -1, -1, -1, 1.0, (0.0, 0.0))


def _scale(x: np.ndarray) -> np.ndarray:
    return np.maximum(np.nan_to_num(np.abs(x), posinf=1.0), 1.0)


def _entries(
    verdict: Verdict, name: str, got: torch.Tensor, n: int, best: list[oracles.Candidate], limit: float
) -> list[oracles.Candidate]:
    """What row ``n`` lists, by its nodes; whether they are the best, in order, and equal ones by token."""
    index, b, p = {c.node: c for c in best}, *divmod(n, got.shape[1])
    found: list[oracles.Candidate] = []
    last: dict[Any, int] = {}
    for i, node in enumerate(got[b, p].tolist()):
        want = best[i] if i < len(best) else NOTHING
        own = index.pop(node, NOTHING)
        allowed = limit * max(want.scale, own.scale)
        twins = own.twin, own.score
        if node != own.node or not _near(own.score, want.score, allowed) or last.get(twins, -1) > own.token:
            verdict.choice(f"{name}[{b}, {p}, {i}].item()", node, want.node)
        last[twins] = own.token
        found.append(own)
    return found


def _near(a: float, b: float, tolerance: float) -> bool:
    return a == b or abs(a - b) <= tolerance
