"""``python -m benchmarks.overhead``: host time of a call up to the launch of CUDA C++ kernels, without a GPU.

The kernels are those of the tests' emulator, with launches that run nothing. So all that the host does on the
way to a launch is measured: the public function and its checks, the dispatcher, reading the arguments, making
the results, the launch plan. What a GPU adds is not: the launch itself (2 to 3 us by CUDA), the guard of the
device, and what the caching allocator takes instead of the CPU's.
"""

from __future__ import annotations

import argparse
import sys
import timeit
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from vstar_ops.collect_env import cpu_model
from vstar_ops.ops import OPS
from vstar_ops.ops._registry import Op
from vstar_ops.verify.calls import IN_PLACE
from vstar_ops.verify.cases import CASES

ROOT = Path(__file__).parent.parent
sys.path += [str(ROOT / "tests"), str(ROOT / "tools")]
import cuda_emulator  # noqa: E402


def microseconds(call: Callable[[], Any], rounds: int) -> float:
    """The least of some rounds: others compete for the core, never help."""
    return min(timeit.repeat(call, number=100, repeat=rounds)) * 1e4


def inner(call: Callable[[], Any]) -> Callable[[], Any]:
    """The last call of an op that a call makes, past what torch does in Python before the kernel."""
    found: list[tuple[Op, tuple[Any, ...]]] = []
    run = Op.run

    def recorded(op: Op, backend: str | None, arguments: tuple[Any, ...]) -> Any:
        found.append((op, arguments))
        return run(op, backend, arguments)

    with patch.object(Op, "run", recorded):
        call()
    op, arguments = found[-1]
    return lambda: op.overloads["cuda"](*arguments)


def row(label: str, rounds: int, call: Callable[[], Any], direct: Callable[[], Any] | None = None) -> str:
    """A line of the table."""
    cuda_emulator.count()
    call()
    launches = cuda_emulator.counts().launches
    op = ""
    if direct is not None:
        with torch._C._AutoDispatchBelowADInplaceOrView():
            op = f"{microseconds(direct, rounds):.1f}"
    return f"| {label} | {launches} | {microseconds(call, rounds):.1f} | {op} |"


def measure(name: str, rounds: int) -> Iterator[str]:
    """Lines of the table: one request of the plain case, and its gradient where there is one."""
    case = next(iter(CASES[name].values()))(1)
    case = case._replace(function=IN_PLACE.get(name, case.function))
    cuda = OPS[name].overloads["cuda"]
    with patch.dict(OPS[name].overloads, {None: cuda}):
        yield row(f"`{name}`", rounds, case, inner(case))
        if OPS[name].differentiable:
            case = case.map(lambda x: x.detach().requires_grad_(x.is_floating_point()))
            yield row("the same, recorded for a gradient", rounds, case)
            result, given = case()[0], case.arguments[next(iter(case.arguments))]
            ones = torch.ones_like(result)
            backward = lambda: torch.autograd.grad(result, given, ones, retain_graph=True)  # noqa: E731
            yield row("its backward pass", rounds, backward)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__)
    parser.add_argument("--rounds", type=int, default=50, help="of 100 calls each (default: %(default)s)")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    x = torch.zeros(8)
    addition = microseconds(lambda: x.add_(1), rounds)
    print(f"{cpu_model()}, torch {torch.__version__}; microseconds of the host per call.\n")
    print("| op | launches | public function | the op alone |\n|---|---|---|---|")
    with cuda_emulator.idle():
        for name in CASES:
            if not name.endswith("_backward"):
                for line in measure(name, rounds):
                    print(line, flush=True)
    print(f"| in-place addition of torch | | {addition:.1f} | |")


if __name__ == "__main__":
    main()
