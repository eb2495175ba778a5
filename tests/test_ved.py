"""Value-guided decoding: the batched search against the sequential reference and against the definition."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vstar_ops
from vstar_ops import SearchTrees, Trie
from vstar_ops.decoding import beam_search, ved
from vstar_ops.ops.ved import Evaluation, Rows, ved_candidates, ved_insert, ved_select
from vstar_ops.reference.ved_search import ved_search


class RandomModel:
    """A ValueModel whose outputs are a pure function of (request, prefix): rows of random tables."""

    def __init__(self, trie: Trie, seed: int, *, spread: float = 2.0, values: float = 1.0) -> None:
        self.trie, self.seed, self.spread, self.values = trie, seed, spread, values
        self.columns = trie.max_token + 1 + 2
        self.calls: list[int] = []

    def _row(self, context: int, node: int) -> np.ndarray:
        rng = np.random.default_rng([self.seed, context, node])
        return rng.normal(size=2 * self.columns + 1).astype(np.float32)

    def _logits(self, context: int, node: int) -> torch.Tensor:
        return torch.from_numpy(self._row(context, node)[: self.columns] * self.spread)

    def prefill(self, context):
        state = [(int(c), 0) for c in context]
        rows = [self._logits(*s) for s in state]
        return torch.stack(rows) if rows else torch.empty(0, self.columns), state

    def extend(self, state, parent, token):
        logits = torch.full((len(parent), self.columns), float("nan"))  # unused rows must not be read
        slot = torch.full((len(parent),), -(2**40))
        self.calls.append(int((parent >= 0).sum()))
        for row, (p, t) in enumerate(zip(parent.tolist(), token.tolist())):
            if p < 0:
                continue
            context, node = state[p]
            children = self.trie.children(node)
            node = int(children.node[children.token == t])  # exactly one: tokens are legal
            state.append((context, node))
            logits[row], slot[row] = self._logits(context, node), len(state) - 1
        return logits, slot

    def value(self, state, slot):
        rows = [self._row(*state[s])[-1] * self.values if s >= 0 else float("nan") for s in slot.tolist()]
        return torch.tensor(rows, dtype=torch.float32)

    def child_value(self, state, slot):
        columns = slice(self.columns, 2 * self.columns)
        rows = [self._row(*state[s])[columns] if s >= 0 else np.full(self.columns, np.nan) for s in slot.tolist()]
        return torch.from_numpy(np.stack(rows).astype(np.float32))


def random_trie(rng: np.random.Generator, length: int, items: int, codes: int) -> Trie:
    return Trie.from_sequences(rng.integers(0, codes, size=(items, length)))


def random_options(rng: np.random.Generator, length: int) -> dict:
    options = {
        "candidates": int(rng.integers(1, 20)),
        "budget": int(rng.integers(length, 60)),
        "width": int(rng.integers(1, 10)),
        "entropy_weight": float(rng.choice([0.0, 0.1, 1.0])),
        "exploration": float(rng.choice([0.0, 0.3, 1.0, 3.0])),
        "logp_weight": float(rng.choice([0.0, 0.0, 0.3, 1.0])),
        "value_weight": float(rng.choice([1.0, 1.0, 0.5, 0.0])),
        "max_idle": int(rng.choice([0, 3, 200])),
    }
    flags = ("evaluate_leaves", "action_values", "expand_root", "skip_forced")
    return options | {name: bool(rng.integers(2)) for name in flags}


def compare(case: int) -> None:
    """One random case, all requests of a batch against the sequential search, node by node."""
    rng = np.random.default_rng(case)
    length = int(rng.integers(1, 5))
    trie = random_trie(rng, length, int(rng.integers(1, 200)), int(rng.integers(2, 12)))
    options = random_options(rng, length)
    contexts = rng.integers(0, 1000, size=int(rng.integers(1, 4)))
    seeds = torch.from_numpy(rng.integers(-(2**62), 2**62, size=len(contexts)))
    model = RandomModel(trie, case, values=float(rng.choice([0.0, 0.3, 1.0])))
    out = ved(model, contexts, trie, seed=seeds, **options)
    trees = out.trees
    assert (out.forward_tokens <= options["budget"]).all()
    for b, context in enumerate(contexts):
        leaves, tree = ved_search(model, [context], trie, seed=int(seeds[b]), **options)
        n = int(trees.size[b])
        position = {id(s): i for i, s in enumerate(tree)}
        assert trees.node[b, :n].tolist() == [s.node for s in tree]
        assert trees.parent[b, :n].tolist() == [position[id(s.parent)] if s.parent else -1 for s in tree]
        assert trees.depth[b, :n].tolist() == [s.depth for s in tree]
        assert trees.visits[b, :n].tolist() == [s.visits for s in tree]
        for name in ("logp", "value", "entropy", "priority"):
            want = torch.tensor([getattr(s, name) for s in tree])
            torch.testing.assert_close(getattr(trees, name)[b, :n], want, rtol=1e-4, atol=1e-5)
        count = int(out.count[b])
        assert out.node[b, :count].tolist() == [leaf.node for leaf in leaves]
        assert (out.node[b, count:] == -1).all() and (out.score[b, count:] == -torch.inf).all()
        for got, name in ((out.logp, "logp"), (out.score, "score")):
            want = torch.tensor([getattr(leaf, name) for leaf in leaves])
            torch.testing.assert_close(got[b, :count], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("block", range(4))
def test_same_decisions_as_the_sequential_search(block, backend):
    for case in range(100 if backend == "cpp" else 10):
        compare(1000 * block + case)
