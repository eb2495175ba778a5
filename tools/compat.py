"""Compiles both modules against the headers of another torch: ``python tools/compat.py 2.11.0``.

Nothing is installed. The wheel is downloaded once, its headers are kept in ``build/compat/<version>/``.
Without nvcc only the CPU module is compiled. One architecture is enough to see that the sources compile:
TORCH_CUDA_ARCH_LIST, or sm_90.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import recipe

ROOT = Path(__file__).resolve().parent.parent


def headers(version: str, folder: Path) -> Path:
    """The include folder of a torch, taken out of its wheel."""
    include = folder / "torch/include"
    if (include / "torch/headeronly/version.h").exists():
        return include
    print(f"torch {version}: downloading the wheel for its headers", flush=True)
    with tempfile.TemporaryDirectory() as download:
        pip = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--no-deps",
            "--only-binary=:all:",
            "-d",
            download,
        ]
        subprocess.run([*pip, f"torch=={version}"], check=True)
        (wheel,) = Path(download).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            wanted = [name for name in archive.namelist() if name.startswith("torch/include/torch/")]
            # Last the file that says that all others are there.
            for name in sorted(wanted, key=lambda name: name.endswith("headeronly/version.h")):
                archive.extract(name, folder)
    return include


def compiles(backend: str, version: str, folder: Path) -> bool:
    """Compile a module's sources, and say how that went."""
    start = time.monotonic()
    try:
        compiler = recipe.compiler(backend)
    except recipe.CannotBuild as reason:
        print(f"torch {version}, {backend}: skipped because {reason}", flush=True)
        return backend == "cuda"
    count = f"{len(compiler.sources)} files by {compiler.version}"
    print(f"torch {version}, {backend}: {' '.join(compiler.command)}", flush=True)
    try:
        recipe.compile_sources(compiler, headers(version, folder), folder / backend, version)
    except recipe.CannotBuild as reason:
        print(f"torch {version}, {backend}: failed, {reason}", flush=True)
        return False
    print(f"torch {version}, {backend}: ok, {count}, {time.monotonic() - start:.0f} s", flush=True)
    return True


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python tools/compat.py VERSION, such as 2.11.0")
    version = sys.argv[1]
    os.chdir(ROOT)
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "9.0")
    folder = Path("build/compat", version)
    headers(version, folder)
    results = [compiles(backend, version, folder) for backend in recipe.MODULES]
    sys.exit(not all(results))


if __name__ == "__main__":
    main()
