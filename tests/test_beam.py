"""``beam_search`` against exhaustive and level-wise oracles, with a model that is a table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vstar_ops import Trie
from vstar_ops.decoding import beam_search
from vstar_ops.verify import oracles

COLUMNS = 12


def table(context: int, prefix: tuple[int, ...]) -> np.ndarray:
    """The logits after a prefix: a pure function of both."""
    return np.random.default_rng([context, len(prefix), *prefix]).normal(size=COLUMNS).astype(np.float32) * 2


class TableModel:
    """A PrefixModel over ``table``; slots are positions of a list, and every evaluation is written down."""

    finite_logits = True

    def __init__(self) -> None:
        self.evaluated: list[tuple[int, tuple[int, ...]]] = []

    def prefill(self, context):
        state = [(b, c, ()) for b, c in enumerate(context)]
        return torch.from_numpy(np.stack([table(c, ()) for c in context])), state

    def extend(self, state, parent, token):
        assert parent.dtype == token.dtype == torch.int64
        assert parent.shape == token.shape
        logits = torch.full((len(parent), COLUMNS), float("nan"))  # unused rows must not be read
        slots = torch.full((len(parent),), -(2**40))
        for row, (p, t) in enumerate(zip(parent.tolist(), token.tolist())):
            if p == -1:
                continue
            b, context, prefix = state[p]
            prefix = (*prefix, t)
            self.evaluated.append((b, prefix))
            logits[row] = torch.from_numpy(table(context, prefix))
            slots[row] = len(state)
            state.append((b, context, prefix))
        return logits, slots


class Beam(NamedTuple):
    """Sequences best first, their log-probabilities, and the prefixes alive at each depth."""

    sequences: list[tuple[int, ...]]
    logp: list[float]
    alive: list[list[tuple[int, ...]]]


def brute_force(
    table: Callable[[tuple[int, ...]], Any],
    trie: oracles.DictTrie,
    width: int | None,
    normalize: str = "legal",
    temperature: float = 1.0,
) -> Beam:
    """Beam search, level by level, keeping ``width`` prefixes; every one, an exhaustive search, for None."""
    beams: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    alive = []
    for _ in range(trie.length):
        grown = []
        for cum, prefix in beams:
            children = trie.children[trie.node[prefix]]
            row = [float(z) for z in table(prefix)]
            z = [row[v] for v, _ in children]
            logp = oracles.log_softmax(z, z if normalize == "legal" else row, temperature)
            grown += [(cum + p, (*prefix, v)) for (v, _), p in zip(children, logp)]
        beams = sorted(grown, key=lambda x: (-x[0], x[1]))[:width]
        alive.append([prefix for _, prefix in beams])
    return Beam([p for _, p in beams], [s for s, _ in beams], alive)


def check(rows, contexts, width, *, exhaustive=False, normalize="legal", temperature=1.0, skip_forced=True):
    """One search against the oracle; returns the result and the model."""
    length = rows.shape[1]
    trie, want = Trie.from_sequences(rows), oracles.DictTrie(rows.tolist(), length)
    model = TableModel()
    out = beam_search(
        model, contexts, trie, width, normalize=normalize, temperature=temperature, skip_forced=skip_forced
    )
    batch = len(contexts)
    assert out.sequence.shape == (batch, width, length)
    assert out.node.shape == out.logp.shape == (batch, width)
    kinds = [torch.int32, torch.int32, torch.float32, torch.int32, torch.int32]
    assert [x.dtype for x in out] == kinds
    assert len(set(model.evaluated)) == len(model.evaluated), "a prefix was evaluated twice"
    for b, context in enumerate(contexts):

        def logits(prefix, context=context):
            return table(context, prefix)

        beam = brute_force(logits, want, None if exhaustive else width, normalize, temperature)
        n = min(width, len(beam.sequences))
        assert int(out.num_valid[b]) == n
        assert [tuple(s) for s in out.sequence[b, :n].tolist()] == beam.sequences[:n]
        assert out.logp[b, :n].tolist() == pytest.approx(beam.logp[:n], abs=1e-5, rel=1e-5)
        assert out.node[b, :n].tolist() == [want.node[s] for s in beam.sequences[:n]]
        assert (out.sequence[b, n:] == -1).all()
        assert (out.node[b, n:] == -1).all()
        assert (out.logp[b, n:] == -np.inf).all()

        alive = [p for level in beam.alive[:-1] for p in level[:width]]
        if skip_forced and normalize == "legal":
            needed = [p for p in alive if len(want.children[want.node[p]]) > 1]
            alive = list({p[:i] for p in needed for i in range(1, len(p) + 1)})
        if not exhaustive:
            assert sorted(p for c, p in model.evaluated if c == b) == sorted(alive)
        assert int(out.forward_tokens[b]) == 1 + sum(c == b for c, _ in model.evaluated)
    return out, model


def catalogue(seed, num, length, high=COLUMNS):
    return np.random.default_rng(seed).integers(0, high, (num, length))


@given(
    seed=st.integers(0, 2**32 - 1),
    num=st.integers(1, 40),
    length=st.integers(1, 5),
    high=st.integers(1, COLUMNS),
    batch=st.integers(1, 3),
    width=st.integers(1, 12),
    normalize=st.sampled_from(["legal", "vocab"]),
    temperature=st.sampled_from([1.0, 0.7, 2.0]),
    skip_forced=st.booleans(),
)
def test_oracle(backend, seed, num, length, high, batch, width, normalize, temperature, skip_forced):
    rows = catalogue(seed, num, length, high)
    contexts = list(range(seed % 1000, seed % 1000 + batch))
    check(rows, contexts, width, normalize=normalize, temperature=temperature, skip_forced=skip_forced)


@pytest.mark.parametrize("skip_forced", [True, False])
@pytest.mark.parametrize("normalize", ["legal", "vocab"])
@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_a_wide_beam_is_exhaustive(backend, length, normalize, skip_forced):
    rows = catalogue(length, 30, length, 4)
    for width in (30, 41):
        check(rows, [5, 6], width, exhaustive=True, normalize=normalize, skip_forced=skip_forced)


@given(
    seed=st.integers(0, 2**32 - 1), num=st.integers(1, 40), length=st.integers(1, 5), width=st.integers(1, 9)
)
def test_skipping_changes_nothing_but_the_cost(backend, seed, num, length, width):
    trie = Trie.from_sequences(catalogue(seed, num, length, 5))
    fast, slow = (beam_search(TableModel(), [1, 2, 3], trie, width, skip_forced=s) for s in (True, False))
    assert torch.equal(fast.sequence, slow.sequence)
    assert torch.equal(fast.node, slow.node)
    assert torch.equal(fast.num_valid, slow.num_valid)
    torch.testing.assert_close(fast.logp, slow.logp, rtol=0, atol=0)
    assert (fast.forward_tokens <= slow.forward_tokens).all()


def test_forced_chains_are_not_evaluated(backend):
    """Six items that differ in the first token only: after the root nothing is uncertain."""
    rows = np.array([[v, v + 1, v + 2] for v in range(6)])
    out, model = check(rows, [0, 1], 4)
    assert model.evaluated == []
    assert out.forward_tokens.tolist() == [1, 1]
    out, _ = check(rows, [0, 1], 4, skip_forced=False)
    assert out.forward_tokens.tolist() == [9, 9]


def test_a_skipped_prefix_is_caught_up(backend):
    """The second token is forced and the third is not, so the skipped first prefix is run after all."""
    rows = np.array([[a, 5, b, 7] for a in range(3) for b in range(2)])
    out, model = check(rows, [3], 6)
    assert sorted(p for _, p in model.evaluated) == [(0,), (0, 5), (1,), (1, 5), (2,), (2, 5)]
    assert out.forward_tokens.tolist() == [7]
    out, _ = check(rows, [3], 6, skip_forced=False)
    assert out.forward_tokens.tolist() == [13]


def test_a_long_skipped_chain_is_caught_up(backend):
    rows = np.array([[0, 1, 2, 3, 4], [0, 1, 2, 3, 5], [6, 6, 6, 6, 6], [7, 0, 1, 6, 1], [7, 0, 2, 6, 1]])
    _, model = check(rows, [9], 4)
    assert {p for _, p in model.evaluated} == {(0, 1, 2, 3)[: i + 1] for i in range(4)} | {(7,), (7, 0)}


def test_no_more_than_the_budget(backend):
    """1 + 2 K for L = 3, and less with skipping."""
    rows = catalogue(8, 400, 3)
    out, _ = check(rows, [1, 2], 8, skip_forced=False)
    assert out.forward_tokens.tolist() == [17, 17]
    out, _ = check(rows, [1, 2], 8)
    assert (out.forward_tokens <= 17).all()


@pytest.mark.parametrize("skip_forced", [True, False])
def test_a_catalogue_smaller_than_the_width(backend, skip_forced):
    out, _ = check(np.array([[1, 2, 3], [1, 2, 4], [1, 2, 4]]), [0], 5, skip_forced=skip_forced)
    assert out.num_valid.tolist() == [2]
    assert out.sequence[0, 2:].tolist() == [[-1] * 3] * 3


@pytest.mark.parametrize("skip_forced", [True, False])
@pytest.mark.parametrize("normalize", ["legal", "vocab"])
def test_an_empty_catalogue(backend, normalize, skip_forced):
    out, model = check(np.zeros((0, 3), np.int64), [0, 1], 2, normalize=normalize, skip_forced=skip_forced)
    assert out.num_valid.tolist() == [0, 0]
    assert model.evaluated == []


def test_vocab_cannot_skip(backend):
    rows = np.array([[v, v + 1, v + 2] for v in range(6)])
    out, _ = check(rows, [0], 3, normalize="vocab")
    assert out.forward_tokens.tolist() == [7]
    assert (out.logp < 0).all()


def test_requests_alone_as_in_a_batch(backend):
    trie = Trie.from_sequences(catalogue(11, 60, 4, 6))
    together = beam_search(TableModel(), [4, 5, 6], trie, 7)
    for b, context in enumerate((4, 5, 6)):
        alone = beam_search(TableModel(), [context], trie, 7)
        assert all(torch.equal(a[0], t[b]) for a, t in zip(alone, together))


@pytest.mark.parametrize(
    ("arguments", "error", "name"),
    [
        ({"beam_width": 0}, ValueError, "beam_width"),
        ({"normalize": "all"}, ValueError, "normalize"),
        ({"temperature": 0.0}, ValueError, "temperature"),
    ],
)
def test_errors(arguments, error, name):
    trie = Trie.from_sequences(catalogue(0, 5, 2))
    with pytest.raises(error, match=f"^({name}) must"):
        beam_search(TableModel(), [0], trie, **{"beam_width": 2, **arguments})


def test_the_vocabulary_needs_all_columns(backend):
    """A model that says that it gives some columns alone cannot be normalized over the vocabulary."""
    trie = Trie.from_sequences(catalogue(0, 20, 3))
    model = TableModel()
    model.partial_logits = True
    with pytest.raises(ValueError, match="normalize='vocab' needs the logits of all columns"):
        beam_search(model, [0], trie, 4, normalize="vocab")
    model.partial_logits = False
    beam_search(model, [0], trie, 4, normalize="vocab")
