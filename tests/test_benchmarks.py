"""The benchmark programs run and say what they promise; figures are not looked at."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import benchmarks.gpu


@pytest.mark.slow
def test_gpu_program_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All cases, small, on the CPU's backends: none fails its check, and the table is printed last."""
    status = benchmarks.gpu.main(["--device", "cpu", "--small", "--rounds", "1", "--out", str(tmp_path)])
    assert status == 0
    (found,) = tmp_path.glob("*.json")
    rows = json.loads(found.read_text())["rows"]
    assert {row["case"].split()[0] for row in rows} >= {"expand_topk", "sibling_advantage", "ved"}
    assert all(row["seconds"] > 0 for row in rows)
    assert capsys.readouterr().out.strip() == found.with_suffix(".md").read_text().strip()


@pytest.mark.slow
def test_gpu_program_fails_where_a_result_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = benchmarks.gpu.group("cpu", 2, 8)

    def differs() -> None:
        raise AssertionError("output 0 differs")

    monkeypatch.setattr(benchmarks.gpu, "cases", lambda *_: [lambda: case._replace(check=differs)])
    status = benchmarks.gpu.main(["--device", "cpu", "--small", "--rounds", "1", "--out", str(tmp_path)])
    assert status != 0
    assert "AssertionError: output 0 differs" in capsys.readouterr().out
