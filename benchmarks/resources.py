"""``python -m benchmarks.resources``: compile every kernel, Triton and CUDA C++, for every GPU architecture,
and record what registers and shared memory it takes. ``--check`` compares with the tables that are checked in
instead.

Compiling needs no GPU. The figures belong to a version of Triton and of nvcc, which the tables name. Without
nvcc the table of the CUDA C++ kernels stays as it is, and with another one it is not compared; that no kernel
spills is checked with any.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

from vstar_ops._files import replacing
from vstar_ops._triton import ARCHITECTURES, modules, resources, specializations

TABLE = Path(__file__).parent / "results" / "resources.md"
CUDA = "# Resources of the CUDA C++ kernels\n"
ROOT = Path(__file__).parent.parent

sys.path.append(str(ROOT / "tools"))
import recipe  # noqa: E402  # the flags are those of the build


def _measure(job: tuple[str, int, int]) -> tuple[int, int, int]:
    module, index, architecture = job
    return resources(list(specializations([module]))[index], architecture)


def table() -> tuple[str, list[str]]:
    """The table as Markdown, and the kernels that spill."""
    names = [(m, i, item) for m in modules() for i, item in enumerate(specializations([m]))]
    jobs = [(m, i, architecture) for m, i, _ in names for architecture in ARCHITECTURES]
    with ProcessPoolExecutor(min(len(os.sched_getaffinity(0)), 8)) as pool:
        found = dict(zip(jobs, pool.map(_measure, jobs)))
    heads = " | ".join(f"sm_{a}" for a in ARCHITECTURES)
    lines = [f"| kernel | warps | {heads} |", "|---|---|" + "---|" * len(ARCHITECTURES)]
    spills = []
    for m, i, item in names:
        cells = []
        for architecture in ARCHITECTURES:
            registers, shared, spilled = found[m, i, architecture]
            cells.append(f"{registers}, {shared}" + (f", **spills {spilled}**" if spilled else ""))
            if spilled:
                spills.append(f"{item.name} on sm_{architecture}: {spilled} bytes")
        lines.append(f"| {item.name} | {item.warps} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n", spills


def document(body: str) -> str:
    """The file that is checked in."""
    return (
        f"# Resources of the Triton kernels\n\nTriton {version('triton')}. Registers per thread, bytes of "
        "shared memory per block; a kernel that spills says so. Printed by `python -m benchmarks.resources`, "
        f"which compiles for contiguous inputs and needs no GPU.\n\n{body}"
    )


def _entries(header: Path) -> dict[tuple[str, int], tuple[int, int]]:
    """Registers and spilled bytes of a header's kernels, by name and architecture."""
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    command = [recipe.nvcc(), *recipe.NVCC_FLAGS, "-Xptxas=-v", *targets, "-Icsrc", "-x", "cu"]
    done = subprocess.run(
        [*command, "-c", str(header), "-o", os.devnull], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"nvcc does not compile {header.name}: {done.stderr}")
    found = {}
    for part in done.stderr.split("Compiling entry function ")[1:]:
        mangled, architecture = re.findall(r"'(\w+)'", part.partition("\n")[0])
        spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part)
        registers = re.search(r"Used (\d+) registers", part)
        if spilled is None or registers is None:
            raise RuntimeError(f"nvcc reports no resources of {mangled}: {part!r}")
        spills = max(int(spilled[1]), int(spilled[2]))
        found[mangled, int(architecture.removeprefix("sm_"))] = int(registers[1]), spills
    return found


def cuda_table() -> tuple[str, list[str]]:
    """The table of the CUDA C++ kernels as Markdown, and the kernels that spill."""
    headers = sorted(path.with_suffix(".cuh") for path in (ROOT / "csrc/cuda").glob("*.cu"))
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        parts = list(pool.map(_entries, headers))
    found = {key: value for part in parts for key, value in part.items()}
    mangled = sorted({name for name, _ in found})
    filt = subprocess.run(["c++filt", "-p", *mangled], capture_output=True, text=True, check=True)
    names = [name.replace("vstar::", "").replace("cuda::", "") for name in filt.stdout.splitlines()]
    lines = ["| kernel | " + " | ".join(f"sm_{a}" for a in ARCHITECTURES) + " |"]
    lines.append("|---|" + "---|" * len(ARCHITECTURES))
    spills = []
    for name, key in sorted(zip(names, mangled)):
        cells = []
        for architecture in ARCHITECTURES:
            registers, spilled = found[key, architecture]
            cells.append(f"{registers}" + (f", **spills {spilled}**" if spilled else ""))
            if spilled:
                spills.append(f"{name} on sm_{architecture}: {spilled} bytes")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    text = (
        f"{CUDA}\nnvcc {recipe.nvcc_version()}. Registers per thread; a kernel that spills says so. All "
        "shared memory is dynamic: what a launch asks for is in the op's header, at most 96 KB.\n\n"
        + "\n".join(lines)
        + "\n"
    )
    return text, spills


def main() -> None:
    """Write or check the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resources", description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail where the checked-in table differs")
    args = parser.parse_args()
    body, spills = table()
    written = TABLE.read_text().partition(CUDA)
    cuda = written[1] + written[2]
    try:
        now, more = cuda_table()
    except recipe.CannotBuild:  # without nvcc
        pass
    else:
        spills += more
        if not args.check or now.splitlines()[2] == cuda.splitlines()[2]:  # the same nvcc
            cuda = now
    text = document(body) + "\n" + cuda
    if args.check:
        differs = TABLE.read_text() != text
        if differs:
            print(text)
            print(f"{TABLE.name} differs: run `python -m benchmarks.resources`", file=sys.stderr)
        sys.exit(differs or bool(spills))
    with replacing(TABLE) as path:
        path.write_text(text)
    print(text)
    for spill in spills:
        print(f"spills: {spill}", file=sys.stderr)
    sys.exit(bool(spills))


if __name__ == "__main__":
    main()
