"""What the tests of an op run: kernels in place of its dispatcher op, and whether any was launched."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import cuda_emulator
import pytest
import torch

import vstar_ops
from vstar_ops.ops import OPS
from vstar_ops.ops._registry import REFUSED, Op
from vstar_ops.verify.calls import moved

file = ""  # whose tests run, without test_ and .py
calls: Counter[tuple[str, str, str]] = Counter()  # by file, backend and op; under the op "" its tests
launches: Counter[tuple[str, str, str]] = Counter()  # of kernels, likewise
interpreted = 0  # Triton kernels since the tests began


def route(monkeypatch: pytest.MonkeyPatch, backend: str, kernel: Callable[[Op], Callable[..., Any]]) -> None:
    """Let ``kernel(op)`` stand in for every op, save for ``use_backend`` inside a test; count launches."""
    run = Op.run

    def routed(op: Op, asked: str | None, arguments: tuple[Any, ...]) -> Any:
        if asked not in (None, backend):
            return run(op, asked, arguments)
        before = launched(backend)
        try:
            return kernel(op)(*arguments)
        finally:
            calls[file, backend, op.name] += 1
            launches[file, backend, op.name] += launched(backend) - before

    monkeypatch.setattr(Op, "run", routed)
    if backend == "triton":  # which leaves all checks to Python
        monkeypatch.setattr(Op, "attempt", lambda *_: REFUSED)


def counts_launches(backend: str) -> bool:
    """Whether :data:`launches` says anything: not of a GPU's."""
    return backend == "emulated" or (backend == "triton" and vstar_ops._backends.interpreting())


def launched(backend: str) -> int:
    """Kernels that were launched so far, where they can be counted."""
    return cuda_emulator.counts().launches if backend == "emulated" else interpreted


def not_launched() -> list[str]:
    """File, backend and op where the tests of ``tests/test_<module>.py`` have launched no kernel."""
    found = []
    for module, backend in sorted({key[:2] for key in calls if counts_launches(key[1])}):
        ops = [op.name for op in OPS.values() if op.module == module]
        called = [name for name in ops if calls[module, backend, name]]
        missing = [name for name in called or ops if not launches[module, backend, name]]
        found += [f"test_{module}.py, {backend}, {name}" for name in missing]
    return found


class Moved(torch.autograd.Function):
    """A copy on a device, with its gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, device: str) -> torch.Tensor:
        ctx.device = x.device
        return moved(x, device)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient.to(ctx.device), None


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """NaN equals NaN."""
    if not a.is_floating_point():
        return torch.equal(a, b)
    return torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def through_gpu(op: Op, backend: str, device: str = "cuda") -> Callable[..., Any]:
    """An op for CPU tensors that runs on the GPU; what it changes in place is changed here too."""

    def call(*arguments: Any) -> Any:
        there = [Moved.apply(x, device) if isinstance(x, torch.Tensor) else x for x in arguments]
        result = op.overloads[backend](*there)
        for here, other in zip(arguments, there):
            if isinstance(here, torch.Tensor) and not _equal(here, other.cpu()):
                here.detach().copy_(other)
        if isinstance(result, torch.Tensor):
            return result.cpu()
        return result and tuple(x.cpu() for x in result)

    return call
