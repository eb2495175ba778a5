"""Calls after calls on every backend, until the time is up: :func:`verify`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from .. import backends as all_backends
from .. import warmup
from .._backends import interpreting
from ..ops import OPS
from . import checks, sampling
from .calls import Call, loss_and_gradient, tensors
from .cases import CASES, LARGE
from .checks import KINDS, Finding, differences, run, unsupported
from .judge import Problem
from .script import MOST, script
from .shrink import message, size, smallest
from .wants import expectation

FEWEST = 20  # cases of an op, even where the machine stands still while the time runs out


@dataclass
class Row:
    """What came of an op on a backend."""

    op: str
    backend: str
    cases: int = 0
    dtypes: Counter[str] = field(default_factory=Counter)
    worst_error: float = 0.0
    worst_of_limit: float = 0.0
    index_mismatches: int = 0
    errors: int = 0
    unsupported: int = 0
    compared: Counter[str] = field(default_factory=Counter)
    different: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    found: Finding | None = None
    script: str = ""

    @property
    def failed(self) -> bool:
        return self.found is not None


class Case(NamedTuple):
    """A call, the Python that makes it, and whether it is too large for the oracle."""

    call: Call
    origin: str
    large: bool = False

    @property
    def dtype(self) -> str:
        """Of its first floats, or else of its first tensor."""
        found = tensors(tuple(self.call.arguments.values()))
        return str(next((x for x in found if x.is_floating_point()), found[0]).dtype).removeprefix("torch.")


def cases(op: str, seed: int) -> Iterator[Case]:
    """Those of the tests, then random ones, and between them such as threads share."""
    large = list(LARGE[op].items())
    for label, make in CASES[op].items():
        for batch in (3, 0):
            yield Case(gradient(op, make(batch)), f"cases.CASES[{op!r}][{label!r}]({batch})")
    kinds, i = sampling.dtypes(op), 0
    while True:
        dtype = kinds[i % len(kinds)]
        call = sampling.draw(op, np.random.default_rng([seed, i]), dtype)
        origin = f"sampling.draw({op!r}, np.random.default_rng([{seed}, {i}]), {dtype})"
        yield Case(call, origin)
        i += 1
        if large and i % 20 == 5:
            label, many = large.pop(0)
            yield Case(gradient(op, many()), f"cases.LARGE[{op!r}][{label!r}]()", large=True)


def gradient(op: str, call: Call) -> Call:
    """The loss is compared together with its gradient."""
    return call._replace(function=loss_and_gradient) if op == "sibling_grpo_loss" else call


def verify(
    seconds: float = 30.0,
    seed: int = 0,
    ops: Iterable[str] | None = None,
    backends: Iterable[str] | None = None,
    shrink: float = 5.0,
) -> list[Row]:
    """Run every op on every backend that is on, for so long, and compare; one row for each of both.

    Every op gets the same time, and at least ``FEWEST`` cases. An op that has failed on a backend is not
    called there again. At the end the smallest call that fails is looked for, for up to ``shrink`` seconds
    each.
    """
    names = [x for x in OPS if ops is None or x in set(ops)]
    on = [x for x in all_backends() if x not in checks.off()]
    on = on if backends is None else [x for x in on if x in set(backends)]
    if "triton" in on and checks.device_of("triton") == "cuda":
        warmup()  # compiles for minutes where nothing is cached
    rows = {(op, backend): Row(op, backend) for op in names for backend in on}
    streams, spent = {op: cases(op, seed) for op in names}, dict.fromkeys(names, 0.0)
    tried = Counter(dict.fromkeys(names, 0))
    end = checks.clock() + seconds
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small calls only lose time to threads
    try:
        while names:
            start = checks.clock()
            if start > end:
                behind = [x for x in names if tried[x] < FEWEST or not all(rows[x, y].cases for y in on)]
                if not behind:
                    break
                op = behind[0]
            else:
                op = min(names, key=lambda name: spent[name])
            tried[op] += 1
            _one_case(op, next(streams[op]), [rows[op, backend] for backend in on], spent[op])
            spent[op] += checks.clock() - start
            if all(rows[op, backend].failed for backend in on):
                names.remove(op)
    finally:
        torch.set_num_threads(threads)
    for row in rows.values():
        if row.found is not None:
            small = smallest(row.found, _others(row.found, seed), shrink)
            row.found = small if size(small.call) <= MOST else row.found
            row.script = script(row.found)
    return list(rows.values())


def _others(found: Finding, seed: int, number: int = 40) -> Iterator[Call]:
    """Random calls beside one that has failed."""
    kinds = sampling.dtypes(found.op)
    for i in range(number):
        dtype = kinds[i % len(kinds)]
        if dtype != torch.float64 or found.backend == "reference":
            yield sampling.draw(found.op, np.random.default_rng([seed, i]), dtype)


def _one_case(op: str, case: Case, rows: list[Row], spent: float) -> None:
    """A case on each backend that takes it and is not behind the others for being slow."""
    compare = None if case.large else expectation(op, case.call)
    double = checks.has_float64(case.call) and not op.startswith("ved")  # whose sums are
    for row in rows:
        late = row.cases > 0 and row.seconds > spent / len(rows) + 0.05
        long = row.backend == "triton" and interpreting() and size(case.call) > 200
        if row.failed or late or long or not _takes(row.backend, case, double):
            continue
        start = checks.clock()
        try:
            found = _check(row, case, compare)
        except Exception as error:
            if unsupported(error):
                row.unsupported += 1
                continue
            row.errors += 1
            raised = Problem("", message(error), None)
            found = Finding(op, row.backend, "error", case.call, case.origin, raised)
        row.found = found
        row.cases += 1
        row.dtypes[case.dtype] += 1
        row.seconds += checks.clock() - start


def _takes(backend: str, case: Case, double: bool) -> bool:
    """Large cases are about threads, and float64 goes to the reference alone."""
    return backend == "cpu" if case.large else backend == "reference" or not double


def _check(row: Row, case: Case, compare: Any) -> Finding | None:
    """One case on one backend, counted; what is wrong with it."""
    wrong: dict[str, Problem] = {}
    out = run(row.backend, case.call)
    if compare is not None:
        verdict = compare(out)
        row.worst_error = max(row.worst_error, verdict.error)
        row.worst_of_limit = max(row.worst_of_limit, verdict.of_limit)
        row.index_mismatches += verdict.mismatches
        if verdict.problems:
            wrong["values"] = verdict.problems[0]
    for kind in KINDS[1:]:
        if kind == "threads" and not (case.large and row.backend == "cpu"):
            continue
        for problem in differences(row.op, row.backend, kind, case.call, out):
            row.compared[kind] += 1
            if problem is not None:
                row.different[kind] += 1
                wrong.setdefault(kind, problem)
    for kind in KINDS:
        if kind in wrong:
            return Finding(row.op, row.backend, kind, case.call, case.origin, wrong[kind])
    return None
