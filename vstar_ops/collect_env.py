"""What a bug report needs to say about the machine: ``python -m vstar_ops.collect_env``.

With ``--backends`` only one line, which says what is on and why the rest is off.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

from vstar_ops import _build_info, backends


def collect() -> dict[str, dict[str, str]]:
    """Everything that is printed, as section -> name -> text. Nothing that is missing is an error."""
    return {
        "versions": {
            **{name: _version(name) for name in ("vstar_ops", "torch", "triton", "numpy")},
            "python": f"{platform.python_version()} ({platform.python_implementation()})",
            "os": platform.platform(),
        },
        "cpu": {
            "model": cpu_model(),
            "cores": f"{os.cpu_count()}, of which torch uses {torch.get_num_threads()}",
            "simd": torch.backends.cpu.get_cpu_capability(),
        },
        "gpu": {
            "torch built for": f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only",
            "devices": _devices(),
        },
        "compilers": {
            "c++": _first_line(*shlex.split(os.environ.get("CXX") or "c++"), "--version"),
            "nvcc": _last_line("nvcc", "--version"),
        },
        "build": _build_info.summary(),
        "backends": {
            name: ("on: " if status.available else "off: ") + status.detail
            for name, status in backends().items()
        },
        "libraries": {Path(path).name: path for path in _libraries()} or {"none": "loaded"},
        "environment": {
            name: value for name, value in sorted(os.environ.items()) if name.startswith("VSTAR_OPS_")
        }
        or {"VSTAR_OPS_*": "not set"},
    }


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _devices() -> str:
    if not torch.cuda.is_available():
        return "none"
    cuda = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return ", ".join(f"{device.name} (sm_{device.major}{device.minor})" for device in cuda)


def _output(*command: str) -> list[str]:
    if shutil.which(command[0]) is None:
        return ["not found"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError) as error:
        return [f"does not run: {error}"]
    return run.stdout.strip().splitlines() or [f"says nothing (exit status {run.returncode})"]


def _first_line(*command: str) -> str:
    return _output(*command)[0]


def _last_line(*command: str) -> str:
    return _output(*command)[-1]


def _libraries() -> list[str]:
    package = str(Path(__file__).resolve().parent)
    return sorted(path for path in torch.ops.loaded_libraries if path.startswith(package))


def main() -> None:
    sections = collect()
    if sys.argv[1:] == ["--backends"]:
        print(
            "vstar_ops backends:", "; ".join(f"{name} {text}" for name, text in sections["backends"].items())
        )
        return
    for section, entries in sections.items():
        print(f"{section}:")
        for name, text in entries.items():
            print(f"  {name:<16}{text}")


if __name__ == "__main__":
    main()
