"""``draw_children`` and ``distinct_rows``: by hand, against their oracles, at their edges.

What a decoder makes of them is tested in ``test_decoding.py``.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import vstar_ops
from vstar_ops import derive_seeds, distinct_rows, draw_children
from vstar_ops.verify import oracles, sampling

INF, NAN = math.inf, math.nan

# ---------------------------------------------------------------- by hand


@pytest.mark.parametrize("nothing", [-INF, NAN])
def test_a_draw_by_hand(backend, nothing):
    """The one child that can be drawn is drawn: a list may hold others at -inf or NaN, or without a node."""
    lists = torch.tensor([[nothing, 0.5, 9.0]]), torch.tensor([[4, 5, 6]]), torch.tensor([[10, 11, -1]])
    sequence, cum = torch.tensor([[[3], [2]]]), torch.tensor([[-1.0, -2.0]])
    out = draw_children(*lists, sequence, cum_logp=cum)
    assert [x.dtype for x in out] == [torch.int32, torch.int32, torch.float32, torch.int32]
    assert out.sequence.tolist() == [[[3, 5], [2, 5]]]
    assert (out.node.tolist(), out.logp.tolist(), out.num_valid.tolist()) == ([[11, 11]], [[-0.5, -1.5]], [2])


@pytest.mark.parametrize("pack", [False, True])
def test_lost_candidates(backend, pack):
    """A candidate without a list, or with nothing to draw in it, is lost; ``pack`` moves it to the end."""
    lists = torch.tensor([[-INF], [0.0]]), torch.tensor([[5], [6]]), torch.tensor([[1], [2]])
    row, sequence = torch.tensor([[0, 1, -1, 7, 1]]), torch.arange(5).view(1, 5, 1)
    out = draw_children(*lists, sequence, row=row, pack=pack)
    lost, first, second = [-1, -1], [1, 6], [4, 6]
    packed = [first, second, lost, lost, lost]
    assert out.sequence.tolist() == [packed if pack else [lost, first, lost, lost, second]]
    assert out.node.tolist() == [[2, 2, -1, -1, -1] if pack else [-1, 2, -1, -1, 2]]
    assert ((out.logp == -INF) == (out.node < 0)).all()
    assert out.num_valid.tolist() == [2]


def test_draws_are_in_proportion(backend):
    """Of 4,000 candidates, up to four standard deviations; NaN and a dead entry take no share."""
    p = torch.tensor([0.5, 0.3, 0.2])
    logp = torch.tensor([[*p.log(), NAN, 0.0]])
    lists = logp, torch.arange(5)[None], torch.tensor([[1, 2, 3, 4, -1]])
    number = 4000 if backend in ("cpu", "reference") else 400
    out = draw_children(*lists, torch.empty(1, number, 0, dtype=torch.int32), seed=3)
    found = torch.bincount(out.sequence.flatten(), minlength=5) / number
    assert found[3:].tolist() == [0, 0]
    assert ((found[:3] - p).abs() <= 4 * (p * (1 - p) / number).sqrt()).all()


def test_the_noise_of_a_prefix_is_its_own(backend):
    """Draws depend on seed, candidate, prefix and token, and on nothing else."""
    lists = torch.zeros(1, 50), torch.arange(50)[None], torch.arange(1, 51)[None]
    sequence = torch.empty(1, 9, 0, dtype=torch.int32)

    def drawn(**options):
        return draw_children(*lists, sequence, **options).node.tolist()

    prefix = torch.full((1, 9), 7)
    assert drawn() == drawn(prefix=prefix * 0) != drawn(prefix=prefix)
    assert drawn(seed=5) == drawn(seed=derive_seeds(5, 1)) != drawn(seed=6)
    assert len(set(drawn()[0])) > 4
    order = torch.randperm(50)
    moved = draw_children(*(x[:, order] for x in lists), sequence).node.tolist()
    assert moved == drawn()


def test_ties_go_to_the_first(backend):
    lists = torch.zeros(1, 40), torch.full((1, 40), 3), torch.arange(40, 0, -1)[None]
    out = draw_children(*lists, torch.empty(1, 5, 0, dtype=torch.int32))
    assert out.node.tolist() == [[40] * 5]


def test_rows_by_hand(backend):
    """Numbered by request and node; a prefix that comes again has the row of the first."""
    node = torch.tensor([[9, 7, 9, -1], [5, 5, 6, 4]])
    token, slot = torch.tensor([[1, 2, 1, 0], [3, 3, 4, 5]]), torch.tensor([70, 71])
    out = distinct_rows(node, token, slot)
    assert [x.dtype for x in out] == [torch.int32, *[torch.int64] * 2, *[torch.int32] * 3]
    assert out.row.tolist() == [[1, 0, 1, -1], [3, 3, 4, 2]]
    assert out.parent.tolist() == [70, 70, 71, 71, 71, -1, -1, -1]
    assert out.token.tolist() == [2, 1, 5, 3, 4, 0, 0, 0]
    assert out.node.tolist() == [7, 9, 4, 5, 6, -1, -1, -1]
    assert (out.num_rows.tolist(), out.num_tokens.tolist()) == ([5], [2, 3])
    out = distinct_rows(node, token, slot, row=torch.tensor([[1, 0, 1, 0], [0, 0, -1, 2]]))
    assert out.parent.tolist() == [70, 71, -1, 70, -1, -1, -1, -1]


# ---------------------------------------------------------------- against the oracles


def as_numpy(arguments):
    return {k: x.numpy() if isinstance(x, torch.Tensor) else x for k, x in arguments.items()}


@given(seed=st.integers(0, 2**32 - 1), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_draw_children_oracle(backend, seed, dtype):
    """Any sizes, 0 included, any strides, special values; nearly equal sums may swap."""
    if backend != "reference":
        dtype = torch.float32
    arguments = sampling.draw_children(np.random.default_rng(seed), dtype).arguments
    got = draw_children(**arguments)
    given = as_numpy(arguments)
    seeds = given.pop("seed")
    if isinstance(seeds, int):
        seeds = oracles.splitmix64(seeds, len(given["sequence"]))
    want, margin = oracles.draw_children(**given, seeds=seeds)
    sure = torch.from_numpy(margin > 1e-9)
    assert got.num_valid.tolist() == want["num_valid"].tolist()
    for name in ("sequence", "node"):
        assert torch.equal(getattr(got, name)[sure].long(), torch.from_numpy(want[name])[sure].long()), name
    torch.testing.assert_close(got.logp[sure], torch.from_numpy(want["logp"])[sure].to(dtype))


@given(seed=st.integers(0, 2**32 - 1), dtype=st.sampled_from([torch.int32, torch.int64]))
def test_distinct_rows_oracle(backend, seed, dtype):
    arguments = sampling.distinct_rows(np.random.default_rng(seed), dtype).arguments
    got, want = distinct_rows(**arguments), oracles.distinct_rows(**as_numpy(arguments))
    assert set(want) == set(got._fields)
    for name, array in want.items():
        assert getattr(got, name).is_contiguous()
        assert torch.equal(getattr(got, name).long(), torch.from_numpy(array).long()), name


# ---------------------------------------------------------------- errors


def zeros(*shape, dtype=torch.int32):
    return torch.zeros(shape, dtype=dtype)


DRAW = {"logp": torch.zeros(2, 3), "token": zeros(2, 3), "node": zeros(2, 3), "sequence": zeros(2, 4, 1)}
ROWS = {"node": zeros(2, 4), "token": zeros(2, 4), "slot": zeros(2)}


@pytest.mark.parametrize(
    ("function", "changes", "error", "message"),
    [
        (draw_children, {"logp": zeros(2, 3)}, TypeError, "logp must be float32 or float64, got int32"),
        (draw_children, {"token": zeros(2, 2)}, ValueError, r"token must have the shape \[R, C\] = \[2, 3\]"),
        (draw_children, {"node": torch.zeros(2, 3)}, TypeError, "node must be int32 or int64, got float32"),
        (draw_children, {"sequence": zeros(2, 4)}, ValueError, r"sequence must have the shape \[B, K, l\]"),
        (draw_children, {"row": zeros(2, 3)}, ValueError, r"row must have the shape \[B, K\] = \[2, 4\]"),
        (draw_children, {"prefix": zeros(2)}, ValueError, r"prefix must have the shape \[B, K\]"),
        (draw_children, {"cum_logp": zeros(2, 4)}, TypeError, "cum_logp must be float32"),
        (draw_children, {"seed": 1.5}, TypeError, "seed must be an int or int64 seeds"),
        (draw_children, {"seed": 2**63}, ValueError, "seed must fit in int64"),
        (draw_children, {"seed": zeros(3).long()}, ValueError, r"seed must have the shape \[B\] = \[2\]"),
        (distinct_rows, {"node": zeros(2)}, ValueError, r"node must have the shape \[B, K\]"),
        (distinct_rows, {"token": zeros(2, 3)}, ValueError, r"token must have the shape \[B, K\] = \[2, 4\]"),
        (distinct_rows, {"slot": zeros(2, 1)}, ValueError, r"slot must have the shape \[R\]"),
        (distinct_rows, {"row": zeros(2, 4).bool()}, TypeError, "row must be int32 or int64, got bool"),
    ],
)
def test_errors_name_the_argument(backend, function, changes, error, message):
    with pytest.raises(error, match=message):
        function(**{**(DRAW if function is draw_children else ROWS), **changes})


def test_values_are_checked_under_validation(backend):
    with vstar_ops.validation():
        for function, usual in ((draw_children, DRAW), (distinct_rows, ROWS)):
            with pytest.raises(ValueError, match=r"row must lie in \[-1, 2\)"):
                function(**usual, row=zeros(2, 4) + 2)
