"""``prefix_returns``: by hand, against its oracle, at its edges.

The table below teaches the op; read it first.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import vstar_ops
from vstar_ops import prefix_returns, sibling_advantage
from vstar_ops.ops._checks import level_weights
from vstar_ops.verify import oracles
from vstar_ops.verify.generators import random_mask, random_tokens

# ---------------------------------------------------------------- by hand


class Example(NamedTuple):
    """One request: candidates with the embeddings of their items, and what they should have been.

    Attributes:
        returns: of every prefix of a candidate, the shorter first.
        similarity: likewise, the cosine of the mean embedding of all candidates below the prefix.
    """

    lesson: str
    tokens: list[tuple[int, ...]]
    embedding: list[tuple[float, float]]
    target: tuple[int, ...]
    target_embedding: tuple[float, float]
    returns: list[list[float]]
    similarity: list[list[float]]
    options: dict[str, Any]


EAST, NORTH, WEST, NOWHERE = (1.0, 0.0), (0.0, 1.0), (-1.0, 0.0), (0.0, 0.0)
DIAGONAL = 0.5**0.5
EXAMPLES = [
    Example(
        "A prefix of the target is worth its weight w; any other costs w (1 - cosine), so an opposite item"
        " costs 2 w, an unrelated one w, and the same item by another name nothing.",
        [(5,), (6,), (7,), (8,)], [EAST, WEST, NORTH, EAST], (5,), EAST,
        [[1.0], [-2.0], [-1.0], [0.0]], [[1.0], [-1.0], [0.0], [1.0]], {"weights": (1.0,)},
    ),
    Example(
        "The candidates of a prefix share the mean of their embeddings: east and north give north-east.",
        [(1, 5), (1, 6), (2, 5)], [EAST, NORTH, NORTH], (1, 5), EAST,
        [[0.5, 1.0], [0.5, -1.0], [-0.5, -1.0]], [[DIAGONAL, 1.0], [DIAGONAL, 0.0], [0.0, 0.0]],
        {"weights": (0.5, 1.0)},
    ),
    Example(
        "A candidate that occurs twice counts twice in the mean: east, east and west give east.",
        [(2,), (2,), (2,)], [EAST, EAST, WEST], (9,), NORTH,
        [[-1.0]] * 3, [[0.0]] * 3, {"weights": (1.0,)},
    ),
    Example(
        "A prefix is the tokens from the first on: the last token of (2, 5) alone is no match.",
        [(2, 5)], [EAST], (1, 5), NORTH, [[-0.5, -1.0]], [[0.0, 0.0]], {"weights": (0.5, 1.0)},
    ),
    Example(
        "A zero vector resembles nothing: the cosine counts as 0.",
        [(1,), (2,)], [NOWHERE, EAST], (3,), EAST, [[-1.0], [0.0]], [[0.0], [1.0]], {"weights": (1.0,)},
    ),
    Example(
        "mask: a candidate that is left out gets 0 and is in no mean, whatever its embedding.",
        [(1,), (1,)], [EAST, (float("nan"), 0.0)], (2,), EAST,
        [[0.0], [0.0]], [[1.0], [0.0]], {"weights": (1.0,), "mask": [True, False]},
    ),
    Example(
        "mask of tokens: a candidate that ends early is in the means of the prefixes that it has.",
        [(1, 7), (1, 7)], [EAST, NORTH], (1, 7), EAST,
        [[0.5, 1.0], [0.5, 0.0]], [[DIAGONAL, 1.0], [DIAGONAL, 0.0]],
        {"weights": (0.5, 1.0), "mask": [[True, True], [True, False]]},
    ),
    Example(
        "Unless they are given, the weights of three levels are 0.3, 0.5 and 1 (V-STAR, Eq. 8).",
        [(1, 2, 3), (1, 2, 4)], [EAST, NORTH], (1, 2, 3), EAST,
        [[0.3, 0.5, 1.0], [0.3, 0.5, -1.0]], [[DIAGONAL, DIAGONAL, 1.0], [DIAGONAL, DIAGONAL, 0.0]], {},
    ),
]  # fmt: skip


@pytest.mark.parametrize("example", EXAMPLES, ids=[x.lesson.partition(":")[0][:60] for x in EXAMPLES])
def test_by_hand(backend, example):
    options = dict(example.options)
    mask = options.pop("mask", None)
    parts = (example.tokens, example.embedding, example.target, example.target_embedding)
    out = prefix_returns(
        *(torch.tensor([x]) for x in parts), None if mask is None else torch.tensor([mask]), **options
    )
    for got, want in ((out.returns, example.returns), (out.similarity, example.similarity)):
        for row, wanted in zip(got[0].tolist(), want, strict=True):
            assert row == pytest.approx(wanted, rel=1e-6, abs=1e-30)
    buckets = sibling_advantage(
        torch.tensor([example.tokens]),
        torch.zeros(1, len(example.tokens)),
        None if mask is None else torch.tensor([mask]),
    )
    assert torch.equal(out.node, buckets.node)
    assert torch.equal(out.num_candidates, buckets.num_candidates)


# ---------------------------------------------------------------- against the oracle


def make(seed, batch, group, length, width, tokens, dtype=torch.float32):
    rng = np.random.default_rng(seed)
    sids = random_tokens(seed, batch, group, length, tokens)
    target = random_tokens(seed + 1, batch, 1, length, tokens)[:, 0]
    item = torch.from_numpy(rng.normal(size=(batch, group, width))).to(dtype)
    wanted = torch.from_numpy(rng.normal(size=(batch, width))).to(dtype)
    return sids, item, target, wanted, random_mask(seed, batch, group)


def compare(got, sids, item, target, wanted, mask, weights):
    want = oracles.prefix_returns(
        sids.numpy(),
        item.double().numpy(),
        target.numpy(),
        wanted.double().numpy(),
        None if mask is None else mask.numpy(),
        weights,
    )
    assert [x.dtype for x in got] == [torch.float32, torch.float32, torch.int32, torch.int32]
    assert all(x.shape == sids.shape for x in got)
    torch.testing.assert_close(got.returns, torch.from_numpy(want[0]).float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.similarity, torch.from_numpy(want[1]).float(), rtol=1e-5, atol=1e-5)
    if mask is not None:
        mask = torch.from_numpy(oracles.tokens_there(sids.shape, mask.numpy(), ended=True))
    buckets = sibling_advantage(sids, torch.zeros(sids.shape[:2]), mask)
    assert torch.equal(got.node, buckets.node)
    assert torch.equal(got.num_candidates, buckets.num_candidates)


@given(
    seed=st.integers(0, 2**32 - 1),
    batch=st.integers(0, 3),
    group=st.one_of(st.integers(0, 8), st.integers(0, 70)),
    length=st.integers(0, 4),
    width=st.sampled_from([0, 1, 3, 8, 20]),
    tokens=st.sampled_from([1, 2, 5, "huge"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    masked=st.sampled_from(["", "candidates", "tokens"]),
    strided=st.booleans(),
)
def test_oracle(backend, seed, batch, group, length, width, tokens, dtype, masked, strided):
    sids, item, target, wanted, mask = make(seed, batch, group, length, width, tokens, dtype)
    mask = {"": None, "candidates": mask, "tokens": random_mask(seed, batch, group, length)}[masked]
    there = torch.from_numpy(
        oracles.tokens_there(sids.shape, mask if mask is None else mask.numpy(), ended=True)
    )
    item[:, ::3] = item[:, :1].clone()  # the same item several times, and zero vectors
    item[:, 5::7] = 0
    if masked and length:
        item[~there[:, :, 0]] = float("nan")  # a padded candidate takes no part
    if strided:
        sids, item = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (sids, item))
        wanted = torch.stack([wanted, wanted], 2)[..., 0]
    weights = np.random.default_rng(seed).random(length).tolist()
    got = prefix_returns(
        sids, item, target.int() if tokens != "huge" else target, wanted, mask, weights=weights
    )
    compare(got, sids, item, target, wanted, mask, weights)


@pytest.mark.parametrize(
    ("length", "weights"),
    [(1, [1.0]), (2, [0.3, 1.0]), (3, [0.3, 0.5, 1.0]), (5, [0.3, 0.4, 0.5, 0.75, 1.0])],
)
def test_default_weights(backend, length, weights):
    case = make(0, 2, 9, length, 4, 2)
    compare(prefix_returns(*case), *case, weights)


def test_nan_stays_in_its_buckets(backend):
    tokens = torch.tensor([[[1, 5], [1, 6], [2, 5]]] * 2)
    item = torch.ones(2, 3, 4)
    item[0, 1, 2] = float("nan")
    out = prefix_returns(tokens, item, torch.tensor([[2, 5]] * 2), torch.ones(2, 4))
    assert out.similarity[0].isnan().tolist() == [[True, False], [True, True], [False, False]]
    assert not out.similarity[1].isnan().any()
    assert out.returns[0, 2].tolist() == pytest.approx([0.3, 1.0])


def test_not_a_number_spares_prefixes_of_the_target(backend):
    tokens = torch.tensor([[[1], [2], [3]]])
    item = torch.tensor([[[1.0, 0.0], [float("inf"), 1.0], [0.0, 1.0]]])
    out = prefix_returns(tokens, item, torch.tensor([[1]]), torch.tensor([[1.0, 1.0]]))
    assert out.returns[0].isnan().tolist() == out.similarity[0].isnan().tolist() == [[False], [True], [False]]
    out = prefix_returns(tokens, item, torch.tensor([[1]]), torch.tensor([[float("nan"), 1.0]]))
    assert out.similarity.isnan().all()
    assert out.returns[0].isnan().tolist() == [[False], [True], [True]]


def test_reference_in_float64():
    sids, item, target, wanted, mask = make(5, 3, 12, 3, 7, 2, torch.float64)
    weights = [0.3, 0.5, 1.0]
    got = vstar_ops.reference.prefix_returns(
        sids, item, target, wanted, mask, torch.tensor(weights, dtype=torch.float64)
    )
    arrays = (x.numpy() for x in (sids, item, target, wanted, mask))
    for x, want in zip(got, oracles.prefix_returns(*arrays, weights)):
        torch.testing.assert_close(x, torch.from_numpy(want), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_token_dtypes(backend, dtype):
    sids, item, target, wanted, mask = make(6, 2, 20, 3, 5, 4)
    want = prefix_returns(sids, item, target, wanted, mask)
    got = prefix_returns(sids.to(dtype), item, target.to(dtype), wanted, mask)
    assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_order_of_candidates_does_not_matter(backend):
    sids, item, target, wanted, mask = make(4, 5, 60, 3, 16, 3)
    order = torch.randperm(60)
    straight = prefix_returns(sids, item, target, wanted, mask)
    turned = prefix_returns(sids[:, order], item[:, order], target, wanted, mask[:, order])
    for got, want in zip(turned, straight):
        torch.testing.assert_close(got, want[:, order], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"tokens": torch.zeros(2, 3)}, TypeError, "tokens must be int32 or .*, got float32"),
        ({"embedding": torch.zeros(2, 4, 5)}, ValueError, r"embedding must have the shape \[B, G, E\]"),
        ({"target": torch.zeros(2, 4, dtype=torch.long)}, ValueError, r"target must have the shape \[B, L\]"),
        ({"target_embedding": torch.zeros(2, 4)}, ValueError, "target_embedding must have the shape"),
        ({"target_embedding": torch.zeros(2, 5).double()}, TypeError, "target_embedding must be float32"),
        ({"mask": torch.ones(2, 3)}, TypeError, "mask must be bool"),
        ({"weights": 1.0}, TypeError, "weights must be L = 3 numbers, got float"),
        ({"weights": (1.0, 2.0)}, ValueError, "weights must be L = 3 numbers, got 2"),
        ({"weights": (1.0, 2.0, float("nan"))}, ValueError, "weights must be finite"),
        ({"weights": (1.0, 2.0, "3")}, TypeError, "weights must be a number, got str"),
    ],
)
def test_errors(change, error, message):
    sids, item, target, wanted, mask = make(0, 2, 3, 3, 5, 4)
    given = {"tokens": sids, "embedding": item, "target": target, "target_embedding": wanted, "mask": mask}
    with pytest.raises(error, match=message):
        prefix_returns(**(given | change))


def test_the_op_checks_the_weights_it_reads(cpu):
    sids, item, target, wanted, mask = make(0, 2, 6, 3, 5, 3)
    for weights, message in (
        (torch.ones(3), "argument 6 must be float64"),
        (torch.ones(2, dtype=torch.float64), r"weights must have the shape \[L\] = \[3\], got \[2\]"),
        (torch.ones(6, dtype=torch.float64)[::2], "argument 6 must be contiguous"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.vstar_ops.prefix_returns(sids, item, target, wanted, mask, weights)


def test_backends_agree():
    case = make(9, 20, 50, 3, 32, 5)
    with vstar_ops.use_backend("reference"):
        want = prefix_returns(*case)
    for got, expected in zip(prefix_returns(*case), want):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_weights_are_kept_apart_by_their_bits():
    """0 and -0 are equal."""
    for weight in (0.0, -0.0, 0.0):
        kept = level_weights("weights", [weight], 1, torch.float64, torch.zeros(1))
        assert kept.signbit().item() == (math.copysign(1, weight) < 0)
