"""Tables and intervals of a finished run."""

from __future__ import annotations

import json
import math
import statistics
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from .checkpoint import read_metrics, save_text
from .config import Config, Variant
from .metrics import CUTOFFS, Scores

# Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)

Results = Mapping[int, Mapping[str, Scores]]  # seed -> row -> column -> value

COLUMNS = {
    **{f"{name}@{k}": f"{name}@{k}" for name in ("HR", "NDCG") for k in CUTOFFS},
    "true_reward@10": "true reward@10",
    "diversity": "diversity",
    "best_reward": "best reward",
    "forward_tokens": "forward tokens",
    "best_step": "best step",
    "steps": "steps",
    "skipped": "skipped steps",
    "seconds": "median seconds",
}
# Of the training, not of the policy: no mean, no interval, no gain.
_COUNTS = ("best_step", "steps", "skipped", "seconds")
# In a terminal, the first of these that fit; all are in results.md.
_WIDTH = 100
_FIRST = ("true_reward@10", "NDCG@10")


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval over seeds (NaN for a single one)."""
    n = len(values)
    mean = sum(values) / n
    if n < 2:
        return mean, math.nan
    variance = sum((x - mean) ** 2 for x in values) / (n - 1)
    return mean, student_t(n - 1) * math.sqrt(variance / n)


def student_t(freedom: float) -> float:
    """The two-sided 95 % quantile of Student's t, linear in ``1 / freedom`` between those of a table (never
    too small, and by less than 0.5 % too large, from 2 degrees of freedom on)."""
    at = [1 / (n + 1) for n in range(len(_T95))] + [0.0]
    return float(np.interp(1 / max(freedom, 1.0), at[::-1], [*_T95, 1.960][::-1]))


def interval_text(values: Sequence[float], digits: int = 4, *, signed: bool = False) -> str:
    """``mean ± half`` of :func:`mean_interval`, the mean alone for a single value."""
    mean, half = mean_interval(values)
    text = f"{mean:{'+' if signed else ''}.{digits}f}"
    return text if math.isnan(half) else f"{text} ± {half:.{digits}f}"


def table(
    results: Results,
    *,
    columns: Iterable[str] = COLUMNS,
    against: str | None = None,
    width: int | None = None,
) -> str:
    """A Markdown table of those ``columns`` that the results have, over the seeds; ``against`` a row name, of
    the paired differences to that row.

    Steps are the smallest and the largest of a seed, seconds their median; no differences are made of them.
    ``width`` leaves the last columns out that do not fit, and does not repeat the name of the row above.
    """
    first = next(iter(results.values()))
    columns = [c for c in columns if c in next(iter(first.values()))]
    columns = [c for c in columns if against is None or c not in _COUNTS]
    rows = [["test" if against is None else f"gain over {against}", *(COLUMNS.get(c, c) for c in columns)]]
    for name in first:
        if name == against:
            continue
        above = f"{rows[-1][0]}, "
        cells = [f"  {name.removeprefix(above)}" if width and name.startswith(above) else name]
        for column in columns:
            values = [r[name][column] - (r[against][column] if against else 0) for r in results.values()]
            if column == "seconds":
                cells.append(f"{statistics.median(values):.0f}")
            elif column in _COUNTS:
                cells.append("-".join(f"{x:.0f}" for x in sorted({min(values), max(values)})))
            else:
                digits = 1 if column == "forward_tokens" else 4
                cells.append(interval_text(values, digits, signed=against is not None))
        rows.append(cells)
    return markdown(rows, width)


def markdown(rows: list[list[str]], width: int | None = None) -> str:
    """A Markdown table of rows of cells, the first its head; without the last columns where it would be wider
    than ``width``."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    while width and len(widths) > 2 and sum(widths) + 3 * len(widths) + 1 > width:
        widths.pop()
    rows = [row[: len(widths)] for row in rows]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def _evaluations(folder: Path, variant: Variant, seed: int) -> dict[int, Scores]:
    """Step -> scores on the valid split."""
    records = read_metrics(folder / f"seed-{seed}" / f"{variant}.jsonl")
    return {r["step"]: r["valid"] for r in records if "valid" in r}


def early_end(folder: Path, seeds: Iterable[int], variants: Sequence[Variant], steps: int) -> str:
    """A sentence on where and why :func:`gains_by_step` ends before ``steps``, empty if it does not."""
    last = {(v, seed): max(_evaluations(folder, v, seed)) for seed in seeds for v in variants}
    end = min(last.values())
    ended = ", ".join(f"{v} of seed {seed}" for (v, seed), step in last.items() if step == end)
    return f"The gains end at step {end} of {steps}: early stopping ended {ended} there." * (end < steps)


def gains_by_step(
    folder: Path, seeds: Iterable[int], variants: Sequence[Variant], width: int | None = None
) -> str:
    """A Markdown table of the valid split: the first variant, and the paired gains of the others over it at
    equal steps, at those evaluations that every seed has had. ``width`` is as for :func:`table`."""
    found = {v: [_evaluations(folder, v, seed) for seed in seeds] for v in variants}
    steps = sorted(set.intersection(*(set(one) for per_seed in found.values() for one in per_seed)))
    first = found[variants[0]]
    columns = ["true_reward@10" if "true_reward@10" in first[0][steps[0]] else "NDCG@10", "best_reward"]
    rows = [["valid, step", *(f"{COLUMNS[c]}, {v}" for c in columns for v in variants)]]
    for step in steps:
        cells = [str(step)]
        for column in columns:
            base = [scores[step][column] for scores in first]
            cells.append(interval_text(base))
            for other in variants[1:]:
                gain = [scores[step][column] - b for scores, b in zip(found[other], base)]
                cells.append(interval_text(gain, signed=True))
        rows.append(cells)
    return markdown(rows, width)


def write(folder: Path, title: str, results: Results, config: Config) -> str:
    """Save ``results.json`` and ``results.md`` in the run's folder; returns the text for a terminal, whose
    tables have fewer columns."""
    save_text(folder / "results.json", json.dumps(results, indent=1, allow_nan=False))
    save_text(folder / "results.md", _text(folder, title, results, config))
    return _text(folder, title, results, config, _WIDTH)


def in_short(results: Results) -> str:
    """A sentence on what reinforcement has changed, by the means over the seeds."""
    rows = next(iter(results.values()))
    supervised = next(iter(rows))
    metric = next(c for c in _FIRST if c in rows[supervised])

    def mean(row: str, column: str) -> float:
        return statistics.mean(seed[row][column] for seed in results.values())

    best = max(rows, key=lambda row: mean(row, metric))
    if best == supervised:
        return f"In short: reinforcement did not raise {COLUMNS[metric]} above {mean(best, metric):.3f}."
    change = f"from {mean(supervised, metric):.3f} to {mean(best, metric):.3f}"
    text = f"In short: {best.removeprefix('+ ')} raises {COLUMNS[metric]} {change}"
    if metric == "NDCG@10":
        return f"{text}."
    before, after = mean(supervised, "NDCG@10"), mean(best, "NDCG@10")
    kept = "keeps" if after > 0.9 * before else "forgets much of"
    return (
        f"{text}, and NDCG@10 goes from {before:.3f} to {after:.3f}: it learns what users value, and {kept} "
        "what they click."
    )


def _text(folder: Path, title: str, results: Results, config: Config, width: int | None = None) -> str:
    rows, variants = next(iter(results.values())), config.variants
    columns: Iterable[str] = COLUMNS
    if width:
        metric = next(c for c in _FIRST if c in next(iter(rows.values())))
        columns = dict.fromkeys([metric, "best_step", "steps", *_FIRST, "best_reward", "HR@10", *COLUMNS])
    sentence = textwrap.fill(in_short(results), width or 120)
    text = f"{title}\n\n{table(results, columns=columns, width=width)}\n\n{sentence}\n"
    # Over the supervised policy, and over the first variant if there are more.
    for against in list(rows)[: min(len(variants), 2)]:
        text += f"\n{table(results, columns=columns, against=against, width=width)}\n"
    if len(variants) > 1 and config.validate:
        text += f"\n{gains_by_step(folder, results, variants, width)}\n"
        if note := early_end(folder, results, variants, config.rl_steps):
            text += f"\n{note}\n"
    if not config.validate:
        text += "\nTrained without validation: the weights are those of the last step.\n"
    if skipped := [f"{name} of seed {s}" for s, r in results.items() for name in r if r[name]["skipped"]]:
        text += f"\nSteps were skipped, their loss or gradient not being finite: {', '.join(skipped)}.\n"
    if len(results) > 1:
        text += f"\nMean and 95 % interval over {len(results)} seeds; gains are paired by seed.\n"
    return text
