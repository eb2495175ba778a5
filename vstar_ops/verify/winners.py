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

    def columns(self, node: int) -> list[int]:
        return [v for v, _ in self.children[node]] if 0 <= node < len(self.children) else []


def expand_topk(call: Call, arguments: dict[str, Any]) -> Callable[[Results], Verdict]:
    """What compares results with the best in order, save where scores nearly tie, and with the entropies."""
    a, logits, k = dict(arguments), call.arguments["logits"], arguments["k"]
    double = logits.dtype == torch.float64
    trie, seeds, limit = Children.of(a.pop("trie")), a.pop("gumbel_seed"), limit_of(logits, 1e-5)
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
        ranked, entropy = oracles.expand_topk(**a, trie=trie, gumbel_seeds=seeds, rounded=rounded)

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


def _near(a: float, b: float, tolerance: float) -> bool:
    return a == b or abs(a - b) <= tolerance
