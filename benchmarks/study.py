"""``python -m benchmarks.study``: what decoder, objective and score are worth, measured.

Four parts, with mean and 95 % interval over seeds, each of which is a run of its own:

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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from vstar_ops import Trie
from vstar_ops.decoding import VEDConfig, beam_search
from vstar_ops.train import checkpoint, report
from vstar_ops.train.config import Config, Variant
from vstar_ops.train.data import Dataset, Split, load_minionerec
from vstar_ops.train.decode import Decoder
from vstar_ops.train.metrics import Scores, evaluate
from vstar_ops.train.model import SIDTransformer
from vstar_ops.train.reinforce import new_policy, reinforce
from vstar_ops.train.scoring import candidate_scores
from vstar_ops.train.supervised import supervised
from vstar_ops.train.synthetic import synthetic
from vstar_ops.train.trainer import Run


@dataclass(frozen=True)
class Ablation:
    """How a policy is trained.

    Attributes:
        variant: as text.
        ved: what differs from the config's search, or from the paper's with ``paper``.
    """

    variant: str = "ved+joint"
    ved: dict[str, Any] = field(default_factory=dict)
    paper: bool = False
    item_prior: bool = True

    def config(self, base: Config) -> Config:
        """``base`` with what the ablation changes."""
        ved = VEDConfig.paper() if self.paper else base.ved
        return dataclasses.replace(base, ved=ved.replace(**self.ved), item_prior=self.item_prior)


NO_VALUE = {"value_weight": 0.0, "child_values": False, "num_value_beams": 0}
POLICY_ALONE = {"num_value_beams": 0, "beam_width": 16, "num_policy_candidates": 16}
LEAVES = {"num_value_beams": 0, "evaluate_leaves": True, "child_values": False}
ABLATIONS = {
    "GRPO, beam search": Ablation("beam+grpo"),
    "joint, beam search": Ablation("beam+joint"),
    "joint, top-k sampling": Ablation("topk+joint"),
    "GRPO, beam search, V learned beside": Ablation("ved+grpo", POLICY_ALONE),
    "GRPO, VED": Ablation("ved+grpo"),
    "sibling only, VED": Ablation("ved+sibling"),
    "V-STAR: joint, VED": Ablation(),
    "V-STAR, the paper's own search": Ablation(paper=True),
    "V-STAR, score V": Ablation(ved={"entropy_weight": 0.0}),
    "V-STAR, score H": Ablation(ved={**NO_VALUE, "entropy_weight": 1.0, "logp_weight": 0.0}),
    "best-first, V = 0": Ablation(ved=NO_VALUE),
    "V-STAR without the item prior": Ablation(item_prior=False),
    "V-STAR, not guided": Ablation(ved={"num_value_beams": 0}),
    "not guided, leaves evaluated": Ablation(ved=LEAVES),
    "not guided, leaves by their parent's V": Ablation(ved={"num_value_beams": 0, "child_values": False}),
}
REFERENCE, PLAIN = "V-STAR: joint, VED", "GRPO, beam search"
PAPERS = "V-STAR, the paper's own search"  # evaluates leaves, so its policy is the one whose V knows them

# (b), (c): what may be chosen for the search, on the valid split; what differs from that of training.
WITHOUT = "log pi, V = 0"
SEARCHES: dict[str, dict[str, Any]] = {
    WITHOUT: NO_VALUE,
    **{f"log pi + {weight:g} V": {"value_weight": weight} for weight in (1.0, 3.0, 30.0, 100.0)},
    "beams by value alone": {"beam_width": 10**6, "num_value_beams": 10**6},  # as wide as the budget allows
}
COLUMNS = ("HR@10", "NDCG@10", "true_reward@10", "best_reward", "diversity", "forward_tokens")


@dataclass(frozen=True)
class Study:
    """One data set, one folder, one seed; ``rows`` of each split, a fixed random part, None for all."""

    run: Run
    rows: dict[str, int | None]

    def cell(self, name: str, measure: Callable[[], Any]) -> Any:
        """The content of ``name``.json, measured if it is not there."""
        path = self.run.folder / "study" / f"{name}.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            checkpoint.save_text(path, json.dumps(measure(), indent=1))
        return json.loads(path.read_text())

    @functools.cached_property
    def supervised(self) -> SIDTransformer:
        """The policy that all of them start from."""
        return supervised(self.run, self.on_valid(self.run.config))[0]

    def trained(self, name: str) -> SIDTransformer:
        """The policy of an ablation, from its weights if it is done."""
        ablation, folder = ABLATIONS[name], self.run.folder / _slug(name)
        folder.mkdir(parents=True, exist_ok=True)
        run = dataclasses.replace(self.run, config=ablation.config(self.run.config), folder=folder)
        variant, weights = Variant.parse(ablation.variant), folder / "weights.pt"
        if weights.exists():
            model = new_policy(run, variant, self.supervised)
            model.load_state_dict(checkpoint.load(weights))
        else:
            model, _ = reinforce(run, variant, self.supervised, self.on_valid(run.config))
            checkpoint.save(weights, model.state_dict())
        return model.eval()

    def on_valid(self, config: Config) -> Callable[[SIDTransformer], Scores]:
        """The evaluation of early stopping: by VED where there is a value head."""
        decoder = Decoder("ved", config.candidates, config.ved.for_evaluation())
        return lambda model: self.scores(model, decoder.for_model(model), "valid", config.valid_rows)

    def scores(
        self, model: SIDTransformer, decoder: Decoder, split: str = "test", rows: int | None = None
    ) -> Scores:
        """Metrics of a decoder on ``rows`` of a split, by default as many as the study looks at."""
        return evaluate(model, self.run.dataset, self.run.trie, decoder, split, rows or self.rows[split])

    # ------------------------------------------------------------------ the parts

    def ablations(self) -> dict[str, dict[str, Scores]]:
        """(a): the policies on the test split, all decoded by beam search and those with V by VED as well."""

        def measure(name: str, decoder: str) -> Scores:
            model, config = self.trained(name), ABLATIONS[name].config(self.run.config)
            if decoder == "ved" and model.value_head is None:
                return {}
            return self.scores(model, Decoder(decoder, config.candidates, config.ved.for_evaluation()))

        result: dict[str, dict[str, Scores]] = {"beam": {}, "ved": {}}
        for name in ABLATIONS:
            for decoder, cells in result.items():
                scores = self.cell(f"a-{_slug(name)}-{decoder}", functools.partial(measure, name, decoder))
                if scores:
                    cells[name] = scores
        return result

    def chosen(
        self, model: SIDTransformer, candidates: int, budget: int | None = None
    ) -> tuple[str, Decoder]:
        """The search of the highest best reward on the valid split."""
        searches = {name: self.search(name, candidates, budget) for name in SEARCHES}
        best = max(searches, key=lambda name: self.scores(model, searches[name], "valid")["best_reward"])
        return best, searches[best]

    def search(self, name: str, candidates: int, budget: int | None = None) -> Decoder:
        """One of :data:`SEARCHES`; without a budget at that of a beam search."""
        ved = self.run.config.ved.for_evaluation().replace(**SEARCHES[name], budget=budget)
        return Decoder("ved", candidates, ved)

    def many(self) -> dict[str, Scores]:
        """(b): 64 candidates of V-STAR's policy; the paper's search has the policy trained with it."""
        model, paper = self.trained(REFERENCE), self.trained(PAPERS)
        name, chosen = self.chosen(model, 64)
        return {
            "beam search": self.scores(model, Decoder("beam", 64)),
            "top-k sampling": self.scores(model, Decoder("topk", 64)),
            "VED, the paper's": self.scores(paper, Decoder("ved", 64, VEDConfig.paper())),
            "VED, V = 0": self.scores(model, self.search(WITHOUT, 64)),
            f"VED, {name}": self.scores(model, chosen),
        }

    def budgets(self) -> dict[str, dict[str, Scores]]:
        """(c): the first 16 candidates at 1x to 4x the forward tokens of a beam search of width 16."""
        model, paper = self.trained(REFERENCE), self.trained(PAPERS)
        rows: dict[str, dict[str, Scores]] = {}
        for times in (1, 2, 3, 4):
            budget = 1 + (self.run.trie.length - 1) * 16 * times
            _, chosen = self.chosen(model, 16, budget)
            for name, policy, decoder in (
                ("beam search", model, Decoder("beam", 16, beam_width=16 * times)),
                ("VED, the paper's", paper, Decoder("ved", 16, VEDConfig.paper(budget=budget))),
                ("VED, V = 0", model, self.search(WITHOUT, 16, budget)),
                ("VED, chosen", model, chosen),
            ):
                rows.setdefault(name, {})[str(times)] = self.scores(policy, decoder)
        return rows

    def correlations(self) -> dict[str, Scores]:
        """(d): within a request, over the distinct prefixes of 64 beams; mean over the requests."""
        model, parts = self.trained(REFERENCE), []
        split = self.run.dataset.test.part(self.rows["test"])
        for rows in tqdm(torch.arange(len(split)).split(128), desc="correlations", leave=False, disable=None):
            parts.append(_correlations(model, self.run, split[rows]))
        result: dict[str, Scores] = {}
        for score, level in parts[0]:
            found = torch.cat([part[score, level] for part in parts])  # of every request
            result.setdefault(score, {})[level] = found[~found.isnan()].mean().item()
        return result


@torch.no_grad()
def _correlations(model: SIDTransformer, run: Run, part: Split) -> dict[tuple[str, str], Tensor]:
    """``(score, level)`` -> Spearman's correlation per request, NaN where one side is constant.

    The reward of a prefix is the mean true reward of the items below it, or, where that is not known, 1 for
    a prefix of the target and 0 otherwise.
    """
    trie, result = run.trie, {}
    tokens = beam_search(model, part.context, trie, 64).sequence.long()
    scores = candidate_scores(model, part.context, trie, tokens, values=True, child_values=True, leaves=False)
    assert scores.value is not None and scores.value_from_parent is not None
    # Leaves are valued by their parents: their own V is what no search asks and no loss trains.
    value = torch.cat([scores.value[..., :-1], scores.value_from_parent[..., -1:]], 2)
    logp = scores.logp.cumsum(2)
    leaves = trie.sequences(torch.arange(trie.level_offset[-2], trie.num_nodes))
    for level in range(1, trie.length + 1):
        node = trie.lookup(tokens[..., :level]).long()
        distinct = node >= 0
        distinct &= ~((node[:, :, None] == node[:, None]).tril(-1)).any(2)
        if run.dataset.reward is not None:
            every = run.dataset.reward(part.user, leaves.long().expand(len(part), -1, -1))
            below = trie.lookup(leaves[:, :level]).long().expand(len(part), -1)
            total = every.new_zeros(len(part), trie.num_nodes).scatter_add_(1, below, every)
            number = torch.bincount(below[0], minlength=trie.num_nodes)
            reward = (total / number.clamp(min=1)).gather(1, node.clamp(min=0))
        else:
            reward = (tokens[..., :level] == part.target[:, None, :level]).all(2).float()
        for name, score in (("log pi", logp), ("V", value)):
            result[name, str(level)] = _spearman(score[..., level - 1], reward, distinct)
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
    text = f"# {title}\n\nTest split, {len(seeds)} seeds: mean and 95 % interval; gains are paired by seed.\n"
    first = next(iter(seeds.values()))

    def tables(head: str, cells: dict[int, dict[str, Scores]], *against: str) -> str:
        found = [report.table(cells, columns=COLUMNS, against=row) for row in (None, *against)]
        return "\n\n".join(["", head, *found]) + "\n"

    if "a" in first:
        text += "\n## (a) Trained with, 16 candidates\n"
        for decoder, name in (("beam", "beam search"), ("ved", "VED, as in training")):
            cells = {s: {PLAIN: p["a"]["beam"][PLAIN]} | p["a"][decoder] for s, p in seeds.items()}
            text += tables(f"Decoded by {name} at test, {PLAIN} by beam search:", cells, PLAIN)
    if "b" in first:
        names = {s: list(parts["b"])[-1] for s, parts in seeds.items()}  # the chosen search
        cells = {s: _renamed(parts["b"], {names[s]: "VED, chosen"}) for s, parts in seeds.items()}
        text += tables("## (b) 64 candidates of the V-STAR policy", cells, "beam search", "VED, V = 0")
        text += f"\nChosen on valid: {', '.join(f'seed {s}: {n}' for s, n in names.items())}.\n"
    if "c" in first:
        text += "\n## (c) The first 16 candidates against the budget\n"
        for times in next(iter(first["c"].values())):
            cells = {s: {n: row[times] for n, row in p["c"].items()} for s, p in seeds.items()}
            text += tables(f"{times}x", cells, "VED, V = 0")
    if "d" in first:
        text += "\n## (d) Spearman's correlation with the reward, by level\n\n"
        levels = next(iter(first["d"].values()))
        text += report.table({s: parts["d"] for s, parts in seeds.items()}, columns=levels) + "\n"
    checkpoint.save_text(folder / "study.md", text)
    checkpoint.save_text(folder / "study.json", json.dumps(seeds, indent=1))
    _plots(folder, seeds)
    return text


def _renamed(cells: dict[str, Scores], names: dict[str, str]) -> dict[str, Scores]:
    return {names.get(name, name): scores for name, scores in cells.items()}


def _plots(folder: Path, seeds: dict[int, dict[str, Any]]) -> None:
    first = next(iter(seeds.values()))

    def stats(value: Callable[[dict[str, Any]], float]) -> tuple[float, float]:
        mean, half = report.mean_interval([value(parts) for parts in seeds.values()])
        return mean, 0.0 if math.isnan(half) else half

    def lines(axis: Any, part: str, value: Callable[[Any], float], **labels: str) -> None:
        for name, row in first[part].items():
            points = [stats(lambda parts, n=name, x=x: value(parts[part][n][x])) for x in row]
            mean, half = zip(*points)
            axis.errorbar([int(x) for x in row], mean, half, marker="o", capsize=3, label=name)
        axis.set(**labels)

    with report.panels(folder / "study.png", (18, 6)) as axes:
        if "a" in first:
            column = next(c for c in ("true_reward@10", "NDCG@10") if c in first["a"]["beam"][PLAIN])
            for decoder, suffix in (("ved", ", VED at test"), ("beam", "")):
                for name in reversed(first["a"][decoder]):
                    mean, half = stats(lambda parts, d=decoder, n=name: parts["a"][d][n][column])
                    axes[0].barh(name + suffix, mean, xerr=half, color="steelblue", ecolor="black")
            axes[0].set(title="(a) trained with", xlabel=report.COLUMNS[column])
        if "c" in first:
            label = "budget, times a beam search of width 16"
            value = lambda scores: scores["best_reward"]  # noqa: E731
            lines(axes[1], "c", value, title="(c) best of 16", xlabel=label, ylabel="best reward")
        if "d" in first:
            title = "(d) correlation with the reward"
            lines(axes[2], "d", float, title=title, xlabel="level", ylabel="Spearman")


def _slug(name: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def run(dataset: Dataset, config: Config, folder: Path, parts: str, rows: dict[str, int | None]) -> str:
    """All parts for all seeds, then the report."""
    trie = Trie.from_sequences(dataset.sequences)
    seeds: dict[int, dict[str, Any]] = {}
    runs = [Run(config, dataset, trie, folder / f"seed-{seed}", seed) for seed in config.seeds]
    for one in runs:
        one.check()
    for one in runs:
        study = Study(one, rows)
        study.run.folder.mkdir(parents=True, exist_ok=True)
        measures = {"b": study.many, "c": study.budgets, "d": study.correlations}
        cells: dict[str, Any] = {"a": study.ablations()} if "a" in parts else {}
        cells |= {name: study.cell(name, one) for name, one in measures.items() if name in parts}
        seeds[one.seed] = cells
    return write(folder, f"{dataset.name}: decoders, objectives, scores", seeds)


def main(argv: list[str] | None = None) -> int:
    """Parse the options, run, print the table."""
    p = argparse.ArgumentParser(prog="python -m benchmarks.study", description=(__doc__ or "").split("\n")[0])
    p.add_argument("--out", type=Path, help="the study's folder; an unfinished one is continued")
    p.add_argument("--data", help="folder in MiniOneRec's layout (default: the synthetic catalogue)")
    p.add_argument("--category", default=Config().category, help="default: %(default)s")
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
    changes = {name: getattr(args, name) for name in ("rl_steps", "sft_epochs") if getattr(args, name)}
    changes |= {name: getattr(args, name) for name in ("data", "category", "item_embeddings", "threads")}
    config = (Config() if args.data else Config.synthetic()).replace(**changes, seeds=seeds)
    rows = {"valid": args.valid_rows, "test": args.test_rows}
    folder = args.out or Path("runs") / f"study-{dataset.name}"
    folder.mkdir(parents=True, exist_ok=True)
    text, known = config.replace(seeds=()).to_json() + json.dumps(rows), folder / "config.json"
    if known.exists() and known.read_text() != text:
        p.error(f"{folder} holds a study of other settings: choose another --out")
    checkpoint.save_text(known, text)
    torch.set_num_threads(args.threads)
    try:
        text = run(dataset, config, folder, args.parts, rows)
    except (checkpoint.Mismatch, FloatingPointError) as error:
        p.exit(1, f"{p.prog}: error: {error}\n")
    print(text)
    print(f"in {folder}: study.md, study.json, study.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
