"""``python -m benchmarks.plots``: the time of a step as its sizes grow, and ops beside the pace of memory.

``--measure`` first times a step of a beam search over requests, beams, columns and catalogues, which takes
minutes, and writes ``benchmarks/results/sweeps.json``. The pictures are drawn from that file and from
``cpu.json`` there into ``docs/figures``, as SVG and PNG.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vstar_ops import Trie
from vstar_ops._files import replacing
from vstar_ops.collect_env import cpu_model
from vstar_ops.train.pictures import panels

from . import harness
from .catalogue import frontiers, made
from .competitors import DENSE, GATHER, LEGAL, OURS, STATIC, DenseMask, Gather, Static, Step, ours, wrong
from .figures import FIGURES, RESULTS

SWEEPS = RESULTS / "sweeps.json"


class Point(NamedTuple):
    """A step at ``depth`` of random items of ``length`` levels of ``codes`` codes."""

    items: int = 1_000_000
    length: int = 3
    codes: int = 1024
    columns: int = 1024
    batch: int = 16
    width: int = 32
    depth: int = 1


SIZES = [10**4, 10**5, 10**6, 10**7]
WIDE = Point(length=4, codes=8192, columns=8192, batch=4)
SWEPT: dict[str, tuple[str, str, list[Point]]] = {
    "requests": ("batch", "depth 1 of 1e6 items, W=32, V=1,024", [Point(batch=2**i) for i in range(0, 8, 2)]),
    "beams": ("width", "depth 1 of 1e6 items, B=16, V=1,024", [Point(width=2**i) for i in range(2, 9, 2)]),
    "columns": (
        "columns",
        "depth 1 of 1e6 items, 1,024 codes, B=4, W=32",
        [Point(columns=x, batch=4) for x in (1024, 4096, 16_384, 65_536, 152_064)],
    ),
    "items": ("items", "depth 1, B=4, W=32, V=8,192", [WIDE._replace(items=x) for x in SIZES]),
    "items, below": (
        "items",
        "depth 2, B=4, W=32, V=8,192",
        [WIDE._replace(items=x, depth=2) for x in SIZES],
    ),
}
AXES = {"batch": "requests B", "width": "beams W", "columns": "columns V of the logits", "items": "items"}
# Of Okabe and Ito, for all kinds of color vision; markers differ too.
STYLES = {
    OURS: ("ours, softmax over all columns", "#0072B2", "o"),
    LEGAL: ("ours, softmax over the children", "#D55E00", "s"),
    GATHER: ("best torch composition, over the children", "#000000", "^"),
    DENSE: ("dense mask, over all columns", "#CC79A7", "v"),
    STATIC: ("STATIC's method, over all columns", "#009E73", "D"),
}


def small(point: Point) -> Point:
    """The same direction, to check this program."""
    scaled = {"items": max(point.items // 1000, 10), "codes": 16, "columns": max(16, point.columns // 512)}
    return point._replace(**scaled, batch=min(point.batch, 2), width=min(point.width, 4))


def time_step(trie: Trie, point: Point, rounds: int) -> dict[str, float]:
    """Seconds of a step of each kind, after a check that those of a kind find the same winners."""
    node, cum_logp = frontiers(trie, point.batch, point.width, point.columns)[point.depth]
    logits = torch.randn(point.batch, node.shape[1], point.columns)
    inputs = logits, node.long(), cum_logp, point.width
    steps: dict[str, Step] = {OURS: ours(trie, "vocab"), LEGAL: ours(trie, "legal")}
    for name, make in ((GATHER, Gather), (DENSE, DenseMask), (STATIC, Static)):
        steps[name] = make(trie, point.depth, point.columns)
        same = LEGAL if name == GATHER else OURS
        share = wrong(steps[name](*inputs), steps[same](*inputs))
        assert share == 0, f"{point}: {name} has {share:.1%} wrong winners"
    clock = harness.Clock(slice_s=0.005)
    samples = {name: clock.sample(lambda _, f=f: f(*inputs)) for name, f in steps.items()}
    timing = clock.interleave(samples, rounds)
    return {name: timing.seconds(name) for name in steps}


def measure(rounds: int, is_small: bool) -> dict[str, Any]:
    """A row per point of every sweep."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    tries = dict[tuple[int, int, int], Trie]()
    for sweep, (_, _, points) in SWEPT.items():
        for point in map(small, points) if is_small else points:
            key = point.items, point.codes, point.length
            if key not in tries:
                tries[key] = Trie.from_sequences(made(*key))
            rows.append({"sweep": sweep, **point._asdict(), "seconds": time_step(tries[key], point, rounds)})
            print(json.dumps(rows[-1]), flush=True)
    return {"machine": f"{cpu_model()}, 1 thread, torch {torch.__version__}", "rows": rows}


def sweeps(path: Path, found: dict[str, Any]) -> None:
    """Time of a step against what grows."""
    with panels(path, (8, 9), 6, rows=3) as axes:
        for axis, (sweep, (by, text, _)) in zip(axes, SWEPT.items()):
            rows = [row for row in found["rows"] if row["sweep"] == sweep]
            for name, (_, color, marker) in STYLES.items():
                x, y = [row[by] for row in rows], [1e3 * row["seconds"][name] for row in rows]
                axis.plot(x, y, color=color, marker=marker, markersize=4, lw=1.5)
            axis.set(xscale="log", yscale="log", xlabel=AXES[by], ylabel="time of a step, ms")
            axis.set_title(text, fontsize=9)
        axes[-1].axis("off")
        for text, color, marker in STYLES.values():
            axes[-1].plot([], [], color=color, marker=marker, label=text)


def roofline(path: Path, found: dict[str, Any]) -> None:
    """What every op must move, and the pace at which it does, under the bandwidth of a copy.

    Cases with a filter lie where those without one do, and are left out.
    """
    limit = found["bandwidth"] / 1e9
    cases = {row["case"]: row for row in found["rows"] if "ours_bytes_per_second" in row}
    rows = {case: row for case, row in cases.items() if "banned" not in case}
    with panels(path, (8, 8), 2, rows=2) as (axis, names):
        for number, row in enumerate(rows.values(), 1):
            pace = row["ours_bytes_per_second"] / 1e9
            place = row["ours_s"] * row["ours_bytes_per_second"], pace
            axis.plot(*place, "o", color="#0072B2", markersize=5)
            axis.annotate(str(number), place, (4, 3), textcoords="offset points", fontsize=8)
        axis.axhline(limit, color="#D55E00", lw=1.5)
        axis.text(2e3, 1.1 * limit, f"a copy in memory: {limit:.1f} GB/s", color="#D55E00", fontsize=9)
        axis.set(xscale="log", yscale="log", xlim=(1e3, 1e10))
        axis.set_xlabel("bytes that any implementation must read and write, each once")
        axis.set_ylabel("GB/s, those bytes by the time of ours")
        names.axis("off")
        half = -(-len(rows) // 2)
        for i, case in enumerate(rows):
            x, y = (0.5 if i >= half else 0), 1 - (i % half) / half
            names.text(x, y, f"{i + 1}  {case}", fontsize=7, va="top", transform=names.transAxes)


def main() -> None:
    """Measure where asked, draw."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plots", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--measure", action="store_true", help="first time the steps, which takes minutes")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds (default: %(default)s)")
    parser.add_argument("--small", action="store_true", help="small shapes, to check this program")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of sweeps.json and cpu.json")
    parser.add_argument("--out", type=Path, default=FIGURES, help="folder of the pictures")
    args = parser.parse_args()
    if args.measure:
        measured = measure(args.rounds, args.small)
        with replacing(args.results / SWEEPS.name) as path:
            path.write_text(json.dumps(measured, indent=1))
    for draw, source in ((sweeps, SWEEPS.name), (roofline, "cpu.json")):
        found = json.loads((args.results / source).read_text())
        for kind in ("svg", "png"):
            path = args.out / f"{draw.__name__}.{kind}"
            draw(path, found)
            print(path)


if __name__ == "__main__":
    main()
