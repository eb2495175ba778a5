"""``prefix_tree``: by hand, against its oracle, at its edges.

The table below teaches the op; read it first.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vstar_ops import prefix_tree, sibling_advantage
from vstar_ops.verify import oracles
from vstar_ops.verify.generators import random_mask, random_tokens

# ---------------------------------------------------------------- by hand


class Example(NamedTuple):
    """One request: its candidates, the nodes of their tree, and the nodes of each candidate.

    Attributes:
        nodes: ``(token, parent, depth, first candidate, number of candidates)``.
        node: of every token of a candidate.
    """

    lesson: str
    tokens: list[tuple[int, ...]]
    nodes: list[tuple[int, int, int, int, int]]
    node: list[tuple[int, ...]]
    mask: list[bool] | list[list[bool]] | None = None


EXAMPLES = [
    Example(
        "Two candidates with nothing in common: a path each. The first tokens' parent is -1, the prompt.",
        [(1, 5), (2, 6)],
        [(1, -1, 1, 0, 1), (2, -1, 1, 1, 1), (5, 0, 2, 0, 1), (6, 1, 2, 1, 1)], [(0, 2), (1, 3)],
    ),
    Example(
        "A shared prefix is one node.",
        [(1, 5), (1, 6)], [(1, -1, 1, 0, 2), (5, 0, 2, 0, 1), (6, 0, 2, 1, 1)], [(0, 1), (0, 2)],
    ),
    Example(
        "The same token below another parent is another node.",
        [(1, 5), (2, 5)],
        [(1, -1, 1, 0, 1), (2, -1, 1, 1, 1), (5, 0, 2, 0, 1), (5, 1, 2, 1, 1)], [(0, 2), (1, 3)],
    ),
    Example(
        "Nodes are numbered level by level, in the order of their tokens and not of the candidates. A"
        " candidate that occurs twice takes no node of its own.",
        [(1, 6), (1, 5), (2, 5), (1, 6)],
        [(1, -1, 1, 0, 3), (2, -1, 1, 2, 1), (5, 0, 2, 1, 1), (6, 0, 2, 0, 2), (5, 1, 2, 2, 1)],
        [(0, 3), (0, 2), (1, 4), (0, 3)],
    ),
    Example(
        "mask: a candidate that is left out is in no node.",
        [(1, 5), (2, 6)], [(2, -1, 1, 1, 1), (6, 0, 2, 1, 1)], [(-1, -1), (0, 1)], [False, True],
    ),
    Example(
        "mask of tokens: a candidate that ends early has no node behind its end, whatever the padding.",
        [(1, 5), (1, 0)], [(1, -1, 1, 0, 2), (5, 0, 2, 0, 1)], [(0, 1), (0, -1)],
        [[True, True], [True, False]],
    ),
    Example(
        "mask of tokens: a parent's number counts all nodes of its level, also those that nothing follows.",
        [(1, 0), (2, 5)], [(1, -1, 1, 0, 1), (2, -1, 1, 1, 1), (5, 1, 2, 1, 1)], [(0, -1), (1, 2)],
        [[True, False], [True, True]],
    ),
    Example(
        "mask of tokens: it ends before its first masked token.",
        [(1, 5), (2, 6)], [(2, -1, 1, 1, 1), (6, 0, 2, 1, 1)], [(-1, -1), (0, 1)],
        [[False, True], [True, True]],
    ),
    Example("mask: nobody is left.", [(1, 5), (2, 6)], [], [(-1, -1), (-1, -1)], [False, False]),
]  # fmt: skip


@pytest.mark.parametrize("example", EXAMPLES, ids=[x.lesson.partition(":")[0][:60] for x in EXAMPLES])
def test_by_hand(backend, example):
    mask = None if example.mask is None else torch.tensor([example.mask])
    tree = prefix_tree(torch.tensor([example.tokens]), mask)
    assert tree.size.tolist() == [len(example.nodes)]
    empty = [(-1, -1, 0, -1, 0)] * (len(example.tokens) * len(example.tokens[0]) - len(example.nodes))
    fields = tree.token, tree.parent, tree.depth, tree.first, tree.num_candidates
    assert list(zip(*(x[0].tolist() for x in fields))) == example.nodes + empty
    assert list(map(tuple, tree.node[0].tolist())) == example.node


# ---------------------------------------------------------------- against the oracle


def make(seed, batch, group, length, tokens, dtype=torch.int64):
    return random_tokens(seed, batch, group, length, tokens, dtype), random_mask(seed, batch, group)


def compare(got, tokens, mask):
    want = oracles.prefix_tree(tokens.numpy(), None if mask is None else mask.numpy())
    assert set(want) == set(got._fields)
    for name, array in want.items():
        field = getattr(got, name)
        wide = name == "token" and tokens.dtype == torch.int64
        assert field.dtype == (torch.int64 if wide else torch.int32)
        assert field.is_contiguous() and torch.equal(field.long(), torch.from_numpy(array)), name
    if mask is not None:
        mask = torch.from_numpy(oracles.tokens_there(tokens.shape, mask.numpy(), ended=True))
    buckets = sibling_advantage(tokens, torch.zeros(tokens.shape[:2]), mask)
    assert torch.equal(got.node, buckets.node)


@given(
    seed=st.integers(0, 2**32 - 1),
    batch=st.integers(0, 3),
    group=st.one_of(st.integers(0, 8), st.integers(0, 150)),
    length=st.integers(0, 4),
    tokens=st.sampled_from([1, 2, 5, 100, "huge"]),
    dtype=st.sampled_from([torch.int64, torch.int32, torch.uint8]),
    masked=st.sampled_from(["", "candidates", "tokens"]),
    strided=st.booleans(),
)
def test_oracle(backend, seed, batch, group, length, tokens, dtype, masked, strided):
    sids, mask = make(seed, batch, group, length, tokens, dtype)
    mask = {"": None, "candidates": mask, "tokens": random_mask(seed, batch, group, length)}[masked]
    if strided:
        sids = sids.permute(2, 1, 0).contiguous().permute(2, 1, 0)
        mask = mask if mask is None else mask.transpose(0, 1).contiguous().transpose(0, 1)
    compare(prefix_tree(sids, mask), sids, mask)


@pytest.mark.parametrize("group", [64, 65, 129, 200])
def test_groups_of_several_programs(backend, group):
    sids, mask = make(group, 2, group, 3, 6)
    for each in (mask, random_mask(group, 2, group, 3)):
        compare(prefix_tree(sids, each), sids, each)


def test_order_of_candidates_does_not_matter(backend):
    sids, mask = make(1, 3, 40, 3, 4)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    plain, moved = prefix_tree(sids, mask), prefix_tree(sids[:, order], mask[:, order])
    for name in ("parent", "token", "depth", "num_candidates", "size"):
        assert torch.equal(getattr(plain, name), getattr(moved, name))
    assert torch.equal(plain.node[:, order], moved.node)


@pytest.mark.parametrize(
    ("tokens", "mask", "error", "message"),
    [
        (torch.zeros(2, 3, 1), None, TypeError, "tokens must be int32 or .*, got float32"),
        (torch.zeros(2, 3, dtype=torch.int64), None, ValueError, r"tokens must have the shape \[B, G, L\]"),
        ([[[1]]], None, TypeError, "tokens must be a tensor"),
        (torch.zeros(2, 3, 1, dtype=torch.int64), torch.ones(2, 3), TypeError, "mask must be bool"),
        (
            torch.zeros(2, 3, 1, dtype=torch.int64),
            torch.ones(3, 2, dtype=torch.bool),
            ValueError,
            r"mask must have the shape \[B, G\] = \[2, 3\], got \[3, 2\]",
        ),
    ],
)
def test_errors_name_the_argument(backend, tokens, mask, error, message):
    with pytest.raises(error, match=message):
        prefix_tree(tokens, mask)
