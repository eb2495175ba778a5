"""``python -m benchmarks.resources``: compile every kernel, Triton and CUDA C++, for every GPU architecture,
and record what registers and shared memory it takes. ``--check`` compares with the tables that are checked in
instead, with ``--only 90`` Triton kernels for that architecture alone. ``--model`` does the same with what
the kernels should take on an H100 (``results/model.md``).

Compiling needs no GPU. The figures belong to a version of Triton and of nvcc, which the tables name. Without
nvcc the table of the CUDA C++ kernels stays as it is, and with another one it is not compared; that no kernel
spills is checked with any.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

from vstar_ops._files import replacing
from vstar_ops._triton import ARCHITECTURES, compiled, cuobjdump, modules, resources, specializations

from . import cost_steps
from .cost_cases import CASES as CASES_OF_OPS
from .cost_cases import CostCase
from .cost_model import LAUNCH, MARGIN, Cost, Kernel, Launch, cost

CASES = [*CASES_OF_OPS, *cost_steps.CASES]
TABLE = Path(__file__).parent / "results" / "resources.md"
MODEL = Path(__file__).parent / "results" / "model.md"
CUDA = "# Resources of the CUDA C++ kernels\n"
ROOT = Path(__file__).parent.parent

sys.path.append(str(ROOT / "tools"))
import recipe  # noqa: E402  # the flags are those of the build


def _measure(job: tuple[str, int, int]) -> tuple[int, int, int]:
    module, index, architecture = job
    return resources(list(specializations([module]))[index], architecture)


def table(architectures: Sequence[int] = ARCHITECTURES) -> tuple[str, list[str]]:
    """The table as Markdown, and the kernels that spill. What is not compiled now stays as it was written."""
    names = [(m, i, item) for m in modules() for i, item in enumerate(specializations([m]))]
    jobs = [(m, i, architecture) for m, i, _ in names for architecture in architectures]
    written = dict(re.findall(r"(?m)^\| (.+?) \| \d+ \| (.*) \|$", TABLE.read_text()))
    with ProcessPoolExecutor(min(len(os.sched_getaffinity(0)), 8)) as pool:
        found = dict(zip(jobs, pool.map(_measure, jobs)))
    heads = " | ".join(f"sm_{a}" for a in ARCHITECTURES)
    lines = [f"| kernel | warps | {heads} |", "|---|---|" + "---|" * len(ARCHITECTURES)]
    spills = []
    for m, i, item in names:
        cells = written.get(item.name, "").split(" | ")
        cells += [""] * (len(ARCHITECTURES) - len(cells))
        for architecture in architectures:
            registers, shared, spilled = found[m, i, architecture]
            text = f"{registers}, {shared}" + (f", **spills {spilled}**" if spilled else "")
            cells[ARCHITECTURES.index(architecture)] = text
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


def _nvcc(header: Path, *options: str) -> str:
    """Compile a header by the flags of the build; what nvcc says about it."""
    command = [recipe.nvcc(), *recipe.NVCC_FLAGS, "-Icsrc", "-x", "cu", str(header), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nvcc does not compile {header.name}: {done.stderr}")
    return done.stderr


def _entries(header: Path) -> dict[tuple[str, int], tuple[int, int]]:
    """Registers and spilled bytes of a header's kernels, by name and architecture."""
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    said = _nvcc(header, "-Xptxas=-v", *targets, "-c", "-o", os.devnull)
    found = {}
    for part in said.split("Compiling entry function ")[1:]:
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


# ---------------------------------------------------------------- the cost model


def _kernels(cubin: bytes, shared: int = 0) -> dict[str, Kernel]:
    """The kernels of a file of machine code."""
    usage = re.findall(r"Function (\w+):\n\s*REG:(\d+)", cuobjdump(cubin, "-res-usage"))
    code = dict(part.split("\n", 1) for part in cuobjdump(cubin, "-sass").split("Function : ")[1:])
    return {name: Kernel(code[name], int(registers), shared) for name, registers in usage}


def _cuda_kernels() -> dict[str, Kernel]:
    """Those of CUDA C++ for sm_90, compiled once for as long as the sources stay the same."""
    sources = sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cuh", ".cu"))
    words = [recipe.nvcc_version().encode(), *map(str.encode, recipe.NVCC_FLAGS)]
    words += [path.read_bytes() for path in sources]
    folder = ROOT / "build" / "model" / hashlib.sha256(b"\0".join(words)).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for name in ("beams", "draws", "expand_topk", "sibling_advantage", "token_logp", "ved", "ved_rows"):
        cubin = folder / f"{name}.cubin"
        if not cubin.exists():
            with replacing(cubin) as path:
                _nvcc(ROOT / f"csrc/cuda/{name}.cuh", "-arch=sm_90", "-cubin", "-o", str(path))
        found |= _kernels(cubin.read_bytes())
    return found


def _triton_kernel(name: str) -> Kernel:
    """A specialization for sm_90; ``, odd`` behind its name: for rows whose length is no multiple of 16."""
    item = next(x for x in specializations() if x.name == name.removesuffix(", odd"))
    found = compiled(item, 90, aligned=not name.endswith(", odd"))
    (kernel,) = _kernels(found.asm["cubin"], found.metadata.shared).values()
    return kernel


def _launch_line(kernel: Kernel, launch: Launch, found: Cost) -> str:
    spent = [f"{n} x {times:.4g}" for n, times in found.trips]
    cells = [
        launch.kernel,
        f"{launch.blocks} x {launch.warps}",
        f"{kernel.registers}; {found.resident}",
        str(found.once),
        " + ".join(spent),
        f"{found.instructions:.0f}",
        f"{found.per_item:.{0 if found.per_item >= 100 else 1}f}",
        found.widths,
        f"{found.issue * 1e6:.1f} ({found.pipe})",
        f"{found.memory * 1e6:.1f}",
        f"{found.latency * 1e6:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def _case_line(case: CostCase, launches: list[Launch], costs: list[Cost], of: int) -> str:
    predicted = LAUNCH * len(costs) + MARGIN * sum(x.seconds for x in costs)
    limits = [sum(getattr(x, limit) for x in costs) for limit in ("issue", "memory", "latency")]
    moved = sum(x.bytes for x in launches) / 1e6
    times = " | ".join(f"{x * 1e6:.1f}" for x in (*limits, predicted))
    goal, met = "-", "-"
    if case.goals is not None:
        goal, met = f"{case.goals[of] * 1e6:.1f}", "yes" if predicted <= case.goals[of] else "no"
    return f"| {case.name} | {len(costs)} | {moved:.1f} | {times} | {goal} | {met} |"


def model_part(title: str, compiler: str, kernels: dict[str, Kernel], of: int) -> tuple[str, list[str]]:
    """What is checked in about the kernels of a backend, and those that use local memory."""
    cases = [
        "| case | launches | MB | issue | memory | latency | prediction | goal | met |",
        "|---" * 9 + "|",
    ]
    lines = [
        "| kernel | blocks x warps | registers; blocks per SM | outside of loops | per trip x trips "
        "| of a warp | per item | loads and stores, bits | issue | memory | latency |",
        "|---" * 11 + "|",
    ]
    for case in CASES:
        launches = case.cuda if of == 0 else case.triton
        costs = [cost(kernels[x.kernel], x) for x in launches]
        cases.append(_case_line(case, launches, costs, of))
        lines += [_launch_line(kernels[x.kernel], x, y) for x, y in zip(launches, costs)]
    local = [name for name, x in kernels.items() if any(re.match("LDL|STL", y.text) for y in x.code)]
    body = "\n".join((*cases, "", "Instructions of a warp; microseconds.", "", *lines))
    return f"# {title}\n\n{compiler}\n\n{body}\n", local


def _same(old: str, new: str) -> bool:
    """Whether two tables say the same, their numbers to 5 %."""
    number = r"\d+(?:\.\d+)?"
    pairs = zip(re.findall(number, old), re.findall(number, new))
    return re.sub(number, "", old) == re.sub(number, "", new) and all(
        abs(float(x) - float(y)) <= 0.05 * float(x) + 0.05 for x, y in pairs
    )


def model(check: bool) -> int:
    """Write or check what the kernels should take; the exit status."""
    written = MODEL.read_text()
    head, *parts = re.split(r"(?m)^(?=# (?:CUDA C\+\+|Triton)$)", written)
    failures = []
    names = {x.kernel for case in CASES for x in case.triton}
    found = [model_part("Triton", f"Triton {version('triton')}.", {x: _triton_kernel(x) for x in names}, 1)]
    try:
        every, wanted = _cuda_kernels(), {x.kernel for case in CASES for x in case.cuda}
        chosen = {x: next(k for name, k in every.items() if x in name) for x in wanted}
        found.insert(0, model_part("CUDA C++", f"nvcc {recipe.nvcc_version()}.", chosen, 0))
    except recipe.CannotBuild:  # without nvcc
        pass
    for text, local in found:
        failures += [f"{name} uses local memory" for name in local]
        title, _, compiler = text.split("\n")[:3]
        place = next((i for i, x in enumerate(parts) if x.startswith(title + "\n")), len(parts))
        before = parts[place] if place < len(parts) else ""
        if check and compiler in before and not _same(before.strip(), text.strip()):
            failures.append(
                f"{title[2:]}: {MODEL.name} differs, run `python -m benchmarks.resources --model`"
            )
        parts[place : place + 1] = [text]
    now = head + "\n".join(x.strip() + "\n" for x in parts)
    if not check:
        with replacing(MODEL) as path:
            path.write_text(now)
    print(now)
    for failure in failures:
        print(failure, file=sys.stderr)
    return int(bool(failures))


def main() -> None:
    """Write or check the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resources", description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail where the checked-in table differs")
    parser.add_argument("--model", action="store_true", help="the cost model instead of the resources")
    parser.add_argument("--only", type=int, choices=ARCHITECTURES, help="of Triton, this architecture")
    args = parser.parse_args()
    if args.model:
        sys.exit(model(args.check))
    body, spills = table([args.only] if args.only else ARCHITECTURES)
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
