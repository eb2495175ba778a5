"""The loop that both stages share: steps, evaluation, early stopping, checkpoints, resume.

Every random choice comes from torch's global generator, whose state is part of a checkpoint together with the
order of the data. So a killed run continues bit for bit on one thread, where torch itself is deterministic.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..trie import Trie
from . import checkpoint
from .config import Config
from .data import SPLITS, Dataset
from .model import SIDTransformer
from .parallel import World

Step = Callable[[Tensor, float], dict[str, float]]
Evaluate = Callable[[SIDTransformer], dict[str, float]]


@dataclass(frozen=True)
class Run:
    """What the stages of one seed share.

    The trie, models and what is computed are on the device of ``world``, the data set stays on the CPU, but
    for its true reward.

    Raises:
        ValueError: a split is empty that the config asks for.
    """

    config: Config
    dataset: Dataset
    trie: Trie
    folder: Path
    seed: int
    world: World = field(default_factory=World)

    def __post_init__(self) -> None:
        for name in SPLITS:
            if not len(getattr(self.dataset, name)) and (name != "valid" or self.config.validate):
                raise ValueError(f"{self.dataset.name}: the {name} split is empty")

    @property
    def device(self) -> torch.device:
        """Where models are."""
        return self.world.device

    @functools.cached_property
    def host_trie(self) -> Trie:
        """The trie on the CPU."""
        return self.trie.to("cpu")

    def autocast(self) -> AbstractContextManager[Any]:
        """The context in which models run, by ``config.dtype``."""
        if self.config.dtype == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, getattr(torch, self.config.dtype))

    @functools.cached_property
    def fingerprint(self) -> dict[str, Any]:
        """What a checkpoint must have been trained on for this run to use it."""
        path = self.config.item_embeddings
        vectors = hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else None
        found: dict[str, Any] = {**self.dataset.fingerprint, "item embeddings": vectors}
        return found | {"configuration": self.config.settings()}

    def check(self) -> None:
        """Refuse a folder whose supervised policy is another run's, see :func:`checkpoint.require`."""
        path = self.folder / "sft.pt"
        if path.exists():
            checkpoint.require(path, checkpoint.load(path), self.fingerprint)


@dataclass(frozen=True)
class Schedule:
    """The length of a stage and its learning rate.

    The learning rate rises over ``warmup`` steps and then stays, or falls along a cosine.
    """

    steps: int
    evals: int
    warmup: int
    cosine: bool = False

    def scale(self, step: int) -> float:
        """What the peak learning rate is multiplied by."""
        fall = 0.02 + 0.98 * (1 + math.cos(math.pi * step / self.steps)) / 2 if self.cosine else 1.0
        return min(1.0, (step + 1) / self.warmup) * fall

    def evaluates(self, step: int) -> bool:
        """Whether there is an evaluation after so many steps."""
        return step % max(1, math.ceil(self.steps / self.evals)) == 0 or step == self.steps


class Batches:
    """Endless batches of examples ``[size, ...]``: shuffled every epoch, those of similar length together.

    ``epoch()`` draws an epoch's examples ``[N, ...]`` and their lengths ``[N]``.
    """

    def __init__(self, epoch: Callable[[], tuple[Tensor, Tensor]], size: int) -> None:
        self.epoch, self.size = epoch, size
        self.plan: list[Tensor] = []
        self.position = 0

    def __next__(self) -> Tensor:
        if self.position == len(self.plan):
            examples, lengths = self.epoch()
            pools = torch.randperm(len(lengths)).split(8 * self.size)
            batches = [
                b for p in pools for b in examples[p[lengths[p].argsort(stable=True)]].split(self.size)
            ]
            self.plan, self.position = [batches[i] for i in torch.randperm(len(batches)).tolist()], 0
        self.position += 1
        return self.plan[self.position - 1]

    def state_dict(self) -> dict[str, Any]:
        return {"plan": self.plan, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


def optimizer_of(
    model: SIDTransformer, lr: float, weight_decay: float, value_lr: float = 0.0
) -> torch.optim.Optimizer:
    """AdamW. Biases and norms do not decay; the value head has a learning rate of its own."""
    policy, head = model.parts()
    groups: list[dict[str, Any]] = [
        {"params": [p for p in policy if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in policy if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if head:
        groups.append({"params": head, "weight_decay": weight_decay, "lr": value_lr})
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))


def fit(
    run: Run,
    stage: str,
    model: SIDTransformer,
    optimizer: torch.optim.Optimizer,
    batches: Batches,
    step: Step,
    evaluate: Evaluate,
    *,
    schedule: Schedule,
    metric: str,
) -> dict[str, float]:
    """Run a stage to its end, from its checkpoint if there is one; leave the best weights in ``model``.

    A step whose loss or gradient is not finite moves nothing, in no process: they all see the same averages.
    Without ``config.validate`` nothing is evaluated, and the last weights are left in ``model``.

    Args:
        stage: its name in files.
        step: ``step(examples, progress)`` computes the loss on this process' shard of the examples, calls
            backward and returns figures to log; ``progress`` rises from 0 to 1.
        evaluate: scores of the model on the valid split; only the main process is asked.
        metric: the score that chooses the best weights; ``config.patience`` evaluations without a new best
            end the stage.

    Returns:
        ``seconds`` spent, over all of the run's lives, without evaluation; ``steps`` taken, the
        ``best_step``, whose weights are left, and how many steps were ``skipped``.

    Raises:
        FloatingPointError: the metric or the weights are not finite, or ``config.max_skipped`` steps in a row
            were skipped. The last checkpoint is left as it is.
        Mismatch: the checkpoint is one of other data, settings or initial weights.
    """
    peak = [group["lr"] for group in optimizer.param_groups]
    state = _State(run, stage, model, optimizer, batches)
    now = state.progress
    first, began = now.step, time.perf_counter()
    figures: dict[str, float] = {}
    hidden = None if run.world.is_main else True  # None: shown on a terminal
    with tqdm(total=schedule.steps, initial=now.step, desc=f"seed {run.seed} {stage}", disable=hidden) as bar:

        def validate() -> None:
            scores: dict[str, float] = {}
            if run.config.validate:
                scores = run.world.broadcast(evaluate(model) if run.world.is_main else {})
                state.rate(metric, scores[metric])
            else:
                state.keep()
            record = {"step": now.step, "seconds": round(now.seconds, 2)}
            state.log(record | ({"valid": scores} if scores else {}))
            now.done = now.step == schedule.steps or now.bad >= run.config.patience
            state.save()
            text = f"valid {metric} {scores[metric]:.4f}, best {now.best:.4f}" if scores else ""
            bar.set_postfix_str(text)
            if run.world.is_main and bar.disable:  # no terminal: a line instead of the bar
                pace = (time.perf_counter() - began) / max(1, now.step - first)
                print(_line(state.name, now, schedule.steps, figures, text, pace), flush=True)

        if not state.resumed:
            validate()
        while not now.done:
            started = time.perf_counter()
            for group, lr in zip(optimizer.param_groups, peak):
                group["lr"] = lr * schedule.scale(now.step)
            optimizer.zero_grad()
            with run.autocast():
                figures = step(next(batches), now.step / schedule.steps)
            broken = _update(model, optimizer, figures)
            now.step += 1
            now.seconds += time.perf_counter() - started
            state.log({"step": now.step, **figures} | ({"skipped": broken} if broken else {}))
            state.count(broken)
            bar.update()
            if schedule.evaluates(now.step):
                validate()
            elif now.step % run.config.checkpoint_every == 0:
                state.save()
    state.close()
    return {"seconds": now.seconds, "steps": now.step, "best_step": now.best_step, "skipped": now.skipped}


def _line(name: str, now: Progress, steps: int, figures: Mapping[str, float], text: str, pace: float) -> str:
    """An evaluation as a line; ``pace`` is the seconds per step, with evaluations."""
    parts = [f"{key} {figures[key]:.4f}" for key in ("reward", "loss") if key in figures][:1]
    parts += [text] * bool(text) + [f"{now.skipped} steps skipped"] * bool(now.skipped)
    parts.append(f"{now.seconds:.0f} s")
    if now.step and not now.done:
        parts.append(f"at most {pace * (steps - now.step):.0f} s left")
    return f"{name}, step {now.step} of {steps}: {', '.join(parts)}"


def _update(model: SIDTransformer, optimizer: torch.optim.Optimizer, figures: dict[str, float]) -> str:
    """Clip the gradients, add their norms to the ``figures``, and step.

    Returns what is not finite, in which case nothing moves; otherwise an empty text.
    """
    for name, part in zip(("grad_norm", "value_grad_norm"), model.parts()):
        if part:
            figures[name] = nn.utils.clip_grad_norm_(part, 1.0).item()
    checked = {name: x for name, x in figures.items() if name.endswith(("loss", "grad_norm"))}
    broken = ", ".join(f"{name} {x}" for name, x in checked.items() if not math.isfinite(x))
    if not broken:
        optimizer.step()
    return broken


@dataclass
class Progress:
    """How far a stage is; ``metrics`` is the length of its metrics file, ``in_a_row`` the number of steps
    skipped last."""

    step: int = 0
    best: float = -math.inf
    best_step: int = 0
    bad: int = 0
    skipped: int = 0
    in_a_row: int = 0
    seconds: float = 0.0
    done: bool = False
    metrics: int = 0


class _State:
    """All of a stage that outlives its process, restored from its checkpoint if there is one."""

    def __init__(
        self, run: Run, stage: str, model: SIDTransformer, optimizer: torch.optim.Optimizer, batches: Batches
    ) -> None:
        self.name, self.limit = f"seed {run.seed} {stage}", run.config.max_skipped
        self.model, self.optimizer, self.batches = model, optimizer, batches
        self.progress, self.initial = Progress(), _weights(model)
        self.best_weights = self.initial
        self.fingerprint = run.fingerprint | {"initial weights": digest(self.initial)}
        self.path = run.folder / f"{stage}.pt"
        self.resumed = run.world.broadcast(self.path.exists())
        if self.resumed:
            self.restore(checkpoint.load(self.path))
        path = run.folder / f"{stage}.jsonl"
        self.file = checkpoint.MetricsFile(path, self.progress.metrics) if run.world.is_main else None

    def log(self, record: dict[str, Any]) -> None:
        if self.file:
            self.file.write(record)

    def rate(self, metric: str, score: float) -> None:
        """Keep the weights if they are the best so far."""
        if not math.isfinite(score):
            raise FloatingPointError(
                f"{self.name}, step {self.progress.step}: {metric} on the valid split is {score}, so that no "
                "step can be chosen by it"
            )
        self.progress.bad += 1
        if score > self.progress.best:
            self.progress.best, self.progress.bad = score, 0
            self.keep()

    def keep(self) -> None:
        """The weights are those that the stage will leave, for now."""
        self.progress.best_step, self.best_weights = self.progress.step, _weights(self.model)

    def count(self, broken: str) -> None:
        """Count a step that was skipped because of what is ``broken``; too many in a row end the run."""
        now = self.progress
        now.in_a_row = now.in_a_row + 1 if broken else 0
        now.skipped += bool(broken)
        if now.in_a_row >= self.limit:
            raise FloatingPointError(
                f"{self.name}, step {now.step}: {broken}; the last of {now.in_a_row} steps in a row that "
                f"were skipped, their loss or gradient not being finite. {self.path} is intact"
            )

    def save(self) -> None:
        """Write the checkpoint, in the main process. It ends with the stage's last step, which needs no more
        than the weights."""
        now = self.progress
        if not math.isfinite(nn.utils.get_total_norm(self.model.parameters()).item()):
            raise FloatingPointError(
                f"{self.name}, step {now.step}: the weights are not finite. {self.path} is intact"
            )
        if not self.file:
            return
        now.metrics, weights = self.file.position(), checkpoint.on_cpu(self.model.state_dict())
        moved = checkpoint.moved_rows(weights, self.initial)
        best = moved  # stored once
        if now.best_step != now.step:
            best = checkpoint.moved_rows(self.best_weights, self.initial)
        state: dict[str, Any] = {"fingerprint": self.fingerprint, "progress": dataclasses.asdict(now)}
        state |= {"model": moved, "best_weights": best}
        if not now.done:
            optimizer = checkpoint.on_cpu(self.optimizer.state_dict())
            for i, moments in optimizer["state"].items():
                optimizer["state"][i] = checkpoint.moved_rows(moments, _zeros(moments))
            state |= {"optimizer": optimizer, "batches": self.batches.state_dict()}
            state["rng"] = torch.get_rng_state()
        checkpoint.save(self.path, state)

    def restore(self, saved: dict[str, Any]) -> None:
        """Continue from what :meth:`save` wrote."""
        checkpoint.require(self.path, saved, self.fingerprint)
        self.progress = Progress(**saved["progress"])
        self.best_weights = checkpoint.whole(saved["best_weights"], self.initial)
        self.model.load_state_dict(checkpoint.whole(saved["model"], self.initial))
        if self.progress.done:
            return
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        moments = saved["optimizer"]["state"]
        for i, found in moments.items():
            moments[i] = checkpoint.whole(found, dict.fromkeys(found, torch.zeros(parameters[i].shape)))
        self.optimizer.load_state_dict(saved["optimizer"])
        self.batches.load_state_dict(saved["batches"])
        torch.set_rng_state(saved["rng"])

    def close(self) -> None:
        """Leave the best weights in the model."""
        if self.file:
            self.file.close()
        self.model.load_state_dict(self.best_weights)


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.to("cpu", copy=True) for name, weight in model.state_dict().items()}


def _zeros(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(x) for name, x in tensors.items()}


def digest(tensors: Mapping[str, Tensor]) -> str:
    """A hash of tensors, wherever they are."""
    found = hashlib.sha256()
    for x in tensors.values():
        found.update(x.cpu().numpy().tobytes())
    return found.hexdigest()
