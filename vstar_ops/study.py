"""``python -m vstar_ops.study``: what decoder, objective and score are worth, measured.

Four parts, each of the seeds a run of its own, mean and 95 % interval over them:

(a) ablations: a policy trained with each decoder, objective and score, then decoded by beam search;
(b) 64 candidates by beam search, top-k sampling and VED: diversity, best reward;
(c) quality against the budget of forward tokens, 1x to 4x, beam search and VED;
(d) Spearman's correlation of log-probability and of V with the reward, level by level.

Options of the search are chosen on the valid split; every cell looks at the test split once. A cell that
is done is a JSON file and is not done again, so a killed study continues where it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .decoding import beam_search
from .train import checkpoint
from .train.__main__ import SYNTHETIC
from .train.data import Dataset, Split, load_minionerec
from .train.decode import PAPER, at_test
from .train.loop import Config, Job, reinforce, supervised
from .train.model import SIDTransformer
from .train.report import interval_text, mean_interval
from .train.scoring import candidate_scores
from .train.synthetic import synthetic
from .trie import Trie

Scores = dict[str, float]

# (a): name -> decoder+objective, and what differs from the config's search; `item_prior` is the config's.
NO_VALUE = {"value_weight": 0.0, "child_values": False, "num_value_beams": 0}
ABLATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "GRPO, beam search": ("beam+grpo", {}),
    "joint, beam search": ("beam+joint", {}),
    "joint, top-k sampling": ("topk+joint", {}),
    "GRPO, beam search, V learned beside": (
        "ved+grpo",
        {"num_value_beams": 0, "beam_width": 16, "num_policy_candidates": 16},
    ),
    "GRPO, VED": ("ved+grpo", {}),
    "sibling only, VED": ("ved+sibling", {}),
    "V-STAR: joint, VED": ("ved+joint", {}),
    "V-STAR, the paper's own search": ("ved+joint", {"paper": True}),
    "V-STAR, score V": ("ved+joint", {"entropy_weight": 0.0}),
    "V-STAR, score H": ("ved+joint", {**NO_VALUE, "entropy_weight": 1.0, "logp_weight": 0.0}),
    "best-first, V = 0": ("ved+joint", NO_VALUE),
    "V-STAR without the item prior": ("ved+joint", {"item_prior": False}),
    "V-STAR, not guided": ("ved+joint", {"num_value_beams": 0}),
    "not guided, leaves evaluated": (
        "ved+joint",
        {"num_value_beams": 0, "evaluate_leaves": True, "child_values": False},
    ),
    "not guided, leaves by their parent's V": ("ved+joint", {"num_value_beams": 0, "child_values": False}),
}
REFERENCE, PLAIN = "V-STAR: joint, VED", "GRPO, beam search"
WITHOUT = "log pi, V = 0"
PAPERS = "V-STAR, the paper's own search"  # evaluates leaves, so its policy is the one whose V knows them

# (b), (c): what may be chosen for the search, on the valid split; what differs from that of training.
SEARCHES: dict[str, dict[str, Any]] = {
    "log pi, V = 0": NO_VALUE,
    **{f"log pi + {weight:g} V": {"value_weight": weight} for weight in (1.0, 3.0, 30.0, 100.0)},
    "beams by value alone": {"beam_width": 10**6, "num_value_beams": 10**6},  # as wide as the budget allows
}
COLUMNS = ("HR@10", "NDCG@10", "true_reward@10", "best_reward", "diversity", "forward_tokens")


@dataclasses.dataclass
class Study:
    """One data set, one folder, one seed."""

    job: Job
    rows: dict[str, int | None]  # of each split, a fixed random part; None for all

    def cell(self, name: str, measure: Callable[[], Any]) -> Any:
        """The content of ``name``.json, measured if it is not there."""
        path = self.job.folder / "study" / f"{name}.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            checkpoint.save_text(path, json.dumps(measure(), indent=1))
        return json.loads(path.read_text())

    def trained(self, name: str) -> tuple[SIDTransformer, Job]:
        """The policy of an ablation, from its weights if it is done, and the job that trained it."""
        variant, changes = ABLATIONS[name]
        changes = dict(changes)
        base = PAPER if changes.pop("paper", False) else self.job.config.ved
        prior = changes.pop("item_prior", True)
        folder = self.job.folder / _slug(name)
        folder.mkdir(parents=True, exist_ok=True)
        config = dataclasses.replace(self.job.config, ved={**base, **changes}, item_prior=prior)
        job = dataclasses.replace(self.job, config=config, folder=folder)
        model, weights = job.model(), folder / "weights.pt"
        if weights.exists():
            state = checkpoint.load(weights)
            if any(key.startswith("value_head") for key in state):
                job.add_value_head(model, action_values="value_head.child.token.weight" in state)
            model.load_state_dict(state)
        else:
            model, _ = reinforce(job, variant, self.supervised())
            checkpoint.save(weights, model.state_dict())
        return model.eval(), job

    def supervised(self) -> SIDTransformer:
        """The policy that all of them start from."""
        return supervised(self.job)[0]

    def scores(
        self, model: SIDTransformer, split: str, candidates: int, decoder: str, options: dict[str, Any]
    ) -> Scores:
        """Metrics of a decoder on what is looked at of a split."""
        return self.job.evaluate(model, split, self.rows[split], decoder, candidates, options)

    # ------------------------------------------------------------------ the parts

    def ablations(self) -> dict[str, dict[str, Scores]]:
        """(a): the policies on the test split, all decoded by beam search and those with V by VED as well."""

        def measure(name: str, decoder: str) -> Scores:
            model, job = self.trained(name)
            if decoder == "ved" and model.value_head is None:
                return {}
            options = at_test(job.config.ved) if decoder == "ved" else {}
            return self.scores(model, "test", job.config.candidates, decoder, options)

        result: dict[str, dict[str, Scores]] = {"beam": {}, "ved": {}}
        for name in ABLATIONS:
            for decoder, cells in result.items():
                cells[name] = self.cell(
                    f"a-{_slug(name)}-{decoder}", functools.partial(measure, name, decoder)
                )
        return {decoder: {n: c for n, c in cells.items() if c} for decoder, cells in result.items()}

    def chosen(self, model: SIDTransformer, candidates: int, budget: int) -> tuple[str, dict[str, Any]]:
        """The search of the highest best reward on the valid split."""
        best, found = -math.inf, ""
        for name in SEARCHES:
            scores = self.scores(model, "valid", candidates, "ved", self.search(name, budget))
            if scores["best_reward"] > best:
                best, found = scores["best_reward"], name
        return found, self.search(found, budget)

    def search(self, name: str, budget: int) -> dict[str, Any]:
        """The options of one of :data:`SEARCHES`."""
        return at_test({**self.job.config.ved, **SEARCHES[name], "budget": budget})

    def many(self) -> dict[str, Scores]:
        """(b): 64 candidates of V-STAR's policy; the paper's search has the policy trained with it."""
        (model, _), (paper, _) = self.trained(REFERENCE), self.trained(PAPERS)
        budget = 1 + (self.job.trie.length - 1) * 64
        name, options = self.chosen(model, 64, budget)
        return {
            "beam search": self.scores(model, "test", 64, "beam", {}),
            "top-k sampling": self.scores(model, "test", 64, "topk", {}),
            "VED, the paper's": self.scores(paper, "test", 64, "ved", {**PAPER, "budget": budget}),
            "VED, V = 0": self.scores(model, "test", 64, "ved", self.search(WITHOUT, budget)),
            f"VED, {name}": self.scores(model, "test", 64, "ved", options),
        }

    def budgets(self) -> dict[str, dict[str, Scores]]:
        """(c): the first 16 candidates at 1x to 4x the forward tokens of a beam search of width 16."""
        (model, _), (paper, _) = self.trained(REFERENCE), self.trained(PAPERS)
        names = ("beam search", "VED, the paper's", "VED, V = 0", "VED, chosen")
        rows: dict[str, dict[str, Scores]] = {name: {} for name in names}
        for times in (1, 2, 3, 4):
            budget = 1 + (self.job.trie.length - 1) * 16 * times
            _, options = self.chosen(model, 16, budget)
            papers, without = {**PAPER, "budget": budget}, self.search(WITHOUT, budget)
            rows["beam search"][str(times)] = self.scores(
                model, "test", 16, "beam", {"beam_width": 16 * times}
            )
            rows["VED, the paper's"][str(times)] = self.scores(paper, "test", 16, "ved", papers)
            rows["VED, V = 0"][str(times)] = self.scores(model, "test", 16, "ved", without)
            rows["VED, chosen"][str(times)] = self.scores(model, "test", 16, "ved", options)
        return rows

    def correlations(self) -> dict[str, Scores]:
        """(d): within a request, over the distinct prefixes of 64 beams; mean over the requests."""
        model, job = self.trained(REFERENCE)
        parts: dict[str, list[Tensor]] = {}
        split = self.job.dataset.test.part(self.rows["test"])
        for rows in tqdm(torch.arange(len(split)).split(128), desc="correlations", leave=False, disable=None):
            for name, values in _correlations(model, job, split[rows]).items():
                parts.setdefault(name, []).append(values)
        result: dict[str, Scores] = {}
        for name, found in parts.items():
            score, level = name.split(", level ")
            known = torch.cat(found)  # of every request
            result.setdefault(score, {})[level] = known[~known.isnan()].mean().item()
        return result


@torch.no_grad()
def _correlations(model: SIDTransformer, job: Job, part: Split) -> dict[str, Tensor]:
    """``score, level`` -> Spearman's correlation a request, NaN where one side is constant.

    The reward of a prefix is the mean true reward of the items below it, or, where that is not known, 1 for
    a prefix of the target and 0 else.
    """
    trie, result = job.trie, {}
    tokens = beam_search(model, part.context, trie, 64).sequence.long()
    scores = candidate_scores(
        model, part.context, trie, tokens, values=True, action_values=True, leaves=False
    )
    assert scores.value is not None and scores.action_value is not None
    # Leaves are valued by their parents: their own V is what no search asks and no loss trains.
    value = torch.cat([scores.value[..., :-1], scores.action_value[..., -1:]], 2)
    logp = scores.logp.cumsum(2)
    leaves = trie.sequences(torch.arange(trie.level_offset[-2], trie.num_nodes))
    for level in range(1, trie.length + 1):
        node = trie.lookup(tokens[..., :level]).long()
        distinct = node >= 0
        distinct &= ~((node[:, :, None] == node[:, None]).tril(-1)).any(2)
        if job.dataset.reward is not None:
            every = job.dataset.reward(part.user, leaves.long().expand(len(part), -1, -1))
            below = trie.lookup(leaves[:, :level]).long().expand(len(part), -1)
            total = every.new_zeros(len(part), trie.num_nodes).scatter_add_(1, below, every)
            number = torch.bincount(below[0], minlength=trie.num_nodes) if len(part) else total[0]
            reward = (total / number.clamp(min=1)).gather(1, node.clamp(min=0))
        else:
            reward = (tokens[..., :level] == part.target[:, None, :level]).all(2).float()
        for name, score in (("log pi", logp), ("V", value)):
            result[f"{name}, level {level}"] = _spearman(score[..., level - 1], reward, distinct)
    return result


def _spearman(x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    """Per row of ``[B, N]``: Pearson's correlation of the average ranks of what the mask keeps."""

    def ranks(values: Tensor) -> Tensor:
        less = ((values[:, None] < values[:, :, None]) & mask[:, None]).sum(2)
        equal = ((values[:, None] == values[:, :, None]) & mask[:, None]).sum(2)
        rank = (less + 0.5 * equal.double()).masked_fill(~mask, 0)
        return (rank - (rank.sum(1) / mask.sum(1)).unsqueeze(1)).masked_fill(~mask, 0)

    a, b = ranks(x), ranks(y)
    return (a * b).sum(1) / (a.square().sum(1) * b.square().sum(1)).sqrt()


# ------------------------------------------------------------------ the report


def write(folder: Path, title: str, seeds: dict[int, dict[str, Any]]) -> str:
    """``study.md``, ``study.json`` and the plots out of seed -> part -> cells; returns the text."""
    text = f"# {title}\n\nTest split, {len(seeds)} seeds: mean and 95 % interval.\n"
    first = next(iter(seeds.values()))
    if "a" in first:
        text += "\n## (a) Trained with, 16 candidates\n"
        for decoder, title in (("beam", "beam search"), ("ved", "VED, as in training")):
            cells = {s: {PLAIN: p["a"]["beam"][PLAIN]} | p["a"][decoder] for s, p in seeds.items()}
            text += f"\nDecoded by {title} at test:\n\n" + _table(cells)
            text += f"\nPaired differences to {PLAIN}, decoded by beam search:\n\n"
            text += _table(cells, against=PLAIN)
    if "b" in first:
        text += "\n## (b) 64 candidates of the V-STAR policy\n\n"
        cells = {s: _one_name(parts["b"]) for s, parts in seeds.items()}
        text += _table(cells)
        for against in ("beam search", "VED, V = 0"):
            text += f"\nPaired differences to {against}:\n\n" + _table(cells, against=against)
        names = {s: [n for n in parts["b"] if n.startswith("VED")][-1] for s, parts in seeds.items()}
        text += f"\nChosen on valid: {', '.join(f'seed {s}: {n}' for s, n in names.items())}.\n"
    if "c" in first:
        text += "\n## (c) The first 16 candidates against the budget\n"
        for times in next(iter(first["c"].values())):
            text += f"\n{times}x\n\n"
            cells = {s: {n: row[times] for n, row in p["c"].items()} for s, p in seeds.items()}
            text += _table(cells) + "\nPaired differences to VED, V = 0:\n\n"
            text += _table(cells, against="VED, V = 0")
    if "d" in first:
        text += "\n## (d) Spearman's correlation with the reward, by level\n\n"
        text += _table(
            {s: parts["d"] for s, parts in seeds.items()}, columns=tuple(next(iter(first["d"].values())))
        )
    checkpoint.save_text(folder / "study.md", text)
    checkpoint.save_text(folder / "study.json", json.dumps({str(s): p for s, p in seeds.items()}, indent=1))
    _plots(folder, seeds)
    return text


def _one_name(cells: dict[str, Scores]) -> dict[str, Scores]:
    """The chosen search under one name for all seeds."""
    *others, last = cells
    return {name: cells[name] for name in others} | {"VED, chosen": cells[last]}


def _table(
    cells: dict[int, dict[str, Scores]], *, against: str | None = None, columns: tuple[str, ...] = COLUMNS
) -> str:
    first = next(iter(cells.values()))
    shown = [c for c in columns if c in next(iter(first.values()))]
    lines = [f"| | {' | '.join(shown)} |", "|---" * (len(shown) + 1) + "|"]
    for name in first:
        if name == against:
            continue
        row = []
        for column in shown:
            values = [s[name][column] - (s[against][column] if against else 0) for s in cells.values()]
            digits = 1 if column == "forward_tokens" else 4
            row.append(interval_text(values, digits, signed=against is not None))
        lines.append(f"| {name} | {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def _plots(folder: Path, seeds: dict[int, dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    first = next(iter(seeds.values()))
    figure, axes = pyplot.subplots(1, 3, figsize=(18, 6), constrained_layout=True)

    def bars(axis: Any, cells: dict[int, dict[str, Scores]], column: str) -> None:
        names = list(next(iter(cells.values())))[::-1]
        stats = [mean_interval([s[name][column] for s in cells.values()]) for name in names]
        error = [0 if math.isnan(half) else half for _, half in stats]
        axis.barh(names, [mean for mean, _ in stats], xerr=error, color="steelblue", ecolor="black")
        axis.set(xlabel=column.replace("_", " "))

    if "a" in first:
        scores = first["a"]["beam"][PLAIN]
        bars(
            axes[0],
            {
                s: p["a"]["beam"] | {f"{n}, VED at test": c for n, c in p["a"]["ved"].items()}
                for s, p in seeds.items()
            },
            next(c for c in COLUMNS[::-1] if c in scores and "@10" in c),
        )
        axes[0].set(title="(a) trained with")
    if "c" in first:
        for name, row in first["c"].items():
            points = [mean_interval([p["c"][name][t]["best_reward"] for p in seeds.values()]) for t in row]
            error = [0 if math.isnan(half) else half for _, half in points]
            axes[1].errorbar(
                [int(t) for t in row], [m for m, _ in points], error, marker="o", capsize=3, label=name
            )
        axes[1].set(
            title="(c) best of 16", xlabel="budget, times a beam search of width 16", ylabel="best reward"
        )
        axes[1].legend(fontsize="small")
    if "d" in first:
        for name, row in first["d"].items():
            points = [mean_interval([p["d"][name][level] for p in seeds.values()]) for level in row]
            error = [0 if math.isnan(half) else half for _, half in points]
            axes[2].errorbar(
                [int(x) for x in row], [m for m, _ in points], error, marker="o", capsize=3, label=name
            )
        axes[2].set(title="(d) correlation with the reward", xlabel="level", ylabel="Spearman")
        axes[2].legend(fontsize="small")
    figure.savefig(folder / "study.png", dpi=110)
    pyplot.close(figure)


def _slug(name: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def run(dataset: Dataset, config: Config, folder: Path, parts: str, rows: dict[str, int | None]) -> str:
    """All parts for all seeds, then the report."""
    trie = Trie.from_sequences(dataset.sequences)
    seeds: dict[int, dict[str, Any]] = {}
    for seed in config.seeds:
        job = Job(config, dataset, trie, folder / f"seed-{seed}", seed)
        job.folder.mkdir(parents=True, exist_ok=True)
        study = Study(job, rows)
        cells: dict[str, Any] = {}
        if "a" in parts:
            cells["a"] = study.ablations()
        if "b" in parts:
            cells["b"] = study.cell("b", study.many)
        if "c" in parts:
            cells["c"] = study.cell("c", study.budgets)
        if "d" in parts:
            cells["d"] = study.cell("d", study.correlations)
        seeds[seed] = cells
    return write(folder, f"{dataset.name}: decoders, objectives, scores", seeds)


def main(argv: list[str] | None = None) -> int:
    """Parse the options, run, print the table."""
    p = argparse.ArgumentParser(
        prog="python -m vstar_ops.study", description=__doc__.split("\n")[0] if __doc__ else ""
    )
    p.add_argument(
        "--out",
        type=Path,
        help="the study's folder; an unfinished one is continued (default: runs/study-<data>)",
    )
    p.add_argument("--data", help="folder in MiniOneRec's layout (default: the synthetic catalogue)")
    p.add_argument("--category", default=Config.category, help="default: %(default)s")
    p.add_argument("--item-embeddings", metavar="NPY", help="for the dense return (default: from clicks)")
    p.add_argument("--seeds", default="0,1,2,3,4", help="default: %(default)s")
    p.add_argument("--parts", default="abcd", help="some of a, b, c, d (default: %(default)s)")
    p.add_argument("--threads", type=int, default=1, help="default: %(default)s, bit-for-bit repeatable")
    p.add_argument("--rl-steps", type=int, help="default: as in python -m vstar_ops.train")
    p.add_argument("--sft-epochs", type=int, help="default: as in python -m vstar_ops.train")
    p.add_argument("--valid-rows", type=int, default=500, help="to choose a search by (default: %(default)s)")
    p.add_argument("--test-rows", type=int, help="a fixed random part of the test split (default: all)")
    args = p.parse_args(argv)
    if not args.parts or set(args.parts) - set("abcd"):
        p.error(f"--parts: expected some of a, b, c, d, got {args.parts!r}")
    try:
        seeds = tuple(dict.fromkeys(int(s) for s in args.seeds.split(",")))
        dataset = load_minionerec(args.data, args.category) if args.data else synthetic()
    except (OSError, ValueError) as error:
        p.error(str(error))
    changes: dict[str, Any] = {} if args.data else dict(SYNTHETIC)
    changes |= {k: v for k, v in (("rl_steps", args.rl_steps), ("sft_epochs", args.sft_epochs)) if v}
    changes |= {"data": args.data, "category": args.category, "item_embeddings": args.item_embeddings}
    folder = args.out or Path("runs") / f"study-{dataset.name}"
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    config = Config(seeds=seeds, threads=args.threads, test_decoder="ved", **changes)
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k != "seeds"}
    settings["study"] = {"valid_rows": args.valid_rows, "test_rows": args.test_rows}
    text = json.dumps(settings, indent=1)
    known = folder / "config.json"
    if known.exists() and known.read_text() != text:
        p.error(f"{folder} holds a study of other settings: choose another --out")
    checkpoint.save_text(known, text)
    rows = {"valid": args.valid_rows, "test": args.test_rows}
    print(run(dataset, config, folder, args.parts, rows))
    print(f"in {folder}: study.md, study.json, study.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
