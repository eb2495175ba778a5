"""Tables, intervals and learning curves of a finished run."""

from __future__ import annotations

import json
import math
from pathlib import Path

from .checkpoint import read_metrics, save_text
from .metrics import CUTOFFS

# Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)

Results = dict[int, dict[str, dict[str, float]]]  # seed -> row -> column -> value

COLUMNS = {
    **{f"{name}@{k}": f"{name}@{k}" for name in ("HR", "NDCG") for k in CUTOFFS},
    "true_reward@10": "true reward@10",
    "diversity": "diversity",
    "best_reward": "best reward",
    "forward_tokens": "forward tokens",
    "seconds": "seconds",
}


def mean_interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval over seeds (NaN for a single one)."""
    n = len(values)
    mean = sum(values) / n
    if n < 2:
        return mean, math.nan
    variance = sum((x - mean) ** 2 for x in values) / (n - 1)
    return mean, _T95[min(n - 1, len(_T95)) - 1] * math.sqrt(variance / n)


def interval_text(values: list[float], digits: int = 4, *, signed: bool = False) -> str:
    """``mean ± half`` of :func:`mean_interval`, the mean alone for a single value."""
    mean, half = mean_interval(values)
    text = f"{mean:{'+' if signed else ''}.{digits}f}"
    return text if math.isnan(half) else f"{text} ± {half:.{digits}f}"


def table(results: Results, *, against: str | None = None) -> str:
    """A Markdown table over seeds; ``against`` a row name, of the paired differences to that row."""
    first = next(iter(results.values()))
    columns = [c for c in COLUMNS if c in next(iter(first.values()))]
    head = ["test" if against is None else f"gain over {against}", *(COLUMNS[c] for c in columns)]
    rows = [head]
    for name in first:
        if name == against:
            continue
        cells = [name]
        for column in columns:
            values = [r[name][column] - (r[against][column] if against else 0) for r in results.values()]
            digits = 1 if column in ("seconds", "forward_tokens") else 4
            cells.append(interval_text(values, digits, signed=against is not None))
        rows.append(cells)
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def gains_by_step(folder: Path, seeds: list[int], variants: tuple[str, ...]) -> str:
    """A Markdown table of the valid split: the first variant, and the paired gains of the others over it at
    equal steps, at those looks that every seed has had."""
    looks: dict[str, list[dict[int, dict[str, float]]]] = {
        v: [
            {
                r["step"]: r["valid"]
                for r in read_metrics(folder / f"seed-{seed}" / f"{v}.jsonl")
                if "valid" in r
            }
            for seed in seeds
        ]
        for v in variants
    }
    first, *others = variants
    steps = sorted(set.intersection(*(set(look) for seed_looks in looks.values() for look in seed_looks)))
    known = looks[first][0][steps[0]]
    columns = ["true_reward@10" if "true_reward@10" in known else "NDCG@10", "best_reward"]
    head = [f"{COLUMNS[c]}, {v}" for c in columns for v in variants]
    lines = ["| valid, step | " + " | ".join(head) + " |", "|---" * (len(head) + 1) + "|"]
    for step in steps:
        cells = [str(step)]
        for column in columns:
            base = [look[step][column] for look in looks[first]]
            cells.append(interval_text(base))
            for other in others:
                gain = [look[step][column] - b for look, b in zip(looks[other], base)]
                cells.append(interval_text(gain, signed=True))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write(folder: Path, title: str, results: Results, variants: tuple[str, ...]) -> str:
    """Save ``results.json``, ``results.md`` and ``curves.png`` in the run's folder; returns the text."""
    text = f"{title}\n\n{table(results)}\n"
    names = list(next(iter(results.values())))
    # Over the supervised policy, and over the first variant if there are more.
    for against in names[: min(len(variants), 2)]:
        text += f"\n{table(results, against=against)}\n"
    if len(variants) > 1:
        text += f"\n{gains_by_step(folder, list(results), variants)}\n"
    if len(results) > 1:
        text += f"\nMean and 95 % interval over {len(results)} seeds; gains are paired by seed.\n"
    save_text(folder / "results.json", json.dumps({str(k): v for k, v in results.items()}, indent=1))
    save_text(folder / "results.md", text)
    _curves(folder)
    return text


def _curves(folder: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(15, 4), constrained_layout=True)
    for path in sorted(folder.glob("seed-*/*.jsonl")):
        records = read_metrics(path)
        stage, seed = path.stem, path.parent.name
        valid = [r for r in records if "valid" in r]
        right = "true_reward@10" if valid and "true_reward@10" in valid[0]["valid"] else "best_reward"
        steps = [r["step"] for r in valid]
        if stage == "sft":
            axes[0].plot(steps, [r["valid"]["NDCG@10"] for r in valid], marker="o", label=f"{stage}, {seed}")
        else:
            axes[1].plot(steps, [r["valid"]["NDCG@10"] for r in valid], marker="o", label=f"{stage}, {seed}")
            axes[2].plot(steps, [r["valid"][right] for r in valid], marker="o", label=f"{stage}, {seed}")
            axes[2].set(ylabel=right.replace("_", " "))
    for axis, title in zip(axes, ("supervised", "reinforcement", "reinforcement")):
        axis.set(title=f"{title}, valid split", xlabel="step")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize="small")
    for axis in axes[:2]:
        axis.set(ylabel="NDCG@10")
    figure.savefig(folder / "curves.png", dpi=110)
    pyplot.close(figure)
