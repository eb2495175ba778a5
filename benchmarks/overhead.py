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
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import vstar_ops
from vstar_ops.collect_env import cpu_model
from vstar_ops.ops import OPS
from vstar_ops.ops._registry import Op
from vstar_ops.verify.cases import CASES

ROOT = Path(__file__).parent.parent
sys.path += [str(ROOT / "tests"), str(ROOT / "tools")]
import cuda_emulator  # noqa: E402


def microseconds(call: Callable[[], Any], rounds: int) -> float:
    """The least of some rounds: others compete for the core, never help."""
    return min(timeit.repeat(call, number=100, repeat=rounds)) * 1e4


def inner(call: Callable[[], Any]) -> Callable[[], Any]:
    """The last call of an op that a call makes."""
    found: list[tuple[Op, tuple[Any, ...]]] = []
    run = Op.__call__

    def recorded(op: Op, device: torch.device, *arguments: Any) -> Any:
        found.append((op, arguments))
        return run(op, device, *arguments)

    with patch.object(Op, "__call__", recorded):
        call()
    op, arguments = found[-1]
    return lambda: op.overloads["cuda"](*arguments)


def measure(name: str, rounds: int) -> str:
    """A line of the table: one request of the plain case, half empty if that does more than call the op."""
    case = next(iter(CASES[name].values()))(1)
    with patch.dict(OPS[name].overloads, {None: OPS[name].overloads["cuda"]}):
        call = lambda: case.function(**case.arguments)  # noqa: E731
        direct = inner(call)
        cuda_emulator.count()
        direct()
        launches = cuda_emulator.counts().launches
        public = case.function is getattr(vstar_ops, name, None)
        whole = f"{microseconds(call, rounds):.1f}" if public else ""
        return f"| `{name}` | {launches} | {whole} | {microseconds(direct, rounds):.1f} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__)
    parser.add_argument("--rounds", type=int, default=50, help="of 100 calls each (default: %(default)s)")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    x = torch.zeros(8)
    addition = microseconds(lambda: x.add_(1), rounds)
    print(f"{cpu_model()}, torch {torch.__version__}; microseconds of the host per call.\n")
    print("| op | launches | public function | dispatcher op |\n|---|---|---|---|")
    with cuda_emulator.idle():
        for name in CASES:
            print(measure(name, rounds), flush=True)
    print(f"| in-place addition of torch | | {addition:.1f} | |")


if __name__ == "__main__":
    main()
