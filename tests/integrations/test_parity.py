"""``python -m benchmarks.parity`` and the page that quotes it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from needs import needs

from benchmarks.parity_table import Table

ROOT = Path(__file__).resolve().parents[2]


def rows(text: str) -> list[list[str]]:
    """The sections and their rows, without versions and the measured column."""
    found = []
    for line in text.splitlines():
        if line.startswith("## "):
            found.append([line.split()[1]])
        cells = line.strip("| ").split(" | ")
        if line.startswith("| ") and len(cells) == 5:
            found.append([*cells[:3], *cells[4:]])
    return found


def test_all_bounds_hold_and_the_page_quotes_every_row() -> None:
    needs("transformers", "trl", "verl", "hydra", "ray")
    command = [sys.executable, "-m", "benchmarks.parity"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert done.stdout.rstrip().endswith("bounds exceeded: 0")
    printed = rows(done.stdout)
    assert [row[0] for row in printed if len(row) == 1] == ["Formulas", "transformers", "trl", "verl"]
    assert rows((ROOT / "docs" / "parity.md").read_text()) == printed


def test_a_bound_that_does_not_hold_is_counted(capsys) -> None:
    table = Table()
    one = torch.ones(2)
    table.add("a", "b", "equal", one, one, bound=0)
    table.add("a", "b", "close", one, one + 1e-3, 1e-2, relative=True)
    table.add("a", "b", "on purpose", one, 2 * one)
    assert table.exceeded == 0
    table.add("a", "b", "apart", [one, one], [one, one + 0.5], 0.4)
    table.add("a", "b", "not a number", [one * torch.nan, one], [one, one], 0.4)
    assert table.exceeded == 2
    assert capsys.readouterr().out.count("**exceeded**") == 2
