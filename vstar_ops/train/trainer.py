"""The loop that both stages share: steps, evaluation, early stopping, checkpoints, resume.

Every random choice comes from torch's global generator, whose state is part of a checkpoint together with the
order of the data. So a killed run continues bit for bit on one thread, where torch itself is deterministic.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..trie import Trie
from . import checkpoint
from .config import Config
from .data import Dataset
from .model import SIDTransformer
from .parallel import World

Step = Callable[[Tensor, float], dict[str, float]]
Evaluate = Callable[[SIDTransformer], dict[str, float]]


@dataclass(frozen=True)
class Run:
    """What the stages of one seed share."""

    config: Config
    dataset: Dataset
    trie: Trie
    folder: Path
    seed: int
    world: World = field(default_factory=World)


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
) -> float:
    """Run a stage to its end, from its checkpoint if there is one; leave the best weights in ``model``.

    Args:
        stage: its name in files.
        step: ``step(examples, progress)`` computes the loss on this process' shard of the examples, calls
            backward and returns figures to log; ``progress`` rises from 0 to 1.
        evaluate: scores of the model on the valid split; only the main process is asked.
        metric: the score that chooses the best weights; ``config.patience`` evaluations without a new best
            end the stage.

    Returns:
        Seconds spent, over all of the run's lives, without evaluation.
    """
    peak = [group["lr"] for group in optimizer.param_groups]
    state = _State(run, stage, model, optimizer, batches)
    now = state.progress
    hidden = None if run.world.is_main else True  # None: shown on a terminal
    with tqdm(total=schedule.steps, initial=now.step, desc=f"seed {run.seed} {stage}", disable=hidden) as bar:

        def validate() -> None:
            scores = run.world.broadcast(evaluate(model) if run.world.is_main else {})
            state.log({"step": now.step, "seconds": round(now.seconds, 2), "valid": scores})
            state.rate(scores[metric])
            now.done = now.step == schedule.steps or now.bad >= run.config.patience
            state.save()
            bar.set_postfix_str(f"valid {metric} {scores[metric]:.4f}, best {now.best:.4f}")

        if not state.resumed:
            validate()
        while not now.done:
            started = time.perf_counter()
            for group, lr in zip(optimizer.param_groups, peak):
                group["lr"] = lr * schedule.scale(now.step)
            optimizer.zero_grad()
            figures = step(next(batches), now.step / schedule.steps)
            figures["grad_norm"] = _update(model, optimizer)
            now.step += 1
            now.seconds += time.perf_counter() - started
            state.log({"step": now.step, **figures})
            bar.update()
            if schedule.evaluates(now.step):
                validate()
            elif now.step % run.config.checkpoint_every == 0:
                state.save()
    state.close()
    return now.seconds


def _update(model: SIDTransformer, optimizer: torch.optim.Optimizer) -> float:
    """Clip the gradients and step; returns the norm of the policy's gradient."""
    policy, head = model.parts()
    norm = nn.utils.clip_grad_norm_(policy, 1.0).item()
    if head:
        nn.utils.clip_grad_norm_(head, 1.0)
    optimizer.step()
    return norm


@dataclass
class Progress:
    """How far a stage is; ``metrics`` is the length of its metrics file."""

    step: int = 0
    best: float = -math.inf
    bad: int = 0
    seconds: float = 0.0
    done: bool = False
    metrics: int = 0


class _State:
    """All of a stage that outlives its process, restored from its checkpoint if there is one."""

    def __init__(
        self, run: Run, stage: str, model: SIDTransformer, optimizer: torch.optim.Optimizer, batches: Batches
    ) -> None:
        self.model, self.progress, self.best_weights = model, Progress(), _weights(model)
        self.parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "batches": batches}
        self.path = run.folder / f"{stage}.pt"
        self.resumed = run.world.broadcast(self.path.exists())
        if self.resumed:
            saved = checkpoint.load(self.path)
            self.progress, self.best_weights = Progress(**saved["progress"]), saved["best_weights"]
            for name, part in self.parts.items():
                part.load_state_dict(saved[name])
            torch.set_rng_state(saved["rng"])
        path = run.folder / f"{stage}.jsonl"
        self.file = checkpoint.MetricsFile(path, self.progress.metrics) if run.world.is_main else None

    def log(self, record: dict[str, Any]) -> None:
        if self.file:
            self.file.write(record)

    def rate(self, score: float) -> None:
        """Keep the weights if they are the best so far."""
        self.progress.bad += 1
        if score > self.progress.best:
            self.progress.best, self.progress.bad = score, 0
            self.best_weights = _weights(self.model)

    def save(self) -> None:
        """Write the checkpoint, in the main process."""
        if self.file:
            self.progress.metrics = self.file.position()
            state = {name: part.state_dict() for name, part in self.parts.items()}
            state |= {"progress": dataclasses.asdict(self.progress), "best_weights": self.best_weights}
            checkpoint.save(self.path, state | {"rng": torch.get_rng_state()})

    def close(self) -> None:
        """Leave the best weights in the model."""
        if self.file:
            self.file.close()
        self.model.load_state_dict(self.best_weights)


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in model.state_dict().items()}
