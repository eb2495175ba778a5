"""Builds vstar_ops: Python, and beside it a C++ module wherever a compiler and torch are at hand.

The module sees torch only through its stable ABI and Python not at all, so one binary serves every
torch >= 2.11 and every Python >= 3.10. Without it everything still runs, on the reference backend.
All other metadata is in pyproject.toml.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import setup

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


def ninja_found() -> bool:
    """Whether ninja is at hand; one that pip installed need not be on the PATH of the build."""
    try:
        from ninja import BIN_DIR
    except ImportError:
        return shutil.which("ninja") is not None
    os.environ["PATH"] = os.pathsep.join([BIN_DIR, os.environ.get("PATH", os.defpath)])
    return True


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
        if IN_PLACE:  # one left by an earlier build would outlive its sources
            Path("vstar_ops/_C.abi3.so").unlink(missing_ok=True)
        return {}

    from torch.utils.cpp_extension import BuildExtension, CppExtension

    cpu = CppExtension(
        "vstar_ops._C",
        sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp")),
        include_dirs=[str(Path("csrc").resolve())],  # ninja runs in a folder of its own
        depends=sorted(str(path) for folder in ("common", "cpu") for path in Path("csrc", folder).iterdir()),
        extra_compile_args={"cxx": CXX_FLAGS},
        extra_link_args=["-Wl,-s"] if sys.platform == "linux" else [],
        py_limited_api=True,
    )
    return {
        "ext_modules": [cpu],
        "cmdclass": {"build_ext": BuildExtension.with_options(use_ninja=ninja_found())},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**extensions())
