"""The CUDA C++ kernels on the host: ``csrc/cuda`` compiled against ``emulator/emulator.h``.

The launch plans are compiled too, so what runs is all of ``csrc/cuda`` but the stream and the ``<<<>>>``. The
ops are those of ``vstar_ops_cuda``, on CPU tensors.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
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


EMULATION = ["-ffp-contract=off", "-include", str(FOLDER / "emulator.h")]


def compiled(
    name: str,
    sources: list[Path],
    *,
    sanitizers: str = SANITIZERS,
    program: bool = False,
    flags: list[str] = EMULATION,
) -> Path:
    """A shared library, or a program, in ``build/``; compiled again when a source or a header changes."""
    assert COMPILER is not None
    torch_folder = Path(torch.__file__).parent
    command = [
        COMPILER, *flags, "-O1" if sanitizers else "-O2", "-g1", "-std=c++17", "-fPIC",
        recipe.TORCH_TARGET, f"-I{ROOT / 'csrc'}", f"-I{FOLDER}",
        "-isystem", str(torch_folder / "include"),
    ]  # fmt: skip
    if sanitizers:
        command += [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
    link = ["-ldl"] if program else ["-shared", f"-L{torch_folder / 'lib'}", "-ltorch_cpu"]
    kinds = ("*.h", "*.cuh", "*.inc")
    headers = [*FOLDER.glob("*.h"), *(x for kind in kinds for x in ROOT.glob(f"csrc/**/{kind}"))]
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


def _run(*command: str) -> str:
    done = subprocess.run(command, text=True, capture_output=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
    return done.stdout


def emulated(sanitizers: str = SANITIZERS) -> Path:
    """What registers ``vstar_ops_cuda`` on CPU tensors."""
    sources = [FOLDER / "main.cpp", *sorted(ROOT.glob("csrc/**/*.cu"))]
    return compiled("emulated", sources, sanitizers=sanitizers)


def runtime(sanitizers: str) -> str:
    """What a process must preload that runs code built with sanitizers; empty if the compiler lacks them."""
    # libstdc++ too: what throws exceptions must be there when AddressSanitizer looks for it.
    names = ["libtsan.so" if sanitizers == "thread" else "libasan.so", "libstdc++.so"]
    paths = [_run(str(COMPILER), f"-print-file-name={name}").strip() for name in names]
    return " ".join(paths) if os.path.isabs(paths[0]) else ""


def run_under(sanitizers: str, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program, or Python with kernels, built with sanitizers; skips the test where that cannot be."""
    environment = {"VSTAR_OPS_SANITIZE": sanitizers, "LD_PRELOAD": runtime(sanitizers), **environment}
    # ThreadSanitizer wants certain addresses for itself.
    fixed = ["setarch", "-R"] if subprocess.run(["setarch", "-R", "true"]).returncode == 0 else []
    done = subprocess.run(
        [*fixed, *command], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )
    if "FATAL: ThreadSanitizer: unexpected memory mapping" in done.stderr:
        pytest.skip("ThreadSanitizer cannot run: addresses are random here, and setarch -R is not allowed")
    return done


@cache
def load() -> ctypes.CDLL:
    """Compile and load the emulated kernels."""
    library = emulated()
    torch.ops.load_library(library)
    return ctypes.CDLL(str(library))


def seed(value: int) -> None:
    """Let the order of threads in the launches to come be drawn from a seed."""
    load().emulator_seed(ctypes.c_uint64(value))


@contextmanager
def idle() -> Iterator[None]:
    """Launches inside are counted and run nothing; results hold junk."""
    load().emulator_idle(ctypes.c_bool(True))
    try:
        yield
    finally:
        load().emulator_idle(ctypes.c_bool(False))


def count(sectors: bool = False) -> None:
    """Begin to count anew."""
    load().emulator_count(ctypes.c_bool(sectors))


def counts() -> Counts:
    values = (ctypes.c_int64 * len(Counts._fields))()
    load().emulator_counts(values)
    return Counts(*values)


def kernels() -> tuple[set[str], set[str]]:
    """All kernels by name, with their template arguments, and those that were launched so far."""
    symbols = _run("nm", "-DC", "--defined-only", load()._name)
    names = [line.split(maxsplit=2)[2] for line in symbols.splitlines()]
    function = load().emulator_kernels
    function.restype = ctypes.c_char_p
    launched = set(function().decode().splitlines())
    return {x for x in names if re.fullmatch(r"(void )?vstar::\w+_kernel(<.*>)?\([^()]*\)", x)}, launched
