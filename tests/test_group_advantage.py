"""``group_advantage`` against its oracle."""

from __future__ import annotations

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import vstar_ops
from vstar_ops import group_advantage

POOLS = {"few": [0.0, 1.0, 0.35], "one": [0.35], "many": None, "tiny": [1.0, 1.0 + 2**-23]}


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
)
def test_oracle(backend, seed, batch, group, pool, masked, eps, ddof, std_floor, dtype, strided):
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
    got = group_advantage(rewards, mask, eps=eps, ddof=ddof, std_floor=std_floor)
    want = oracles.group_advantage(
        np.nan_to_num(rewards.double().numpy()), mask.numpy() if masked else None, eps, ddof, std_floor
    )
    assert got.dtype == torch.float32
    assert got.shape == (batch, group)
    torch.testing.assert_close(got, torch.from_numpy(want).float(), rtol=1e-5, atol=1e-6)
    assert torch.equal(got == 0, torch.from_numpy(want == 0))


def test_hand_written(backend):
    got = group_advantage(torch.tensor([[1.0, 0.0, 0.0, 0.0], [2.0, 2.0, 2.0, 2.0]]))
    assert got[0].tolist() == pytest.approx([0.75 / 0.5001] + [-0.25 / 0.5001] * 3)
    assert got[1].tolist() == [0.0] * 4


@pytest.mark.parametrize("group", [3, 7, 64, 1000])
def test_equal_rewards_are_exactly_zero(backend, group):
    assert not group_advantage(torch.full((3, group), 0.35), eps=1e-12).any()


def test_fewer_than_two_present(backend):
    mask = torch.tensor([[True, False], [False, False]])
    assert not group_advantage(torch.tensor([[5.0, 1.0], [1.0, 2.0]]), mask).any()


def test_infinite_padding_takes_no_part(backend):
    mask = torch.tensor([[True, True, False]])
    plain = group_advantage(torch.tensor([[1.0, 2.0]]))
    for junk in (float("inf"), float("-inf"), float("nan"), 1e30):
        got = group_advantage(torch.tensor([[1.0, 2.0, junk]]), mask)
        assert torch.equal(got, torch.cat([plain, torch.zeros(1, 1)], 1))


def test_requests_never_mix(backend):
    rewards = torch.randn(16, 12, generator=torch.Generator().manual_seed(0))
    together = group_advantage(rewards)
    for b in range(16):
        assert torch.equal(group_advantage(rewards[b : b + 1])[0], together[b])


def test_order_permutes_the_result(backend):
    generator = torch.Generator().manual_seed(1)
    rewards = torch.randn(4, 50, generator=generator)
    order = torch.randperm(50, generator=generator)
    torch.testing.assert_close(
        group_advantage(rewards[:, order]), group_advantage(rewards)[:, order], rtol=1e-6, atol=1e-7
    )


def test_threads_give_the_same_bits(cpu, restore_threads):
    rewards = torch.randn(3000, 16, generator=torch.Generator().manual_seed(2))
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results += [group_advantage(rewards), group_advantage(rewards[:1])]
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[3])


def test_no_gradient(backend):
    assert not group_advantage(torch.randn(2, 3, requires_grad=True)).requires_grad


BAD = [
    ({"rewards": [1.0]}, TypeError, "rewards"),
    ({"rewards": torch.zeros(3)}, ValueError, "rewards"),
    ({"rewards": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "rewards"),
    ({"rewards": torch.zeros(2, 3, dtype=torch.float64)}, TypeError, "rewards"),
    ({"mask": torch.ones(2, 2, dtype=torch.bool)}, ValueError, "mask"),
    ({"mask": torch.ones(2, 3)}, TypeError, "mask"),
    ({"mask": torch.ones(2, 3, dtype=torch.bool, device="meta")}, ValueError, "mask"),
    ({"eps": -1.0}, ValueError, "eps"),
    ({"eps": float("nan")}, ValueError, "eps"),
    ({"eps": "small"}, TypeError, "eps"),
    ({"eps": 0.0}, ValueError, "eps"),
    ({"ddof": 2}, ValueError, "ddof"),
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


def test_opcheck():
    op = torch.ops.vstar_ops.group_advantage.default
    torch.library.opcheck(op, (torch.randn(3, 4), None, 1e-4, 1, 0.0))
    torch.library.opcheck(op, (torch.randn(3, 4).bfloat16(), torch.rand(3, 4) > 0.5, 1e-4, 0, 0.1))


@pytest.mark.parametrize("masked", [False, True])
def test_compile(masked):
    rewards = torch.randn(3, 5)
    mask = torch.rand(3, 5) > 0.3 if masked else None
    compiled = torch.compile(lambda r, m: group_advantage(r, m) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(rewards, mask), group_advantage(rewards, mask) * 2)
