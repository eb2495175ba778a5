"""Tables and figure of :mod:`benchmarks.gradients`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from vstar_ops.train import pictures, report

from .policy_tree import FORMS, JOINT, PARENT, PRESETS, SIBLING

Result = Mapping[str, Mapping[str, Any]]  # policy -> what was measured

CANDIDATES = (
    "independent samples",
    "Gumbel top-k",
    "Gumbel top-k, weighted",
    "Gumbel top-k, weights normalized",
    "beam search",
    "beam search, weighted",
    "VED",
    "VED, weighted",
)
SAMPLED, DISTINCT, WEIGHTED, NORMALIZED, BEAM = CANDIDATES[:5]
FOUR = ("GRPO", *PRESETS, str(JOINT[-1]))
MAIN = (*FOUR, "leave-one-out", str(PARENT), str(SIBLING), *(f"GRPO + {form}" for form in JOINT[:2]))


def summary(result: Result) -> str:
    """One table: how near an estimate of 16 candidates is to the exact gradient, by candidates and form."""
    names = ("GRPO", "leave-one-out", *PRESETS, str(PARENT), f"GRPO + {JOINT[1]}")
    rows = [["candidates", "policy", *names]]
    for kind in (kind for kind in CANDIDATES if kind != NORMALIZED):
        for policy, found in result.items():
            cells = list(found["logits"].values())[1].get(kind)
            if cells and (kind == SAMPLED or found is list(result.values())[-1]):
                shown = [cells.get(name) for name in names]
                texts = [f"{x['one']:.2f} ({x['mean']:.2f})" if x else "" for x in shown]
                rows.append([kind, policy, *texts])
    return report.markdown(rows)


def tables(result: Result) -> str:
    """All of it, as Markdown."""
    groups = list(next(iter(result.values()))["logits"])
    at = groups[1]

    def logits(kind: str, name: str, show: Callable[[Any], str], group: str = at) -> list[str]:
        every = (found["logits"][group].get(kind, {}).get(name) for found in result.values())
        return [show(x) if x else "" for x in every]

    def both(x: Any) -> str:
        return f"{x['one']:.3f} ({x['mean']:.3f})"

    def best(x: Any) -> str:
        return f"{x['one best']:.3f} ({x['mean best']:.3f})"

    def gain(x: Any) -> str:
        return "{:+.3f} ± {:.3f}".format(*x["gain"])

    def weights(x: Any) -> str:
        return f"{x['one']:.3f}, {x['one best']:.3f}"

    def table(head: str, rows: Mapping[str, list[str]], columns: Iterable[str] = result) -> str:
        filled = [[name, *row] for name, row in rows.items() if any(map(str.strip, row))]
        return f"{head}\n\n{report.markdown([['', *columns], *filled])}"

    exact = [found["exact"] for found in result.values()]
    policies = {
        "perplexity over items, median": [f"{x['perplexity']:.0f}" for x in exact],
        "expected reward": [f"{x['reward']:.3f}" for x in exact],
        "reward's variance, share of each level": [_row(x["decided"]) for x in exact],
        "squared gradient, share of each level": [_row(x["gradient"]) for x in exact],
    }
    for g in groups:
        policies[f"cosine with the gradient of the best of {g}"] = [f"{x['best'][g]:.3f}" for x in exact]
    forms = ["GRPO", "leave-one-out", *map(str, FORMS), *(f"GRPO + {form}" for form in JOINT)]
    text = [
        "Cosine with the exact gradient by the logits: one draw of candidates, in brackets the mean of many.",
        "The advantages: `GRPO` and `leave-one-out` are one per candidate; `paper` is the paper's form;\n"
        "the others name weighting, baseline and scale of [sibling_advantage](ops/sibling_advantage.md).",
        table("The policies:", policies),
        table(f"{SAMPLED}, G = {at}:", {name: logits(SAMPLED, name, both) for name in forms}),
        table(f"The same with the best of {at}:", {name: logits(SAMPLED, name, best) for name in forms}),
    ]
    for name in FOUR:
        head = f"{name}, G = {at}, by candidates:"
        text.append(table(head, {kind: logits(kind, name, both) for kind in CANDIDATES}))
    rows = {f"{name}, {kind}": logits(kind, name, gain) for kind in CANDIDATES for name in FOUR[1:]}
    text.append(table(f"Gain over GRPO, G = {at}, one draw, with 95 % interval over requests:", rows))
    for kind in (SAMPLED, WEIGHTED, BEAM):
        rows = {
            name: [" ".join(logits(kind, name, lambda x: f"{x['one']:.2f}", group)) for group in groups]
            for name in MAIN
        }
        text.append(table(f"{kind}, one draw, the policies in their order, by G:", rows, groups))
    rows = {
        f"{name}, {kind}": logits(kind, name, lambda x: _row(x["levels"]))
        for kind in (SAMPLED, BEAM)
        for name in FOUR
    }
    text.append(table(f"Level by level, G = {at}, one draw:", rows))
    rows = {
        f"{name}, {kind}": [
            weights(found["weights"][kind][name]) if name in found["weights"].get(kind, {}) else ""
            for found in result.values()
        ]
        for kind in CANDIDATES
        for name in MAIN
    }
    head = f"By the policy's weights, a batch of requests, G = {at}; second the cosine with the best of {at}:"
    return "\n\n".join([*text, table(head, rows)])


def _row(values: Iterable[float]) -> str:
    return " / ".join(f"{x:.2f}" for x in values)


def figure(path: Path, result: Result) -> None:
    """Cosines over G, over candidates and policies, and over levels."""
    policies = list(result)
    groups = list(result[policies[0]]["logits"])
    at, levels = groups[1], range(len(result[policies[0]]["exact"]["decided"]))
    lines = [
        (name, kind, {"linestyle": style, "color": f"C{i}", "marker": "o", "label": f"{name}, {kind}"})
        for i, name in enumerate(FOUR)
        for kind, style in ((SAMPLED, "-"), (BEAM, ":"))
    ]

    def mean(name: str, kind: str, group: str, of: Callable[[Any], float]) -> float:
        return sum(of(found["logits"][group][kind][name]) for found in result.values()) / len(result)

    with pictures.panels(path, (18, 6)) as axes:
        for name, kind, style in lines:
            axes[0].plot(groups, [mean(name, kind, group, lambda x: x["one"]) for group in groups], **style)
            points = [mean(name, kind, at, lambda x, i=i: x["levels"][i]) for i in levels]  # type: ignore[misc]
            axes[2].plot([str(level + 1) for level in levels], points, **style)
        for kind in (kind for kind in CANDIDATES if kind != NORMALIZED):  # the same cosines per request
            found = [p for p in policies if kind in result[p]["logits"][at]]
            points = [result[p]["logits"][at][kind]["centered"]["one"] for p in found]
            axes[1].plot(found, points, marker="o", linestyle="-" if "VED" not in kind else "", label=kind)
        axes[0].set(title="by G, mean over the policies", xlabel="G", ylabel="cosine of one draw")
        axes[1].set(title=f"centered, by candidates, G = {at}")
        axes[2].set(title=f"by level, mean over the policies, G = {at}", xlabel="level")
