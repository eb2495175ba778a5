"""How Triton kernels are launched, without a GPU: the driver launches nothing, and nothing is compiled."""

from __future__ import annotations

import importlib.util
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from helpers import steps

import vstar_ops
from vstar_ops.ops._registry import Op
from vstar_ops.verify.cases import CASES
from vstar_ops.verify.generators import embedded

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(vstar_ops._backends.interpreting(), reason="interpreted kernels are not compiled"),
]
DEVICE = 99  # of no machine, so that no other test finds these variants


class Variant:
    """What Triton makes of a kernel and a class of arguments, as far as a launch knows it."""

    def __init__(self, launched: list[tuple[Variant, tuple[Any, ...]]]) -> None:
        self.function, self.packed_metadata, self.launched = 7, (1, 1, 0), launched

    def run(self, x: int, y: int, z: int, stream: int, function: int, metadata: Any, *rest: Any) -> None:
        assert (stream, function, metadata) == (DEVICE + 1, self.function, self.packed_metadata)
        assert all(isinstance(size, int) and size > 0 for size in (x, y, z))
        self.launched.append((self, rest[3:]))

    def launch_metadata(self, *_: Any) -> None:
        """Nothing; Triton asks for it."""


class Stub:
    """Launches, and how many of them went through Triton."""

    def __init__(self) -> None:
        self.launched: list[tuple[Variant, tuple[Any, ...]]] = []
        self.slow = 0

    def variants(self, call: Callable[[], Any]) -> list[Variant]:
        """Those that a call launches."""
        self.launched.clear()
        self.slow = 0
        call()
        assert self.launched
        return [variant for variant, _ in self.launched]


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class Driver:
        get_current_device = staticmethod(lambda: DEVICE)
        get_current_stream = staticmethod(lambda device: device + 1)
        get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))

    made, run, one_at_a_time = Stub(), JITFunction.run, threading.Lock()
    touched = set()

    def counted(self: Any, *arguments: Any, **options: Any) -> Any:
        made.slow += 1
        touched.add(self)
        with one_at_a_time:  # or two threads make a kernel's cache, and what one of them compiles is lost
            self.device_caches[DEVICE]
        return run(self, *arguments, **options)

    def compiled(self: Any, key: Any, *_: Any) -> Variant:
        return self.device_caches[DEVICE][0].setdefault(key, Variant(made.launched))

    monkeypatch.setattr(driver, "_active", Driver())
    monkeypatch.setattr(JITFunction, "_do_compile", compiled)
    monkeypatch.setattr(JITFunction, "run", counted)
    monkeypatch.setattr(Op, "run", lambda op, backend, arguments: op.overloads["triton"](*arguments))
    yield made
    for kernel in touched:
        kernel.device_caches.pop(DEVICE, None)
        known = kernel.launch.__globals__["known"]
        for key in [key for key in known if key[0] == DEVICE]:
            del known[key]


@pytest.mark.parametrize("op", CASES)
def test_a_second_launch_is_the_first_without_triton(stub: Stub, op: str) -> None:
    """The same variants with the same arguments, addresses in place of tensors."""
    for make in CASES[op].values():
        call = make(3)
        variants = stub.variants(call)
        before = list(stub.launched)
        assert stub.variants(call) == variants
        assert stub.slow == 0
        for (_, first), (_, second) in zip(before, stub.launched, strict=True):
            for x, y in zip(first, second, strict=True):
                if hasattr(x, "data_ptr"):
                    assert type(y) is int
                elif not isinstance(x, int) or abs(x) < 2**31:  # others are addresses, which may change
                    assert type(x) is type(y)
                    assert x == y


def logits_of(columns: int, dtype: torch.dtype, offset: int = 0, step: int = 1) -> torch.Tensor:
    """``[2, 3, columns]`` that begin ``offset`` entries behind a multiple of 16 bytes."""
    memory = torch.zeros(offset + 6 * columns * step + 16, dtype=dtype)
    assert memory.data_ptr() % 16 == 0
    return memory[offset : offset + 6 * columns * step : step].view(2, 3, columns)


LAYOUTS = [
    (columns, dtype, offset, step)
    for columns in (1, 16, 24, 32)
    for dtype in (torch.float32, torch.bfloat16)
    for offset in (0, 1, 8)
    for step in (1, 2, 16)
]


def test_variants_are_told_apart_as_triton_does(stub: Stub) -> None:
    """A launch takes the variant that Triton's own binder would take, whatever was launched before."""
    from vstar_ops.kernels.token_logp import _vocab_statistics

    targets = torch.zeros(2, 3, 1, dtype=torch.int64)
    calls = [partial(vstar_ops.token_logp, logits_of(*layout), targets) for layout in LAYOUTS]
    by_us = [variants[0] for _ in range(2) for variants in map(stub.variants, calls)]
    assert stub.slow == 0
    _vocab_statistics.launch.__globals__["known"].clear()
    by_triton = []
    for call in calls:
        by_triton += stub.variants(call)
        _vocab_statistics.launch.__globals__["known"].clear()
    assert by_us[: len(calls)] == by_us[len(calls) :] == by_triton
    assert len(set(by_triton)) > 10


def test_an_integer_beyond_32_bits_is_another_variant(stub: Stub) -> None:
    """The stride between requests, which no program of the one request multiplies by more than 0."""
    logits, targets = torch.zeros(1, 1, 16), torch.zeros(1, 1, 1, dtype=torch.int64)
    far = logits.as_strided((1, 1, 16), (2**31, 16, 1))
    near = stub.variants(lambda: vstar_ops.token_logp(logits, targets))
    beyond = stub.variants(lambda: vstar_ops.token_logp(far, targets))
    assert beyond != near
    assert stub.variants(lambda: vstar_ops.token_logp(far, targets)) == beyond
    assert stub.slow == 1
    assert stub.variants(lambda: vstar_ops.token_logp(logits, targets)) == near
    assert stub.slow == 0


def test_misaligned_side_inputs_are_another_variant(stub: Stub) -> None:
    call = embedded(3, width=16)
    other = embedded(3, width=16)
    table = other.arguments["embedding"]
    memory = torch.zeros(table.numel() + 1)
    other.arguments["embedding"] = memory[1:].view(table.shape)
    assert stub.variants(call)[-1] != stub.variants(other)[-1]
    assert stub.variants(call)[-1] != stub.variants(other)[-1]
    assert stub.slow == 0


def test_a_hook_is_called(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Profilers ask Triton to call them; Triton then launches."""
    from triton import knobs

    call = CASES["group_advantage"]["plain"](3)
    stub.variants(call)
    hook = lambda *_: None  # noqa: E731
    knobs.runtime.launch_enter_hook.add(hook)
    try:
        stub.variants(call)
        assert stub.slow == 1
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    stub.variants(call)
    assert stub.slow == 0


def test_threads_launch_the_same_variants(stub: Stub) -> None:
    call = CASES["expand_topk"]["options"](3)
    threads = [threading.Thread(target=lambda: [call() for _ in range(20)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(stub.launched) == 4 * 20 * 2
    assert len({variant for variant, _ in stub.launched}) == 2


@pytest.mark.parametrize(
    ("op", "most"),
    [("expand_topk", 142), ("group_advantage", 64), ("sibling_advantage", 95), ("token_logp", 88)],
)
def test_functions_of_a_call(stub: Stub, op: str, most: int) -> None:
    """Through Triton's binder a call takes twice to three times as many."""
    assert steps(CASES[op]["plain"](3)) <= most


def test_a_launch_takes_a_third_of_tritons_time(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of ``expand_topk``, interleaved; the best of many, so that other load does not count."""
    from vstar_ops.kernels import expand_topk as module

    given: list[Any] = []
    with monkeypatch.context() as patched:
        for kernel in (module.expand_rows, module._select):
            launch = partial(
                lambda kernel, launch, *a: given.append((kernel, launch, a)), kernel, kernel.launch
            )
            patched.setattr(kernel, "launch", launch)
        CASES["expand_topk"]["plain"](3)()
    assert len(given) == 2

    def seconds(through_triton: bool) -> float:
        start = time.perf_counter()
        for kernel, launch, (grid, warps, *arguments) in given:
            if through_triton:
                kernel[grid](*arguments, num_warps=warps, enable_fp_fusion=False)
            else:
                launch(grid, warps, *arguments)
        return time.perf_counter() - start

    pairs = [(seconds(False), seconds(True)) for _ in range(200)]
    ours, tritons = map(min, zip(*pairs))
    assert ours < tritons / 3
