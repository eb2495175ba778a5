"""A page of pictures of a run: learning curves, which level decides the reward, one request's search."""

from __future__ import annotations

import html
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import sibling_advantage
from .._files import replacing
from ..decoding import VEDResult
from ..trie import Trie
from .checkpoint import read_metrics, save_text
from .decode import Decoder
from .model import SIDTransformer
from .report import COLUMNS, mean_interval
from .rewards import make_reward, reward_name
from .trainer import Run

_CAPTIONS = {
    "curves.svg": "The valid split during training: mean over the seeds and its 95 % interval.",
    "levels.svg": "Advantage compression. GRPO gives all tokens of a candidate one advantage. The dark part "
    "is what a token of that level decided itself: the change of the mean reward when the prefix grew by it.",
    "search.svg": "One request's search by the last policy with a value head. Circles are prefixes that cost "
    "a forward token: the color is V, the area grows with the visits, the ring with the entropy. Squares "
    "are candidates, numbered by rank.",
}


@contextmanager
def panels(path: Path, size: tuple[float, float], number: int = 3, rows: int = 1) -> Iterator[Any]:
    """Axes in ``rows``, saved as an image after the block; an SVG of the same content has the same bytes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(rows, number // rows, figsize=size, constrained_layout=True)
    axes = axes.flatten() if number > 1 else axes
    yield axes
    for axis in axes if number > 1 else [axes]:
        if axis.axison:
            axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize="small")
    with replacing(path) as new, pyplot.rc_context({"svg.hashsalt": path.stem, "svg.fonttype": "none"}):
        kind = path.suffix[1:]
        figure.savefig(new, format=kind, dpi=110, metadata={"Date": None} if kind == "svg" else None)
    pyplot.close(figure)


def curves(path: Path, folder: Path) -> None:
    """The valid split after each evaluation, of every seed, with the mean over them and its 95 % interval."""
    stages: dict[str, dict[int, dict[str, list[float]]]] = {}
    reward = "best_reward"
    for log in sorted(folder.glob("seed-*/*.jsonl")):
        for record in read_metrics(log):
            if "valid" not in record:  # trained without validation
                continue
            reward = "true_reward@10" if "true_reward@10" in record["valid"] else reward
            at = stages.setdefault(log.stem, {}).setdefault(record["step"], {})
            for column, score in record["valid"].items():
                at.setdefault(column, []).append(score)
    with panels(path, (15, 4)) as axes:
        for stage, steps in stages.items():
            supervised = stage == "sft"
            for axis, column in zip(axes[:1] if supervised else axes[1:], ("NDCG@10", reward)):
                points = [(step, *mean_interval(found[column])) for step, found in sorted(steps.items())]
                step, mean, half = zip(*points)
                (line,) = axis.plot(step, mean, marker="o", label=stage)
                low, high = (
                    [m + sign * (h if h == h else 0) for m, h in zip(mean, half)] for sign in (-1, 1)
                )
                axis.fill_between(step, low, high, color=line.get_color(), alpha=0.15)
                axis.set(ylabel=COLUMNS[column])
        for axis, title in zip(axes, ("supervised", "reinforcement", "reinforcement")):
            axis.set(title=f"{title}, valid split", xlabel="step")


def level_shares(tokens: Tensor, reward: Tensor, mask: Tensor) -> list[float]:
    """Of the reward's variance within requests: the share that the tokens of each level decide.

    The centered sibling advantages of a candidate add up to GRPO's, and those of different levels are
    uncorrelated, so the shares add up to 1. NaN where all rewards of each request are equal.

    Args:
        tokens: integers ``[B, G, L]``; reward: float32 ``[B, G]``; mask: bool ``[B, G]``.
    """
    split = sibling_advantage(tokens, reward, mask, baseline="parent", scale="none")
    by_level = split.advantage.square().sum((0, 1))
    return (by_level / by_level.sum()).cpu().tolist()


def levels(path: Path, shares: list[float], candidates: str) -> None:
    """What of a token's advantage under GRPO is its own doing, by level (:func:`level_shares`)."""
    with panels(path, (5.5, 3.6), 1) as axis:
        place = range(1, len(shares) + 1)
        axis.bar(place, [1.0] * len(shares), color="#d9d9d9", label="earned by other tokens")
        bars = axis.bar(place, shares, color="#31688e", label="decided by this token")
        axis.bar_label(bars, [f"{share:.0%}" for share in shares], padding=2)
        axis.set(title=f"GRPO's advantage on each token\n{candidates}", xlabel="level", xticks=place)
        axis.set(ylabel="of its variance", ylim=(0, 1.25))


def search_tree(
    path: Path, found: VEDResult, trie: Trie, reward: Tensor | None = None, *, b: int = 0
) -> None:
    """The search of request ``b``: every evaluated prefix, and the candidates below them.

    Circles are evaluated prefixes, one forward token each: the color is V, the area grows with the visits,
    the ring with the entropy. Squares are candidates by rank, with their ``reward[B, K]`` where it is known.
    Edges carry tokens.
    """
    trees, size = found.trees, int(found.trees.size[b])
    evaluated, value, visits, entropy = (
        getattr(trees, name)[b, :size].cpu().tolist() for name in ("node", "value", "visits", "entropy")
    )
    position = {node: i for i, node in enumerate(evaluated)}
    ranked = found.node[b, : int(found.num_valid[b])].cpu().tolist()
    above: dict[int, int] = {}
    for node in [*position, *ranked]:
        parent = int(trie.parent(torch.tensor(node))) if node else -1
        while parent >= 0 and parent not in position:  # a candidate whose forced prefixes were not run
            parent = int(trie.parent(torch.tensor(parent)))
        above[node] = parent
    below: dict[int, list[int]] = {}
    for node, parent in above.items():
        below.setdefault(parent, []).append(node)
    height: dict[int, float] = {}

    def lay_out(node: int, rows: int) -> int:
        """Leaves of the drawing take a row each, in the order of their tokens; returns the next free row."""
        children = sorted(below.get(node, []))
        for child in children:
            rows = lay_out(child, rows)
        inner = [height[child] for child in children]
        height[node] = (inner[0] + inner[-1]) / 2 if inner else rows
        return rows if inner else rows + 1

    rows = lay_out(0, 0)
    depth = {node: int(trie.depth(torch.tensor(node))) for node in above}
    with panels(path, (9, 1.2 + 0.21 * rows), 1) as axis:
        for node, parent in above.items():
            if parent < 0:
                continue
            axis.plot(
                [depth[parent], depth[node]],
                [height[parent], height[node]],
                color="#bbbbbb",
                lw=0.8,
                zorder=0,
            )
            tokens = trie.sequences(torch.tensor([node]))[0, depth[parent] : depth[node]].tolist()
            middle = depth[parent] + 0.72 * (depth[node] - depth[parent])
            at = height[parent] + 0.72 * (height[node] - height[parent])
            label = " ".join(map(str, tokens))
            axis.annotate(label, (middle, at), fontsize=6, ha="center", va="center", color="#555555")
        inner = list(position)
        values = [value[position[node]] for node in inner]
        area = [70 + 14 * visits[position[node]] for node in inner]
        ring = [0.5 * entropy[position[node]] for node in inner]
        x, y = [depth[node] for node in inner], [height[node] for node in inner]
        dots = axis.scatter(x, y, s=area, c=values, lw=ring, edgecolors="#d95f02", cmap="viridis", zorder=2)
        axis.figure.colorbar(dots, ax=axis, label="V, weighted", shrink=min(1.0, 8 / rows), pad=0.01)
        leaves = [node for node in ranked if node not in position]
        axis.scatter([depth[n] for n in leaves], [height[n] for n in leaves], marker="s", s=16, c="#444444")
        for rank, node in enumerate(ranked):
            text = f"{rank + 1}." + ("" if reward is None else f"  reward {float(reward[b, rank]):.2f}")
            place = depth[node], height[node]
            axis.annotate(text, place, xytext=(7, 0), textcoords="offset points", fontsize=7, va="center")
        axis.set(xlim=(-0.15, max(depth.values()) + 0.55), title=f"{size} forward tokens", yticks=[])
        axis.set(xticks=range(trie.length + 1), xlabel="tokens of the prefix")
        axis.invert_yaxis()


@torch.no_grad()
def of_seed(run: Run, policies: dict[str, SIDTransformer]) -> None:
    """``levels.svg`` of the supervised policy, and ``search.svg`` of the last policy with a value head.

    Both are of the first test requests, in the order of the file.
    """
    c, data = run.config, run.dataset
    reward_of = make_reward(reward_name(c.reward, data), data)
    rows = torch.arange(min(256, len(data.test)))
    requests = data.test[rows].on(run.device)
    seeds = torch.zeros(len(rows), dtype=torch.int64, device=run.device)
    name, model = next(iter(policies.items()))
    found = Decoder("beam", c.candidates)(model.eval(), requests.context, run.trie, seeds)
    shares = level_shares(found.sequence, reward_of(requests, found.sequence.long()), found.node >= 0)
    levels(run.folder / "levels.svg", shares, f"{name}, {len(rows)} requests of {c.candidates} beams")
    for model in reversed(policies.values()):
        if model.value_head is not None:
            first = data.test[rows[:1]].on(run.device)
            search = Decoder("ved", c.candidates, c.ved.for_evaluation())
            found = search(model.eval(), first.context, run.trie, seeds[:1])
            assert isinstance(found, VEDResult)
            search_tree(
                run.folder / "search.svg", found, run.host_trie, reward_of(first, found.sequence.long())
            )
            return


def write(folder: Path) -> None:
    """``report.html`` in the run's folder, one file: tables, curves, and pictures of the first seed."""
    curves(folder / "curves.svg", folder)
    first = sorted(folder.glob("seed-*/"), key=lambda path: int(path.name.removeprefix("seed-")))[0]
    body = _as_html((folder / "results.md").read_text())
    for name, caption in _CAPTIONS.items():
        path = (folder if name == "curves.svg" else first) / name
        if path.exists():
            picture = path.read_text()
            picture = picture[picture.index("<svg") :]
            body += f"<figure>{picture}<figcaption>{html.escape(caption)}</figcaption></figure>\n"
    save_text(folder / "report.html", f"{_HEAD}<title>{html.escape(folder.name)}</title>\n{body}")


_HEAD = """<!doctype html>
<meta charset="utf-8">
<style>
body { font: 15px/1.5 sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse; font-size: 13px; display: block; overflow-x: auto }
td, th { border-bottom: 1px solid #ddd; padding: 2px 8px; text-align: left; white-space: nowrap }
figure { margin: 2em 0 } figcaption { color: #555 } svg { max-width: 100%; height: auto }
</style>
"""


def _as_html(markdown: str) -> str:
    """Paragraphs and tables."""
    parts = []
    for block in markdown.strip().split("\n\n"):
        if not block.startswith("|"):
            parts.append(f"<p>{html.escape(block)}</p>")
            continue
        head, _, *rows = ([html.escape(x.strip()) for x in row.split("|")[1:-1]] for row in block.split("\n"))
        lines = ["".join(f"<th>{x}</th>" for x in head)]
        lines += ["".join(f"<td>{x}</td>" for x in row) for row in rows]
        parts.append("<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>")
    return "\n".join(parts) + "\n"
