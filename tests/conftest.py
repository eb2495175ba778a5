"""Fixtures and settings shared by all tests."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

import vstar_ops

sys.path.insert(0, str(Path(__file__).parent))  # tests/oracles.py

settings.register_profile(
    "vstar_ops",
    deadline=None,
    max_examples=60,
    derandomize=bool(os.environ.get("CI")),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("vstar_ops")

BACKENDS = [name for name in ("reference", "cpp") if vstar_ops.backends()[name].available]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test once on each backend that is available for CPU tensors."""
    with vstar_ops.use_backend(request.param):
        yield request.param


@pytest.fixture
def cpp() -> Iterator[None]:
    """Run the test on the C++ backend, or skip it."""
    if "cpp" not in BACKENDS:
        pytest.skip(vstar_ops.backends()["cpp"].detail)
    with vstar_ops.use_backend("cpp"):
        yield


@pytest.fixture
def restore_threads() -> Iterator[None]:
    """Leave the number of threads as it was."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    from toy_data import write_folder

    return write_folder(tmp_path / "data")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Models this small only lose time to threads, and ``--threads`` is global to the process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
