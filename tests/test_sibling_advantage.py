"""``sibling_advantage`` against its oracle."""

from __future__ import annotations

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import vstar_ops
from vstar_ops import sibling_advantage

DEFAULTS = {"eps": 1e-4, "ddof": 0, "std_floor": 0.0, "min_siblings": 2, "baseline": "sibling"}
HUGE = [-(2**62), -(2**62) + 1, -(2**31) - 1, -1, 0, 2**31, 2**32, 2**62 - 1, 2**62]
REWARDS = {"few": [0.0, 1.0, 0.35], "one": [0.35], "many": None}


def compare(got, tokens, rewards, mask, options):
    want = oracles.sibling_advantage(
        tokens.numpy(),
        np.nan_to_num(rewards.double().numpy()),
        None if mask is None else mask.numpy(),
        **{**DEFAULTS, **options},
    )
    advantage, valid, node, count = (torch.from_numpy(x) for x in want)
    assert [x.dtype for x in got] == [torch.float32, torch.bool, torch.int32, torch.int32]
    assert all(x.shape == tokens.shape for x in got)
    assert torch.equal(got.valid, valid)
    assert torch.equal(got.node.long(), node)
    assert torch.equal(got.num_candidates.long(), count)
    torch.testing.assert_close(got.advantage, advantage.float(), rtol=1e-5, atol=1e-5)
    # Elsewhere a child at the mean of unequal siblings may be off by a rounding error.
    kept = rewards if mask is None else rewards.masked_fill(~mask, float("nan"))
    if kept.numel():
        highest = kept.nan_to_num(-torch.inf).amax(1, keepdim=True)
        equal = ((kept == highest) | kept.isnan()).all(1)
        assert not got.advantage[equal].any(), "equal rewards must give exactly 0"


def make(seed, batch, group, length, tokens, dtype=torch.int64):
    rng = np.random.default_rng(seed)
    shape = (batch, group, length)
    if tokens == "huge":
        return torch.from_numpy(rng.choice(np.array(HUGE), shape)).reshape(shape)
    return torch.from_numpy(rng.integers(0, tokens, shape)).to(dtype)


@given(
    seed=st.integers(0, 2**32 - 1),
    batch=st.integers(0, 3),
    group=st.one_of(st.integers(0, 8), st.integers(0, 200)),
    length=st.integers(0, 4),
    tokens=st.sampled_from([1, 2, 3, 8, 300, "huge"]),
    kind=st.sampled_from([torch.int64, torch.int32, torch.int16]),
    pool=st.sampled_from(sorted(REWARDS)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    masked=st.booleans(),
    strided=st.booleans(),
    eps=st.sampled_from([1e-4, 1e-6, 0.5]),
    ddof=st.sampled_from([0, 1]),
    std_floor=st.sampled_from([0.0, 0.2]),
    min_siblings=st.integers(2, 4),
    baseline=st.sampled_from(["sibling", "parent", "leave_one_out"]),
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
        },
    )


@pytest.mark.parametrize("baseline", ["sibling", "parent", "leave_one_out"])
@pytest.mark.parametrize("tokens", [2, 8, "huge"])
@pytest.mark.parametrize("group", [33, 65, 200])
def test_oracle_wide(backend, group, tokens, baseline):
    """Groups too large for hypothesis to draw often."""
    case = (group, 2, group, 3, tokens, torch.int64, "many", torch.float32, True, False)
    check_case(*case, {"baseline": baseline})


def check_case(seed, batch, group, length, tokens, kind, pool, dtype, masked, strided, options):
    rng = np.random.default_rng(seed + 1)
    if strided:
        sids = make(seed, length, group, batch, tokens, kind).permute(2, 1, 0)
    else:
        sids = make(seed, batch, group, length, tokens, kind)
    shape = (batch, group)
    values = rng.normal(size=shape) if REWARDS[pool] is None else rng.choice(REWARDS[pool], shape)
    rewards = torch.tensor(values, dtype=torch.float32).reshape(shape).to(dtype)
    mask = torch.from_numpy(rng.random(shape) < rng.random()).reshape(shape) if masked else None
    if masked:
        rewards = rewards.masked_fill(~mask, float("nan"))  # a padded candidate takes no part
    compare(sibling_advantage(sids, rewards, mask, **options), sids, rewards, mask, options)


def test_hand_written(backend):
    """Means 0.5 and 0 at the root; (1, 5) against (1, 6); (2, 5) alone."""
    tokens = torch.tensor([[[1, 5], [1, 6], [2, 5], [2, 5]]])
    out = sibling_advantage(tokens, torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    top, leaf = 0.25 / 0.2501, 0.5 / 0.5001
    assert out.advantage[0, :, 0].tolist() == pytest.approx([top, top, -top, -top])
    assert out.advantage[0, :, 1].tolist() == pytest.approx([leaf, -leaf, 0, 0])
    assert out.valid[0].tolist() == [[True, True], [True, True], [True, False], [True, False]]
    assert out.node[0].tolist() == [[0, 2], [0, 3], [1, 4], [1, 4]]
    assert out.num_candidates[0].tolist() == [[2, 1], [2, 1], [2, 2], [2, 2]]


def test_baselines(backend):
    """Child means 1 (twice), 0, 0.5: siblings' mean 0.5, parent's 0.625, the others' 0.25, 0.75, 0.5."""
    tokens = torch.tensor([[[0], [0], [1], [2]]])
    rewards = torch.tensor([[1.0, 1.0, 0.0, 0.5]])
    scale = (0.5 / 3) ** 0.5 + 1e-4
    want = {
        "sibling": [0.5, 0.5, -0.5, 0.0],
        "parent": [0.375, 0.375, -0.625, -0.125],
        "leave_one_out": [0.75, 0.75, -0.75, 0.0],
    }
    for baseline, values in want.items():
        got = sibling_advantage(tokens, rewards, baseline=baseline).advantage
        assert got[0, :, 0].tolist() == pytest.approx([v / scale for v in values], abs=1e-6)


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


def test_validity_is_not_inferred_from_the_advantage(backend):
    out = sibling_advantage(torch.tensor([[[0], [1]]]), torch.tensor([[0.5, 0.5]]))
    assert out.valid.all() and not out.advantage.any()


def test_a_single_child_is_invalid(backend):
    out = sibling_advantage(torch.tensor([[[3, 1], [3, 2]]]), torch.tensor([[0.0, 1.0]]))
    assert not out.valid[0, :, 0].any() and not out.advantage[0, :, 0].any()
    assert out.valid[0, :, 1].all() and out.advantage[0, :, 1].all()


def test_masked_candidates(backend):
    tokens = torch.tensor([[[0], [1], [2]]])
    mask = torch.tensor([[True, False, True]])
    out = sibling_advantage(tokens, torch.tensor([[1.0, float("nan"), 0.0]]), mask)
    assert out.node[0, :, 0].tolist() == [0, -1, 1]
    assert out.num_candidates[0, :, 0].tolist() == [1, 0, 1]
    assert out.valid[0, :, 0].tolist() == [True, False, True]
    assert out.advantage[0, 1, 0] == 0
    assert out.advantage[0, 0, 0] == -out.advantage[0, 2, 0] > 0
    nobody = sibling_advantage(tokens, torch.ones(1, 3), torch.zeros(1, 3, dtype=torch.bool))
    assert (nobody.node == -1).all() and not nobody.valid.any() and not nobody.num_candidates.any()


def test_tokens_that_collide_in_32_bits(backend):
    tokens = torch.tensor([[[0], [2**32], [-(2**32)], [2**62], [-(2**62)]]])
    out = sibling_advantage(tokens, torch.arange(5.0).view(1, 5))
    assert out.num_candidates[0, :, 0].tolist() == [1] * 5
    assert out.node[0, :, 0].tolist() == [2, 3, 1, 4, 0]


@pytest.mark.parametrize("group", [13, 200])
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


@pytest.mark.parametrize("group", [9, 100])
def test_requests_never_mix(backend, group):
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 3, (8, group, 3), generator=generator)
    rewards = torch.randn(8, group, generator=generator)
    together = sibling_advantage(tokens, rewards)
    for b in range(8):
        alone = sibling_advantage(tokens[b : b + 1], rewards[b : b + 1])
        assert all(torch.equal(a[0], t[b]) for a, t in zip(alone, together))


@given(seed=st.integers(0, 2**32 - 1), group=st.integers(1, 150), vocabulary=st.integers(1, 12))
def test_node_ids_are_dense_and_lexicographic(backend, seed, group, vocabulary):
    tokens = make(seed, 1, group, 3, vocabulary)
    node = sibling_advantage(tokens, torch.zeros(1, group)).node[0]
    first = 0
    for depth in range(3):
        distinct = sorted({tuple(row[: depth + 1]) for row in tokens[0].tolist()})
        ids = {prefix: first + i for i, prefix in enumerate(distinct)}
        assert node[:, depth].tolist() == [ids[tuple(row[: depth + 1])] for row in tokens[0].tolist()]
        first += len(distinct)


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


def test_threads_give_the_same_bits(cpu, restore_threads):
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, 5, (500, 32, 3), generator=generator)
    rewards = torch.randn(500, 32, generator=generator)
    wide = torch.randint(0, 9, (1, 2000, 3), generator=generator)
    wide_rewards = torch.randn(1, 2000, generator=generator)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append([*sibling_advantage(tokens, rewards), *sibling_advantage(wide, wide_rewards)])
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_token_dtypes(backend, dtype):
    tokens = torch.randint(0, 100, (2, 20, 2), generator=torch.Generator().manual_seed(6))
    rewards = torch.arange(40.0).view(2, 20)
    got, want = sibling_advantage(tokens.to(dtype), rewards), sibling_advantage(tokens, rewards)
    assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_no_gradient(backend):
    out = sibling_advantage(torch.zeros(1, 2, 1, dtype=torch.int64), torch.randn(1, 2, requires_grad=True))
    assert not out.advantage.requires_grad


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
    ({"baseline": "median"}, ValueError, "baseline"),
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


def test_opcheck():
    op = torch.ops.vstar_ops.sibling_advantage.default
    tokens, rewards = torch.randint(0, 3, (2, 6, 3)), torch.randn(2, 6)
    torch.library.opcheck(op, (tokens, rewards, None, 1e-4, 0, 0.0, 2, "sibling"))
    torch.library.opcheck(op, (tokens.int(), rewards.half(), rewards > 0, 1e-4, 1, 0.1, 3, "parent"))


def test_compile():
    tokens, rewards = torch.randint(0, 3, (2, 6, 3)), torch.randn(2, 6)
    compiled = torch.compile(lambda t, r: sibling_advantage(t, r), fullgraph=True, backend="aot_eager")
    assert all(
        torch.equal(a, b) for a, b in zip(compiled(tokens, rewards), sibling_advantage(tokens, rewards))
    )
