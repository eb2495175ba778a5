"""Fixtures and settings shared by all tests."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

import vstar_ops

sys.path.insert(0, str(Path(__file__).parent))  # tests/oracles.py

import cuda_emulator
import op_calls

settings.register_profile(
    "vstar_ops",
    deadline=None,
    max_examples=8 if vstar_ops._backends.interpreting() or cuda_emulator.SANITIZERS else 60,
    derandomize=bool(os.environ.get("CI")),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("vstar_ops")

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores

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

    def vector(x: Any, values: np.ndarray) -> Any:
        return tl.tensor(TensorHandle(values, x.dtype.scalar), tl.block_type(x.dtype.scalar, [len(values)]))

    # By numpy: interpreted step by step they take most of the tests' time.
    tl.topk = lambda x, k: vector(x, np.sort(x.handle.data)[::-1][:k].copy())
    tl.sort = lambda x: vector(x, np.sort(x.handle.data))

    @pytest.fixture(scope="session", autouse=True)
    def launches_are_recorded() -> Iterator[None]:
        """Whatever the tests launch is among the specializations that are compiled ahead and measured."""
        from triton.runtime.interpreter import InterpretedFunction

        launched, run = set(), InterpretedFunction.run

        def key(name: str, warps: int, constants: dict[str, Any]) -> tuple[Any, ...]:
            return name, warps, *sorted((k, v) for k, v in constants.items() if k.isupper())

        def recorded(self: Any, *args: Any, **kwargs: Any) -> Any:
            op_calls.interpreted += 1
            launched.add(key(self.fn.__name__, kwargs["num_warps"], kwargs))
            return run(self, *args, **kwargs)

        InterpretedFunction.run = recorded
        yield
        InterpretedFunction.run = run
        known = {key(x.kernel.fn.__name__, x.warps, x.constants) for x in vstar_ops._triton.specializations()}
        assert launched <= known, f"not among the specializations: {launched - known}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """For pytest-xdist: slow tests begin first."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Run the test once on each available backend.

    The tests make CPU tensors. Where kernels run on a GPU, their arguments are copied there and the results
    back, so that every test of an op is also one of its kernels.
    """
    name = request.param
    if request.node.get_closest_marker("slow") and (INTERPRETING or name == "emulated"):
        pytest.skip("takes minutes")
    request.getfixturevalue("poisoned")
    if name == "emulated":
        cuda_emulator.load()
        op_calls.route(monkeypatch, name, lambda op: op.overloads["cuda"])
    elif name in ON_GPU:
        if not torch.cuda.is_available():
            pytest.skip("no GPU")
        op_calls.route(monkeypatch, name, lambda op: op_calls.through_gpu(op, name))
    elif name == "triton":
        op_calls.route(monkeypatch, name, lambda op: op.overloads[name])
    op_calls.calls[op_calls.file, name, ""] += 1
    with vstar_ops.use_backend("auto" if name in {"emulated", *ON_GPU} else name):
        yield name


@pytest.fixture(scope="module", autouse=True)
def counted_by_file(request: pytest.FixtureRequest) -> None:
    """Calls and launches are those of this file."""
    op_calls.file = request.module.__name__.removeprefix("test_")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """The tests of an op fail where its kernels should have run and none was launched, by any process of
    pytest-xdist, which has a part of each file.
    """
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["calls"] = [
            [*x, n, op_calls.launches[x]] for x, n in op_calls.calls.items()
        ]
    elif missing := op_calls.not_launched():
        print(f"\nFAILED: these tests have launched no kernel: {'; '.join(missing)}")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Add what a process of pytest-xdist has counted."""
    for *key, number, launches in getattr(node, "workeroutput", {}).get("calls", []):
        op_calls.calls[tuple(key)] += number
        op_calls.launches[tuple(key)] += launches


@pytest.fixture
def poisoned() -> Iterator[None]:
    """New tensors hold NaN, or the largest integer: an output that no kernel has written shows."""
    in_cpp = torch._C._dispatch_has_kernel_for_dispatch_key(
        "vstar_ops::poison_outputs", "CompositeExplicitAutograd"
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    if in_cpp:
        torch.ops.vstar_ops.poison_outputs(True)
    yield
    torch.use_deterministic_algorithms(False)
    if in_cpp:
        torch.ops.vstar_ops.poison_outputs(False)


@pytest.fixture
def cpu(poisoned: None) -> Iterator[None]:
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
