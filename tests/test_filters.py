"""``filter_items``: by hand, against sets of items, at its edges.

The table below teaches the op; read it first. What catalogues and searches make of it is in
``test_restricted_trie.py``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vstar_ops import ItemFilter, Trie, filter_items
from vstar_ops.reference.filters import num_words, pack_bits, unpack_bits
from vstar_ops.verify import oracles, sampling
from vstar_ops.verify.winners import Children

# ---------------------------------------------------------------- by hand

# Items 0 and 1 share a sequence, the leaf 3; items 2 and 3 are the leaves 4 and 5; above them are nodes 1, 2.
ROWS = [[0, 3], [0, 3], [0, 4], [2, 3]]


class Step(NamedTuple):
    lesson: str
    before: set[int]  # allowed items
    row: list[int] | None
    allow: bool
    items: set[int]
    nodes: set[int]
    within: set[int] | None = None


STEPS = [
    Step("A banned item takes its leaf along, and what leads to this leaf alone.",
         {0, 1, 2, 3}, [3], False, {0, 1, 2}, {0, 1, 3, 4}),
    Step("A leaf stays while it has another item.", {0, 1, 2, 3}, [1], False, {0, 2, 3}, {0, 1, 2, 3, 4, 5}),
    Step("Both of its items.", {0, 1, 2, 3}, [1, 0], False, {2, 3}, {0, 1, 2, 4, 5}),
    Step("Nothing is left.", {2}, [2], False, set(), set()),
    Step("An allowed item brings back all that leads to it.", set(), [3], True, {3}, {0, 2, 5}),
    Step("What is no item is skipped, and one may be listed twice.",
         {2}, [-1, 3, 4, 3, 99], True, {2, 3}, {0, 1, 2, 4, 5}),
    Step("within: who asks for other items does not get them.",
         {2}, [0, 3], True, {0, 2}, {0, 1, 3, 4}, {0, 2}),
    Step("within: bans do not ask.", {2, 3}, [3], False, {2}, {0, 1, 4}, {0, 2}),
    Step("Nothing is listed.", {2}, [], True, {2}, {0, 1, 4}),
    Step("Without a list the nodes are computed from the items.", {1}, None, True, {1}, {0, 1, 3}),
]  # fmt: skip


def packed(members: set[int], n: int) -> torch.Tensor:
    return pack_bits(torch.tensor([[i in members for i in range(n)]]))


def bits_of(trie: Trie, items: set[int]) -> ItemFilter:
    """As a set of items has it, by another way."""
    leaf = torch.repeat_interleave(trie.item_offset.diff().long()) + trie.level_offset[-2]
    nodes = {int(leaf[i]) for i in items}
    for n in sorted(nodes):
        while n > 0:
            n = int(trie.parent(n))
            nodes.add(n)
    return ItemFilter(packed(nodes, trie.num_nodes), packed(items, trie.num_items))


def members(words: torch.Tensor, n: int) -> set[int]:
    assert not unpack_bits(words, 32 * words.shape[1])[:, n:].any(), "bits past the last one"
    return set(unpack_bits(words, n)[0].nonzero()[:, 0].tolist())


@pytest.mark.parametrize("step", STEPS, ids=[x.lesson[:50] for x in STEPS])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_step_by_hand(backend, step, dtype):
    trie = Trie.from_sequences(ROWS)
    bits = bits_of(trie, step.before)
    if step.row is None:
        bits.alive.fill_(-1)
    row = None if step.row is None else torch.tensor([step.row], dtype=dtype).reshape(1, -1)
    within = None if step.within is None else packed(step.within, 4)
    addresses = bits.alive.data_ptr(), bits.allowed.data_ptr()
    filter_items(bits, trie, row, allow=step.allow, within=within)
    assert members(bits.allowed, 4) == step.items
    assert members(bits.alive, 6) == step.nodes
    assert addresses == (bits.alive.data_ptr(), bits.allowed.data_ptr())


# ---------------------------------------------------------------- oracle


@given(seed=st.integers(0, 2**32 - 1))
def test_oracle(backend, seed):
    """Random catalogues with collisions, of one to four levels; lists with repetitions and unknown items."""
    call = sampling.filter_items(np.random.default_rng(seed), torch.int64)
    a, trie = call.arguments, call.arguments["trie"]
    want = oracles.filter_items(
        Children.of(trie).children,
        trie.item_offset.tolist(),
        a["bits"].alive.numpy(),
        a["bits"].allowed.numpy(),
        None if a["row"] is None else a["row"].numpy(),
        a["allow"],
        a["within"].numpy() if "within" in a else None,
    )
    got = call()
    assert got.alive.numpy().tolist() == want["alive"].tolist()
    assert got.allowed.numpy().tolist() == want["allowed"].tolist()


def test_many_changes_in_a_row(backend):
    """After any number of lists the nodes are what the items alone say."""
    rng = np.random.default_rng(0)
    trie = Trie.from_sequences(rng.integers(0, [3, 90, 2, 5], (300, 4)))
    bits, allowed = bits_of(trie, set()), set[int]()
    for allow in rng.random(12) < 0.5:
        listed = rng.integers(-1, 301, 150 if allow else 60)
        filter_items(bits, trie, torch.from_numpy(listed)[None], allow=bool(allow))
        inside = {int(i) for i in listed if 0 <= i < 300}
        allowed = allowed | inside if allow else allowed - inside
        want = bits_of(trie, allowed)
        assert torch.equal(bits.allowed, want.allowed) and torch.equal(bits.alive, want.alive)


def test_a_wide_level(backend):
    """Children in many words: the last one that is alive keeps its parent alive, and none else does."""
    trie = Trie.from_sequences([[0, i] for i in range(300)] + [[1, i] for i in range(300)])
    bits = bits_of(trie, set(range(600)))
    filter_items(bits, trie, torch.tensor([[*range(299), *range(300, 600)]]), allow=False)
    assert members(bits.alive, trie.num_nodes) == {0, 1, 302}
    filter_items(bits, trie, torch.tensor([[299]]), allow=False)
    assert members(bits.alive, trie.num_nodes) == set()


def test_an_empty_catalogue(backend):
    trie = Trie.from_sequences(np.zeros((0, 3), np.int64))
    for row in (None, torch.tensor([[0, -1]])):
        bits = ItemFilter(torch.zeros(1, 2).int(), torch.zeros(1, 1).int())
        filter_items(bits, trie, row, allow=True)
        assert not bits.alive.any()


# ---------------------------------------------------------------- bad input


def changed(**arrays: torch.Tensor) -> dict[str, Any]:
    zeros = torch.zeros(1, 2, dtype=torch.int32)
    return {"bits": ItemFilter(**{"alive": zeros, "allowed": zeros, **arrays})}


@pytest.mark.parametrize(
    ("error", "message", "changes"),
    [
        (TypeError, "trie must be a vstar_ops.Trie, got NoneType", {"trie": None}),
        (ValueError, r"bits.alive must .*got \[1, 3\]", changed(alive=torch.zeros(1, 3).int())),
        (TypeError, "bits.alive must be int32, got int64", changed(alive=torch.zeros(1, 2).long())),
        (ValueError, r"bits.allowed must .*got \[2, 2\]", changed(allowed=torch.zeros(2, 2).int())),
        (ValueError, "bits.alive must be contiguous", changed(alive=torch.zeros(1, 4).int()[:, ::2])),
        (ValueError, r"row must .*got \[2, 1\]", {"row": torch.tensor([[1], [2]])}),
        (TypeError, "row must be int32 or int64, got float32", {"row": torch.zeros(1, 1)}),
        (ValueError, r"within must .*got \[1, 3\]", {"within": torch.zeros(1, 3).int()}),
        (TypeError, "allow must be a bool, got int", {"allow": 1}),
    ],
)  # fmt: skip
def test_errors_name_the_argument(error, message, changes):
    right = {"trie": Trie.from_sequences(ROWS), "row": torch.tensor([[1]]), "allow": True}
    with pytest.raises(error, match=f"^{message}"):
        filter_items(**{**changed(), **right, **changes})


@given(seed=st.integers(0, 2**32 - 1), n=st.integers(0, 200))
def test_packing(seed, n):
    bits = torch.from_numpy(np.random.default_rng(seed).random((3, n)) < 0.5)
    words = pack_bits(bits)
    assert words.shape == (3, num_words(n))
    assert all(int(words[0, i >> 5]) >> (i & 31) & 1 == bits[0, i] for i in range(n))
    assert torch.equal(unpack_bits(words, n), bits)
