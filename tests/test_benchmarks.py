"""The benchmark programs run and say what they promise; figures are not looked at."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import benchmarks.gpu
from benchmarks import cases, competitors, cost_cases
from benchmarks.catalogue import industrial_like
from vstar_ops.ops import OPS

ITEMS = industrial_like()


@pytest.mark.slow
def test_gpu_program_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All cases, small, on the CPU's backends: none fails its check, and the table is printed last."""
    status = benchmarks.gpu.main(["--device", "cpu", "--small", "--rounds", "1", "--out", str(tmp_path)])
    assert status == 0
    (found,) = tmp_path.glob("*.json")
    rows = json.loads(found.read_text())["rows"]
    assert {row["case"].split()[0] for row in rows} >= {"expand_topk", "sibling_advantage", "ved_candidates"}
    assert all(row["seconds"] > 0 for row in rows)
    assert capsys.readouterr().out.strip() == found.with_suffix(".md").read_text().strip()


def test_gpu_program_knows_the_predictions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They stand beside the measurement, under the case's name."""
    found = benchmarks.gpu.predictions()
    names = {case.name for case in cost_cases.CASES}
    assert set(found) == {(name, backend) for name in names for backend in ("cuda", "triton")}
    small = cases.group_advantage(ITEMS, 2, 8)
    monkeypatch.setattr(benchmarks.gpu, "cases", lambda *_: [lambda: small])
    monkeypatch.setattr(benchmarks.gpu, "predictions", lambda: {(small.name, "cpu"): (123e-6, 45e-6)})
    benchmarks.gpu.main(["--device", "cpu", "--small", "--rounds", "1", "--out", str(tmp_path)])
    assert "| 123 us | 45 us |" in capsys.readouterr().out


@pytest.mark.slow
def test_gpu_program_fails_where_a_result_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = cases.group_advantage(ITEMS, 2, 8)
    wrong = {**case.variants, "wrong": lambda x: case.variants["ours"](x) + 1e-3}
    differs = dataclasses.replace(case, variants=wrong)
    monkeypatch.setattr(benchmarks.gpu, "cases", lambda *_: [lambda: differs])
    status = benchmarks.gpu.main(["--device", "cpu", "--small", "--rounds", "1", "--out", str(tmp_path)])
    assert status != 0
    assert (
        "AssertionError: group_advantage B=2 G=8: result 0 of 'ours' and 'wrong'" in capsys.readouterr().out
    )


class Called(TorchDispatchMode):
    """The names of this library's ops that were called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace.startswith("vstar_ops"):
            self.names.add(func._schema.name.partition("::")[2])
        return func(*args, **(kwargs or {}))


def test_every_op_has_a_case() -> None:
    """And every case has a shape for each device."""
    with Called() as called:
        for make in cases.cases("small", ITEMS):
            case = make()
            case.run(case.variants["ours"])
    assert called.names == set(OPS)
    assert len({frozenset(make for make, *_ in sizes) for sizes in cases.SIZES.values()}) == 1


@pytest.mark.parametrize("of_result", [0, 1, 2])
def test_a_check_compares_every_variant_with_every_other(of_result: int) -> None:
    """The first result is a score, the others belong to it: only near ties may swap them."""
    right = torch.tensor([[3.0, 2.0, 2.0, 1.0, 0.0]]), torch.arange(5)[None], torch.arange(5)[None] / 2
    wrong = tuple(x.clone() for x in right)
    wrong[of_result][0, 0] += 1
    variants = {name: lambda: right for name in ("ours", "second", "third")}
    case = cases.Case("case", variants, [()], ranked=True)
    case.check()
    for name in variants:
        with pytest.raises(AssertionError, match=f"result {of_result} of .*{name}"):
            dataclasses.replace(case, variants=variants | {name: lambda: wrong}).check()
    swapped = right[0], right[1][:, [0, 2, 1, 3, 4]], right[2][:, [0, 2, 1, 3, 4]]
    dataclasses.replace(case, variants=variants | {"third": lambda: swapped}).check()


def test_competitors_agree_and_are_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The program checks that the exact ones find the same winners; the cut is found out."""
    rows = tmp_path / "rows.json"
    arguments = ["competitors", "--small", "--rounds", "1", "--json", str(rows)]
    monkeypatch.setattr("sys.argv", arguments)
    competitors.main()
    against = {row.get("against") for row in json.loads(rows.read_text())["rows"]}
    assert against == set(competitors.COMPETITORS)


def test_wrong_winners_are_counted() -> None:
    """Of four winners one is missing, and another changed places with one of nearly the same score."""

    def winners(score: list[float], node: list[int]) -> competitors.Winners:
        tensor = torch.tensor([node])
        return competitors.Winners(torch.tensor([score]), tensor, tensor, tensor)

    right = winners([3.0, 2.0, 1.0, 1.0], [5, 6, 7, 8])
    assert competitors.wrong(right, right) == 0
    assert competitors.wrong(winners([3.0, 2.0, 1.0, 1.0], [5, 6, 7, 9]), right) == 0  # a tie at the end
    assert competitors.wrong(winners([3.0, 1.0, 1.0, 0.5], [5, 7, 8, 9]), right) == 0.25
    assert competitors.wrong(winners([3.0, -math.inf, 1.0, 1.0], [5, 6, 7, 8]), right) == 0.25
