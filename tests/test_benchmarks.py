"""The benchmark programs run and say what they promise; figures are not looked at."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import math
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import benchmarks.__main__
import benchmarks.gpu
import vstar_ops
from benchmarks import base, cases, competitors, cost_cases, filters, harness, plots, scale, trainers, worker
from benchmarks.catalogue import industrial_like
from vstar_ops.ops import OPS

ITEMS = industrial_like()
SMALL = argparse.Namespace(data=None, category="", small=True, rounds=3)


def number(maker: str, size: str = "small") -> int:
    """Of a case, by its maker."""
    return next(i for i, make in enumerate(cases.cases(size, ITEMS)) if make.__name__.startswith(maker))


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
    assert against >= {competitors.GATHER, *competitors.COMPETITORS}


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


def test_cpu_program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Ratios have their intervals, times their pace and their memory."""
    rows = tmp_path / "rows.json"
    arguments = ["benchmarks", "--small", "--rounds", "1", "--no-compile", "--only", "g", "--json", str(rows)]
    monkeypatch.setattr("sys.argv", arguments)
    benchmarks.__main__.main()
    found = json.loads(rows.read_text())
    (row,) = found["rows"]
    assert (row["case"], row["against"]) == ("group_advantage B=2 G=8", "mean, std")
    assert row["interval"] == [row["ratio"]] * 2
    for own in ("ours", "other"):
        assert row[f"{own}_bytes_per_second"] == pytest.approx(4 * 2 * 8 * 2 / row[f"{own}_s"])
        share = row[f"{own}_bytes_per_second"] / found["bandwidth"]
        assert row[f"{own}_bandwidth_share"] == pytest.approx(share)
        assert row[f"{own}_peak"] < 2e6


def test_the_interval_of_a_ratio() -> None:
    """The 8th and the 18th of 25: fewer than 8 of 25 tosses are heads with a probability of 2.2 %."""
    timing = harness.Timing({"ours": [1.0] * 25, "other": [float(x) for x in range(25)]})
    assert timing.ratio("other", "ours") == 12
    assert timing.interval("other", "ours") == (7, 17)
    few = harness.Timing({"ours": [2.0] * 5, "other": [2.0, 4.0, 6.0, 8.0, 10.0]})
    assert few.interval("other", "ours") == (1, 5)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the system tells no peak")
def test_the_peak_of_memory() -> None:
    """What a call holds at once, whatever others have left. The first of a process loads its code as well."""
    calls = [lambda: torch.ones(10**6).sum(), lambda: torch.ones(10**6) + 1, lambda: None]
    for call in calls:
        harness.peak_memory(call)
    left = [bytearray(2000) for _ in range(5000)]
    kept = left[::500]
    del left  # a hole of 1 MB between each two
    one, two, none = map(harness.peak_memory, calls)
    assert kept and 3.5e6 < one < 5e6 and 7.5e6 < two < 9.5e6 and none < 5e5


def test_a_case_without_a_compiler(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The rest is measured."""

    def no_compiler(*_: Any) -> None:
        raise benchmarks.__main__.InductorError(RuntimeError("no C++ compiler"), None)

    monkeypatch.setattr(torch, "compile", lambda *_, **__: no_compiler)
    case = cases.group_advantage(ITEMS, 2, 8)
    assert benchmarks.__main__.compiled(case) is case
    assert "no C++ compiler" in capsys.readouterr().out


def test_pictures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every competitor finds the winners of its kind; all is drawn from files, twice to the same bytes."""
    row = {"case": "op B=1", "ours_s": 1e-3, "ours_bytes_per_second": 1e9}
    (tmp_path / "cpu.json").write_text(json.dumps({"bandwidth": 1e10, "rows": [row]}))
    folders = ["--results", str(tmp_path), "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["plots", "--measure", "--small", "--rounds", "1", *folders])
    plots.main()
    found = json.loads((tmp_path / "sweeps.json").read_text())["rows"]
    assert {row["sweep"] for row in found} == set(plots.SWEPT)
    assert all(set(row["seconds"]) == set(plots.STYLES) and min(row["seconds"].values()) > 0 for row in found)
    drawn = {path: path.read_bytes() for path in tmp_path.glob("*.[sp][vn]g")}
    assert {path.name for path in drawn} == {
        f"{x}.{y}" for x in ("sweeps", "roofline") for y in ("svg", "png")
    }
    assert b"op B=1" in drawn[tmp_path / "roofline.svg"]
    monkeypatch.setattr("sys.argv", ["plots", *folders])
    plots.main()
    assert all(path.read_bytes() == content for path, content in drawn.items())


def test_scale_program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A small catalogue is built, written, mapped, expanded."""
    rows = tmp_path / "rows.json"
    sizes = ["--items", "2000", "--codes", "64", "--rounds", "1", "--json", str(rows)]
    monkeypatch.setattr("sys.argv", ["scale", *sizes])
    scale.main()
    found = json.loads(rows.read_text())
    assert all(found[x]["seconds"] > 0 for x in ("build", "write", "map", "map, and check the sum"))
    children = {row["step"]: row["children"] for row in found["steps"]}
    assert children["all columns legal"] == children["reading the logits"] == 16 * 128 * 64
    assert children["depth 1"] > children["depth 2"] >= children["depth 3"] > 0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.9996, "1 s"), (0.9994, "999 ms"), (12.34, "12.3 s"), (1.5e-6, "1.5 us"), (3e-8, "30 ns")],
)
def test_seconds_are_printed_without_an_exponent(seconds: float, text: str) -> None:
    assert harness._seconds(seconds) == text
    assert [harness.times(x) for x in (99.94, 99.96, 1234.5)] == ["99.9x", "100x", "1234x"]


def test_filters_program(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Every kind of change, and every kind of filter beside none, of a step and of a whole search."""
    monkeypatch.setattr("sys.argv", ["filters", "--small", "--rounds", "1"])
    filters.main()
    out = capsys.readouterr().out
    assert len(re.findall(r"\(.*\).* ms", out)) == 6
    assert out.count("half allowed of each request  ") == 3 + 1
    assert re.search(r"one step: .*x \(.* depth [012], .*\)\n  whole search: .*x \(", out)


@pytest.mark.parametrize("package", ["verl", "trl"])
def test_functions_of_trainers(package: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Where a package is installed its functions give what ours do, else a line says that it is not."""
    trainers.functions(report := harness.Report(), 1, small=True)
    there = [row for row in report.rows if row["case"].endswith(f"as {package} has it")]
    if importlib.util.find_spec(package):
        assert {row["case"].split()[0] for row in there} >= {"token_logp", "sibling_grpo_loss"}
    else:
        assert not there
        assert f"{package} is not installed" in capsys.readouterr().out


# ---------------------------------------------------------------- --base


def test_another_commit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It gives the same bits, or others, or has no such op."""
    shutil.copytree(worker.ROOT / "vstar_ops", tmp_path / "vstar_ops", symlinks=True)
    for folder in ("kernels", "benchmarks"):
        (tmp_path / folder).symlink_to(worker.ROOT / folder)
    with open(tmp_path / "vstar_ops/__init__.py", "a") as module:
        module.write("right = group_advantage\n")
        module.write("def group_advantage(*a, **k): return right(*a, **k) + 1\n")
        module.write("del prefix_tree\n")
    report, chosen = harness.Report(), [number(x) for x in ("sibling_advantage", "group", "prefix_tree")]
    base.compare(SMALL, chosen, "another", tmp_path, report)
    assert [row[base.SAME] for row in report.rows] == [True, False]
    assert all(row["against"] == "another" and row["ratio"] > 0 for row in report.rows)
    out = capsys.readouterr().out
    assert "prefix_tree B=2 G=8 L=3: not on another: AttributeError" in out
    assert "same results: NO" in out


def test_a_commit_that_cannot_run_the_cases(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "benchmarks").symlink_to(worker.ROOT / "benchmarks")
    (tmp_path / "vstar_ops").mkdir()
    (tmp_path / "vstar_ops/__init__.py").write_text("raise ImportError('of another time')")
    with pytest.raises(base.CannotCompare, match="the process that runs the cases in .* ended with 1"):
        base.compare(SMALL, [0], "another", tmp_path, harness.Report())
    assert "of another time" in capfd.readouterr().err


def test_a_base_that_is_no_commit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["benchmarks", "--small", "--base", "no-such-commit"])
    with pytest.raises(SystemExit):
        benchmarks.__main__.main()
    assert "--base 'no-such-commit' names no commit" in capsys.readouterr().err


def test_nothing_to_measure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """No case begins so; and torch against torch says nothing about the library."""
    monkeypatch.setattr("sys.argv", ["benchmarks", "--small", "--only", "expand_topk"])
    with pytest.raises(SystemExit):
        benchmarks.__main__.main()
    said = capsys.readouterr().err
    assert "expected the beginning of one of " in said and "expand_legal, " in said
    off = vstar_ops._backends.BackendStatus(False, "no module")
    monkeypatch.setitem(vstar_ops._backends._backends, "cpu", off)
    with pytest.raises(
        SystemExit, match="without the C\\+\\+ backend there is nothing to measure: no module"
    ):
        benchmarks.__main__.main()


def test_a_module_older_than_its_sources(tmp_path: Path) -> None:
    """What would be measured is not what is there."""
    for name in ("csrc/cpu/loops.h", "tools/recipe.py", "vstar_ops/_C.abi3.so"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    base.must_be_fresh(tmp_path)
    os.utime(tmp_path / "vstar_ops/_C.abi3.so", (0, 0))
    with pytest.raises(base.CannotCompare, match="is newer than _C.abi3.so: make"):
        base.must_be_fresh(tmp_path)
    (tmp_path / "vstar_ops/_C.abi3.so").unlink()
    with pytest.raises(base.CannotCompare, match="is not built: make"):
        base.must_be_fresh(tmp_path)


@pytest.mark.skipif(not (worker.ROOT / ".git").exists(), reason="no repository")
def test_a_commit_that_cannot_be_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its files are there, its build says why it fails."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    base.unpack(base.resolve("HEAD"), tmp_path)
    assert (tmp_path / "csrc/cpu").is_dir()
    assert (tmp_path / "benchmarks/worker.py").samefile(worker.__file__)
    with pytest.raises(base.CannotCompare, match="(?s)cannot be built.*no-such-compiler"):
        base.build("HEAD", tmp_path)
