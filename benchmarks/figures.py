"""``python -m benchmarks.figures``: draws the pictures of README and docs into ``docs/figures``.

``op.svg`` and ``design.svg`` are drawings. ``ratios.svg`` is drawn from what ``python -m benchmarks`` and
``python -m benchmarks.competitors`` have written with ``--json``, as checked in under ``benchmarks/results``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vstar_ops.train.pictures import panels

RESULTS = Path(__file__).parent / "results"
FIGURES = Path(__file__).parent.parent / "docs" / "figures"
BLUE, GRAY, LIGHT, ORANGE = "#31688e", "#555555", "#dddddd", "#d95f02"


def _box(
    axis: Any, x: float, y: float, text: str, *, width: float, height: float, color: str = LIGHT
) -> None:
    from matplotlib.patches import FancyBboxPatch

    corner = x - width / 2, y - height / 2
    axis.add_patch(FancyBboxPatch(corner, width, height, boxstyle="round,pad=0.02", fc=color, ec="none"))
    axis.text(x, y, text, ha="center", va="center", fontsize=8.5, color="white" if color == BLUE else "black")


def _arrow(axis: Any, start: tuple[float, float], end: tuple[float, float]) -> None:
    axis.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": GRAY, "lw": 1.2})


def op(path: Path) -> None:
    """A trie with two beams, one fused op, the winners."""
    place = {"": (0.2, 3), "3": (1, 4.3), "4": (1, 1.7), "37": (1.9, 5.2), "38": (1.9, 4.3), "39": (1.9, 3.4)}
    place |= {"45": (1.9, 2.2), "47": (1.9, 1.2)}
    winners = [("0.92", "0", "8", "4"), ("0.55", "1", "5", "6"), ("0.31", "0", "7", "3")]
    with panels(path, (9.5, 3.3), 1) as axis:
        axis.set(xlim=(-0.3, 8.6), ylim=(0.3, 6.4))
        axis.axis("off")
        won = {"38", "45", "37"}
        for name, (x, y) in place.items():
            if name:
                above = place[name[:-1]]
                axis.plot(
                    [above[0], x], [above[1], y], color=BLUE if name in won else "#bbbbbb", lw=1.4, zorder=0
                )
        for name, (x, y) in place.items():
            color = ORANGE if name in ("3", "4") else BLUE if name in won else "#bbbbbb"
            axis.scatter([x], [y], s=260, color=color, zorder=1)
            axis.text(x, y, name[-1:], ha="center", va="center", fontsize=9, color="white")
        axis.text(1, 5.1, "beam 0", ha="center", fontsize=8, color=ORANGE)
        axis.text(1, 0.9, "beam 1", ha="center", fontsize=8, color=ORANGE)
        axis.text(1, 6.05, "a trie of legal semantic IDs", ha="center", fontsize=9)
        text = (
            "legal children of each beam\nlog-softmax, entropy\n+ value + bonus + noise\ntop-k over all beams"
        )
        _box(axis, 4.1, 3.2, text, width=2.4, height=2.4, color=BLUE)
        axis.text(4.1, 6.05, "expand_topk: one call", ha="center", fontsize=9)
        _arrow(axis, (2.25, 3.2), (2.82, 3.2))
        axis.text(4.1, 1.3, "logits [B, W, V] from the model", ha="center", fontsize=8, color=GRAY)
        _arrow(axis, (4.1, 1.5), (4.1, 1.92))
        _arrow(axis, (5.4, 3.2), (5.95, 3.2))
        axis.text(7.2, 6.05, "the k best, in a total order", ha="center", fontsize=9)
        for column, head in enumerate(("score", "parent", "token", "node")):
            x = 6.25 + 0.68 * column
            axis.text(x, 4.8, head, ha="center", fontsize=8, color=GRAY)
            for row, winner in enumerate(winners):
                axis.text(x, 4.0 - 0.8 * row, winner[column], ha="center", fontsize=9)


def design(path: Path) -> None:
    """From the public function to the four backends."""
    with panels(path, (9.5, 3.6), 1) as axis:
        axis.set(xlim=(0, 10), ylim=(0, 6.2))
        axis.axis("off")
        _box(axis, 1.35, 3, "vstar_ops.expand_topk\nchecks arguments", width=2.3, height=1.1, color=BLUE)
        _box(
            axis,
            4.25,
            3,
            "torch's dispatcher\ncompile, autograd,\ndevice, use_backend",
            width=2.1,
            height=1.5,
        )
        _arrow(axis, (2.6, 3), (3.12, 3))
        _box(axis, 6.7, 2.2, "csrc/torch\nviews, outputs", width=1.5, height=1.1)
        rows = [
            (5.5, "vstar_ops/reference\npure torch, any device", (5.4, 3.6)),
            (4.1, "kernels/\nTriton", (5.4, 3.2)),
            (2.8, "csrc/cpu\nC++: AVX-512, AVX2, scalar", (7.53, 2.35)),
            (1.4, "csrc/cuda\nCUDA C++", (7.53, 2.0)),
        ]
        _arrow(axis, (5.4, 2.8), (5.87, 2.3))
        for y, text, start in rows:
            _box(axis, 9.0, y, text, width=1.9, height=0.9, color=BLUE)
            _arrow(axis, start, (7.97, y))


BARS = {
    "One step of a beam search, depth 1 of 3,686 items, against": (
        (
            "cpu",
            "expand_topk legal depth 1 fp32 B=64",
            "gather, log_softmax, top-k",
            "best composition of torch ops",
        ),
        ("competitors", "Industrial, depth 1, ", "dense mask", "dense mask"),
        ("competitors", "Industrial, depth 1, ", "STATIC", "STATIC's method"),
        ("competitors", "Industrial, depth 1, ", "Python trie", "Python trie, as in prefix functions"),
    ),
    "Advantages and loss, against torch ops": (
        ("cpu", "sibling_advantage B=64", "unique, index_add", "sibling advantages, rows made unique"),
        ("cpu", "prefix_returns B=64", "unique of packed keys, index_add", "dense returns"),
        ("cpu", "token_logp fp32", "cross_entropy", "log-probabilities of 152,064 columns"),
    ),
}


def ratios(path: Path) -> None:
    """How many times as fast as what."""
    found = {
        name: json.loads((RESULTS / f"{name}.json").read_text())["rows"] for name in ("cpu", "competitors")
    }
    with panels(path, (9.5, 3.2), len(BARS)) as axes:
        for axis, (title, bars) in zip(axes, BARS.items()):
            names, lengths = [], []
            for source, case, against, name in bars:
                rows = [
                    x for x in found[source] if x["case"].startswith(case) and x.get("against") == against
                ]
                if source == "competitors":
                    rows = [x for x in rows if x["case"].endswith("legal")]
                names.append(name)
                lengths.append(rows[0]["ratio"])
            drawn = axis.barh(names, lengths, color=BLUE)
            axis.bar_label(drawn, [f"{x:.3g}x" for x in lengths], padding=3)
            axis.invert_yaxis()
            axis.axvline(1, color=ORANGE, lw=1.5)
            axis.set(xscale="log", xlim=(0.5, 4 * max(lengths)), title=title)
            axis.title.set_fontsize(9)
            axis.tick_params(labelsize=8)


def main() -> None:
    """Draw all."""
    for draw in (op, design, ratios):
        draw(FIGURES / f"{draw.__name__}.svg")
        print(FIGURES / f"{draw.__name__}.svg")


if __name__ == "__main__":
    main()
