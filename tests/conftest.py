"""Fixtures and settings shared by all tests."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

import vstar_ops

sys.path.insert(0, str(Path(__file__).parent))  # tests/oracles.py

settings.register_profile(
    "vstar_ops",
    deadline=None,
    max_examples=8 if vstar_ops._backends.interpreting() else 60,
    derandomize=bool(os.environ.get("CI")),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("vstar_ops")

BACKENDS = [name for name in ("reference", "cpp", "triton") if vstar_ops.backends()[name].available]
ON_GPU = "triton" in BACKENDS and not vstar_ops._backends.interpreting()


if vstar_ops._backends.interpreting():
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    def sorted_topk(x: Any, k: int) -> Any:
        """``tl.topk`` by numpy: interpreted step by step it takes most of the tests' time."""
        best = np.sort(x.handle.data)[::-1][:k].copy()
        return tl.tensor(TensorHandle(best, x.dtype.scalar), tl.block_type(x.dtype.scalar, [k]))

    tl.topk = sorted_topk

    @pytest.fixture(scope="session", autouse=True)
    def launches_are_recorded() -> Iterator[None]:
        """Whatever the tests launch is among the specialisations that are compiled ahead and measured."""
        from triton.runtime.interpreter import InterpretedFunction

        launched, run = set(), InterpretedFunction.run

        def key(name: str, warps: int, constants: dict[str, Any]) -> tuple[Any, ...]:
            return name, warps, *sorted((k, v) for k, v in constants.items() if k.isupper())

        def recorded(self: Any, *args: Any, **kwargs: Any) -> Any:
            launched.add(key(self.fn.__name__, kwargs["num_warps"], kwargs))
            return run(self, *args, **kwargs)

        InterpretedFunction.run = recorded
        yield
        InterpretedFunction.run = run
        known = {key(x.kernel.fn.__name__, x.warps, x.constants) for x in vstar_ops._triton.specialisations()}
        assert launched <= known, f"not among the specialisations: {launched - known}"


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Run the test once on each available backend.

    The tests make CPU tensors. Where Triton kernels run on a GPU, their arguments are copied there and the
    results back, so that every test of an op is also one of its kernels.
    """
    if request.param == "triton":
        request.getfixturevalue("poisoned")
    if request.param == "triton" and ON_GPU:
        if not torch.cuda.is_available():
            pytest.skip("no GPU")
        through_gpu(monkeypatch)
        yield request.param
        return
    with vstar_ops.use_backend(request.param):
        yield request.param


@pytest.fixture
def poisoned() -> Iterator[None]:
    """New tensors hold NaN, or the largest integer: an output that no kernel has written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def through_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every op called with CPU tensors run on the GPU; what it changes in place is changed here too."""

    def moved(run: Callable[..., Any]) -> Callable[..., Any]:
        def call(device: torch.device, *arguments: Any) -> Any:
            there = [x.cuda() if isinstance(x, torch.Tensor) else x for x in arguments]
            with vstar_ops.use_backend("triton"):
                result = run(torch.device("cuda"), *there)
            for here, other in zip(arguments, there):
                if isinstance(here, torch.Tensor) and not torch.equal(here, other.cpu()):
                    here.detach().copy_(other)
            if isinstance(result, torch.Tensor):
                return result.cpu()
            return result and tuple(x.cpu() for x in result)

        return call

    for name in vstar_ops._triton.MODULES:
        module = sys.modules[f"vstar_ops.ops.{name}"]
        for run in [x for x in vars(module) if x.startswith("_run")]:
            monkeypatch.setattr(module, run, moved(getattr(module, run)))


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
