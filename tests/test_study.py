"""The study: its parts on a toy catalogue, resumed, and the correlation it reports."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.study import ABLATIONS, _spearman, main

pytestmark = pytest.mark.usefixtures("one_thread")


def test_spearman_is_pearson_of_average_ranks() -> None:
    x = torch.tensor([[1.0, 3.0, 2.0, 9.0], [1.0, 1.0, 2.0, 3.0], [5.0, 5.0, 5.0, 0.0]])
    y = torch.tensor([[0.1, 0.3, 0.2, -7.0], [4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 0.0]])
    mask = torch.tensor([[True, True, True, False], [True] * 4, [True, True, True, False]])
    got = _spearman(x, y, mask)
    ranks = np.corrcoef([0.5, 0.5, 2, 3], [3, 2, 1, 0])[0, 1]
    assert got[:2].tolist() == pytest.approx([1.0, ranks])
    assert got[2].isnan()  # constant where it counts


@pytest.mark.slow
def test_all_parts_and_resume(toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "study"
    options = ["--data", str(toy), "--category", "Toy", "--seeds", "0,1", "--out", str(out)]
    options += ["--rl-steps", "1", "--sft-epochs", "1", "--valid-rows", "5", "--test-rows", "6"]
    assert main(options) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ABLATIONS)
    assert "chosen on valid" in text.lower() and "V-STAR" in text
    assert (out / "study.png").stat().st_size > 1000
    result = json.loads((out / "study.json").read_text())
    assert set(result) == {"0", "1"} and set(result["0"]) == set("abcd")
    assert set(result["0"]["c"]["beam search"]) == {"1", "2", "3", "4"}
    assert set(result["1"]["d"]["V"]) == {"1", "2", "3"}

    cells = sorted((out / "seed-1" / "study").glob("*.json"))
    times = [cell.stat().st_mtime_ns for cell in cells[1:]]
    cells[0].unlink()
    (out / "seed-1" / "study" / "b.json.tmp").write_text("half a cell of a killed run")
    assert main(options) == 0
    assert [cell.stat().st_mtime_ns for cell in cells[1:]] == times
    assert json.loads((out / "study.json").read_text()) == result


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--parts", "x"], "some of a, b, c, d"),
        (["--seeds", "one"], "invalid literal"),
        (["--data", "/nonexistent"], "nonexistent"),
    ],
)
def test_bad_arguments(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(options)
    assert message in capsys.readouterr().err
