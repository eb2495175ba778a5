"""The same cases under pytest-benchmark, to compare two versions of this library.

``pytest benchmarks/bench_ops.py --benchmark-autosave`` on one commit, ``--benchmark-compare`` on the other.
"""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.__main__ import (
    legal_case,
    logp_case,
    loss_case,
    returns_case,
    sibling_case,
    tree_case,
    vocab_case,
)
from benchmarks.catalogue import industrial_like
from vstar_ops import Trie


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    """Ratios between commits are steadiest on one thread."""
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.mark.parametrize("depth", [1, 2])
def test_expand_topk_legal(benchmark: BenchmarkFixture, depth: int) -> None:
    benchmark(legal_case(Trie.from_sequences(industrial_like()), depth, 768)["ours"])


def test_expand_topk_vocab(benchmark: BenchmarkFixture) -> None:
    benchmark(vocab_case()["ours"])


@pytest.mark.parametrize(("batch", "group"), [(64, 16), (256, 64)])
def test_sibling_advantage(benchmark: BenchmarkFixture, batch: int, group: int) -> None:
    benchmark(sibling_case(industrial_like(), batch, group)["ours"])


@pytest.mark.parametrize(("batch", "group"), [(64, 16), (256, 64)])
def test_prefix_returns(benchmark: BenchmarkFixture, batch: int, group: int) -> None:
    benchmark(returns_case(industrial_like(), batch, group)["ours"])


@pytest.mark.parametrize(("batch", "group"), [(64, 16), (256, 64)])
def test_prefix_tree(benchmark: BenchmarkFixture, batch: int, group: int) -> None:
    benchmark(tree_case(industrial_like(), batch, group)["ours"])


@pytest.mark.parametrize(("batch", "group"), [(64, 16), (256, 64)])
def test_sibling_grpo_loss(benchmark: BenchmarkFixture, batch: int, group: int) -> None:
    benchmark(loss_case(industrial_like(), batch, group)["ours"])


def test_token_logp(benchmark: BenchmarkFixture) -> None:
    benchmark(logp_case(64, 152_064)["ours"])
