"""Fixtures and settings shared by all tests."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

import vstar_ops
from vstar_ops.ops._library import Op

sys.path.insert(0, str(Path(__file__).parent))  # tests/oracles.py

import cuda_emulator

settings.register_profile(
    "vstar_ops",
    deadline=None,
    max_examples=8 if vstar_ops._backends.interpreting() or cuda_emulator.SANITIZERS else 60,
    derandomize=bool(os.environ.get("CI")),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("vstar_ops")

INTERPRETING = vstar_ops._backends.interpreting()
BACKENDS = [name for name, status in vstar_ops.backends().items() if status.available]
ON_GPU = {"triton", "cuda"} if not INTERPRETING else {"cuda"}
if cuda_emulator.COMPILER and not INTERPRETING:
    BACKENDS.append("emulated")  # the CUDA C++ kernels on the host; see cuda_emulator.py
if cuda_emulator.SANITIZERS:
    BACKENDS = ["emulated"]


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
        """Whatever the tests launch is among the specializations that are compiled ahead and measured."""
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
        known = {key(x.kernel.fn.__name__, x.warps, x.constants) for x in vstar_ops._triton.specializations()}
        assert launched <= known, f"not among the specializations: {launched - known}"


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Run the test once on each available backend.

    The tests make CPU tensors. Where kernels run on a GPU, their arguments are copied there and the results
    back, so that every test of an op is also one of its kernels.
    """
    name = request.param
    if request.node.get_closest_marker("large") and (INTERPRETING or name == "emulated"):
        pytest.skip("takes minutes")
    if name in ("triton", "cuda"):
        request.getfixturevalue("poisoned")
    if name == "emulated":
        cuda_emulator.load()
        everywhere(monkeypatch, lambda run: run.backends["cuda"])
    elif name in ON_GPU:
        if not torch.cuda.is_available():
            pytest.skip("no GPU")
        everywhere(monkeypatch, functools.partial(through_gpu, name))
    with vstar_ops.use_backend("auto" if name == "emulated" or name in ON_GPU else name):
        yield name


@pytest.fixture
def poisoned() -> Iterator[None]:
    """New tensors hold NaN, or the largest integer: an output that no kernel has written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def everywhere(monkeypatch: pytest.MonkeyPatch, kernel: Callable[[Op], Callable[..., Any]]) -> None:
    """Let ``kernel(run)`` stand in for what runs an op, but for ``use_backend`` inside of the test."""

    def patched(run: Op) -> Callable[..., Any]:
        def call(device: torch.device, *arguments: Any) -> Any:
            if vstar_ops._backends.active_backend(device) is not None:
                return run(device, *arguments)
            return kernel(run)(*arguments)

        return call

    for module, attribute, run in ops():
        monkeypatch.setattr(module, attribute, patched(run))


def ops() -> list[tuple[Any, str, Op]]:
    """Where the public functions find the ops that they call."""
    modules = [module for name, module in sys.modules.items() if name.startswith("vstar_ops.ops.")]
    found = [(m, name, x) for m in modules for name, x in vars(m).items() if name.startswith("_run")]
    return [(m, name, x) for m, name, x in found if isinstance(x, Op)]


def through_gpu(backend: str, run: Op) -> Callable[..., Any]:
    """An op for CPU tensors that runs on the GPU; what it changes in place is changed here too."""

    def call(*arguments: Any) -> Any:
        there = [x.cuda() if isinstance(x, torch.Tensor) else x for x in arguments]
        with vstar_ops.use_backend(backend):
            result = run(torch.device("cuda"), *there)
        for here, other in zip(arguments, there):
            if isinstance(here, torch.Tensor) and not torch.equal(here, other.cpu()):
                here.detach().copy_(other)
        if isinstance(result, torch.Tensor):
            return result.cpu()
        return result and tuple(x.cpu() for x in result)

    return call


@pytest.fixture
def cpu() -> Iterator[None]:
    """Run the test on the C++ backend, or skip it."""
    if "cpu" not in BACKENDS:
        pytest.skip(vstar_ops.backends()["cpu"].detail)
    with vstar_ops.use_backend("cpu"):
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
