"""What the tests of several ops share: results compared, the arguments of an op."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import vstar_ops
from vstar_ops.verify.calls import Call, map_tensors, tensors
from vstar_ops.verify.generators import restricted
from vstar_ops.verify.wants import expectation


def check_every_float16() -> None:
    """Each of the 65,536 is read as the float32 that it stands for, and a gradient is the nearest one."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.float16)
    trie = vstar_ops.Trie.from_sequences(torch.arange(1024)[:, None])
    logits, root = every.view(1, 64, 1024), torch.zeros(1, 64, dtype=torch.int32)
    assert_same(
        vstar_ops.expand_topk(logits, trie, root, 100), vstar_ops.expand_topk(logits.float(), trie, root, 100)
    )
    finite = every[every.isfinite()].view(-1, 1, 1024)[..., :1001]  # some past the last whole vector
    target = torch.arange(len(finite))[:, None, None]
    halves, floats = (
        finite.to(dtype, copy=True).requires_grad_() for dtype in (torch.float16, torch.float32)
    )
    for x in (halves, floats):
        vstar_ops.token_logp(x, target).logp.sum().backward()
    assert halves.grad is not None and floats.grad is not None
    assert_same(halves.grad, floats.grad.half())


# Children of the root's children: a row of one, rows that end at a word of the bits and behind it; long ones.
SHORT, LONG = (1, 2, 29, 31, 33, 70), (1100, 3)
_KEPT: dict[str, Callable[[int], Any]] = {
    "none": lambda n: range(0),
    "all": range,
    "not the first": lambda n: range(1, n),
    "not the last": lambda n: range(n - 1),
    "not the middle one": lambda n: [i for i in range(n) if i != n // 2],
    "the first alone": lambda n: range(1),
    "the last alone": lambda n: range(n - 1, n),
    "one in the middle": lambda n: range(n // 2, n // 2 + 1),
    "every third": lambda n: range(1, n, 3),
}


def restricted_tries(sizes: tuple[int, ...], backend: str, batch: int = 2) -> list[vstar_ops.Trie]:
    """Tries of two levels whose rows lose some children: of neighboring tokens, or of every second one.

    Each row keeps something else, the same for all requests or not. Some have a multiple of 32 nodes.
    """
    names, found, fast = list(_KEPT), [], backend in ("cpu", "reference")
    for step in (1, 2):
        for extra in range(33) if sizes is SHORT and step == 1 and fast else (0, 17):
            lengths = (*sizes, 1 + extra)
            rows = [[i, step * j] for i, n in enumerate(lengths) for j in range(n)]
            requests = batch if extra % 2 else 1
            allowed = torch.zeros(requests, len(rows), dtype=torch.bool)
            for r in range(requests):
                begin = 0
                for i, n in enumerate(lengths):
                    kept = _KEPT[names[(i + r + extra) % len(names)]](n)
                    allowed[r, [begin + j for j in kept]] = True
                    begin += n
            found.append(restricted(vstar_ops.Trie.from_sequences(rows), allowed))
    assert len(sizes) < 5 or any(trie.num_nodes % 32 == 0 for trie in found)
    return found


def assert_as_expected(op: str, call: Call) -> None:
    """A call of an op, against its oracle."""
    verdict = expectation(op, call)(call())
    assert not verdict.problems, verdict.problems[0]


def assert_same(got: Any, want: Any) -> None:
    """The same tensors, bit for bit; NaN equals NaN."""
    assert_close(got, want, tolerance=0)


def assert_close(got: Any, want: Any, tolerance: float = 1e-5) -> None:
    """The same integers, and floats up to a tolerance; NaN equals NaN."""
    got, want = tensors(got), tensors(want)
    assert len(got) == len(want) > 0
    for x, y in zip(got, want):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance, equal_nan=True)


class _Found(Exception):
    pass


class _Catch(TorchDispatchMode):
    def __init__(self, op: Any) -> None:
        super().__init__()
        self.op = op

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is self.op:
            raise _Found(args)
        return function(*args, **(kwargs or {}))


def op_arguments(name: str, call: Callable[[], Any]) -> tuple[Any, ...]:
    """The arguments with which ``call`` runs ``torch.ops.vstar_ops.<name>``; the op itself does not run.

    Tests take them from calls of the public functions, so that no test repeats the schema of an op.
    """
    try:
        with _Catch(getattr(torch.ops.vstar_ops, name).default):
            call()
    except _Found as found:
        return map_tensors(torch.Tensor.detach, found.args[0])
    raise AssertionError(f"vstar_ops::{name} was not called")


def steps(call: Callable[[], Any]) -> int:
    """Functions that a call runs, of Python and of C: what host time follows from on any machine."""
    count = 0

    def event(frame: Any, what: str, argument: Any) -> None:
        nonlocal count
        count += what in ("call", "c_call")

    call()
    before = sys.getprofile()
    sys.setprofile(event)
    try:
        call()
    finally:
        sys.setprofile(before)
    return count


class Ops(TorchDispatchMode):
    """The ops that the dispatcher is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))
