"""What a run depends on: :class:`Config`, whose fields are the options of the command line."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from ..decoding import VEDConfig
from ..ops._checks import check_choice, check_finite
from ..ops._forms import FORMS

# Names in options and files, and what tables call them.
DECODERS = {"beam": "beam candidates", "topk": "top-k samples", "ved": "VED"}
OBJECTIVES = {"grpo": "GRPO", "sibling": "sibling advantages only", "joint": "Sibling-GRPO"}
DTYPES = ("float32", "bfloat16")
REWARDS = ("true", "rule", "ranking", "prefix")


@dataclass(frozen=True)
class Variant:
    """One way to train by reinforcement. As text, in files and JSON, it is ``decoder+objective``.

    Attributes:
        decoder: finds the candidates; a key of :data:`DECODERS`.
        objective: a key of :data:`OBJECTIVES`.

    Raises:
        ValueError: a name is not known.
    """

    decoder: str
    objective: str

    def __post_init__(self) -> None:
        for known, name in ((DECODERS, "decoder"), (OBJECTIVES, "objective")):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")

    @classmethod
    def parse(cls, text: str) -> Variant:
        """The variant whose ``str`` is ``text``."""
        decoder, _, objective = text.partition("+")
        return cls(decoder, objective)

    def __str__(self) -> str:
        return f"{self.decoder}+{self.objective}"

    @property
    def row_name(self) -> str:
        """The variant's name in tables."""
        prefix = "V-STAR: " if (self.decoder, self.objective) == ("ved", "joint") else "+ "
        return f"{prefix}{OBJECTIVES[self.objective]} with {DECODERS[self.decoder]}"


# What may change between two lives of a run. Data and embeddings are known by their content, not their path.
_SETTINGS_OF_NO_WEIGHT = {"data", "category", "item_embeddings", "variants", "seeds", "threads", "ved"}
_SETTINGS_OF_NO_WEIGHT |= {"checkpoint_every", "max_skipped"}

_SHARES = {"dropout", "label_smoothing", "item_dropout"}
_NEVER_NEGATIVE = {"sft_lr", "rl_lr", "value_lr", "weight_decay"}


def option(default: Any, help: str, **argparse: Any) -> Any:
    """A field that is an option of the command line, with further keywords of ``add_argument``."""
    return dataclasses.field(default=default, metadata={"help": help, **argparse})


@dataclass(frozen=True)
class Config:
    """All options of a run. The defaults are those on real data.

    Raises:
        TypeError, ValueError: a number that no stage could be trained with, by name.
    """

    data: str | None = option(None, "folder in MiniOneRec's layout (default: the synthetic catalogue)")
    category: str = option("Industrial_and_Scientific", "which of its catalogues")
    variants: tuple[Variant, ...] = tuple(map(Variant.parse, ("beam+grpo", "beam+joint", "ved+joint")))
    seeds: tuple[int, ...] = option((0,), "one or several, as 0,1,2; several give intervals (default: 0)")
    dtype: str = option("float32", "of the models' layers; weights and losses are float32", choices=DTYPES)
    threads: int | None = option(None, "CPU threads; one is repeatable bit for bit (default: torch's choice)")
    candidates: int = option(16, "candidates per request, and beam width")
    pack: bool = option(True, "run each prompt once per candidate, the conventional way, for comparison")
    reward: str | None = option(None, "default: true on synthetic data, otherwise ranking", choices=REWARDS)
    sft_epochs: int = option(60, "epochs of supervised training")
    sft_batch_size: int = option(64, "users per step")
    sft_lr: float = option(1e-3, "peak learning rate of supervised training")
    rl_steps: int = option(300, "steps of reinforcement")
    rl_batch_size: int = option(64, "requests per step")
    rl_lr: float = option(1e-4, "learning rate of reinforcement")
    sibling_weight: float = option(0.3, "weight of the sibling term in joint")
    sibling_form: str = option("centered", "of the sibling term; paper: Eqs. 17-19", choices=tuple(FORMS))
    sibling_decay: float = option(
        1.0, "what a level of the sibling term weighs, times that of the level above"
    )
    kl_weight: float = option(1e-3, "weight of the KL divergence from the supervised model")
    ved: VEDConfig = VEDConfig.training()  # noqa: RUF009 (it is immutable)
    value_lr: float = option(1e-3, "learning rate of the value head")
    gamma: float = option(0.99, "discount of V's targets")
    item_embeddings: str | None = option(None, ".npy file, E numbers per item (default: from the clicks)")
    item_prior: bool = option(True, "do not tell policy and V how near the user's items are to a prefix")
    test_decoder: str = option(
        "beam",
        "in early stopping and at test; ved is for models with a value head, which get a row for beam too",
        choices=("beam", "ved"),
    )
    dropout: float = option(0.2, "dropout rate of supervised training")
    label_smoothing: float = option(0.1, "label smoothing over legal tokens")
    item_dropout: float = option(0.2, "fraction of a user's items left out at random")
    weight_decay: float = option(0.01, "weight decay of supervised training")
    sft_evals: int = option(10, "number of evaluations on the valid split")
    rl_evals: int = option(10, "number of evaluations on the valid split")
    patience: int = option(4, "number of evaluations without a new best that end a stage")
    valid_rows: int = option(2000, "rows of the valid split to evaluate on while training")
    validate: bool = option(True, "do without a valid split: no early stopping, the last weights are kept")
    checkpoint_every: int = option(50, "steps between checkpoints")
    max_skipped: int = option(
        5, "steps in a row, skipped as loss or gradient is not finite, that end the run"
    )

    def __post_init__(self) -> None:
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("sibling_form", self.sibling_form, tuple(FORMS))
        for name in (field.name for field in dataclasses.fields(self) if field.type == "float"):
            value = check_finite(name, getattr(self, name))
            if name in _SHARES and not 0 <= value <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {value}")
            if name in _NEVER_NEGATIVE and value < 0:
                raise ValueError(f"{name} must be >= 0, got {value}")

    @classmethod
    def synthetic(cls) -> Config:
        """The defaults on the synthetic catalogue, which is easier to fit and has a denser reward. V learns
        that reward itself, so it deserves more weight. The reward does not ask for the clicks: the KL
        divergence from the supervised policy keeps what that has learned of them."""
        ved = VEDConfig.training(value_weight=10.0)
        return cls(sft_epochs=12, rl_steps=150, rl_lr=6e-4, kl_weight=1.0, ved=ved)

    def replace(self, **changes: Any) -> Config:
        """This config with some fields changed."""
        return dataclasses.replace(self, **changes)

    def settings(self) -> dict[str, Any]:
        """What decides a stage's weights beside the data; by this a checkpoint knows its run."""
        values = {name: value for name, value in vars(self).items() if name not in _SETTINGS_OF_NO_WEIGHT}
        return values | {f"ved.{name}": value for name, value in dataclasses.asdict(self.ved).items()}

    def to_json(self) -> str:
        """Text for :meth:`from_json`."""
        return json.dumps(dataclasses.asdict(self) | {"variants": list(map(str, self.variants))}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Config:
        """The config that :meth:`to_json` wrote."""
        values: dict[str, Any] = json.loads(text)
        values["variants"] = tuple(map(Variant.parse, values["variants"]))
        values |= {"seeds": tuple(values["seeds"]), "ved": VEDConfig(**values["ved"])}
        return cls(**values)
