"""``python -m benchmarks --base REV``: today's cases on another commit, in the same run.

The commit is built in a temporary folder outside the checkout. Both sides run in a process each, on the same
inputs, and take turns. Several pairs of processes, since where a process finds its memory matters too.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from io import BytesIO
from pathlib import Path

from . import harness
from .worker import ROOT, Worker, WorkerDied

PAIRS = 3
HERE, SAME = "here", "same results"


class CannotCompare(Exception):
    """Why not."""


def git(*arguments: str) -> bytes:
    """What git says in the checkout."""
    found = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True)
    if found.returncode:
        raise CannotCompare(found.stderr.decode().strip())
    return found.stdout


def resolve(rev: str) -> str:
    """The full name of a commit."""
    try:
        return git("rev-parse", "--verify", "--end-of-options", f"{rev}^{{commit}}").decode().strip()
    except (CannotCompare, FileNotFoundError) as error:
        raise CannotCompare(f"--base {rev!r} names no commit of the repository in {ROOT}: {error}") from None


def must_be_fresh(root: Path = ROOT) -> None:
    """The C++ module of the checkout must be one of today's sources."""
    built = root / "vstar_ops/_C.abi3.so"
    if not built.exists():
        raise CannotCompare(f"{built} is not built: make, or python setup.py build_ext --inplace")
    sources = [x for x in (root / "csrc").rglob("*") if x.suffix in (".h", ".inc", ".cpp")]
    newest = max((*sources, root / "tools/recipe.py"), key=lambda x: x.stat().st_mtime)
    if newest.stat().st_mtime > built.stat().st_mtime:
        name = newest.relative_to(root)
        raise CannotCompare(
            f"{name} is newer than {built.name}: make, or python setup.py build_ext --inplace"
        )


def unpack(commit: str, folder: Path) -> None:
    """The commit's files, with today's benchmarks."""
    with tarfile.open(fileobj=BytesIO(git("archive", commit))) as archive:
        archive.extractall(folder, filter="tar")
    (folder / "benchmarks").rename(folder / "benchmarks of the commit")
    (folder / "benchmarks").symlink_to(ROOT / "benchmarks")


def build(commit: str, folder: Path) -> None:
    """Its C++ module, in place; minutes."""
    print(f"building {commit[:12]} in {folder}", file=sys.stderr, flush=True)
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    environment = {**os.environ, "VSTAR_OPS_REQUIRE": "cpu", "VSTAR_OPS_SKIP": "cuda"}
    found = subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if found.returncode:
        end = found.stdout.decode(errors="replace").strip()[-2000:]
        raise CannotCompare(f"{commit[:12]} cannot be built:\n{end}")
    used = [json.loads((x / "vstar_ops/_build.json").read_text())["cpu"] for x in (ROOT, folder)]
    if used[0] != used[1]:
        print(f"built in other ways: here by {used[0]}, the base by {used[1]}")


@contextmanager
def built(rev: str) -> Iterator[tuple[str, Path]]:
    """A commit's full name and the folder where it is built, which is gone after the block."""
    commit = resolve(rev)
    must_be_fresh()
    with tempfile.TemporaryDirectory(prefix="vstar_ops-base-") as folder:
        unpack(commit, Path(folder))
        build(commit, Path(folder))
        yield commit, Path(folder)


def compare(
    args: argparse.Namespace, cases: list[int], name: str, root: Path, report: harness.Report
) -> None:
    """The ``cases`` of this checkout and of the commit ``name`` in ``root``, in turns."""
    rounds: dict[int, dict[str, list[float]]] = {case: {HERE: [], name: []} for case in cases}
    said: dict[int, list[dict[str, str]]] = {}
    for pair in range(PAIRS):
        with ExitStack() as stack:
            sides = {HERE: stack.enter_context(Worker(args))}
            try:
                sides[name] = stack.enter_context(Worker(args, root))
            except WorkerDied as error:
                raise CannotCompare(str(error)) from None
            for case in cases:
                said[case] = [side.ask(case=case) for side in sides.values()]
                here, base = said[case]
                if "error" in here:
                    raise RuntimeError(f"case {case}: {here['error']}")
                if "error" in base:
                    if pair == 0:
                        print(f"{here['name']}: not on {name}: {base['error']}")
                    continue
                for turn in range(-(-args.rounds // PAIRS)):
                    for own, side in list(sides.items())[:: 1 if turn % 2 else -1]:
                        rounds[case][own].append(side.ask())
                if pair == PAIRS - 1:
                    _add(report, here, base, rounds[case])


def _add(
    report: harness.Report, here: dict[str, str], base: dict[str, str], rounds: dict[str, list[float]]
) -> None:
    report.add(here["name"], harness.Timing(rounds))
    same = here["digest"] == base["digest"]
    report.rows[-1][SAME] = same
    print(f"  {SAME}: {'yes, bit by bit' if same else 'NO'}", flush=True)
