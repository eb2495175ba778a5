"""The study: its parts on a toy catalogue, resumed, its intervals and the correlation it reports."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import study_report, tuning
from benchmarks.crossed import interval
from benchmarks.policies import POLICIES
from benchmarks.rank_correlation import spearman
from benchmarks.study import ROWS, main, row_name
from vstar_ops.train.config import Config
from vstar_ops.train.report import student_t

pytestmark = pytest.mark.usefixtures("one_thread")


def test_spearman_is_pearson_of_average_ranks() -> None:
    x = torch.tensor([[1.0, 3.0, 2.0, 9.0], [1.0, 1.0, 2.0, 3.0], [5.0, 5.0, 5.0, 0.0]])
    y = torch.tensor([[0.1, 0.3, 0.2, -7.0], [4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 0.0]])
    mask = torch.tensor([[True, True, True, False], [True] * 4, [True, True, True, False]])
    got = spearman(x, y, mask)
    ranks = np.corrcoef([0.5, 0.5, 2, 3], [3, 2, 1, 0])[0, 1]
    assert got[:2].tolist() == pytest.approx([1.0, ranks])
    assert got[2].isnan()  # constant where it counts


@pytest.mark.parametrize(
    ("seeds", "requests", "of_seed", "of_request", "rest"),
    [
        (3, 200, 0.1, 0.5, 1.0),
        (8, 200, 0.0, 1.0, 1.0),
        (5, 50, 0.3, 0.3, 1.0),
        (4, 200, 0.2, 0.0, 0.1),
        (5, 100, 0.0, 0.0, 1.0),
        (1, 100, 0.0, 1.0, 1.0),
    ],
)
def test_intervals_cover_the_mean(
    seeds: int, requests: int, of_seed: float, of_request: float, rest: float
) -> None:
    """Of seeds and requests that were not drawn: 95 % of the intervals hold the true mean."""
    rng, covered, trials = np.random.default_rng(0), 0, 600
    for _ in range(trials):
        x = of_seed * rng.normal(size=(seeds, 1)) + of_request * rng.normal(size=requests)
        found = interval(x + rest * rng.normal(size=(seeds, requests)) + 2.0)
        covered += abs(found.mean - 2.0) <= found.half
    assert 0.91 < covered / trials < 0.99


def test_an_interval_over_one_seed_is_that_over_requests() -> None:
    x = np.arange(9.0)
    found = interval(x[None])
    assert found.mean == 4.0
    assert found.half == pytest.approx(2.306 * x.std(ddof=1) / 3, rel=1e-3)
    assert math.isnan(interval(np.ones((3, 1))).half)
    assert interval(np.ones((3, 5))) == (1.0, 0.0)


@pytest.mark.parametrize(("freedom", "quantile"), [(1, 12.706), (7, 2.365), (15, 2.131), (60, 2.0003)])
def test_the_quantiles_of_t_are_safe(freedom: int, quantile: float) -> None:
    assert quantile <= student_t(freedom) < 1.006 * quantile


def test_a_page_has_one_place_for_a_study(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- study x -->\nold\n<!-- end -->\n<!-- study y -->\n<!-- end -->\nb\n")
    study_report.replace_part(page, "x", "new")
    assert page.read_text() == (
        "a\n<!-- study x -->\n\nnew\n<!-- end -->\n<!-- study y -->\n<!-- end -->\nb\n"
    )
    with pytest.raises(ValueError, match=r"must have one <!-- study z -->"):
        study_report.replace_part(page, "z", "new")


@pytest.mark.slow
def test_all_parts_and_resume(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {"GRPO": {"": {}, "32 candidates": {"candidates": 32}}, "V-STAR": {"3 x V": {"value_weight": 3.0}}}
    monkeypatch.setattr(tuning, "SETTINGS", few)
    out, page = tmp_path / "study", tmp_path / "page.md"
    page.write_text("<!-- study Toy -->\n<!-- end -->\n")
    options = [
        "--data",
        str(toy),
        "--category",
        "Toy",
        "--seeds",
        "0,1",
        "--out",
        str(out),
        "--page",
        str(page),
    ]
    options += ["--rl-steps", "1", "--sft-epochs", "1", "--valid-rows", "5", "--test-rows", "6"]
    assert main(options) == 0
    text = capsys.readouterr().out
    assert all(row_name(*row) in text for row in ROWS)
    assert all(question in text for question, _, _ in study_report.QUESTIONS)
    assert all(f"{setting} " in text for setting in ("GRPO, 32 candidates", "V-STAR, 3 x V"))
    assert text[text.index("Toy, seeds 0, 1.") : text.index("\nin ")].strip() in page.read_text()
    assert (out / "study.svg").stat().st_size > 1000
    result = json.loads((out / "study.json").read_text())
    assert set(result["rows"]["SASRec"]) == {"NDCG@10", "HR@10"}
    assert result["seeds"] == [0, 1] and set(result) == {
        "seeds",
        "rows",
        "gains",
        "tokens",
        "levels",
        "tuning",
    }
    assert set(result["tokens"]["VED"]) == {"0.5x", "1x", "2x", "4x"}
    assert set(result["levels"]["V"]) == {"1", "2", "3"}

    # Paired: the difference of the means, over the same requests.
    gain = result["gains"]["GRPO beats the supervised policy"]["NDCG@10"][0]
    rows = result["rows"]
    difference = rows["GRPO, beam search"]["NDCG@10"][0] - rows["SFT, beam search"]["NDCG@10"][0]
    assert gain == pytest.approx(difference)

    cells = sorted((out / "seed-1" / "cells").glob("*.pt"))
    times = [cell.stat().st_mtime_ns for cell in cells[1:]]
    cells[0].unlink()
    assert main(options) == 0
    assert [cell.stat().st_mtime_ns for cell in cells[1:]] == times
    assert json.loads((out / "study.json").read_text()) == result


def test_tuning_changes_what_it_says() -> None:
    """A factor multiplies what the policy has, another value replaces it, of the config or of its search."""
    base = POLICIES["V-STAR"].config(Config())
    for fields, name, want in (
        ({"rl_lr": 3.0}, "rl_lr", 3 * base.rl_lr),
        ({"candidates": 32}, "candidates", 32),
        ({"value_weight": 0.5}, "ved.value_weight", base.ved.value_weight / 2),
        ({"skip_forced": False}, "ved.skip_forced", False),
    ):
        got = tuning.changed(POLICIES["V-STAR"], fields, Config()).config(Config()).settings()
        assert got == base.settings() | {name: want}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--parts", "x"], "some of rows, tokens, levels, gradients"),
        (["--seeds", "one"], "invalid literal"),
        (["--data", "/nonexistent"], "nonexistent"),
    ],
)
def test_bad_arguments(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(options)
    assert message in capsys.readouterr().err
