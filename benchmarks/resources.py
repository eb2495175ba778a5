"""``python -m benchmarks.resources``: compile every Triton kernel for every GPU architecture, and record what
registers and shared memory it takes. ``--check`` compares with the table that is checked in instead.

Compiling needs no GPU. The figures belong to a version of Triton, which the table names.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path

from vstar_ops._files import replacing
from vstar_ops._triton import ARCHITECTURES, MODULES, resources, specialisations

TABLE = Path(__file__).parent / "results" / "resources.md"


def _measure(job: tuple[str, int, int]) -> tuple[int, int, int]:
    module, index, architecture = job
    return resources(list(specialisations([module]))[index], architecture)


def table(modules: Iterable[str] = MODULES) -> tuple[str, list[str]]:
    """The table as Markdown, and the kernels that spill."""
    names = [(m, i, item) for m in modules for i, item in enumerate(specialisations([m]))]
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
        f"# Resources of the Triton kernels\n\nTriton {version('triton')}. Registers a thread, bytes of "
        "shared memory a block; a kernel that spills says so. Printed by `python -m benchmarks.resources`, "
        f"which compiles for contiguous inputs and needs no GPU.\n\n{body}"
    )


def main() -> None:
    """Write or check the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resources", description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail where the checked-in table differs")
    args = parser.parse_args()
    body, spills = table()
    text = document(body)
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
