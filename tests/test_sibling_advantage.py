"""``sibling_advantage``: by hand, against its oracle, at its edges.

The table below teaches the op; read it first.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import vstar_ops
from vstar_ops import sibling_advantage
from vstar_ops.verify import oracles
from vstar_ops.verify.generators import random_tokens

# ---------------------------------------------------------------- by hand


class Example(NamedTuple):
    """One request: candidates and their rewards, and for every token of a candidate its node's advantage.

    A node without siblings has no advantage, written None: the result holds 0 there, and ``valid`` is False.
    """

    lesson: str
    tokens: list[tuple[int, ...]]
    rewards: list[float]
    advantage: list[list[float | None]]
    options: dict[str, Any] | None = None
    node: list[list[int]] | None = None
    num_candidates: list[list[int]] | None = None


HALF, TWO_THIRDS = 0.5**0.5, (2 / 3) ** 0.5
NAN, INF = float("nan"), float("inf")
EXAMPLES = [
    Example(
        "Two children of the root, of mean rewards 1 and 0: mean 1/2, population standard deviation 1/2.",
        [(7,), (8,)], [1, 0], [[1.0], [-1.0]],
    ),
    Example(
        "A child counts once, however many candidates go through it: 7 has the mean 1/2, 8 has 0.",
        [(7,), (7,), (8,)], [1, 0, 0], [[1.0], [1.0], [-1.0]], num_candidates=[[2], [2], [1]],
    ),
    Example(
        "Every prefix has its own siblings: (7, 1) against (7, 2); (8, 1) is alone. Nodes are numbered level"
        " by level, in the order of their tokens.",
        [(7, 1), (7, 2), (8, 1), (8, 1)], [1, 0, 0, 0], [[1.0, 1.0], [1.0, -1.0], [-1.0, None], [-1.0, None]],
        node=[[0, 2], [0, 3], [1, 4], [1, 4]], num_candidates=[[2, 1], [2, 1], [2, 2], [2, 2]],
    ),
    Example(
        "A single child is no choice: no advantage above, one below.",
        [(3, 1), (3, 2)], [0, 1], [[None, -1.0], [None, 1.0]],
    ),
    Example(
        "Equal rewards are a comparison with the result 0: valid, unlike a single child.",
        [(0,), (1,)], [0.5, 0.5], [[0.0], [0.0]],
    ),
    Example(
        "mask: a candidate that is left out is in no node, whatever its reward.",
        [(0,), (1,), (2,)], [1, float("nan"), 0], [[1.0], [None], [-1.0]],
        {"mask": [True, False, True]}, node=[[0], [-1], [1]], num_candidates=[[1], [0], [1]],
    ),
    Example(
        "mask: nobody is left.",
        [(0,), (1,)], [1, 0], [[None], [None]], {"mask": [False, False]},
        node=[[-1], [-1]], num_candidates=[[0], [0]],
    ),
    Example(
        "mask of tokens: a completion that ends early has no sibling behind its end, whatever the padding.",
        [(1, 5, 0), (1, 6, 7), (1, 6, 0)], [1, 0, 1],
        [[None, 1.0, None], [None, -1.0, -1.0], [None, -1.0, 1.0]],
        {"mask": [[True, True, False], [True, True, True], [True, True, True]]},
        node=[[0, 1, -1], [0, 2, 4], [0, 2, 3]], num_candidates=[[3, 1, 0], [3, 2, 1], [3, 2, 1]],
    ),
    Example(
        "mask of tokens: a masked token is in no mean, but still tells the prefixes behind it apart.",
        [(1, 5), (1, 6), (2, 5), (2, 6)], [1, 0, 0, 0], [[1.0, 1.0], [1.0, -1.0], [None, 0.0], [-1.0, 0.0]],
        {"mask": [[True, True], [True, True], [False, True], [True, True]]},
        node=[[0, 2], [0, 3], [-1, 4], [1, 5]], num_candidates=[[2, 1], [2, 1], [0, 1], [1, 1]],
    ),
    Example(
        "A NaN reward: all that is compared with it is NaN, 1 against 2 and (1, 5) against (1, 6). Below 2 it"
        " does not matter.",
        [(1, 5), (1, 6), (2, 5), (2, 6)], [NAN, 1, 0, 1], [[NAN, NAN], [NAN, NAN], [NAN, -1.0], [NAN, 1.0]],
    ),
    Example(
        "Infinity is no number to compare with either, not even with itself.",
        [(1, 5), (1, 6), (2, 5), (2, 6)], [INF, INF, 0, 1], [[NAN, NAN], [NAN, NAN], [NAN, -1.0], [NAN, 1.0]],
    ),
    Example(
        "A NaN reward without siblings is compared with nothing.", [(3,), (3,)], [NAN, 1], [[None], [None]],
    ),
    Example(
        "scale='none': the difference of the means itself, 1/2.",
        [(7,), (8,)], [1, 0], [[0.5], [-0.5]], {"scale": "none"},
    ),
    Example(
        "scale='group': one standard deviation per request, that of its rewards, which is 1 here. So the"
        " children of 8, whose difference is smaller, keep it.",
        [(7, 1), (7, 2), (8, 1), (8, 2)], [1.4, -1.4, 0.2, -0.2],
        [[0.0, 1.4], [0.0, -1.4], [0.0, 0.2], [0.0, -0.2]], {"scale": "group"},
    ),
    Example(
        "eps is added to the standard deviation, 1/2 here.",
        [(7,), (8,)], [1, 0], [[0.5], [-0.5]], {"eps": 0.5},
    ),
    Example(
        "ddof=1: the sample standard deviation, 1/sqrt(2) here.",
        [(7,), (8,)], [1, 0], [[HALF], [-HALF]], {"ddof": 1},
    ),
    Example(
        "std_floor: the standard deviation counts as at least so much.",
        [(7,), (8,)], [1, 0], [[0.25], [-0.25]], {"std_floor": 2.0},
    ),
    Example(
        "min_siblings=3: two children are too few to compare.",
        [(7,), (8,)], [1, 0], [[None], [None]], {"min_siblings": 3},
    ),
    Example(
        "baseline='sibling', the default: children of means 1, 0 and 1/2 against their mean 1/2.",
        [(7,), (7,), (8,), (9,)], [1, 1, 0, 0.5],
        [[0.5 / (TWO_THIRDS / 2)], [0.5 / (TWO_THIRDS / 2)], [-0.5 / (TWO_THIRDS / 2)], [0.0]],
    ),
    Example(
        "baseline='parent': against the mean of the parent's candidates, 5/8.",
        [(7,), (7,), (8,), (9,)], [1, 1, 0, 0.5],
        [[3 / 8 / (TWO_THIRDS / 2)]] * 2 + [[-5 / 8 / (TWO_THIRDS / 2)], [-1 / 8 / (TWO_THIRDS / 2)]],
        {"baseline": "parent"},
    ),
    Example(
        "baseline='leave_one_out': each child against the mean of the others, 1/4, 3/4 and 1/2.",
        [(7,), (7,), (8,), (9,)], [1, 1, 0, 0.5],
        [[0.75 / (TWO_THIRDS / 2)]] * 2 + [[-0.75 / (TWO_THIRDS / 2)], [0.0]], {"baseline": "leave_one_out"},
    ),
]  # fmt: skip


@pytest.mark.parametrize("example", EXAMPLES, ids=[x.lesson.partition(":")[0][:60] for x in EXAMPLES])
def test_by_hand(backend, example):
    options = {"eps": 1e-9, **(example.options or {})}
    options |= {"mask": torch.tensor([options["mask"]])} if "mask" in options else {}
    out = sibling_advantage(
        torch.tensor([example.tokens]), torch.tensor([example.rewards]).float(), **options
    )
    for got, want in zip(out.advantage[0].tolist(), example.advantage, strict=True):
        assert got == pytest.approx([x or 0.0 for x in want], rel=1e-6, abs=1e-30, nan_ok=True)
    assert out.valid[0].tolist() == [[x is not None for x in row] for row in example.advantage]
    if example.node is not None:
        assert out.node[0].tolist() == example.node
    if example.num_candidates is not None:
        assert out.num_candidates[0].tolist() == example.num_candidates


# ---------------------------------------------------------------- against the oracle

DEFAULTS = {"eps": 1e-4, "ddof": 0, "std_floor": 0.0, "min_siblings": 2, "baseline": "sibling"}
REWARDS = {
    "few": [0.0, 1.0, 0.35],
    "one": [0.35],
    "many": None,
    "broken": [0.0, 1.0, 0.5, 2.0, -1.0, NAN, INF, -INF],
}
MASKS = ["none", "candidates", "tokens", "ends"]


def make_mask(rng, kind, batch, group, length):
    """Of candidates; of tokens, with holes; of tokens at the end of each candidate."""
    if kind == "none":
        return None
    ends = rng.integers(0, length + 1, (batch, group, 1)) > np.arange(length)
    holes = rng.random((batch, group, length)) < rng.random()
    return torch.from_numpy(
        {"candidates": rng.random((batch, group)) < rng.random(), "tokens": holes, "ends": ends}[kind]
    )


def compare(got, tokens, rewards, mask, options):
    length = tokens.shape[2]
    want = oracles.sibling_advantage(
        tokens.numpy(),
        rewards.double().numpy(),
        None if mask is None else mask.numpy(),
        **{**DEFAULTS, **options},
    )
    advantage, valid, node, count = (torch.from_numpy(x) for x in want)
    assert [x.dtype for x in got] == [torch.float32, torch.bool, torch.int32, torch.int32]
    assert all(x.shape == tokens.shape for x in got)
    assert torch.equal(got.valid, valid)
    assert torch.equal(got.node.long(), node)
    assert torch.equal(got.num_candidates.long(), count)
    torch.testing.assert_close(got.advantage, advantage.float(), rtol=1e-5, atol=1e-5, equal_nan=True)
    # Elsewhere a child at the mean of unequal siblings may be off by a rounding error.
    if rewards.numel() and length:
        present = torch.from_numpy(
            oracles.tokens_there(tokens.shape, mask if mask is None else mask.numpy())
        ).any(2)
        highest = rewards.masked_fill(~present, -INF).amax(1, keepdim=True)
        equal = ((rewards == highest) | ~present).all(1) & highest[:, 0].isfinite()
        assert not got.advantage[equal].any(), "equal rewards must give exactly 0"


@given(
    seed=st.integers(0, 2**32 - 1),
    batch=st.integers(0, 3),
    group=st.one_of(st.integers(0, 8), st.integers(0, 200)),
    length=st.integers(0, 4),
    tokens=st.sampled_from([1, 2, 3, 8, 300, "huge"]),
    kind=st.sampled_from([torch.int64, torch.int32, torch.int16]),
    pool=st.sampled_from(sorted(REWARDS)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    masked=st.sampled_from(MASKS),
    strided=st.booleans(),
    eps=st.sampled_from([1e-4, 1e-6, 0.5]),
    ddof=st.sampled_from([0, 1]),
    std_floor=st.sampled_from([0.0, 0.2]),
    min_siblings=st.integers(2, 4),
    baseline=st.sampled_from(["sibling", "parent", "leave_one_out"]),
    scale=st.sampled_from(["siblings", "group", "none"]),
)
def test_oracle(
    backend,
    seed,
    batch,
    group,
    length,
    tokens,
    kind,
    pool,
    dtype,
    masked,
    strided,
    eps,
    ddof,
    std_floor,
    min_siblings,
    baseline,
    scale,
):
    check_case(
        seed,
        batch,
        group,
        length,
        tokens,
        kind,
        pool,
        dtype,
        masked,
        strided,
        {
            "eps": eps,
            "ddof": ddof,
            "std_floor": std_floor,
            "min_siblings": min_siblings,
            "baseline": baseline,
            "scale": scale,
        },
    )


@pytest.mark.parametrize("baseline", ["sibling", "parent", "leave_one_out"])
@pytest.mark.parametrize("tokens", [2, 8, "huge"])
@pytest.mark.parametrize("group", [33, 65, 130])
def test_oracle_wide(backend, group, tokens, baseline):
    """Groups too large for hypothesis to draw often."""
    masked = MASKS[(group + len(baseline)) % 4]
    pool = "broken" if tokens == 8 else "many"
    case = (group, 2, group, 3, tokens, torch.int64, pool, torch.float32, masked, False)
    scale = {"sibling": "siblings", "parent": "group", "leave_one_out": "none"}[baseline]
    check_case(*case, {"baseline": baseline, "scale": scale})


def check_case(seed, batch, group, length, tokens, kind, pool, dtype, masked, strided, options):
    rng = np.random.default_rng(seed + 1)
    if strided:
        sids = random_tokens(seed, length, group, batch, tokens, kind).permute(2, 1, 0)
    else:
        sids = random_tokens(seed, batch, group, length, tokens, kind)
    shape = (batch, group)
    values = rng.normal(size=shape) if REWARDS[pool] is None else rng.choice(REWARDS[pool], shape)
    rewards = torch.tensor(values, dtype=torch.float32).reshape(shape).to(dtype)
    mask = make_mask(rng, masked, batch, group, length)
    if mask is not None:
        present = mask if mask.dim() == 2 else mask.any(2)
        rewards = rewards.masked_fill(~present, NAN)  # a padded candidate takes no part
    compare(sibling_advantage(sids, rewards, mask, **options), sids, rewards, mask, options)


@pytest.mark.parametrize("baseline", ["sibling", "parent", "leave_one_out"])
def test_equal_rewards_are_exactly_zero(backend, baseline):
    """Seven rewards of 0.35, spread unevenly over the children, whose float sums differ in the last bit."""
    rewards = torch.full((1, 7), 0.35)
    tokens = torch.tensor([[[0, 0], [0, 1], [0, 1], [0, 2], [1, 0], [1, 1], [2, 0]]])
    out = sibling_advantage(tokens, rewards, eps=1e-12, baseline=baseline)
    assert out.valid[0, :6].all()
    assert not out.advantage.any()


@pytest.mark.parametrize("baseline", ["sibling", "parent", "leave_one_out"])
@pytest.mark.parametrize("children", [3, 5, 7, 11, 49])
def test_equal_means_are_exactly_zero(backend, children, baseline):
    """Means that no float holds exactly, so that a sum of them rounds."""
    rewards = torch.tensor([0.1, 0.2, 0.7]).repeat(1, children)
    tokens = torch.arange(children).repeat_interleave(3).view(1, -1, 1)
    out = sibling_advantage(tokens, rewards, eps=1e-30, baseline=baseline)
    assert out.valid.all() and not out.advantage.any()


@pytest.mark.parametrize("scale", ["siblings", "none"])
@pytest.mark.parametrize("baseline", ["sibling", "parent", "leave_one_out"])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_other_parents_do_not_notice(backend, bad, baseline, scale):
    """What is not compared with a reward has the same bits whatever that reward is."""
    tokens = random_tokens(5, 2, 30, 3, 3)
    rewards = torch.randn(2, 30, generator=torch.Generator().manual_seed(5))
    broken = rewards.clone()
    broken[1, 7] = bad
    plain = sibling_advantage(tokens, rewards, baseline=baseline, scale=scale)
    got = sibling_advantage(tokens, broken, baseline=baseline, scale=scale)
    compared = torch.zeros(tokens.shape, dtype=torch.bool)
    for depth in range(3):
        compared[1, :, depth] = (tokens[1, :, :depth] == tokens[1, 7, :depth]).all(1)
    assert torch.equal(got.advantage.isnan(), compared & plain.valid)
    assert torch.equal(got.advantage[~compared], plain.advantage[~compared])
    assert all(torch.equal(x, y) for x, y in zip(got[1:], plain[1:]))


def test_the_largest_rewards_are_compared(backend):
    tokens, rewards = torch.tensor([[[0], [0], [1], [2]]]), torch.tensor([[3e38, 3e38, -3e38, 3.4e38]])
    got, small = sibling_advantage(tokens, rewards), sibling_advantage(tokens, rewards / 1e38)
    torch.testing.assert_close(got.advantage, small.advantage, rtol=1e-3, atol=0)


def test_padding_may_hold_anything(backend):
    """Masked tokens at the end decide nothing; a mask of whole candidates says the same by token."""
    tokens = random_tokens(6, 3, 40, 4, 3)
    rewards = torch.randn(3, 40, generator=torch.Generator().manual_seed(6))
    mask = make_mask(np.random.default_rng(6), "ends", 3, 40, 4)
    want = sibling_advantage(tokens, rewards, mask)
    assert not want.valid.logical_and(~mask).any() and (want.node[~mask] == -1).all()
    for padding in (0, 1, -100):
        got = sibling_advantage(tokens.masked_fill(~mask, padding), rewards, mask)
        assert all(map(torch.equal, got, want))
    whole = mask[:, :, 0]
    by_token = whole[:, :, None].expand(tokens.shape).contiguous()
    assert all(map(torch.equal, *(sibling_advantage(tokens, rewards, m) for m in (whole, by_token))))


def test_tokens_that_collide_in_32_bits(backend):
    tokens = torch.tensor([[[0], [2**32], [-(2**32)], [2**62], [-(2**62)]]])
    out = sibling_advantage(tokens, torch.arange(5.0).view(1, 5))
    assert out.num_candidates[0, :, 0].tolist() == [1] * 5
    assert out.node[0, :, 0].tolist() == [2, 3, 1, 4, 0]


@pytest.mark.parametrize("group", [13, 130])
def test_order_permutes_the_result(backend, group):
    generator = torch.Generator().manual_seed(group)
    tokens = torch.randint(0, 4, (3, group, 3), generator=generator)
    rewards = torch.randn(3, group, generator=generator)
    order = torch.randperm(group, generator=generator)
    plain = sibling_advantage(tokens, rewards)
    moved = sibling_advantage(tokens[:, order], rewards[:, order])
    for name in ("valid", "node", "num_candidates"):
        assert torch.equal(getattr(moved, name), getattr(plain, name)[:, order])
    torch.testing.assert_close(moved.advantage, plain.advantage[:, order], rtol=1e-6, atol=1e-7)


@given(seed=st.integers(0, 2**32 - 1), group=st.integers(1, 150), vocabulary=st.integers(1, 12))
def test_node_ids_are_dense_and_lexicographic(backend, seed, group, vocabulary):
    tokens = random_tokens(seed, 1, group, 3, vocabulary)
    node = sibling_advantage(tokens, torch.zeros(1, group)).node[0]
    first = 0
    for depth in range(3):
        distinct = sorted({tuple(row[: depth + 1]) for row in tokens[0].tolist()})
        ids = {prefix: first + i for i, prefix in enumerate(distinct)}
        assert node[:, depth].tolist() == [ids[tuple(row[: depth + 1])] for row in tokens[0].tolist()]
        first += len(distinct)


@pytest.mark.slow
def test_large_groups_like_the_reference(cpu):
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(0, 40, (1, 4096, 3), generator=generator)
    rewards = torch.randn(1, 4096, generator=generator)
    mask = torch.rand(1, 4096, generator=generator) > 0.1
    got = sibling_advantage(tokens, rewards, mask)
    with vstar_ops.use_backend("reference"):
        want = sibling_advantage(tokens, rewards, mask)
    torch.testing.assert_close(got.advantage, want.advantage, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(got[1:], want[1:]))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_token_dtypes(backend, dtype):
    tokens = torch.randint(0, 100, (2, 20, 2), generator=torch.Generator().manual_seed(6))
    rewards = torch.arange(40.0).view(2, 20)
    got, want = sibling_advantage(tokens.to(dtype), rewards), sibling_advantage(tokens, rewards)
    assert all(torch.equal(a, b) for a, b in zip(got, want))


BAD = [
    ({"tokens": [[[1]]]}, TypeError, "tokens"),
    ({"tokens": torch.zeros(2, 3, 2)}, TypeError, "tokens"),
    ({"tokens": torch.zeros(2, 3, dtype=torch.int64)}, ValueError, "tokens"),
    ({"rewards": torch.zeros(2, 4)}, ValueError, "rewards"),
    ({"rewards": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "rewards"),
    ({"rewards": torch.zeros(2, 3, device="meta")}, ValueError, "rewards"),
    ({"mask": torch.ones(3, 2, dtype=torch.bool)}, ValueError, "mask"),
    ({"mask": torch.ones(2, 3, dtype=torch.uint8)}, TypeError, "mask"),
    ({"eps": -1e-9}, ValueError, "eps"),
    ({"eps": 0.0}, ValueError, "eps"),
    ({"eps": None}, TypeError, "eps"),
    ({"ddof": -1}, ValueError, "ddof"),
    ({"std_floor": -1.0}, ValueError, "std_floor"),
    ({"min_siblings": 1}, ValueError, "min_siblings"),
    ({"min_siblings": "two"}, TypeError, "min_siblings"),
    ({"min_siblings": 2.5}, TypeError, "min_siblings"),
    ({"mask": torch.ones(2, 3, 3, dtype=torch.bool)}, ValueError, "mask"),
    ({"baseline": "median"}, ValueError, "baseline"),
    ({"scale": "request"}, ValueError, "scale"),
]


@pytest.mark.parametrize(("change", "error", "name"), BAD)
def test_errors_name_the_argument(backend, change, error, name):
    arguments = {"tokens": torch.zeros(2, 3, 2, dtype=torch.int64), "rewards": torch.zeros(2, 3), **change}
    with pytest.raises(error, match=f"^{name} "):
        sibling_advantage(**arguments)


def test_validation_looks_at_values(backend):
    tokens, rewards = torch.zeros(1, 2, 1, dtype=torch.int64), torch.tensor([[1.0, float("inf")]])
    with vstar_ops.validation(), pytest.raises(ValueError, match=r"^rewards "):
        sibling_advantage(tokens, rewards)
