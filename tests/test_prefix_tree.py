"""``prefix_tree`` against its oracle."""

from __future__ import annotations

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import vstar_ops
from vstar_ops import prefix_tree, sibling_advantage

HUGE = [-(2**62), -(2**31) - 1, -1, 0, 2**31, 2**32, 2**62]


def make(seed, batch, group, length, tokens, dtype=torch.int64):
    rng = np.random.default_rng(seed)
    pool = np.array(HUGE) if tokens == "huge" else np.arange(tokens)
    sids = torch.from_numpy(rng.choice(pool, (batch, group, length)))
    return sids if tokens == "huge" else sids.to(dtype), torch.from_numpy(rng.random((batch, group)) < 0.8)


def compare(got, tokens, mask):
    want = oracles.prefix_tree(tokens.numpy(), None if mask is None else mask.numpy())
    assert set(want) == set(got._fields)
    for name, array in want.items():
        field = getattr(got, name)
        wide = name == "token" and tokens.dtype == torch.int64
        assert field.dtype == (torch.int64 if wide else torch.int32)
        assert field.is_contiguous() and torch.equal(field.long(), torch.from_numpy(array)), name
    buckets = sibling_advantage(tokens, torch.zeros(tokens.shape[:2]), mask)
    assert torch.equal(got.node, buckets.node)


@given(
    seed=st.integers(0, 2**32 - 1),
    batch=st.integers(0, 3),
    group=st.one_of(st.integers(0, 8), st.integers(0, 150)),
    length=st.integers(0, 4),
    tokens=st.sampled_from([1, 2, 5, 100, "huge"]),
    dtype=st.sampled_from([torch.int64, torch.int32, torch.uint8]),
    masked=st.booleans(),
    strided=st.booleans(),
)
def test_oracle(backend, seed, batch, group, length, tokens, dtype, masked, strided):
    sids, mask = make(seed, batch, group, length, tokens, dtype)
    mask = mask if masked else None
    if strided:
        sids = sids.permute(2, 1, 0).contiguous().permute(2, 1, 0)
        mask = mask if mask is None else mask.T.contiguous().T
    compare(prefix_tree(sids, mask), sids, mask)


@pytest.mark.parametrize("group", [64, 65, 129, 200])
def test_groups_of_several_programs(backend, group):
    sids, mask = make(group, 2, group, 3, 6)
    compare(prefix_tree(sids, mask), sids, mask)


def test_hand_written(backend):
    tree = prefix_tree(torch.tensor([[[1, 6], [1, 5], [2, 5], [1, 6]]]))
    assert tree.token.tolist() == [[1, 2, 5, 6, 5, -1, -1, -1]]
    assert tree.parent.tolist() == [[-1, -1, 0, 0, 1, -1, -1, -1]]
    assert tree.depth.tolist() == [[1, 1, 2, 2, 2, 0, 0, 0]]
    assert tree.first.tolist() == [[0, 2, 1, 0, 2, -1, -1, -1]]
    assert tree.num_candidates.tolist() == [[3, 1, 1, 2, 1, 0, 0, 0]]
    assert tree.node.tolist() == [[[0, 3], [0, 2], [1, 4], [0, 3]]] and tree.size.tolist() == [5]
    nobody = prefix_tree(torch.zeros(1, 2, 2, dtype=torch.int64), torch.zeros(1, 2, dtype=torch.bool))
    assert nobody.size.tolist() == [0] and (nobody.node == -1).all() and not nobody.num_candidates.any()


def test_order_of_candidates_does_not_matter(backend):
    sids, mask = make(1, 3, 40, 3, 4)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    plain, moved = prefix_tree(sids, mask), prefix_tree(sids[:, order], mask[:, order])
    for name in ("parent", "token", "depth", "num_candidates", "size"):
        assert torch.equal(getattr(plain, name), getattr(moved, name))
    assert torch.equal(plain.node[:, order], moved.node)


@pytest.mark.skipif(vstar_ops._backends.interpreting(), reason="takes minutes")
def test_alone_in_a_batch_and_on_two_threads(backend, restore_threads):
    sids, mask = make(3, 400, 16, 3, 5)
    torch.set_num_threads(1)
    whole = prefix_tree(sids, mask)
    torch.set_num_threads(2)
    assert all(torch.equal(got, want) for got, want in zip(prefix_tree(sids, mask), whole))
    for b in (0, 123, 399):
        alone = prefix_tree(sids[b : b + 1], mask[b : b + 1])
        assert all(torch.equal(got[0], want[b]) for got, want in zip(alone, whole))


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


def test_opcheck():
    op = torch.ops.vstar_ops.prefix_tree.default
    sids, mask = make(0, 2, 6, 3, 3)
    torch.library.opcheck(op, (sids, None))
    torch.library.opcheck(op, (sids.int(), mask))
    torch.library.opcheck(op, (sids[:, :0], None))


def test_compile():
    sids, mask = make(0, 2, 6, 3, 3)
    compiled = torch.compile(prefix_tree, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(got, want) for got, want in zip(compiled(sids, mask), prefix_tree(sids, mask)))
