"""``python -m vstar_ops.train``: supervised training, then reinforcement, then a table."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..trie import Trie
from . import checkpoint, parallel, report
from .data import Dataset, load_minionerec
from .decode import DECODERS, PAPER, TUNED, VED_OPTIONS
from .loop import OBJECTIVES, Config, Job, run_seed
from .rewards import NAMES
from .synthetic import synthetic
from .value import load_embeddings

# What differs from Config on the embedded catalogue, which is easier to fit and has a denser reward. V learns
# that reward itself, and knows more of it than the clicks do.
SYNTHETIC: dict[str, Any] = {"sft_epochs": 12, "rl_steps": 150, "rl_lr": 6e-4, "sibling_weight": 0.1}
SYNTHETIC["ved"] = {**TUNED, "value_weight": 30.0}


def parser() -> argparse.ArgumentParser:
    default = dataclasses.asdict(Config()) | dict.fromkeys(SYNTHETIC)
    p = argparse.ArgumentParser(
        prog="python -m vstar_ops.train",
        description="Train a generative recommender over semantic IDs: supervised, then by reinforcement on "
        "the candidates of a decoder. Without arguments on an embedded synthetic catalogue.",
    )

    def add(name: str, help: str, **kw: object) -> None:
        kw.setdefault("type", str)
        field = name.removeprefix("--").replace("-", "_")
        p.add_argument(name, help=help, default=default[field], **kw)  # type: ignore[arg-type]

    p.add_argument("--out", type=Path, help="the run's folder (default: runs/<data>-<time>)")
    p.add_argument("--resume", type=Path, metavar="RUN", help="continue the killed run in this folder")
    add("--data", "folder in MiniOneRec's layout (default: the synthetic catalogue)", metavar="DIR")
    add("--category", "which of its catalogues (default: %(default)s)", metavar="NAME")
    p.add_argument(
        "--decoder",
        type=_some_of(DECODERS),
        help=f"finds the candidates of training: some of {','.join(DECODERS)} (default: beam)",
    )
    p.add_argument(
        "--objective",
        type=_some_of(OBJECTIVES),
        help=f"some of {','.join(OBJECTIVES)}, each with each decoder (default: joint; without --decoder and "
        f"--objective {', '.join(Config().variants)}, the last being V-STAR)",
    )
    add(
        "--test-decoder",
        "in early stopping and at test: beam, or ved for what has a value head, which then has a row for "
        "beam search too (default: %(default)s)",
        choices=("beam", "ved"),
    )
    p.add_argument(
        "--ved",
        nargs="+",
        metavar="OPTION=VALUE",
        help="options of the tree search, or paper for the paper's own: "
        f"{', '.join(VED_OPTIONS)}; default: {_ved_text(TUNED)}, on synthetic data "
        f"value_weight={SYNTHETIC['ved']['value_weight']}",
    )
    add(
        "--item-embeddings",
        "E numbers an item, for V and the dense return (default: from clicks)",
        metavar="NPY",
    )
    p.add_argument(
        "--no-item-prior",
        dest="item_prior",
        action="store_false",
        help="V learns from nothing how near the user's items are to a prefix",
    )
    add(
        "--value-return",
        "what V learns from: the reward, or the dense return of Eq. 8 (default: reward for true, else dense)",
        choices=("reward", "dense"),
    )
    add("--value-lr", "of the value head (default: %(default)s)", type=float)
    add("--value-loss-weight", "default: %(default)s", type=float)
    add("--gamma", "discount of V's targets (default: %(default)s)", type=float)
    p.add_argument("--seed", type=int, help="one seed (default: 0)")
    add("--seeds", "several seeds, as 0,1,2: adds 95%% intervals", type=_seeds)
    p.add_argument(
        "--no-pack",
        dest="pack",
        action="store_false",
        help="run a prompt once with each of its candidates, the conventional way, for comparison",
    )
    add("--threads", "CPU threads; one is bit-for-bit repeatable (default: torch's choice)", type=_positive)
    add("--candidates", "beam width, candidates a request (default: %(default)s)", type=_positive)
    add("--reward", "default: true on synthetic data, ranking else", choices=NAMES)
    add("--sft-epochs", _both("sft_epochs"), type=_positive)
    add("--sft-batch-size", "users a step (default: %(default)s)", type=_positive)
    add("--sft-lr", "peak learning rate (default: %(default)s)", type=float)
    add("--rl-steps", _both("rl_steps"), type=_positive)
    add("--rl-batch-size", "requests a step (default: %(default)s)", type=_positive)
    add("--rl-lr", _both("rl_lr"), type=float)
    add("--clip", "bounds LOW HIGH of the ratio, as 0.2 0.28 (default: none)", type=float, nargs=2)
    add("--sibling-weight", _both("sibling_weight", "weight of the sibling term in joint; "), type=float)
    add("--kl-weight", "weight of the KL to the supervised model (default: %(default)s)", type=float)
    add("--dropout", "default: %(default)s", type=float)
    add("--label-smoothing", "over legal tokens (default: %(default)s)", type=float)
    add("--item-dropout", "share of a user's items left out at random (default: %(default)s)", type=float)
    add("--weight-decay", "default: %(default)s", type=float)
    add("--sft-evals", "looks at the valid split (default: %(default)s)", type=_positive)
    add("--rl-evals", "looks at the valid split (default: %(default)s)", type=_positive)
    add("--patience", "looks without a new best that end a stage (default: %(default)s)", type=_positive)
    add("--valid-rows", "rows of valid looked at while training (default: %(default)s)", type=_positive)
    add("--checkpoint-every", "steps (default: %(default)s)", type=_positive)
    return p


def main(argv: list[str] | None = None) -> int:
    with parallel.world() as world:
        return _main(argv, world)


def _main(argv: list[str] | None, world: parallel.World) -> int:
    p = parser()
    args = p.parse_args(argv)
    if args.resume:
        if not (args.resume / "config.json").exists():
            p.error(f"{args.resume} holds no run (no config.json)")
        if len(argv if argv is not None else sys.argv[1:]) > 2:
            p.error("--resume continues a run with the options it was started with: give no others")
        folder = args.resume
        config = _config(json.loads((folder / "config.json").read_text()))
    else:
        default = dataclasses.asdict(Config())
        values = {name: getattr(args, name, value) for name, value in default.items()}
        if args.decoder or args.objective:
            pairs = itertools.product(args.decoder or ("beam",), args.objective or ("joint",))
            values["variants"] = tuple(f"{decoder}+{objective}" for decoder, objective in pairs)
        try:
            values["ved"] = _ved(args.ved, SYNTHETIC["ved"] if args.data is None else TUNED)
        except ValueError as error:
            p.error(str(error))
        if args.seed is not None:
            values["seeds"] = (args.seed,)
        fallback = SYNTHETIC if args.data is None else default
        values |= {name: fallback[name] for name in SYNTHETIC if values[name] is None}
        config = _config(values)
        name = config.category if config.data else "synthetic"
        folder = world.broadcast(args.out or Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}")
        if world.broadcast((folder / "config.json").exists()):
            p.error(f"{folder} already holds a run: choose another --out, or give --resume {folder}")
    try:
        dataset = load_minionerec(config.data, config.category) if config.data else synthetic()
    except (OSError, ValueError) as error:
        p.error(str(error))
    if config.item_embeddings:
        try:
            load_embeddings(config.item_embeddings, len(dataset.sequences))
        except (OSError, ValueError) as error:
            p.error(str(error))
    if config.reward == "true" and dataset.reward is None:
        p.error("--reward true needs the synthetic catalogue; on real data choose rule or ranking")
    folder.mkdir(parents=True, exist_ok=True)
    if world.is_main:
        checkpoint.save_text(folder / "config.json", json.dumps(dataclasses.asdict(config), indent=1))
    if config.threads:
        torch.set_num_threads(config.threads)
    text = run(config, dataset, folder, world)
    if world.is_main:
        print(text)
        print(f"in {folder}: results.md, results.json, curves.png, and a folder a seed")
    return 0


def run(config: Config, dataset: Dataset, folder: Path, world: parallel.World) -> str:
    """All seeds, one after the other; what is already done is not done again. Empty where ``world`` is led by
    another process."""
    trie = Trie.from_sequences(dataset.sequences)
    if world.is_main:
        print(
            f"{dataset.name}: {len(dataset.sequences)} items, {trie.num_sequences} distinct semantic IDs; "
            f"{len(dataset.train)} training, {len(dataset.valid)} valid, {len(dataset.test)} test requests"
        )
    results: report.Results = {}
    for seed in config.seeds:
        job = Job(config, dataset, trie, folder / f"seed-{seed}", seed, world)
        path = job.folder / "results.json"
        if not world.broadcast(path.exists()):
            rows = run_seed(job)
            if world.is_main:
                checkpoint.save_text(path, json.dumps(rows, indent=1))
        if world.is_main:
            results[seed] = json.loads(path.read_text())
    if not world.is_main:
        return ""
    title = f"{dataset.name}, test split, {config.candidates} candidates a request"
    return report.write(folder, title, results, config.variants)


def _both(name: str, what: str = "") -> str:
    return f"{what}default: {SYNTHETIC[name]} on synthetic data, {getattr(Config(), name)} else"


def _config(values: dict[str, object]) -> Config:
    """A Config of parsed options or of JSON, whose lists are tuples again."""
    return Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})  # type: ignore[arg-type]


def _some_of(known: tuple[str, ...]) -> Callable[[str], tuple[str, ...]]:
    def parse(text: str) -> tuple[str, ...]:
        names = tuple(text.split(","))
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(known)}, got {unknown[0]!r}")
        return tuple(dict.fromkeys(names))

    return parse


def _ved(words: list[str] | None, default: dict[str, Any]) -> dict[str, Any]:
    """The options of ``--ved``; what is not given is the default, or as in PAPER after the word ``paper``."""
    options = dict(default)
    for word in words or ():
        name, equals, text = word.partition("=")
        if word == "paper":
            options = dict(PAPER)
            continue
        if name not in VED_OPTIONS or not equals:
            raise ValueError(
                f"--ved: expected paper or OPTION=VALUE of {', '.join(VED_OPTIONS)}, got {word!r}"
            )
        kind = VED_OPTIONS[name]
        try:
            options[name] = {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
        except (KeyError, ValueError):
            raise ValueError(f"--ved: {name} must be {_KINDS[kind]}, got {text!r}") from None
    return options


_KINDS = {bool: "true or false", int: "a whole number", float: "a number"}


def _ved_text(options: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in options.items())


def _seeds(text: str) -> tuple[int, ...]:
    try:
        return tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected whole numbers as 0,1,2, got {text!r}") from None


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
