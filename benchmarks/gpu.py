"""``python -m benchmarks.gpu``: every op on the GPU at hand, checked and then timed against torch.

For each case: time per call (CUDA events; the replay of a graph where a call takes less than 2 ms), bytes
that any implementation must move and their share of the measured copy bandwidth, and the ratio to the best
eager composition of torch operations we know and to ``torch.compile`` of it. All of them are timed in turns.
Beside the time stands what ``results/model.md`` predicts for an H100, and what is aimed at.
Results are compared with each other and with the reference first; a backend that differs is not timed and
fails the run. Inputs rotate among several sets where they would fit into the L2 cache.

``--device cpu`` runs all of it on the CPU's backends, without events and graphs: a check of this program.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import vstar_ops
from vstar_ops._files import replacing

from .cases import FP32, Case, cases, expand_dense
from .catalogue import industrial_like
from .harness import Clock, Sample, copy_bandwidth

RESULTS = Path(__file__).parent / "results"
MODEL = RESULTS / "model.md"


def call_overhead(device: str) -> float:
    """Seconds of host time of one small ``expand_topk``, queued and not waited for."""
    with torch.device(device):
        case = expand_dense(torch.zeros(0), 1, 1, 32, 4, FP32)
    clock, queue_is_empty = Clock(), torch.cuda.synchronize if device == "cuda" else lambda: None
    sample = clock.sample(partial(case.run, case.variants["ours"]), calls=20)
    return clock.interleave({"ours": sample}, 30, queue_is_empty).seconds("ours")


def on(backend: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """The same call on a backend."""

    def called(*arguments: Any) -> Any:
        with vstar_ops.use_backend(backend):
            return call(*arguments)

    return called


def predictions() -> dict[tuple[str, str], tuple[float, float]]:
    """Of (case, backend): the seconds that ``results/model.md`` predicts, and those aimed at."""
    found, backend = {}, ""
    for line in MODEL.read_text().splitlines():
        cells = [x.strip() for x in line.strip("|").split("|")]
        if line.startswith("# "):
            backend = {"# CUDA C++": "cuda", "# Triton": "triton"}.get(line, "")
        elif len(cells) == 9 and cells[-1] in ("yes", "no"):
            found[cells[0], backend] = float(cells[6]) * 1e-6, float(cells[7]) * 1e-6
    return found


def measure(
    clock: Clock,
    backends: list[str],
    case: Case,
    bandwidth: float,
    rounds: int,
    model: dict[tuple[str, str], tuple[float, float]],
) -> list[dict[str, Any]]:
    """A row per backend."""
    samples, failed, ours = dict[str, Sample](), dict[str, str](), case.variants["ours"]

    def attempt(name: str, check: Callable[[], None], call: Callable[[int], Any], graph: bool) -> None:
        try:
            check()
            samples[name] = clock.sample(call, len(case.inputs), case.calls, graph)
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"

    for backend in backends:
        attempt(backend, on(backend, case.check), on(backend, partial(case.run, ours)), True)
    eager = list(case.variants.values())[-1]
    if eager is not ours:
        attempt("eager", lambda: None, partial(case.run, eager), False)
        if case.compiled and clock.gpu:
            compiled = torch.compile(eager, dynamic=False)
            attempt("compile", lambda: case.check(compiled=compiled), partial(case.run, compiled), False)
    timing = clock.interleave(samples, rounds, case.reset)
    torch._dynamo.reset()
    others = {name: timing.seconds(name) for name in samples if name not in backends}
    rows = []
    for backend in backends:
        row: dict[str, Any] = {"case": case.name, "backend": backend}
        if backend in failed:
            rows.append(row | {"error": failed[backend]})
            continue
        own, moved = timing.seconds(backend), on(backend, case.bytes)()
        row |= {"seconds": own, "how": samples[backend].how, "other_seconds": others, "failed": failed}
        row |= {"bytes": moved, "bytes_per_second": moved / own, "bandwidth_share": moved / own / bandwidth}
        row |= {"ratio": {name: timing.ratio(name, backend) for name in others}}
        if (case.name, backend) in model:
            row |= dict(zip(("predicted", "goal"), model[case.name, backend], strict=True))
        rows.append(row)
    return rows


def table(header: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Markdown, a line per row."""
    text = "\n".join(f"- {name}: {value}" for name, value in header.items())
    text += "\n\n| case | backend | time | predicted for an H100 | aimed at "
    text += "| GB/s | of copy bandwidth | eager torch | torch.compile |\n" + "|---" * 9 + "|\n"
    for row in rows:
        if "error" in row:
            text += f"| {row['case']} | {row['backend']} | **{row['error']}** | | | | | | |\n"
            continue
        ratios = [f"{row['ratio'][n]:.1f}x" if n in row["ratio"] else "" for n in ("eager", "compile")]
        time_of = f"{row['seconds'] * 1e6:.1f} us ({row['how']})"
        time_of += "".join(f" | {row[n] * 1e6:.0f} us" if n in row else " |" for n in ("predicted", "goal"))
        share = f"{row['bytes_per_second'] / 1e9:.1f} | {row['bandwidth_share']:.1%}"
        text += f"| {row['case']} | {row['backend']} | {time_of} | {share} | {' | '.join(ratios)} |\n"
    return text


def _header(device: str, bandwidth: float, overhead: dict[str, float]) -> dict[str, Any]:
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, cwd=RESULTS, capture_output=True, text=True).stdout.strip()
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    return {
        "device": name,
        "date": datetime.date.today().isoformat(),
        "commit": commit or "unknown",
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda}",
        "triton": version("triton") if vstar_ops.backends()["triton"].available else "off",
        "copy bandwidth": f"{bandwidth / 1e9:.0f} GB/s",
        "host time of a small expand_topk": ", ".join(f"{k} {v * 1e6:.1f} us" for k, v in overhead.items()),
    }


def main(argv: list[str] | None = None) -> int:
    """Measure, write the files, print the table last."""
    summary = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=summary)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="small shapes, to check this program")
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds a case (default: 15)")
    parser.add_argument("--only", default="", help="cases whose name holds this text")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU: torch.cuda.is_available() is False")
    names = ("triton", "cuda") if args.device == "cuda" else ("cpu", "reference")
    available = [name for name in names if vstar_ops.backends()[name].available]
    if not available:
        parser.error("no backend: " + "; ".join(f"{n}: {vstar_ops.backends()[n].detail}" for n in names))

    torch.manual_seed(0)
    clock = Clock(args.device, slice_s=0)
    bandwidth = copy_bandwidth(clock, args.device, 2**24 if args.small else 2**31)
    overhead = {name: on(name, call_overhead)(args.device) for name in available}
    header, rows = _header(args.device, bandwidth, overhead), list[dict[str, Any]]()
    model = predictions()
    for make in cases("small" if args.small else "cuda", industrial_like().to(args.device)):
        case = make()
        if args.only in case.name:
            print(case.name, "…", file=sys.stderr, flush=True)
            rows += measure(clock, available, case, bandwidth, args.rounds, model)
            write(args.out, header, rows)  # after every case, so that nothing is lost
    print(table(header, rows))
    missing = {case for case, _ in model} - {row["case"] for row in rows}
    if missing and not (args.small or args.only):
        print(f"{MODEL.name} predicts what was not measured: {', '.join(sorted(missing))}", file=sys.stderr)
        return 1
    return any("error" in row for row in rows)


def write(folder: Path, header: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """``<device>-<date>.json`` and ``.md``."""
    slug = "-".join(f"{header['device']} {header['date']}".lower().split())
    folder.mkdir(parents=True, exist_ok=True)
    as_json = json.dumps({"machine": header, "rows": rows}, indent=1)
    for suffix, content in ((".json", as_json), (".md", table(header, rows))):
        with replacing(folder / f"{slug}{suffix}") as path:
            path.write_text(content)


if __name__ == "__main__":
    sys.exit(main())
