"""Builds vstar_ops: Python, and beside it a C++ module wherever a compiler and torch are at hand, and a
CUDA module where nvcc is and torch is built for CUDA.

The modules see torch only through its stable ABI and Python not at all, so one binary serves every
torch >= 2.11 and every Python >= 3.10. Without them everything still runs, on the reference backend.
All other metadata is in pyproject.toml.

The CUDA module needs neither a GPU nor a CUDA torch to be built: VSTAR_OPS_CUDA=1 builds it beside any
torch and fails without nvcc, VSTAR_OPS_CUDA=0 leaves it out. CUDA_HOME says where nvcc is,
TORCH_CUDA_ARCH_LIST what to build for, MAX_JOBS how many files are compiled at a time.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Extension, setup

# The oldest torch whose stable ABI is used, 2.11, in the encoding of torch/headeronly/version.h.
TORCH_TARGET = "0x020b000000000000"

# Contraction stays off so that scores are the same on every machine; what the other two switch off
# (errno, floating-point traps) nobody reads, and it stands in the way of vector code.
CXX_FLAGS = [
    "-O3",
    "-g0",
    "-std=c++17",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
]

# As for the CPU, nothing is contracted: what two launches compute must agree to the last bit.
NVCC_FLAGS = [
    "-O3",
    "-std=c++17",
    "-fmad=false",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
    f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
]

# Front ends run this file once for each step (requirements, metadata, build). Only a build looks for
# torch and a compiler, and only a build speaks of what is missing.
BUILDING = not {"build", "build_ext", "bdist_wheel", "editable_wheel", "develop", "install"}.isdisjoint(
    sys.argv
)
IN_PLACE = not {"editable_wheel", "develop", "--inplace", "-i"}.isdisjoint(sys.argv)


def compiler() -> str | None:
    """A command that turns C++17 into a program: $CXX if it is set, else the first that works."""
    source = "#include <optional>\nint main() { return std::optional<int>(0).value(); }\n"
    with tempfile.TemporaryDirectory() as folder:
        flags = ["-std=c++17", "-x", "c++", "-", "-o", str(Path(folder, "probe"))]
        for command in [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]:
            try:
                run = subprocess.run(
                    [*shlex.split(command), *flags], input=source, text=True, capture_output=True
                )
            except OSError:
                continue
            if run.returncode == 0:
                return command
    return None


def obstacle() -> str | None:
    """Why the C++ module cannot be built here; None where it can."""
    if os.environ.get("VSTAR_OPS_NO_EXT", "0") not in ("", "0"):
        return "VSTAR_OPS_NO_EXT is set"
    try:
        import torch
    except ImportError:
        return "torch is not importable at build time (install it first and use --no-build-isolation)"
    if torch.__version__ < (2, 11):
        return f"torch {torch.__version__} is older than 2.11"
    command = compiler()
    if command is None:
        return f"{os.environ.get('CXX') or 'c++'} does not compile C++17"
    os.environ["CXX"] = command  # torch and setuptools would each look for one of their own
    return None


def nvcc() -> str | None:
    """CUDA's compiler: below $CUDA_HOME or $CUDA_PATH where set, else on the PATH or in its usual place."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(name):
            return shutil.which("nvcc", path=str(Path(os.environ[name], "bin")))
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def cuda_obstacle() -> str | None:
    """Why the CUDA module is not built here; None where it is."""
    wanted = os.environ.get("VSTAR_OPS_CUDA", "")
    if wanted == "0":
        return "VSTAR_OPS_CUDA=0 is set"
    if nvcc() is None:
        reason = "nvcc is not found (CUDA_HOME says where it is)"
        if wanted:
            sys.exit(f"VSTAR_OPS_CUDA={wanted} asks for the CUDA module, but {reason}")
        return reason
    import torch

    if torch.version.cuda is None and not wanted:
        return f"torch {torch.__version__} is built without CUDA (VSTAR_OPS_CUDA=1 builds it all the same)"
    return None


def architectures() -> list[str]:
    """nvcc's flags for TORCH_CUDA_ARCH_LIST, such as ``8.0;9.0+PTX``; else sm_80, sm_90, sm_100, PTX."""
    given = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if not given:
        known = subprocess.run(
            [str(nvcc()), "--list-gpu-arch"], capture_output=True, text=True, check=True
        ).stdout
        given = [a for a in ("8.0", "9.0", "10.0") if f"compute_{a.replace('.', '')}" in known.split()]
        given[-1] += "+PTX"
    flags = []
    for name in given:
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", name)
        if match is None:
            sys.exit(f"TORCH_CUDA_ARCH_LIST must hold entries such as 9.0 or 10.0+PTX, got {name!r}")
        number = match[1] + match[2] + match[3]
        code = f"[sm_{number},compute_{number}]" if match[4] else f"sm_{number}"
        flags += ["-gencode", f"arch=compute_{number},code={code}"]
    return flags


def build_cuda(targets: list[str], objects: Path, library: Path) -> None:
    """Compile the CUDA sources that are out of date, and link them."""
    import torch

    folder = Path(torch.__file__).parent
    words = [word for word in shlex.split(os.environ["CXX"]) if not word.startswith("-")]
    host = words[-1]  # of "ccache g++ -m64"
    command = [str(nvcc()), *NVCC_FLAGS, *targets, "-ccbin", host]
    headers = [*Path("csrc").rglob("*.h"), *Path("csrc").rglob("*.cuh"), Path("setup.py")]
    objects.mkdir(parents=True, exist_ok=True)
    (objects / "command").touch()
    changed = (objects / "command").read_text() != " ".join(command)

    def compiled(source: Path) -> str:
        target = objects / f"{source.stem}.o"
        newest = max(path.stat().st_mtime for path in (source, *headers))
        if changed or not target.exists() or target.stat().st_mtime < newest:
            include = ["-Icsrc", "-isystem", str(folder / "include")]
            subprocess.run([*command, *include, "-c", str(source), "-o", str(target)], check=True)
        return str(target)

    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    with ThreadPoolExecutor(jobs) as pool:
        found = list(pool.map(compiled, sorted(Path("csrc").rglob("*.cu"))))
    (objects / "command").write_text(" ".join(command))
    # libtorch brings in libtorch_cuda, where it exists: the linker must not leave it out as unused. CUDA's
    # run-time library is linked statically, so that it need not be the very one that torch uses.
    torch_libraries = [
        "-L",
        str(folder / "lib"),
        "-Xlinker=--no-as-needed,-s",
        "-ltorch",
        "-ltorch_cpu",
        "-lc10",
    ]
    library.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        [*command, "-shared", "--cudart=static", "-o", str(library), *found, *torch_libraries], check=True
    )


def ninja_found() -> bool:
    """Whether ninja is at hand; one that pip installed need not be on the PATH of the build."""
    try:
        from ninja import BIN_DIR
    except ImportError:
        return shutil.which("ninja") is not None
    os.environ["PATH"] = os.pathsep.join([BIN_DIR, os.environ.get("PATH", os.defpath)])
    return True


def forget(*modules: str) -> None:
    """Modules left in place by an earlier build would outlive their sources."""
    if IN_PLACE:
        for name in modules:
            Path(f"vstar_ops/{name}.abi3.so").unlink(missing_ok=True)


def extensions() -> dict:
    """The compiled modules as arguments of setup(); none where they cannot be built."""
    if not BUILDING:
        return {}
    reason = obstacle()
    if reason:
        print(
            f"vstar_ops is built without its C++ module because {reason}; "
            "everything still works, more slowly, on the pure-torch reference backend.",
            flush=True,
        )
        forget("_C", "_CUDA")
        return {}

    from torch.utils.cpp_extension import BuildExtension, CppExtension

    cpu = CppExtension(
        "vstar_ops._C",
        sorted(str(path) for path in Path("csrc").rglob("*.cpp")),
        include_dirs=[str(Path("csrc").resolve())],  # ninja runs in a folder of its own
        depends=sorted(str(path) for kind in ("*.h", "*.inc") for path in Path("csrc").rglob(kind)),
        extra_compile_args={"cxx": CXX_FLAGS},
        extra_link_args=["-Wl,-s"] if sys.platform == "linux" else [],
        py_limited_api=True,
    )
    modules: list[Any] = [cpu]
    reason = cuda_obstacle()
    if reason:
        print(f"vstar_ops is built without its CUDA module because {reason}.", flush=True)
        forget("_CUDA")
    else:
        targets = architectures()
        modules.append(Extension("vstar_ops._CUDA", [], py_limited_api=True))

    class Build(BuildExtension.with_options(use_ninja=ninja_found())):  # type: ignore[misc]
        def build_extension(self, module: Any) -> None:
            if module.name == "vstar_ops._CUDA":
                build_cuda(targets, Path(self.build_temp, "cuda"), Path(self.get_ext_fullpath(module.name)))
            else:
                super().build_extension(module)

    return {
        "ext_modules": modules,
        "cmdclass": {"build_ext": Build},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**extensions())
