"""One call on one backend, and all that may be wrong with it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import vstar_ops
from vstar_ops import _triton
from vstar_ops._backends import interpreting

from ..trie import Trie
from .calls import Call, map_tensors, moved, tensors, with_alive
from .judge import Problem, results
from .wants import expectation

KINDS = ("values", "runs", "batches", "threads")
THREADS = max(2, torch.get_num_threads())


class Finding(NamedTuple):
    """A call that fails on a backend, and the Python that has made it.

    ``kind``: its values are wrong, or its bits differ between runs, batches or threads, or it is an error.
    """

    op: str
    backend: str
    kind: str
    call: Call
    origin: str
    problem: Problem


def clock() -> float:
    """Seconds, of which a sweep has so many. Tests replace it: on a busy machine they have less of each."""
    return time.perf_counter()


def device_of(backend: str) -> str:
    """Where a backend is tested."""
    return "cuda" if backend == "cuda" or (backend == "triton" and not interpreting()) else "cpu"


def off() -> dict[str, str]:
    """Backends that cannot be tested here, and why."""
    reasons = {name: x.detail for name, x in vstar_ops.backends().items() if not x.available}
    on = [name for name in vstar_ops.backends() if name not in reasons]
    if not torch.cuda.is_available():
        reasons |= {name: "there is no GPU" for name in on if device_of(name) == "cuda"}
    return reasons


def run(backend: str, call: Call) -> Any:
    """The result on the CPU; tensors go to the backend's device as they lie."""
    device = device_of(backend)
    if device != "cpu":
        call = call.map(lambda x: moved(x, device))
        arguments = {k: _there(x, device) if isinstance(x, Trie) else x for k, x in call.arguments.items()}
        call = call._replace(arguments=arguments)
    with vstar_ops.use_backend(backend), np.errstate(all="ignore"):  # of the interpreted kernels
        return map_tensors(torch.Tensor.cpu, call())


def _there(trie: Trie, device: str) -> Trie:
    return trie.to(device) if trie.alive is None else with_alive(trie.to(device), trie.alive.to(device))


def problem(op: str, backend: str, kind: str, call: Call) -> Problem | None:
    """What is wrong with a call in this respect; an exception of the backend is raised."""
    if kind == "values":
        return next(iter(expectation(op, call)(run(backend, call)).problems), None)
    return next((p for p in differences(op, backend, kind, call) if p is not None), None)


def differences(op: str, backend: str, kind: str, call: Call, whole: Any = None) -> Iterator[Problem | None]:
    """For each comparison of bits what differs, or None; ``whole`` is the result, if that is known."""
    whole = run(backend, call) if whole is None else whole
    if kind == "runs":
        yield different(run(backend, call), whole)
    elif kind == "threads":
        before = torch.get_num_threads()
        try:
            for threads in (1, THREADS):
                torch.set_num_threads(threads)
                yield different(run(backend, call), whole)
        finally:
            torch.set_num_threads(before)
    elif separable(op, call) and not (backend == "reference" and has_float64(call)):  # sums of torch's own
        size = len(next(iter(results(whole).values() if op != "sibling_grpo_loss" else [whole[1]])))
        for b in sorted({0, size // 2, size - 1}) if size > 1 else ():
            alone = run(backend, call.request(b))
            if op == "sibling_grpo_loss":  # the loss is a sum over the requests
                yield different({"[1]": alone[1]}, {"[1]": whole[1][b : b + 1]}, f"[{b} : {b + 1}]")
            else:
                yield different(alone, map_tensors(_part(b), whole), f"[{b} : {b + 1}]")


def _part(b: int) -> Callable[[Tensor], Tensor]:
    return lambda x: x[b : b + 1]


def has_float64(call: Call) -> bool:
    return any(x.dtype == torch.float64 for x in tensors(tuple(call.arguments.values())))


def separable(op: str, call: Call) -> bool:
    """Whether a request's results are its own."""
    if op in ("rows_to_run", "distinct_rows"):  # which number them over all requests
        return False
    if op == "sibling_grpo_loss":
        return call.arguments.get("normalizer") is not None
    return not any(isinstance(call.arguments.get(name), int) for name in ("gumbel_seed", "seed"))


def different(got: Any, want: Any, part: str = "") -> Problem | None:
    """The first tensor in which the bits differ."""
    got, want = (x if isinstance(x, dict) else results(x) for x in (got, want))
    for name in got:
        if not same_bits(got[name], want[name]):
            return Problem(name, part, "other bits")
    return None


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether dtype, shape and every bit agree."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    plain = (x.clone(memory_format=torch.contiguous_format).flatten() for x in (a, b))
    return torch.equal(*(x.view(torch.uint8) for x in plain))


def unsupported(error: Exception) -> bool:
    """A documented limit of the Triton kernels, which launch nothing then."""
    return isinstance(error, _triton.Unsupported)
