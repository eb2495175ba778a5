"""``python -m benchmarks.study``: what search, value and sibling advantages are worth, measured.

Parts, each over several seeds:

rows: policies trained in every way, each decoded in several ways on the test split; gains are paired by seed
    and request, and the questions that the paper raises are answered with intervals.
tokens: quality against the forward tokens that a search really spends.
tuning: one setting of training changed at a time, with the first seed on the valid split, see
    :mod:`benchmarks.tuning`.
levels: how well log-probability, item prior and V rank the prefixes of each level.
gradients: which estimate of the policy gradient points along the exact one (synthetic catalogue alone), see
    :mod:`benchmarks.gradients`.

All policies of a seed start from one supervised policy and take the same number of steps. Whatever is chosen
is chosen on the valid split; the test split is looked at once per cell. A cell that is done is a file and is
not done again, so a killed study continues where it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from vstar_ops import Trie
from vstar_ops.decoding import BeamResult, VEDConfig, beam_search
from vstar_ops.train import checkpoint
from vstar_ops.train.config import Config, Variant
from vstar_ops.train.data import Dataset, load_minionerec
from vstar_ops.train.decode import Decoder
from vstar_ops.train.metrics import evaluate, per_request
from vstar_ops.train.model import SIDTransformer
from vstar_ops.train.reinforce import new_policy, reinforce
from vstar_ops.train.scoring import candidate_scores
from vstar_ops.train.supervised import supervised
from vstar_ops.train.synthetic import synthetic
from vstar_ops.train.trainer import Run

from . import study_report, tuning
from .policies import CANDIDATES, GRPO, PLAIN, POLICIES, SFT, VSTAR, Policy
from .rank_correlation import correlations
from .sasrec import sasrec

Cell = dict[str, Tensor]  # score -> a number per test request
Decode = Callable[[SIDTransformer, Tensor, Trie, Tensor], Any]

PARTS = ("rows", "tokens", "levels", "gradients", "tuning")
NO_VALUE: dict[str, Any] = {"value_weight": 0.0, "child_values": False, "num_value_beams": 0}

BEAM, WIDE, VED, BEST_FIRST, RERANKED = (
    "beam search",
    "beam search of VED's tokens",
    "VED",
    "VED, V = 0",
    "beams re-ranked by the prior",
)
ROWS = (
    (PLAIN, BEAM),
    (PLAIN, RERANKED),
    (PLAIN, BEST_FIRST),
    (SFT, BEAM),
    (SFT, WIDE),
    (SFT, BEST_FIRST),
    ("SFT, prior by hand", BEAM),
    ("SFT, prior by hand", BEST_FIRST),
    (GRPO, BEAM),
    (GRPO, BEST_FIRST),
    ("Sibling-GRPO, the paper's", BEAM),
    ("Sibling-GRPO, the paper's", BEST_FIRST),
    ("Sibling-GRPO", BEAM),
    ("Sibling-GRPO", BEST_FIRST),
    ("sibling advantages alone", BEAM),
    ("sibling advantages alone", BEST_FIRST),
    ("GRPO, V learned beside", BEAM),
    ("GRPO, V learned beside", VED),
    ("GRPO, V learned beside", BEST_FIRST),
    (VSTAR, BEAM),
    (VSTAR, WIDE),
    (VSTAR, VED),
    (VSTAR, BEST_FIRST),
    ("V-STAR, the paper's", BEAM),
    ("V-STAR, the paper's", VED),
)
BUDGETS = (0.5, 1.0, 2.0, 4.0)  # times what a beam search of width 16 may spend
BY_HAND = (1.0, 2.0, 4.0, 6.0, 8.0, 12.0)


@dataclass(frozen=True)
class Study:
    """One data set, one folder, one seed; ``rows`` of each split, a fixed random part, None for all."""

    run: Run
    rows: dict[str, int | None]

    def cell(self, name: str, measure: Callable[[], Cell]) -> Cell:
        """The content of ``name``.pt, measured if it is not there."""
        path = self.run.folder / "cells" / f"{_slug(name)}.pt"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            checkpoint.save(path, measure())
        return checkpoint.load(path)

    @functools.cached_property
    def supervised(self) -> SIDTransformer:
        """The policy that all of them start from, with its item prior."""
        return supervised(self.run, self.on_valid(self.run.config))[0].eval()

    def policy(self, name: str) -> SIDTransformer:
        """A policy, from its weights if it is trained already."""
        if POLICIES[name].variant is None:
            return self.with_prior(POLICIES[name].prior)
        return self.train(POLICIES[name], name)

    def train(self, wanted: Policy, name: str) -> SIDTransformer:
        """A policy by reinforcement, in the folder of its ``name``."""
        folder = self.run.folder / _slug(name)
        folder.mkdir(parents=True, exist_ok=True)
        run = dataclasses.replace(self.run, config=wanted.config(self.run.config), folder=folder)
        variant, weights = Variant.parse(wanted.variant or ""), folder / "weights.pt"
        if weights.exists():
            model = new_policy(run, variant, self.supervised)
            model.load_state_dict(checkpoint.load(weights))
            return model.eval()
        model, figures = reinforce(run, variant, self.supervised, self.on_valid(run.config))
        checkpoint.save_text(folder / "figures.json", json.dumps(figures))
        checkpoint.save(weights, model.state_dict())
        return model.eval()

    def looks(self, wanted: Policy, name: str) -> list[tuple[float, float]]:
        """The steps at which a trained policy was looked at, and what the valid split said."""
        text = (self.run.folder / _slug(name) / f"{wanted.variant}.jsonl").read_text()
        return tuning.read_looks(text, "NDCG@10" if self.run.dataset.reward is None else "true_reward@10")

    def with_prior(self, prior: str) -> SIDTransformer:
        """The supervised policy with another item prior."""
        if prior == "fitted":
            return self.supervised
        model = new_policy(self.run, Variant("beam", "grpo"), self.supervised).eval()
        assert model.prior is not None and model.nearness is not None
        for_valid = functools.partial(evaluate, model, self.run.dataset, self.run.trie, name="valid")

        def score(weight: float) -> float:
            torch.nn.init.constant_(model.prior, weight / model.nearness.SCALE)
            return for_valid(decoder=Decoder("beam", CANDIDATES), rows=self.rows["valid"])["NDCG@10"]

        weight = 0.0 if prior == "none" else max(BY_HAND, key=score)
        torch.nn.init.constant_(model.prior, weight / model.nearness.SCALE)
        return model

    def on_valid(self, config: Config) -> Callable[[SIDTransformer], dict[str, float]]:
        """The evaluation that chooses a step: by VED where there is a value head."""
        decoder = Decoder("ved", CANDIDATES, config.ved.for_evaluation())

        def score(model: SIDTransformer) -> dict[str, float]:
            one = decoder.for_model(model)
            return evaluate(model, self.run.dataset, self.run.trie, one, "valid", config.valid_rows)

        return score

    def scores(self, model: SIDTransformer, decoder: Decode, rows: int | None = None) -> Cell:
        """Of every test request, or of ``rows`` of them."""
        rows = rows or self.rows["test"]
        found = per_request(model, self.run.dataset, self.run.trie, decoder, "test", rows)  # type: ignore[arg-type]
        rank = found.pop("rank").double()
        gain = (1 / torch.log2(rank + 2)) * (rank < 10)
        found |= {"NDCG@10": gain, "HR@10": (rank < 10).double()}
        return {name: x.float() for name, x in found.items()}

    # ------------------------------------------------------------------ the parts

    def table(self) -> dict[str, Cell]:
        """Row name -> scores of every test request."""
        found = {row_name(*row): self.cell(row_name(*row), functools.partial(self.row, *row)) for row in ROWS}
        if self.run.dataset.reward is None:  # it learns clicks, as the supervised policy does
            found["SASRec"] = self.cell("SASRec", lambda: sasrec(self.run, self.rows["test"]))
        return found

    def row(self, policy: str, decoding: str) -> Cell:
        """One cell of the table."""
        model = self.policy(policy)
        return self.scores(model, self.decoder(policy, decoding, model))

    def decoder(self, policy: str, decoding: str, model: SIDTransformer) -> Decode:
        """How a row decodes."""
        config = POLICIES[policy].config(self.run.config).ved.for_evaluation()
        if decoding == RERANKED:
            return self.reranked
        if decoding == WIDE:
            return Decoder("beam", CANDIDATES, beam_width=self.equal_width(model, config))
        if decoding == BEAM:
            return Decoder("beam", CANDIDATES)
        return Decoder("ved", CANDIDATES, config.replace(**NO_VALUE) if decoding == BEST_FIRST else config)

    def equal_width(self, model: SIDTransformer, config: VEDConfig) -> int:
        """The narrowest beam whose forward tokens are those of VED or more, on a part of the valid split."""
        config = config if model.value_head is not None else config.replace(**NO_VALUE)

        def spent(decoder: Decoder) -> float:
            found = evaluate(model, self.run.dataset, self.run.trie, decoder, "valid", 256)
            return found["forward_tokens"]

        target, width = spent(Decoder("ved", CANDIDATES, config)), CANDIDATES
        while width < 4 * CANDIDATES and spent(Decoder("beam", CANDIDATES, beam_width=width)) < target:
            width += 1
        return width

    def reranked(self, model: SIDTransformer, context: Tensor, trie: Trie, seed: Tensor) -> BeamResult:
        """The beams of a policy in the order of the policy with the fitted prior."""
        found = beam_search(model, context, trie, CANDIDATES)
        logp = candidate_scores(self.supervised, context, trie, found.sequence).logp.sum(2)
        logp = logp.masked_fill(found.node < 0, -torch.inf)
        order = logp.argsort(dim=1, descending=True, stable=True)
        sequence = found.sequence.gather(1, order[..., None].expand_as(found.sequence))
        node = found.node.gather(1, order)
        return BeamResult(sequence, node, logp.gather(1, order), found.num_valid, found.forward_tokens)

    def tokens(self) -> dict[str, dict[str, Cell]]:
        """Search -> budget -> scores of the first 16 candidates of V-STAR's policy."""
        config = self.run.config.ved.for_evaluation()
        searches: dict[str, VEDConfig | None] = {
            BEAM: None,
            VED: config.replace(skip_forced=True),
            "VED, forced tokens paid": config.replace(skip_forced=False),
            BEST_FIRST: config.replace(**NO_VALUE),
        }
        result: dict[str, dict[str, Cell]] = {}
        for name, ved in searches.items():
            for times in BUDGETS:
                width = round(CANDIDATES * times)
                decoder = Decoder("beam", CANDIDATES, beam_width=width)
                if ved is not None:
                    budget = 1 + (self.run.trie.length - 1) * width
                    decoder = Decoder("ved", CANDIDATES, ved.replace(budget=budget))
                elif times < 1:
                    continue  # it would return fewer candidates

                def measure(decoder: Decoder = decoder) -> Cell:
                    return self.scores(self.policy(VSTAR), decoder, 1000)

                result.setdefault(name, {})[f"{times:g}x"] = self.cell(f"tokens {name} {times:g}", measure)
        return result

    def levels(self) -> dict[str, dict[str, Cell]]:
        """Score -> level -> Spearman's correlation with the reward, per request, NaN where undefined."""
        split = self.run.dataset.test.part(self.rows["test"] or 1000)

        def measure() -> Cell:
            model = self.policy(VSTAR)
            batches = torch.arange(len(split)).split(128)
            parts = [
                correlations(model, self.run, split[rows])
                for rows in tqdm(batches, desc="levels", leave=False, disable=None)
            ]
            return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

        result: dict[str, dict[str, Cell]] = {}
        for name, values in self.cell("levels", measure).items():
            score, _, level = name.rpartition(" ")
            result.setdefault(score, {})[level] = {"correlation": values}
        return result

    def tuning(self) -> dict[str, Tensor]:
        """Setting -> the score of the valid split at each look, before the first step first."""
        on_clicks, found = self.run.dataset.reward is None, {}
        for setting, policy in tuning.settings(self.run.config, on_clicks=on_clicks).items():

            def measure(policy: Policy = policy, name: str = f"tuning {setting}") -> Cell:
                self.train(policy, name)
                return {"valid": torch.tensor(self.looks(policy, name))}

            found[setting] = self.cell(f"tuning {setting}", measure)["valid"]
        return found


def row_name(policy: str, decoding: str) -> str:
    """What a table calls a row."""
    return f"{policy}, {decoding}"


def _slug(name: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def run(
    dataset: Dataset, config: Config, folder: Path, parts: Sequence[str], rows: dict[str, int | None]
) -> str:
    """All parts for all seeds, then the report."""
    trie = Trie.from_sequences(dataset.sequences)
    runs = [Run(config, dataset, trie, folder / f"seed-{seed}", seed) for seed in config.seeds]
    for one in runs:
        one.check()
    found: dict[str, list[Any]] = {}
    for one in runs:
        one.folder.mkdir(parents=True, exist_ok=True)
        study = Study(one, rows)
        measures: dict[str, Callable[[], Any]] = {
            "rows": study.table,
            "tokens": study.tokens,
            "levels": study.levels,
            "tuning": study.tuning,
        }
        for part, measure in measures.items():
            if part in parts and (part != "tuning" or one is runs[0]):
                found.setdefault(part, []).append(measure())
    if "gradients" in parts and dataset.reward is not None:
        from . import gradients

        found["gradients"] = [gradients.part(folder / "gradients")]
    figures = {
        name: [
            json.loads((one.folder / _slug(name) / "figures.json").read_text())
            for one in runs
            if (one.folder / _slug(name) / "figures.json").exists()
        ]
        for name in POLICIES
    }
    return study_report.write(folder, dataset.name, config.seeds, found, figures)


def main(argv: list[str] | None = None) -> int:
    """Parse the options, run, print the tables."""
    p = argparse.ArgumentParser(prog="python -m benchmarks.study", description=(__doc__ or "").split("\n")[0])
    p.add_argument("--out", type=Path, help="the study's folder; an unfinished one is continued")
    p.add_argument("--data", help="folder in MiniOneRec's layout (default: the synthetic catalogue)")
    p.add_argument("--category", default=Config().category, help="default: %(default)s")
    p.add_argument("--item-embeddings", metavar="NPY", help="of the items (default: from clicks)")
    p.add_argument("--seeds", default="0,1,2,3,4", help="default: %(default)s")
    p.add_argument("--parts", default=",".join(PARTS), help="some of %(default)s (default: all)")
    p.add_argument("--threads", type=int, default=1, help="default: %(default)s, bit-for-bit repeatable")
    p.add_argument("--rl-steps", type=int, default=100, help="default: %(default)s")
    p.add_argument("--sft-epochs", type=int, help="default: as in python -m vstar_ops.train")
    p.add_argument("--valid-rows", type=int, default=2000, help="to choose by (default: %(default)s)")
    p.add_argument("--test-rows", type=int, help="a fixed random part of the test split (default: all)")
    p.add_argument("--page", type=Path, help="a Markdown page whose marked part is replaced by the tables")
    args = p.parse_args(argv)
    parts = args.parts.split(",")
    if set(parts) - set(PARTS):
        p.error(f"--parts: expected some of {', '.join(PARTS)}, got {args.parts!r}")
    try:
        seeds = tuple(dict.fromkeys(int(s) for s in args.seeds.split(",")))
        dataset = load_minionerec(args.data, args.category) if args.data else synthetic()
    except (OSError, ValueError) as error:
        p.error(str(error))
    changes = {"sft_epochs": args.sft_epochs} if args.sft_epochs else {}
    changes |= {
        name: getattr(args, name) for name in ("data", "item_embeddings", "threads", "rl_steps", "valid_rows")
    }
    config = (Config() if args.data else Config.synthetic()).replace(
        **changes, category=args.category, seeds=seeds, rl_evals=4
    )
    rows = {"valid": args.valid_rows, "test": args.test_rows}
    folder = args.out or Path("runs") / f"study-{dataset.name}"
    folder.mkdir(parents=True, exist_ok=True)
    text, known = config.replace(seeds=()).to_json() + json.dumps(rows), folder / "config.json"
    if known.exists() and known.read_text() != text:
        p.error(f"{folder} holds a study of other settings: choose another --out")
    checkpoint.save_text(known, text)
    torch.set_num_threads(args.threads)
    try:
        text = run(dataset, config, folder, parts, rows)
    except (checkpoint.Mismatch, FloatingPointError) as error:
        p.exit(1, f"{p.prog}: error: {error}\n")
    print(text)
    print(f"in {folder}: study.md, study.json, study.svg")
    if args.page:
        study_report.replace_part(args.page, dataset.name, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
