"""How ``csrc/`` is compiled: the compilers, their flags, what is out of date, the link.

``setup.py`` builds by this recipe, and ``tools/compat.py`` tries it against the headers of other torch
versions. The modules see torch only through its stable ABI and Python not at all, so each is a plain
compile and link. CXX, CXXFLAGS, LDFLAGS, CUDA_HOME, TORCH_CUDA_ARCH_LIST and MAX_JOBS are read as usual.
"""

from __future__ import annotations

import functools
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

MODULES = {"cpu": "_C", "cuda": "_CUDA"}  # backend -> its library in vstar_ops/
OLDEST_TORCH = "2.11"  # whose stable ABI is used

# The stable ABI's version is in the encoding of torch/headeronly/version.h.
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x{:02x}{:02x}000000000000".format(*map(int, OLDEST_TORCH.split(".")))

# Contraction stays off so that scores are the same on every machine, and signed overflow is defined. What the
# last two switch off (errno, floating-point traps) nobody reads, and it stands in the way of vector code.
CXX_FLAGS = [
    "-O3",
    "-g0",
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fwrapv",
    "-fno-math-errno",
    "-fno-trapping-math",
    TORCH_TARGET,
]
# As for the CPU, nothing is contracted: what two launches compute must agree to the last bit.
NVCC_FLAGS = ["-O3", "-std=c++17", "-fmad=false", "-Xcompiler=-fPIC,-fvisibility=hidden", TORCH_TARGET]


class CannotBuild(Exception):
    """Why a module cannot be built here, as words that follow "because"."""


class Compiler(NamedTuple):
    """What compiles a module's sources.

    Attributes:
        command: program and flags.
        version: what it says of itself.
        sources: of the module.
    """

    command: list[str]
    version: str
    sources: list[Path]


@functools.cache
def host_compiler() -> list[str]:
    """A command that turns C++17 into a program: $CXX if it is set, else the first that works."""
    source = "#include <optional>\nint main() { return std::optional<int>(0).value(); }\n"
    with tempfile.TemporaryDirectory() as folder:
        flags = ["-std=c++17", "-x", "c++", "-", "-o", str(Path(folder, "probe"))]
        for command in [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]:
            words = shlex.split(command)
            try:
                subprocess.run([*words, *flags], input=source, text=True, capture_output=True, check=True)
            except (OSError, subprocess.CalledProcessError):
                continue
            return words
    raise CannotBuild(f"{os.environ.get('CXX') or 'c++'} does not compile C++17")


def nvcc() -> str:
    """CUDA's compiler: below $CUDA_HOME or $CUDA_PATH where set, else on the PATH or in its usual place."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        found = shutil.which("nvcc", path=str(Path(home, "bin")))
    else:
        found = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if found is None:
        raise CannotBuild("nvcc is not found (CUDA_HOME says where it is)")
    return found


def nvcc_version() -> str:
    """The release of :func:`nvcc`, such as ``13.0``."""
    said = _output(nvcc(), "--version")
    found = re.search(r"release (\d+\.\d+)", said)
    if found is None:
        raise CannotBuild(f"{nvcc()} --version names no release: {said!r}")
    return found[1]


def architectures() -> list[str]:
    """nvcc's flags for TORCH_CUDA_ARCH_LIST, such as ``8.0;9.0+PTX``; else sm_80, sm_90, sm_100, PTX."""
    given = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if not given:
        known = _output(nvcc(), "--list-gpu-arch").split()
        given = [a for a in ("8.0", "9.0", "10.0") if f"compute_{a.replace('.', '')}" in known]
        given[-1] += "+PTX"
    flags = []
    for name in given:
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", name)
        if match is None:
            raise CannotBuild(f"TORCH_CUDA_ARCH_LIST must hold entries such as 9.0 or 10.0+PTX, got {name!r}")
        number = match[1] + match[2] + match[3]
        code = f"[sm_{number},compute_{number}]" if match[4] else f"sm_{number}"
        flags += ["-gencode", f"arch=compute_{number},code={code}"]
    return flags


def compiler(backend: str) -> Compiler:
    """What compiles a backend's module; raises :class:`CannotBuild` where it is missing."""
    host = host_compiler()
    if backend == "cpu":
        command = [*host, *shlex.split(os.environ.get("CXXFLAGS", "")), *CXX_FLAGS]
        return Compiler(
            command, _output(*host, "--version").splitlines()[0], sorted(Path("csrc").rglob("*.cpp"))
        )
    program = [word for word in host if not word.startswith("-")][-1]  # of "ccache g++ -m64"
    command = [nvcc(), *NVCC_FLAGS, *architectures(), "-ccbin", program]
    return Compiler(command, f"nvcc {nvcc_version()}", sorted(Path("csrc").rglob("*.cu")))


def check_torch(backend: str, required: bool) -> None:
    """Raise :class:`CannotBuild` where a module cannot be built beside the torch that is there."""
    try:
        import torch
    except ImportError:
        raise CannotBuild(
            "torch could not be imported at build time (pip hides it without --no-build-isolation)"
        ) from None
    if torch.__version__ < OLDEST_TORCH:
        raise CannotBuild(f"torch {torch.__version__} is older than {OLDEST_TORCH}")
    if backend == "cpu":
        return
    theirs, ours = torch.version.cuda, nvcc_version()
    if theirs is None and not required:
        raise CannotBuild(
            f"torch {torch.__version__} is built without CUDA (VSTAR_OPS_REQUIRE=cuda builds it anyway)"
        )
    if theirs and theirs.partition(".")[0] != ours.partition(".")[0]:
        raise CannotBuild(
            f"nvcc is of CUDA {ours} and torch {torch.__version__} of CUDA {theirs}; "
            "their major versions must be equal (CUDA_HOME chooses the nvcc)"
        )


def compile_sources(with_: Compiler, include: Path, objects: Path, torch_version: str) -> list[str]:
    """Compile what is out of date (without ninja, all), MAX_JOBS files at a time; return the objects."""
    objects.mkdir(parents=True, exist_ok=True)
    targets = {objects / f"{source.stem}.o": source for source in with_.sources}
    command = [*with_.command, "-Icsrc", "-isystem", str(include), "-MMD", "-c"]
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    if ninja() is None:

        def compiled(target: Path) -> None:
            _run([*command, str(targets[target]), "-o", str(target)], f"on {targets[target]}")

        with ThreadPoolExecutor(int(jobs)) as pool:
            list(pool.map(compiled, targets))
    else:
        # The compiler's version and torch's are part of the command: where they change, all is compiled anew.
        words = f"{shlex.join(command)} $in -o $out  # {with_.version}, torch {torch_version}"
        rule = f"rule compile\n  command = {words}\n  depfile = $stem.d\n  deps = gcc"
        builds = [f"build {t}: compile {s}\n  stem = {t.with_suffix('')}" for t, s in targets.items()]
        file = objects / "build.ninja"
        file.write_text("\n".join([f"builddir = {objects}", rule, *builds, ""]))
        _run([str(ninja()), "--quiet", "-f", str(file), "-j", jobs], "", with_)
    return list(map(str, targets))


def ninja() -> str | None:
    """Where ninja is; one that pip installed need not be on the PATH of the build."""
    try:
        from ninja import BIN_DIR
    except ImportError:
        return shutil.which("ninja")
    return shutil.which("ninja", path=BIN_DIR)


def link(backend: str, with_: Compiler, objects: Iterable[str], torch_folder: Path, library: Path) -> None:
    """Make a module of its objects."""
    flags = [f"-L{torch_folder / 'lib'}"]
    if sys.platform == "linux":
        # libtorch brings in libtorch_cuda, where it exists: the linker must not leave it out as unused.
        flags.append("-Xlinker=--no-as-needed,-s" if backend == "cuda" else "-Wl,--no-as-needed,-s")
    if backend == "cuda":  # linked statically, CUDA's run-time library need not be the one that torch uses
        flags.append("--cudart=static")
    flags += ["-ltorch", "-ltorch_cpu", "-lc10"]
    if backend == "cpu":
        flags += shlex.split(os.environ.get("LDFLAGS", ""))
    library.parent.mkdir(parents=True, exist_ok=True)
    _run([*with_.command, "-shared", "-o", str(library), *objects, *flags], f"at linking {library.name}")


def _run(command: list[str], doing: str, by_ninja: Compiler | None = None) -> None:
    """Run a compiler, and repeat what it says; its first error is part of the reason for a missing module."""
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
    except OSError as error:
        raise CannotBuild(f"{command[0]} does not run: {error}") from error
    sys.stderr.write(done.stdout)
    if done.returncode:
        program, said = command[0], done.stdout
        if by_ninja:
            program = by_ninja.command[0]
            stem, _, said = said.partition("FAILED: ")[2].partition(".o")
            sources = {source.stem: source for source in by_ninja.sources}
            doing = f"on {sources.get(stem.rpartition('/')[2], 'some file')}"
            said = said.partition("\n")[2].partition("\n")[2]  # without the command
        errors = [line for line in said.splitlines() if "error" in line]
        cause = errors[0] if errors else f"exit status {done.returncode}"
        raise CannotBuild(f"{program} failed {doing} ({cause})")


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, text=True, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise CannotBuild(f"{command[0]} does not run: {error}") from error
