"""The cases under pytest-benchmark, to compare two versions of this library.

``pytest benchmarks/bench_ops.py --benchmark-autosave`` on one commit, ``--benchmark-compare`` on the other.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from operator import attrgetter

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.cases import Case, cases
from benchmarks.catalogue import industrial_like


@pytest.mark.parametrize("make", cases("cpu", industrial_like()), ids=attrgetter("__name__"))
def test_op(benchmark: BenchmarkFixture, make: Callable[[], Case]) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # ratios between commits are steadiest on one thread
    case = make()
    case.check()
    ours = partial(case.run, case.variants["ours"])
    if case.calls:
        benchmark.pedantic(ours, setup=case.reset, rounds=100)
    else:
        benchmark(ours)
