"""``python -m vstar_ops.verify``: a table, programs that show what failed, and an exit status."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import torch

from .. import __version__
from .checks import off
from .script import describe
from .sweep import Row, verify

_COLUMNS = ("op", "backend", "dtypes", "cases", "worst error", "of limit", "index mismatches")
_FIELDS = ("op", "backend", "cases", "dtypes", "index_mismatches", "errors", "unsupported")
_BITS = ("runs", "batches", "threads")


def main(arguments: list[str] | None = None) -> int:
    """Print what came of all ops and backends; 1 if anything failed."""
    parser = argparse.ArgumentParser(
        prog="python -m vstar_ops.verify",
        description="Compare every op on every backend of this machine with float64 oracles, on random and "
        "adversarial inputs, and its bits between runs, batches and numbers of threads. "
        "The exit status is 1 if anything fails.",
    )
    parser.add_argument("--seconds", type=float, default=30.0, help="time in all (30)")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs, >= 0 (0)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(arguments)
    if options.seed < 0 or not options.seconds > 0:
        parser.error("--seed must be >= 0 and --seconds > 0")
    rows = verify(options.seconds, options.seed)
    failures = [(row, row.found) for row in rows if row.found is not None]
    if options.json:
        print(json.dumps(report(rows, options.seconds, options.seed), indent=1))
        return int(bool(failures))
    print(title(options.seconds, options.seed), *lines(rows), sep="\n")
    for row, found in failures:
        print(f"\nFAILED: {row.op} on {row.backend!r}: {describe(found)}")
        print(f"A program that shows it:\n\n{row.script}")
    if not failures:
        tested = ", ".join(dict.fromkeys(row.backend for row in rows))
        missing = "".join(f"; off: {name}" for name in off())
        print(f"\nAll {sum(row.cases for row in rows)} cases agree, on {tested}{missing}.")
    return int(bool(failures))


def title(seconds: float, seed: int) -> str:
    """Versions, settings, and why a backend is off."""
    reasons = "".join(f"\noff: {name}: {reason}" for name, reason in off().items())
    return f"vstar_ops {__version__}, torch {torch.__version__}, seed {seed}, {seconds:g} s{reasons}\n"


def lines(rows: list[Row]) -> list[str]:
    """The table."""
    table = [[*_COLUMNS, "same bits: runs", *_BITS[1:]]]
    for row in rows:
        errors = f"{row.errors} raised" if row.errors else str(row.index_mismatches)
        table.append(
            [row.op, row.backend, str(len(row.dtypes)), str(row.cases), f"{row.worst_error:.1e}"]
            + [f"{100 * row.worst_of_limit:.1f} %", errors]
            + [_bits(row, name) for name in _BITS]
        )
    widths = [max(map(len, column)) for column in zip(*table)]
    return ["  ".join(x.ljust(n) for x, n in zip(line, widths)).rstrip() for line in table]


def _bits(row: Row, kind: str) -> str:
    """How often bits were compared and equal."""
    compared, different = row.compared[kind], row.different[kind]
    if not compared:
        return "-"
    return f"no, {different} of {compared}" if different else f"yes, {compared}"


def report(rows: list[Row], seconds: float, seed: int) -> dict[str, Any]:
    """What ``--json`` prints; an error that is infinite, as NaN for a number is, is null."""
    found = [
        {
            "op": row.op, "backend": row.backend, "kind": row.found.kind, "what": describe(row.found),
            "made_by": row.found.origin, "script": row.script,
        }
        for row in rows if row.found is not None
    ]  # fmt: skip
    return {
        "vstar_ops": __version__,
        "torch": torch.__version__,
        "off": off(),
        "seconds": seconds,
        "seed": seed,
        "passed": not found,
        "rows": [
            {
                **{name: getattr(row, name) for name in _FIELDS},
                "worst_error": _finite(row.worst_error),
                "worst_error_of_limit": _finite(row.worst_of_limit),
                "compared": dict(row.compared),
                "different": dict(row.different),
            }
            for row in rows
        ],
        "failures": found,
    }


def _finite(x: float) -> float | None:
    return x if x < float("inf") else None


if __name__ == "__main__":
    sys.exit(main())
