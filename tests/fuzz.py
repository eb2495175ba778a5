"""``make fuzz``: the C++ backend under AddressSanitizer and UBSan, called with damaged arguments.

A call is drawn as ``python -m vstar_ops.verify`` draws it. Then some arguments are replaced: numbers beyond
any range in tensors, other shapes, dtypes and strides, odd scalars. It must return or raise a TypeError or a
ValueError. Any other error, a report of a sanitizer, or a call of a minute is a finding. The program says how
to repeat it. Tries are not damaged: they are checked where they are made, and immutable since.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import cuda_emulator
import numpy as np
import recipe
import torch
from torch import Tensor

import vstar_ops
from vstar_ops.ops import OPS
from vstar_ops.verify import sampling
from vstar_ops.verify.calls import Call, map_tensors

INTEGERS = [-(2**63), -(2**31) - 1, -(2**31), -2, -1, 0, 1, 2, 2**31 - 1, 2**31, 2**32, 2**63 - 1]
FLOATS = [-float("inf"), float("inf"), float("nan"), -3e38, 3e38, -1e-40, 0.0, -0.0, 1e300]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.bool]
# RuntimeErrors of torch itself: the dispatcher's about a scalar, autograd's about integers or another shape.
BY_TORCH = (
    "Expected a value of type",
    "can require gradients",
    "Mismatch in shape",
    "Boolean value of Tensor",
)


def values(rng: np.random.Generator, x: Tensor) -> Tensor:
    """Some elements are others."""
    there = torch.from_numpy(np.asarray(rng.random(tuple(x.shape)) < rng.choice([0.05, 1.0])))
    if x.dtype == torch.bool:
        return x ^ there
    if x.is_floating_point():
        odd = torch.from_numpy(np.asarray(rng.choice(FLOATS, tuple(x.shape)))).to(x.dtype)
    else:
        low, high = torch.iinfo(x.dtype).min, torch.iinfo(x.dtype).max
        known = np.array([i for i in INTEGERS if low <= i <= high] + [low, high], dtype=object)
        odd = torch.tensor(rng.choice(known, x.numel()).tolist(), dtype=x.dtype).reshape(x.shape)
    return torch.where(there, odd, x)


def form(rng: np.random.Generator, x: Tensor) -> Tensor:
    """Another shape, dtype or layout."""
    axis = int(rng.integers(max(x.dim(), 1)))
    if x.dim() == 0:
        return x[None]
    ways = (
        lambda: x.narrow(axis, 0, max(x.shape[axis] - 1, 0)),
        lambda: x.narrow(axis, 0, 0),
        lambda: torch.cat([x, x], axis),
        lambda: x.unsqueeze(axis),
        lambda: x.select(axis, 0) if x.shape[axis] else x.sum(axis),
        lambda: x.transpose(0, -1),
        lambda: x.flip(axis),
        lambda: x.narrow(axis, 0, min(x.shape[axis], 1)).expand(x.shape) if x.shape[axis] else x,
        lambda: x.to(DTYPES[rng.integers(len(DTYPES))]),
        lambda: torch.stack([x, x], -1)[..., 0],
    )
    return ways[rng.integers(len(ways))]()


def damaged(rng: np.random.Generator, x: Any) -> Any:
    """An argument, or one tensor of it, replaced."""
    if isinstance(x, Tensor):
        return (values, values, form)[rng.integers(3)](rng, x)
    if isinstance(x, (bool, str)) or x is None:
        return [None, "no such", True, 3][rng.integers(4)]
    if isinstance(x, int):
        return int(rng.choice([-(2**63), -1, 0, 1, 2, 1000, 70_000]))
    if isinstance(x, float):
        return float(rng.choice(FLOATS))
    chosen, seen = rng.random(), Counter[str]()

    def one(tensor: Tensor) -> Any:
        seen["tensors"] += 1
        if rng.random() >= max(chosen, 0.1):
            return tensor
        return None if rng.random() < 0.1 else damaged(rng, tensor)

    return map_tensors(one, x)


def call_of(op: str, seed: int, number: int) -> Call:
    """The call of this number."""
    rng = np.random.default_rng([seed, number])
    kinds = sampling.dtypes(op)
    call = sampling.draw(op, rng, kinds[rng.integers(len(kinds))])
    arguments = dict(call.arguments)
    for _ in range(rng.integers(4)):
        name = list(arguments)[rng.integers(len(arguments))]
        if not name.startswith("grad_"):  # which autograd has, not the caller
            arguments[name] = damaged(rng, arguments[name])
    return Call(call.function, arguments)


def fuzz(seconds: float, seed: int, first: int, count: int | None, at: int) -> dict[str, Any]:
    """How often each op returned and refused. The number of the call is written to the file ``at``."""
    names, returned, refused = list(OPS), Counter[str](), Counter[str]()
    torch.set_num_threads(1)
    end, number = time.monotonic() + seconds, first
    while number - first < count if count else time.monotonic() < end:
        os.pwrite(at, f"{number:20}".encode(), 0)
        op = names[number % len(names)]
        signal.alarm(60)
        call = call_of(op, seed, number)
        try:
            with vstar_ops.use_backend("cpu"):
                call()
            returned[op] += 1
        except Exception as error:
            if not isinstance(error, (TypeError, ValueError)) and not any(x in str(error) for x in BY_TORCH):
                raise
            refused[op] += 1
        number += 1
    signal.alarm(0)
    return {"returned": returned, "refused": refused}


def prepare(folder: Path) -> None:
    """The package in ``folder``, with a C++ module that is built with sanitizers."""
    library = cuda_emulator.compiled(
        "cpu",
        sorted(cuda_emulator.ROOT.glob("csrc/**/*.cpp")),
        sanitizers="address,undefined",
        flags=[x for x in recipe.CXX_FLAGS if x.startswith("-f")],
    )
    skipped = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(cuda_emulator.ROOT / "vstar_ops", folder / "vstar_ops", symlinks=True, ignore=skipped)
    (folder / "kernels").symlink_to(cuda_emulator.ROOT / "kernels")
    (folder / "vstar_ops/_C.so").symlink_to(library)


def main(argv: list[str] | None = None) -> int:
    """Build, fuzz in a process of its own, say what came of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first call")
    parser.add_argument("--count", type=int, help="so many calls, instead of so many seconds")
    parser.add_argument("--inside", type=int, help=argparse.SUPPRESS)  # the process with the sanitizers
    args = parser.parse_args(argv)
    if args.inside is not None:
        assert hasattr(ctypes.CDLL(None), "__asan_init"), "AddressSanitizer is not loaded"
        assert Path(vstar_ops.__file__).parent.parent == Path(os.environ["PYTHONPATH"].split(":")[0])
        print(json.dumps(fuzz(args.seconds, args.seed, args.first, args.count, args.inside)))
        return 0
    with tempfile.TemporaryDirectory() as name, tempfile.TemporaryFile() as at:
        prepare(Path(name))
        os.pwrite(at.fileno(), b"0", 0)
        inside = [sys.executable, __file__, *(argv if argv is not None else sys.argv[1:])]
        environment = {
            "PYTHONPATH": f"{name}:{cuda_emulator.ROOT / 'tools'}:{cuda_emulator.ROOT / 'tests'}",
            "LD_PRELOAD": cuda_emulator.runtime("address"),
            "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
            "UBSAN_OPTIONS": "print_stacktrace=1",
        }
        done = subprocess.run(
            [*inside, "--inside", str(at.fileno())], pass_fds=[at.fileno()], cwd=name,
            env=os.environ | environment, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        number = int(os.pread(at.fileno(), 20, 0))
    if done.returncode:
        op = list(OPS)[number % len(OPS)]
        print(f"{op} ended the process with {done.returncode}; to repeat it:")
        print(f'make fuzz ARGS="--seed {args.seed} --first {number} --count 1"')
        return 1
    found = json.loads(done.stdout)
    for op in OPS:
        print(
            f"{op:<22} returned {found['returned'].get(op, 0):>8,}  refused {found['refused'].get(op, 0):>8,}"
        )
    total = sum(found["returned"].values()), sum(found["refused"].values())
    print(f"{'all':<22} returned {total[0]:>8,}  refused {total[1]:>8,}  no other error, no report")
    return 0


if __name__ == "__main__":
    sys.exit(main())
