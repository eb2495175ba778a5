"""What the study found, as tables, answers and a figure."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vstar_ops.train import checkpoint, pictures, report

from . import tuning
from .crossed import Interval, interval

COLUMNS = ("true_reward@10", "NDCG@10", "HR@10", "best_reward", "diversity", "forward_tokens")
BASE = "GRPO, beam search"
# Question -> the row that would show it, and the row that it must beat.
QUESTIONS = (
    ("The item prior helps the supervised policy", "SFT, beam search", "SFT without item prior, beam search"),
    ("VED without V finds better candidates than a beam search of as many tokens, same policy",
     "SFT, VED, V = 0", "SFT, beam search of VED's tokens"),
    ("VED with V finds better candidates than a beam search of as many tokens, same policy",
     "V-STAR, VED", "V-STAR, beam search of VED's tokens"),
    ("A trained V adds to the item prior, same policy and search", "V-STAR, VED", "V-STAR, VED, V = 0"),
    ("Training policy and V adds to search with the item prior alone", "V-STAR, VED", "SFT, VED, V = 0"),
    ("Joint training beats GRPO, both decoded by beam search", "V-STAR, beam search", BASE),
    ("Joint training beats GRPO with a V learned beside, both decoded by VED",
     "V-STAR, VED", "GRPO, V learned beside, VED"),
    ("V-STAR beats GRPO, each as it is meant to be decoded", "V-STAR, VED", BASE),
    ("GRPO beats the supervised policy", BASE, "SFT, beam search"),
    ("Sibling-GRPO beats GRPO", "Sibling-GRPO, beam search", BASE),
    ("The paper's sibling term beats GRPO", "Sibling-GRPO, the paper's, beam search", BASE),
    ("The centered sibling term beats the paper's", "Sibling-GRPO, beam search",
     "Sibling-GRPO, the paper's, beam search"),
)  # fmt: skip

Cells = Mapping[str, Mapping[str, Tensor]]  # row -> score -> per request


def of(seeds: Sequence[Cells], row: str, column: str, against: str | None = None) -> Interval:
    """The mean of a score over seeds and requests, or of its paired difference from another row."""
    x = torch.stack([cells[row][column] for cells in seeds])
    if against is not None:
        x = x - torch.stack([cells[against][column] for cells in seeds])
    return interval(x.double().numpy())


def write(
    folder: Path,
    name: str,
    seeds: Sequence[int],
    found: Mapping[str, list[Any]],
    figures: Mapping[str, list[Any]],
) -> str:
    """``study.md``, ``study.json`` and ``study.svg``; returns the text."""
    text, numbers = [f"{name}, seeds {', '.join(map(str, seeds))}."], {}
    if "rows" in found:
        rows = found["rows"]
        columns = [c for c in COLUMNS if c in next(iter(rows[0].values()))]
        numbers["rows"] = {
            row: {c: of(rows, row, c) for c in columns if c in scores} for row, scores in rows[0].items()
        }
        numbers["gains"] = {
            question: {c: of(rows, row, c, base) for c in columns[:-2]} for question, row, base in QUESTIONS
        }
        text += [
            "Test split:",
            _rows(rows, columns),
            "Questions; the difference is paired by seed and request:",
        ]
        text += [_answers(rows, columns), "Steps of reinforcement, taken and kept:", _steps(figures)]
    if "tokens" in found:
        numbers["tokens"] = _nested(found["tokens"])
        text += ["The first 16 candidates of V-STAR's policy, 1,000 test requests:", _tokens(found["tokens"])]
    if "levels" in found:
        numbers["levels"] = {
            score: {level: _correlation(found["levels"], score, level) for level in levels}
            for score, levels in found["levels"][0].items()
        }
        text += ["Spearman's correlation with the reward, by level:", _levels(numbers["levels"])]
    if "tuning" in found:
        (looks,) = found["tuning"]
        numbers["tuning"] = {name: x.tolist() for name, x in looks.items()}
        text += [f"One setting changed at a time, seed {seeds[0]}, valid split:", tuning.table(looks)]
    if "gradients" in found:
        from . import gradients_report

        numbers["gradients"] = found["gradients"][0]
        result = found["gradients"][0]
        text += ["Cosine of an estimate with the exact gradient of the expected reward, by the logits of all"]
        text[-1] += " prefixes, 16 candidates; in brackets that of the mean of many estimates:"
        text.append(gradients_report.summary(result))
        checkpoint.save_text(folder / "gradients.md", gradients_report.tables(result) + "\n")
        gradients_report.figure(folder / "gradients.svg", result)
    joined = "\n\n".join(text) + "\n"
    checkpoint.save_text(folder / "study.md", joined)
    checkpoint.save_text(folder / "study.json", json.dumps({"seeds": list(seeds), **numbers}, indent=1))
    _figure(folder / "study.svg", found)
    return joined


def replace_part(page: Path, name: str, text: str) -> None:
    """Put ``text`` between ``<!-- study NAME -->`` and ``<!-- end -->`` of a page.

    Raises:
        ValueError: the page has no such place.
    """
    begin, end = f"<!-- study {name} -->\n", "<!-- end -->"
    old = page.read_text()
    new, places = re.subn(f"{re.escape(begin)}.*?{end}", lambda _: f"{begin}\n{text}\n{end}", old, flags=re.S)
    if places != 1:
        raise ValueError(f"{page} must have one {begin.strip()} ... {end}, got {places}")
    checkpoint.save_text(page, new)


def _rows(seeds: Sequence[Cells], columns: Sequence[str]) -> str:
    target = columns[0]
    table = [
        ["policy, decoded by", *(report.COLUMNS[c] for c in columns), f"gain in {report.COLUMNS[target]}"]
    ]
    for row in seeds[0]:
        cells = [
            of(seeds, row, c).text(1 if c == "forward_tokens" else 4) if c in seeds[0][row] else ""
            for c in columns
        ]
        gain = "" if row == BASE else of(seeds, row, target, BASE).text(signed=True)
        table.append([row, *cells, gain])
    return report.markdown(table) + f"\n\nGains are over {BASE}, paired by seed and request."


def _answers(seeds: Sequence[Cells], columns: Sequence[str]) -> str:
    scores = [c for c in columns if c not in ("diversity", "forward_tokens")]
    table = [["", "answer", *(report.COLUMNS[c] for c in scores)]]
    for question, row, base in QUESTIONS:
        gains = [of(seeds, row, c, base) for c in scores]
        table.append([question, gains[0].verdict, *(gain.text(signed=True) for gain in gains)])
    return report.markdown(table) + f"\n\nThe answer is about {report.COLUMNS[scores[0]]}."


def _steps(figures: Mapping[str, list[Any]]) -> str:
    table = [["policy", "taken", "kept", "seconds"]]
    for name, runs in figures.items():
        if runs:
            steps, best, seconds = ([run[key] for run in runs] for key in ("steps", "best_step", "seconds"))
            ends = f"{min(steps)}" if min(steps) == max(steps) else f"{min(steps)}-{max(steps)}"
            table.append([name, ends, ", ".join(map(str, best)), f"{sorted(seconds)[len(seconds) // 2]:.0f}"])
    return report.markdown(table)


def _nested(seeds: Sequence[Mapping[str, Cells]]) -> dict[str, dict[str, dict[str, Interval]]]:
    return {
        name: {
            budget: {c: of([s[name] for s in seeds], budget, c) for c in COLUMNS if c in scores}
            for budget, scores in budgets.items()
        }
        for name, budgets in seeds[0].items()
    }


def _tokens(seeds: Sequence[Mapping[str, Cells]]) -> str:
    found = _nested(seeds)
    target = next(c for c in COLUMNS if c in next(iter(next(iter(found.values())).values())))
    table = [["search", "ceiling", "tokens spent", report.COLUMNS[target], "best reward", "diversity"]]
    for name, budgets in found.items():
        for budget, scores in budgets.items():
            cells = [scores[c].text() for c in (target, "best_reward", "diversity")]
            table.append([name, budget, scores["forward_tokens"].text(1), *cells])
    return report.markdown(table)


def _correlation(seeds: Sequence[Any], score: str, level: str) -> Interval:
    x = torch.stack([cells[score][level]["correlation"] for cells in seeds]).double()
    return interval(x[:, ~x.isnan().any(0)].numpy())


def _levels(found: Mapping[str, Mapping[str, Interval]]) -> str:
    levels = list(next(iter(found.values())))
    return report.markdown(
        [["level", *levels], *([score, *(x[n].text(3) for n in levels)] for score, x in found.items())]
    )


def _figure(path: Path, found: Mapping[str, list[Any]]) -> None:
    with pictures.panels(path, (18, 6)) as axes:
        if "rows" in found:
            rows = found["rows"]
            target = next(c for c in COLUMNS if c in next(iter(rows[0].values())))
            for row in reversed(rows[0]):
                x = of(rows, row, target)
                axes[0].barh(row, x.mean, xerr=x.half, color="steelblue", ecolor="black")
            axes[0].set(title="policies and decoders, test", xlabel=report.COLUMNS[target])
        if "tokens" in found:
            for name, budgets in _nested(found["tokens"]).items():
                x = [scores["forward_tokens"].mean for scores in budgets.values()]
                y = [scores["best_reward"] for scores in budgets.values()]
                mean, half = zip(*y)
                axes[1].errorbar(x, mean, half, marker="o", capsize=3, label=name)
            axes[1].set(title="V-STAR's policy", xlabel="forward tokens spent", ylabel="best reward of 16")
        if "levels" in found:
            for score, levels in found["levels"][0].items():
                points = [_correlation(found["levels"], score, level) for level in levels]
                mean, half = zip(*points)
                axes[2].errorbar([int(n) for n in levels], mean, half, marker="o", capsize=3, label=score)
            axes[2].set(title="rank correlation with the reward", xlabel="level", ylabel="Spearman")
