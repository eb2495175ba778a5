"""The CUDA C++ kernels on the host: ``csrc/cuda`` compiled against ``emulator/emulator.h``.

The launch plans are compiled too, so what runs is all of ``csrc/cuda`` but the stream and the ``<<<>>>``. The
ops are those of ``vstar_ops_cuda``, on CPU tensors.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

import recipe
import torch

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "tests/emulator"
COMPILER = next(filter(None, map(shutil.which, ["g++", "c++"])), None)
SANITIZERS = os.environ.get("VSTAR_OPS_SANITIZE", "")  # for example "address,undefined"


class Counts(NamedTuple):
    """What launches did since the last :func:`count`; sectors (of 32 bytes) and bytes that were read."""

    launches: int
    blocks: int
    barriers: int
    warp_operations: int
    atomics: int
    sectors: int
    bytes: int


def compiled(name: str, sources: list[Path], *, sanitizers: str = SANITIZERS, program: bool = False) -> Path:
    """A shared library, or a program, in ``build/``; compiled again when a source or a header changes."""
    assert COMPILER is not None
    torch_folder = Path(torch.__file__).parent
    command = [
        COMPILER, "-O2", "-g1", "-std=c++17", "-fPIC", "-ffp-contract=off",
        recipe.TORCH_TARGET, f"-I{ROOT / 'csrc'}", f"-I{FOLDER}",
        "-isystem", str(torch_folder / "include"), "-include", str(FOLDER / "emulator.h"),
    ]  # fmt: skip
    if sanitizers:
        command += [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
    link = [] if program else ["-shared", f"-L{torch_folder / 'lib'}", "-ltorch_cpu"]
    headers = [*FOLDER.glob("*.h"), *ROOT.glob("csrc/**/*.h"), *ROOT.glob("csrc/**/*.cuh")]
    state = hashlib.sha256(" ".join([*command, *link, torch.__version__]).encode())
    for path in sorted([*sources, *headers]):
        state.update(path.read_bytes())
    folder = ROOT / "build" / "emulator" / state.hexdigest()[:16]
    target = folder / (name if program else f"{name}.so")
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one process compiles, the others wait for it
        if not target.exists():
            objects = [folder / f"{path.stem}.o" for path in sources]
            steps = [(*command, "-x", "c++", "-c", str(a), "-o", str(b)) for a, b in zip(sources, objects)]
            with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
                list(pool.map(lambda step: _run(*step), steps))
            unfinished = folder / f"{name}.unfinished"
            _run(*command, "-x", "none", *map(str, objects), *link, "-o", str(unfinished))
            unfinished.replace(target)
    return target


def _run(*command: str) -> None:
    done = subprocess.run(command, text=True, capture_output=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"


@cache
def load() -> ctypes.CDLL:
    """Compile and load what registers ``vstar_ops_cuda`` on CPU tensors."""
    sources = [FOLDER / "main.cpp", *sorted(ROOT.glob("csrc/**/*.cu"))]
    library = compiled("emulated", sources)
    torch.ops.load_library(library)
    return ctypes.CDLL(str(library))


def seed(value: int) -> None:
    """Let the order of threads in the launches to come be drawn from a seed."""
    load().emulator_seed(ctypes.c_uint64(value))


def count(sectors: bool = False) -> None:
    """Begin to count anew."""
    load().emulator_count(ctypes.c_bool(sectors))


def counts() -> Counts:
    values = (ctypes.c_int64 * len(Counts._fields))()
    load().emulator_counts(values)
    return Counts(*values)
