"""The cases under pytest-benchmark, to compare two versions of this library.

``pytest benchmarks/bench_ops.py --benchmark-autosave`` on one commit, ``--benchmark-compare`` on the other.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.cases import Case, Setting, cases
from benchmarks.catalogue import industrial_like


def label(make: partial[Case]) -> str:
    """The case's function and its shape, known before it is made."""
    return "-".join([make.func.__name__, *(str(x).removeprefix("torch.") for x in make.args[1:])])


@pytest.mark.parametrize("make", cases("cpu", Setting("cpu", industrial_like())), ids=label)
def test_op(benchmark: BenchmarkFixture, make: partial[Case]) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # ratios between commits are steadiest on one thread
    case = make()
    case.check()
    ours = case.timed()["ours"]
    if case.calls:
        benchmark.pedantic(ours, args=(0,), setup=case.reset, rounds=100)
    else:
        benchmark(ours, 0)
