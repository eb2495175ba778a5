"""``python -m vstar_ops.train``: supervised training, then reinforcement, then a table."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from ..decoding import VEDConfig
from ..trie import Trie
from . import checkpoint, parallel, pictures, report
from .config import DECODERS, OBJECTIVES, Config, Variant
from .data import Dataset, load_minionerec
from .decode import Decoder
from .metrics import Scores, evaluate
from .model import SIDTransformer
from .reinforce import reinforce
from .supervised import supervised
from .synthetic import synthetic
from .trainer import Run
from .value import load_embeddings


def run(config: Config, dataset: Dataset, folder: Path, world: parallel.World) -> str:
    """All seeds, one after the other, and their report; what is done already is not done again.

    Empty in processes other than the main one.
    """
    trie = Trie.from_sequences(dataset.sequences).to(world.device)
    if dataset.reward is not None:
        dataset = dataclasses.replace(dataset, reward=dataset.reward.to(world.device))
    if world.is_main:
        print(
            f"{dataset.name}: {len(dataset.sequences)} items, {trie.num_sequences} distinct semantic IDs; "
            f"{len(dataset.train)} training, {len(dataset.valid)} valid, {len(dataset.test)} test requests"
        )
        print(
            f"Seeds: {len(config.seeds)}. Each: at most {config.sft_epochs} epochs of supervised training, "
            f"then {config.rl_steps} steps of reinforcement of {', '.join(map(str, config.variants))}.\n"
            "Every stage says how long it still takes. (The demo takes four minutes on two cores.)",
            flush=True,
        )
    results: dict[int, dict[str, Scores]] = {}
    runs = [Run(config, dataset, trie, folder / f"seed-{seed}", seed, world) for seed in config.seeds]
    for one in runs:
        one.check()
    for one in runs:
        path = one.folder / "results.json"
        if not world.broadcast(path.exists()):
            rows = run_seed(one)
            if world.is_main:
                checkpoint.save_text(path, json.dumps(rows, indent=1, allow_nan=False))
        if world.is_main:
            results[one.seed] = json.loads(path.read_text())
    if not world.is_main:
        return ""
    title = f"{dataset.name}, test split, {config.candidates} candidates per request"
    text = report.write(folder, title, results, config)
    pictures.write(folder)
    return text


def run_seed(run: Run) -> dict[str, Scores]:
    """All stages; row name -> scores on the test split, which is looked at here, once, at the end.

    Empty in processes other than the main one.
    """
    c = run.config
    run.folder.mkdir(parents=True, exist_ok=True)
    beam = Decoder("beam", c.candidates)
    tested = Decoder(c.test_decoder, c.candidates, c.ved.for_evaluation())

    def scores(model: SIDTransformer, split: str, decoder: Decoder, rows: int | None = None) -> Scores:
        with run.autocast():
            return evaluate(model, run.dataset, run.trie, decoder.for_model(model), split, rows)

    on_valid = functools.partial(scores, split="valid", decoder=tested, rows=c.valid_rows)
    sft, figures = supervised(run, on_valid)
    stages = [("sft", "SFT", sft, figures)]
    for variant in c.variants:
        stages.append((str(variant), variant.row_name, *reinforce(run, variant, sft, on_valid)))
    results: dict[str, Scores] = {}
    for stage, row, model, figures in stages if run.world.is_main else ():
        checkpoint.save(run.folder / f"{stage}.weights.pt", model.state_dict())
        decoders = {row: tested}
        if tested.for_model(model).name != "beam":
            decoders[f"{row}, beam search at test"] = beam
        if c.validate:
            valid = {name: scores(model, "valid", one)["NDCG@10"] for name, one in decoders.items()}
        for name, one in decoders.items():
            results[name] = scores(model, "test", one) | figures
            if c.validate:
                results[name]["valid_NDCG@10"] = valid[name]
    if run.world.is_main:
        pictures.of_seed(run, {row: model for _, row, model, _ in stages})
    return results


# ------------------------------------------------------------------ the command line


def parser() -> argparse.ArgumentParser:
    """The options; only those that are given are in what it parses."""
    p = argparse.ArgumentParser(
        prog="python -m vstar_ops.train",
        description="Train a generative recommender over semantic IDs: supervised, then by reinforcement on "
        "the candidates of a decoder. Without arguments on an embedded synthetic catalogue.",
        argument_default=argparse.SUPPRESS,
    )
    real, made = Config(), Config.synthetic()
    p.add_argument("--out", type=Path, help="the run's folder (default: runs/<data>-<time>)")
    p.add_argument("--resume", type=Path, metavar="RUN", help="continue the killed run in this folder")
    p.add_argument(
        "--device",
        default="auto",
        help="cpu, cuda, cuda:1, or auto: cuda where there is a GPU; a resumed run may move (default: auto)",
    )
    for name, known in (("decoder", DECODERS), ("objective", OBJECTIVES)):
        some_of = functools.partial(_some_of, known)
        p.add_argument(f"--{name}", type=some_of, help=f"of the variants: some of {','.join(known)}")
    p.epilog = (
        "Every --objective is trained with every --decoder; where one is missing it is joint or beam. "
        f"Without both: {', '.join(map(str, real.variants))}, the last of which is V-STAR."
    )
    options = ", ".join(f"{name}={value}" for name, value in dataclasses.asdict(real.ved).items())
    p.add_argument(
        "--ved",
        nargs="+",
        metavar="OPTION=VALUE",
        help="options of the tree search, or paper for the paper's own; default: "
        f"{options}; on synthetic data value_weight={made.ved.value_weight}",
    )
    for field in dataclasses.fields(Config):
        if not field.metadata:
            continue
        keywords, name = dict(field.metadata), field.name.replace("_", "-")
        if field.default is True:
            p.add_argument(f"--no-{name}", dest=field.name, action="store_false", **keywords)
            continue
        values = [getattr(config, field.name) for config in (made, real)]
        if isinstance(field.default, (int, float, str)):
            default = "{} on synthetic data, {} otherwise" if values[0] != values[1] else "{}"
            keywords["help"] += f" (default: {default.format(*values)})"
        p.add_argument(f"--{name}", **{"type": _PARSE.get(str(field.type), str), **keywords})
    return p


def main(argv: list[str] | None = None) -> int:
    """Parse the options, run, print the table."""
    p = parser()
    given = vars(p.parse_args(argv))
    try:
        device = parallel.choose_device(given.pop("device"))
    except ValueError as error:
        p.error(str(error))
    with parallel.world(device) as world:
        try:
            folder, config, dataset = _prepare(given, world)
        except (OSError, TypeError, ValueError) as error:
            p.error(str(error))
        if world.is_main:
            checkpoint.save_text(folder / "config.json", config.to_json())
        if config.threads:
            torch.set_num_threads(config.threads)
        try:
            text = run(config, dataset, folder, world)
        except (checkpoint.Mismatch, FloatingPointError) as error:
            p.exit(1, f"{p.prog}: error: {error}\n" if world.is_main else None)
        if world.is_main:
            print(text)
            print(f"in {folder}: report.html, results.md with all columns, results.json, a folder per seed")
        return 0


def _prepare(given: dict[str, Any], world: parallel.World) -> tuple[Path, Config, Dataset]:
    """Folder, config and data of the options that were given."""
    if "resume" in given:
        folder = given.pop("resume")
        if not (folder / "config.json").exists():
            raise ValueError(f"{folder} holds no run (no config.json)")
        if given:
            raise ValueError("--resume continues a run with the options it was started with: give no others")
        config = Config.from_json((folder / "config.json").read_text())
    else:
        out = given.pop("out", None)
        config = _config(given)
        name = config.category if config.data else "synthetic"
        folder = world.broadcast(out or Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}")
        if world.broadcast((folder / "config.json").exists()):
            raise ValueError(f"{folder} already holds a run: choose another --out, or give --resume {folder}")
    if config.data:
        dataset = load_minionerec(config.data, config.category, validate=config.validate)
    else:
        dataset = synthetic()
    if config.item_embeddings:
        load_embeddings(config.item_embeddings, len(dataset.sequences))  # fail now, not after a stage
    if config.reward == "true" and dataset.reward is None:
        raise ValueError("--reward true needs the synthetic catalogue; on real data choose one by the click")
    folder.mkdir(parents=True, exist_ok=True)
    return folder, config, dataset


def _config(given: dict[str, Any]) -> Config:
    """The config of the options that were given."""
    base = Config() if "data" in given else Config.synthetic()
    decoders, objectives = given.pop("decoder", None), given.pop("objective", None)
    if decoders or objectives:
        pairs = itertools.product(decoders or ("beam",), objectives or ("joint",))
        given["variants"] = tuple(Variant(*pair) for pair in pairs)
    return base.replace(**given | {"ved": _ved(given.get("ved", ()), base.ved)})


def _ved(words: Iterable[str], config: VEDConfig) -> VEDConfig:
    """``config`` changed by the words of ``--ved``: OPTION=VALUE, or ``paper``, which changes them all."""
    types = {field.name: str(field.type) for field in dataclasses.fields(VEDConfig)}
    changes: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if word == "paper":
            config, changes = VEDConfig.paper(), {}
        elif name not in types or not equals:
            raise ValueError(f"--ved: expected paper or OPTION=VALUE of {', '.join(types)}, got {word!r}")
        else:
            parse, expected = _VED_TYPES[types[name]]
            try:
                changes[name] = parse(text)
            except (KeyError, ValueError):
                raise ValueError(f"--ved: {name} must be {expected}, got {text!r}") from None
    return config.replace(**changes)


def _some_of(known: Iterable[str], text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(text.split(",")))
    if unknown := [name for name in names if name not in known]:
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(known)}, got {unknown[0]!r}")
    return names


def _seeds(text: str) -> tuple[int, ...]:
    try:
        return tuple(dict.fromkeys(map(int, text.split(","))))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected whole numbers as 0,1,2, got {text!r}") from None


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


# How options are parsed, by the type of their field.
_PARSE: dict[str, Callable[[str], Any]] = {
    "int": _positive,
    "int | None": _positive,
    "float": float,
    "tuple[int, ...]": _seeds,
}
_VED_TYPES: dict[str, tuple[Callable[[str], Any], str]] = {
    "bool": (lambda text: {"true": True, "false": False}[text.lower()], "true or false"),
    "int": (int, "a whole number"),
    "int | None": (lambda text: None if text.lower() == "none" else int(text), "a whole number or none"),
    "float": (float, "a number"),
    "str": (str, "a name"),
}


if __name__ == "__main__":
    sys.exit(main())
