"""``python -m benchmarks.gradients``: which estimate of the policy gradient points along the exact one.

On the synthetic catalogue, whose reward is known for every item, for the supervised policy and for those
that it becomes by reinforcement. There are two objectives: the expected reward, and the expected best of G
independent draws. The cosine of an estimate with the exact gradient is taken

- by the logits of all prefixes, per request, for one draw of G candidates (bias and noise) and for the mean
  of many draws (what remains is bias);
- by the policy's weights, for a batch of requests, which is what an optimizer sees.

Cells that are done are kept, so that a killed run continues. About 10 minutes on one core.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vstar_ops import Trie
from vstar_ops.train import checkpoint, report
from vstar_ops.train.config import Config, Variant
from vstar_ops.train.data import Dataset, Split
from vstar_ops.train.decode import Decoder
from vstar_ops.train.model import SIDTransformer
from vstar_ops.train.reinforce import new_policy, reinforce
from vstar_ops.train.scoring import candidate_rows
from vstar_ops.train.supervised import supervised
from vstar_ops.train.synthetic import synthetic
from vstar_ops.train.trainer import Run

from .gradients_report import BEAM, DISTINCT, MAIN, NORMALIZED, SAMPLED, WEIGHTED, figure, tables
from .policy_tree import (
    Draws,
    Tree,
    best_of,
    cosine,
    estimates,
    gumbel_top,
    sample,
    searched,
    weighted_estimates,
)

GROUPS = (8, 16, 32, 64, 128, 256)
SUPERVISED = "supervised"
VSTAR = Variant("ved", "joint")
POLICIES: dict[str, tuple[Variant, int]] = {
    SUPERVISED: (VSTAR, 0),
    "GRPO, 50 steps": (Variant("beam", "grpo"), 50),
    "GRPO, 150 steps": (Variant("beam", "grpo"), 150),
    "V-STAR, 150 steps": (VSTAR, 150),
}
_AT_ONCE = 16  # requests whose tree is run at once
_SINGLE = 8  # draws that are looked at alone


@dataclass(frozen=True)
class Case:
    """A policy and requests, and what is exact about them.

    Attributes:
        logp: float64 ``[B, E]``, of each edge.
        reward: float64 ``[B, leaves]``.
    """

    tree: Tree
    model: SIDTransformer
    requests: Split
    logp: Tensor
    reward: Tensor

    @classmethod
    def of(cls, tree: Tree, model: SIDTransformer, dataset: Dataset, requests: Split) -> Case:
        assert dataset.reward is not None
        every = tree.sequences(torch.arange(len(tree.path)))
        reward = dataset.reward(requests.user, every.expand(len(requests), *every.shape))
        with torch.no_grad():
            parts = [tree.logp(tree.logits(model, part)) for part in requests.context.split(_AT_ONCE)]
        return cls(tree, model, requests, torch.cat(parts), reward.double())

    @functools.cached_property
    def leaf_logp(self) -> Tensor:
        return self.tree.leaf_logp(self.logp)

    @functools.cached_property
    def exact(self) -> Tensor:
        """The gradient of the expected reward by the logits, ``[B, E]``."""
        return self.tree.exact(self.logp, self.reward)

    def exact_best(self, group: int) -> Tensor:
        """The gradient of the expected best of ``group`` draws."""
        return self.tree.exact(self.logp, best_of(self.leaf_logp.exp(), self.reward, group))

    def candidates(self, group: int, config: Config, draws: int) -> Iterator[tuple[str, Draws]]:
        """All kinds of candidates; VED only with a value head, scaled from 16 candidates to the group."""
        yield SAMPLED, sample(self.leaf_logp, draws, group)
        found = gumbel_top(self.leaf_logp, draws, group)
        yield DISTINCT, replace(found, share=None)
        yield WEIGHTED, found
        assert found.share is not None
        yield NORMALIZED, replace(found, share=found.share / found.share.sum(2, keepdim=True))
        decoders = {BEAM: Decoder("beam", group)}
        if self.model.value_head is not None:
            numbers = ("beam_width", "num_value_beams", "num_policy_candidates")
            scaled = {name: round(getattr(config.ved, name) * group / config.candidates) for name in numbers}
            decoders["VED"] = Decoder("ved", group, config.ved.replace(**scaled))
        for name, decoder in decoders.items():
            found = searched(decoder, self.model, self.requests.context, self.tree, self.leaf_logp)
            yield name, replace(found, share=None)
            yield f"{name}, weighted", found

    def coefficients(self, draws: Draws) -> dict[str, Tensor]:
        """By estimator a number per token, ``[B, D, G, L]``."""
        leaf = draws.leaf.clamp(min=0)
        reward = self.reward.gather(1, leaf.flatten(1)).float().view(leaf.shape).flatten(0, 1)
        nodes = self.tree.path[leaf].flatten(0, 1)
        if draws.share is None:
            found = estimates(nodes, reward, (draws.leaf >= 0).flatten(0, 1))
        else:
            found = weighted_estimates(nodes, reward, draws.p.flatten(0, 1), draws.share.flatten(0, 1))
        return {name: x.unflatten(0, leaf.shape[:2]) for name, x in found.items()}

    def weight_of(self, draws: Draws, coefficients: Tensor) -> Tensor:
        """``[B, E]``: the sum of the coefficients of each edge, mean over the draws."""
        edges = self.tree.path[draws.leaf.clamp(min=0)]
        total = torch.zeros_like(self.logp).scatter_add_(1, edges.flatten(1), coefficients.flatten(1))
        return total / edges.shape[1]

    def alone(self, draws: Draws, coefficients: Tensor) -> Iterator[Tensor]:
        """The estimate by the logits of each of the first draws, ``[B, E]``."""
        for leaf, c in zip(draws.leaf.unbind(1)[:_SINGLE], coefficients.unbind(1)):
            yield self.tree.gradient(self.logp, self.weight_of(Draws(leaf[:, None], draws.p), c[:, None]))


def exact_figures(case: Case, groups: tuple[int, ...]) -> dict[str, Any]:
    """What the policy is, and where its gradient lies."""
    p, levels = case.leaf_logp.exp(), case.tree.levels
    norms = torch.stack([case.exact[:, level].square().sum(1) for level in levels], 1)
    return {
        "perplexity": (-(p * case.leaf_logp).sum(1)).exp().median().item(),
        "reward": (p * case.reward).sum(1).mean().item(),
        "decided": case.tree.decided(case.logp, case.reward).mean(0).tolist(),
        "gradient": (norms / norms.sum(1, keepdim=True)).mean(0).tolist(),
        "best": {str(g): cosine(case.exact, case.exact_best(g)).mean().item() for g in groups},
    }


def by_logits(case: Case, group: int, config: Config) -> dict[str, Any]:
    """Candidates -> estimator -> cosines per request, means over requests and draws."""
    best, levels = case.exact_best(group), case.tree.levels
    result: dict[str, Any] = {}
    for kind, draws in case.candidates(group, config, draws=min(256, max(16, 4096 // group))):
        result[kind], first = {}, None
        for name, coefficients in case.coefficients(draws).items():
            mean = case.tree.gradient(case.logp, case.weight_of(draws, coefficients))
            single = torch.stack(list(case.alone(draws, coefficients)))
            one = cosine(single, case.exact).mean(0)
            first = one if first is None else first
            result[kind][name] = {
                "one": one.mean().item(),
                "mean": cosine(mean, case.exact).mean().item(),
                "one best": cosine(single, best).mean().item(),
                "mean best": cosine(mean, best).mean().item(),
                "levels": [cosine(single[..., x], case.exact[:, x]).mean().item() for x in levels],
                "gain": report.mean_interval((one - first).tolist()),  # over the first, GRPO
            }
    return result


def by_weights(case: Case, group: int, config: Config, draws: int = 2) -> dict[str, Any]:
    """Cosines of the gradients by the policy's weights, summed over all requests: candidates -> estimator ->
    mean over the draws."""
    model = copy.deepcopy(case.model)
    model.value_head = None  # the policy alone
    part = functools.partial(_gradients, list(model.parameters()), len(case.requests))
    context, trie = case.requests.context, case.tree.trie

    def whole(rows: slice) -> Tensor:
        return case.tree.logits(model, context[rows])

    exact, best = part(whole, [case.tree.by_child(x) for x in (case.exact, case.exact_best(group))])
    result: dict[str, Any] = {"exact": {"expected reward": {"best": cosine(exact, best).item()}}}
    for kind, found in case.candidates(group, config, draws):
        result[kind] = {}
        every = {name: x for name, x in case.coefficients(found).items() if name in MAIN}
        scores: list[Tensor] = []
        for draw in range(found.leaf.shape[1]):
            tokens = case.tree.sequences(found.leaf[:, draw])

            def logp(rows: slice, tokens: Tensor = tokens) -> Tensor:
                return candidate_rows(model, context[rows], trie, tokens[rows]).scores(model.packed).logp

            vectors = part(logp, [x[:, draw] for x in every.values()])
            scores.append(torch.stack([cosine(vectors, target) for target in (exact, best)]))
        for name, (one, one_best) in zip(every, torch.stack(scores).mean(0).T.tolist()):
            result[kind][name] = {"one": one, "one best": one_best}
    return result


def _gradients(
    parameters: list[Tensor], number: int, run: Callable[[slice], Tensor], weights: list[Tensor]
) -> Tensor:
    """``[K, P]``: the gradients of ``sum(weight * run(all rows))`` for each of ``K`` weights."""
    total = [torch.zeros(sum(p.numel() for p in parameters)) for _ in weights]
    for begin in range(0, number, _AT_ONCE):
        rows = slice(begin, begin + _AT_ONCE)
        output = run(rows)
        for sums, weight in zip(total, weights):
            found = torch.autograd.grad(
                output, parameters, weight[rows].to(output.dtype), retain_graph=True, materialize_grads=True
            )
            sums += torch.cat([x.flatten() for x in found])
    return torch.stack(total).double()


# ------------------------------------------------------------------ the part of the study


@dataclass(frozen=True)
class Study:
    """The policies and cells of one folder."""

    run: Run
    groups: tuple[int, ...]
    requests: int

    @functools.cached_property
    def supervised(self) -> SIDTransformer:
        return supervised(self._stage("supervised"), _never)[0]

    def _stage(self, name: str, **changes: Any) -> Run:
        folder = self.run.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        return replace(self.run, config=self.run.config.replace(**changes), folder=folder)

    def policy(self, name: str) -> SIDTransformer:
        """Trained, or read from its checkpoint."""
        variant, steps = POLICIES[name]
        if not steps:
            return new_policy(self.run, variant, self.supervised).eval()
        run = self._stage(f"{variant}-{steps}", rl_steps=steps)
        return reinforce(run, variant, self.supervised, _never)[0].eval()

    def cells(self, name: str) -> dict[str, Any]:
        """Of a policy: ``exact``, ``logits`` per group, ``weights`` for the second group."""
        folder, config = self.run.folder / "cells", self.run.config
        folder.mkdir(exist_ok=True)

        @functools.cache
        def case() -> Case:
            requests = self.run.dataset.train.part(self.requests)
            return Case.of(Tree(self.run.trie), self.policy(name), self.run.dataset, requests)

        def cell(part: str, measure: Callable[[], Any]) -> Any:
            path = folder / f"{name} {part}.json".replace(",", "").replace(" ", "-")
            if not path.exists():
                torch.manual_seed(self.run.seed)
                checkpoint.save_text(path, json.dumps(measure(), indent=1))
            return json.loads(path.read_text())

        def logits(group: int) -> Any:
            return cell(f"logits {group}", lambda: by_logits(case(), group, config))

        return {
            "exact": cell("exact", lambda: exact_figures(case(), self.groups)),
            "logits": {str(group): logits(group) for group in self.groups},
            "weights": cell("weights", lambda: by_weights(case(), self.groups[1], config)),
        }


def _never(_: SIDTransformer) -> dict[str, float]:
    raise AssertionError("nothing is evaluated without validation")


def part(
    folder: Path,
    *,
    dataset: Dataset | None = None,
    config: Config | None = None,
    groups: tuple[int, ...] = GROUPS,
    requests: int = 64,
    seed: int = 0,
) -> dict[str, Any]:
    """All cells; those in the folder are not measured again.

    Args:
        folder: for cells and checkpoints.
        dataset: one whose true reward is known (the synthetic catalogue).
        config: of the training (that of the synthetic catalogue).
        groups: numbers of candidates, at least two; the second is looked at by weights as well.
        requests: of the train split, a fixed random choice.
        seed: of the policies.

    Raises:
        Mismatch: the folder holds cells of other settings.
    """
    dataset = dataset or synthetic()
    config = (config or Config.synthetic()).replace(validate=False)
    folder.mkdir(parents=True, exist_ok=True)
    run = Run(config, dataset, Trie.from_sequences(dataset.sequences), folder, seed)
    settings = {"run": run.fingerprint, "groups": groups, "requests": requests, "seed": seed}
    text, known = json.dumps(settings, indent=1), folder / "settings.json"
    if known.exists() and known.read_text() != text:
        raise checkpoint.Mismatch(f"{folder} holds cells of other settings: choose another folder")
    checkpoint.save_text(known, text)
    study = Study(run, groups, requests)
    return {name: study.cells(name) for name in POLICIES}


def main(argv: list[str] | None = None) -> int:
    """Parse the options, run, print the tables."""
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.gradients", description=(__doc__ or "").split("\n")[0]
    )
    p.add_argument("--out", type=Path, default=Path("runs/gradients"), help="default: %(default)s")
    p.add_argument("--requests", type=int, default=64, help="default: %(default)s")
    p.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    p.add_argument("--threads", type=int, default=1, help="default: %(default)s, bit-for-bit repeatable")
    args = p.parse_args(argv)
    torch.set_num_threads(args.threads)
    try:
        result = part(args.out, requests=args.requests, seed=args.seed)
    except checkpoint.Mismatch as error:
        p.error(str(error))
    text = tables(result)
    checkpoint.save_text(args.out / "gradients.json", json.dumps(result, indent=1))
    checkpoint.save_text(args.out / "gradients.md", f"# Gradient quality\n\n{text}\n")
    figure(args.out / "gradients.png", result)
    print(text)
    print(f"in {args.out}: gradients.md, gradients.json, gradients.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
