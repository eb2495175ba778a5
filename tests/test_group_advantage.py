"""``group_advantage``: by hand, against its oracle, at its edges.

The table below teaches the op; read it first.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import vstar_ops
from vstar_ops import group_advantage
from vstar_ops.verify import oracles

# ---------------------------------------------------------------- by hand

NAN, INF = float("nan"), float("inf")
# One group each: what it teaches, rewards, options, advantages.
EXAMPLES = [
    (
        "(reward - mean) / (std + eps): the mean is 2, the sample standard deviation is 1",
        [1.0, 2.0, 3.0], {"eps": 1e-9}, [-1.0, 0.0, 1.0],
    ),
    (
        "eps is added to the standard deviation, here 1/2, and is 1e-4 unless given",
        [1.0, 0.0, 0.0, 0.0], {}, [0.75 / 0.5001, -0.25 / 0.5001, -0.25 / 0.5001, -0.25 / 0.5001],
    ),
    ("equal rewards say nothing: exactly 0", [2.0, 2.0, 2.0, 2.0], {}, [0.0] * 4),
    ("a group of one has nothing to compare with", [5.0], {}, [0.0]),
    (
        "mask: a candidate that is left out gets 0 and does not count, whatever its reward",
        [1.0, 2.0, NAN, 3.0], {"eps": 1e-9, "mask": [True, True, False, True]}, [-1.0, 0.0, 0.0, 1.0],
    ),
    ("mask: with fewer than two candidates left, all get 0", [5.0, 1.0], {"mask": [True, False]}, [0.0, 0.0]),
    ("mask: nobody is left", [1.0, 2.0], {"mask": [False, False]}, [0.0, 0.0]),
    ("a NaN reward: every advantage that is compared with it is NaN", [NAN, 1.0, 1.0], {}, [NAN] * 3),
    ("infinity is no number to compare with, not even with itself", [INF, INF, INF], {}, [NAN] * 3),
    ("minus infinity neither", [1.0, -INF, 2.0], {"mask": [True, True, True]}, [NAN] * 3),
    (
        "mask: a reward that is not there is compared with nothing",
        [NAN, INF, 3.0], {"mask": [True, False, False]}, [0.0, 0.0, 0.0],
    ),
    ("scale='none': the difference to the mean, 2", [1.0, 2.0, 3.0], {"scale": "none"}, [-1.0, 0.0, 1.0]),
    ("scale='none': the mean of unequal rewards, 1", [3.0, 0.0, 0.0], {"scale": "none"}, [2.0, -1.0, -1.0]),
    ("scale='none': NaN all the same", [3.0, INF, 0.0], {"scale": "none"}, [NAN] * 3),
    (
        "ddof=0: the population's standard deviation, sqrt(2/3) here",
        [1.0, 2.0, 3.0], {"eps": 1e-9, "ddof": 0}, [-(1.5**0.5), 0.0, 1.5**0.5],
    ),
    (
        "std_floor: the standard deviation counts as at least so much; 1 counts as 2",
        [1.0, 2.0, 3.0], {"eps": 1e-9, "std_floor": 2.0}, [-0.5, 0.0, 0.5],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("lesson", "rewards", "options", "want"), EXAMPLES, ids=[x[0] for x in EXAMPLES])
def test_by_hand(backend, lesson, rewards, options, want):
    given_ = {name: torch.tensor([x]) if name == "mask" else x for name, x in options.items()}
    got = group_advantage(torch.tensor([rewards]), **given_)
    assert got[0].tolist() == pytest.approx(want, rel=1e-6, abs=1e-30, nan_ok=True)


# ---------------------------------------------------------------- against the oracle

POOLS = {
    "few": [0.0, 1.0, 0.35],
    "one": [0.35],
    "many": None,
    "tiny": [1.0, 1.0 + 2**-23],
    "broken": [1.0, 2.0, 0.35, 0.0, NAN, INF, -INF],
    "large": [3e38, -3e38, 3.4e38],
}


@given(
    seed=st.integers(0, 2**32 - 1),
    batch=st.integers(0, 4),
    group=st.one_of(st.integers(0, 8), st.integers(0, 200)),
    pool=st.sampled_from(sorted(POOLS)),
    masked=st.booleans(),
    eps=st.sampled_from([1e-4, 1e-8, 0.5, 0.0]),
    ddof=st.sampled_from([0, 1]),
    std_floor=st.sampled_from([0.0, 0.1]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    strided=st.booleans(),
    scale=st.sampled_from(["group", "none"]),
)
def test_oracle(backend, seed, batch, group, pool, masked, eps, ddof, std_floor, dtype, strided, scale):
    if eps == 0 and std_floor == 0:
        eps = 1e-4
    rng = np.random.default_rng(seed)
    shape = (group, batch) if strided else (batch, group)
    values = rng.normal(size=shape) * 3 if POOLS[pool] is None else rng.choice(POOLS[pool], shape)
    rewards = torch.tensor(values, dtype=torch.float32).reshape(shape).to(dtype)
    mask = torch.from_numpy(rng.random(shape) < rng.random()) if masked else None
    if strided:
        rewards, mask = rewards.t(), mask.t() if masked else None
    if masked:
        rewards = rewards.masked_fill(~mask, float("nan"))  # a padded candidate takes no part
    got = group_advantage(rewards, mask, eps=eps, ddof=ddof, std_floor=std_floor, scale=scale)
    arrays = rewards.double().numpy(), mask.numpy() if masked else None
    want = oracles.group_advantage(*arrays, eps, ddof, std_floor, scale)
    assert got.dtype == torch.float32
    assert got.shape == (batch, group)
    torch.testing.assert_close(got, torch.from_numpy(want).float(), rtol=1e-5, atol=1e-6, equal_nan=True)
    assert torch.equal(got == 0, torch.from_numpy(want == 0))


@pytest.mark.parametrize("group", [3, 7, 64, 1000])
def test_equal_rewards_are_exactly_zero(backend, group):
    assert not group_advantage(torch.full((3, group), 0.35), eps=1e-12).any()


def test_infinite_padding_takes_no_part(backend):
    mask = torch.tensor([[True, True, False]])
    plain = group_advantage(torch.tensor([[1.0, 2.0]]))
    for junk in (float("inf"), float("-inf"), float("nan"), 1e30):
        got = group_advantage(torch.tensor([[1.0, 2.0, junk]]), mask)
        assert torch.equal(got, torch.cat([plain, torch.zeros(1, 1)], 1))


def test_order_permutes_the_result(backend):
    generator = torch.Generator().manual_seed(1)
    rewards = torch.randn(4, 50, generator=generator)
    order = torch.randperm(50, generator=generator)
    torch.testing.assert_close(
        group_advantage(rewards[:, order]), group_advantage(rewards)[:, order], rtol=1e-6, atol=1e-7
    )


BAD = [
    ({"rewards": [1.0]}, TypeError, "rewards"),
    ({"rewards": torch.zeros(3)}, ValueError, "rewards"),
    ({"rewards": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "rewards"),
    ({"mask": torch.ones(2, 2, dtype=torch.bool)}, ValueError, "mask"),
    ({"mask": torch.ones(2, 3)}, TypeError, "mask"),
    ({"mask": torch.ones(2, 3, dtype=torch.bool, device="meta")}, ValueError, "mask"),
    ({"eps": -1.0}, ValueError, "eps"),
    ({"eps": float("nan")}, ValueError, "eps"),
    ({"eps": "small"}, TypeError, "eps"),
    ({"eps": 0.0}, ValueError, "eps"),
    ({"ddof": 2}, ValueError, "ddof"),
    ({"scale": "siblings"}, ValueError, "scale"),
    ({"std_floor": -0.1}, ValueError, "std_floor"),
    ({"std_floor": float("inf")}, ValueError, "std_floor"),
]


@pytest.mark.parametrize(("change", "error", "name"), BAD)
def test_errors_name_the_argument(backend, change, error, name):
    arguments = {"rewards": torch.zeros(2, 3), **change}
    with pytest.raises(error, match=f"^{name} "):
        group_advantage(**arguments)


def test_validation_looks_at_values(backend):
    rewards = torch.tensor([[1.0, float("nan")]])
    group_advantage(rewards)
    with vstar_ops.validation():
        with pytest.raises(ValueError, match=r"^rewards "):
            group_advantage(rewards)
        group_advantage(rewards, torch.tensor([[True, False]]))
    group_advantage(rewards)
