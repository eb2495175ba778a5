"""The two training stages, and the loop that both share.

:func:`fit` is the loop: steps, evaluation, early stopping, checkpoints, resume. A stage gives it a step
function. Every random choice comes from torch's global generator, whose state is part of a checkpoint
together with the data order, so a killed run continues bit for bit (on one thread, where torch itself is
deterministic).
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .. import sibling_grpo_loss
from ..packing import PackedRows
from ..trie import Trie
from . import checkpoint
from .data import Dataset, user_sequences
from .decode import TUNED, at_test, decode
from .metrics import evaluate
from .model import PackedScores, SIDTransformer
from .parallel import World
from .rewards import Reward, make_reward
from .scoring import candidate_rows, legal_logp
from .value import (
    DenseReturn,
    ItemEmbeddings,
    RewardReturn,
    cooccurrence_embeddings,
    load_embeddings,
    squared_error,
    td_target,
)

OBJECTIVES = ("grpo", "sibling", "joint")


@dataclass(frozen=True)
class Config:
    """What a run depends on; the command line's options of the same names explain them."""

    data: str | None = None
    category: str = "Industrial_and_Scientific"
    variants: tuple[str, ...] = ("beam+grpo", "beam+joint", "ved+joint")
    seeds: tuple[int, ...] = (0,)
    threads: int | None = None
    candidates: int = 16
    pack: bool = True
    reward: str | None = None
    sft_epochs: int = 60
    sft_batch_size: int = 64
    sft_lr: float = 1e-3
    rl_steps: int = 300
    rl_batch_size: int = 64
    rl_lr: float = 1e-4
    clip: tuple[float, float] | None = None
    sibling_weight: float = 1.0
    kl_weight: float = 1e-3
    ved: dict[str, Any] = field(default_factory=lambda: dict(TUNED))
    value_lr: float = 1e-3
    value_loss_weight: float = 1.0
    value_return: str | None = None
    gamma: float = 0.99
    item_embeddings: str | None = None
    item_prior: bool = True
    test_decoder: str = "beam"
    dropout: float = 0.2
    label_smoothing: float = 0.1
    item_dropout: float = 0.2
    weight_decay: float = 0.01
    sft_evals: int = 10
    rl_evals: int = 10
    patience: int = 4
    valid_rows: int = 2000
    checkpoint_every: int = 50


@dataclass
class Job:
    """One seed's run: its data, its folder and its options."""

    config: Config
    dataset: Dataset
    trie: Trie
    folder: Path
    seed: int
    world: World = field(default_factory=World)

    def model(self) -> SIDTransformer:
        return SIDTransformer(self.dataset.vocab, self.dataset.max_tokens, dropout=self.config.dropout)

    def decoder(self, model: SIDTransformer) -> str:
        """At test. VED needs a value head: what was trained without one is decoded by beam search."""
        return self.config.test_decoder if model.value_head is not None else "beam"

    @property
    def reward_name(self) -> str:
        return self.config.reward or ("true" if self.dataset.reward else "ranking")

    def returns(self, reward: Reward) -> DenseReturn | RewardReturn:
        """What V is trained on: the reward itself where it says something of every candidate."""
        kind = self.config.value_return or ("reward" if self.reward_name == "true" else "dense")
        return RewardReturn(reward) if kind == "reward" else DenseReturn(self.items)

    @functools.cached_property
    def items(self) -> ItemEmbeddings:
        """From the config's file, or from the clicks."""
        path, data = self.config.item_embeddings, self.dataset
        if path:
            vectors = load_embeddings(path, len(data.sequences))
        else:
            vectors = cooccurrence_embeddings(data, self.trie)
        return ItemEmbeddings(self.trie, data.sequences, vectors)

    def add_value_head(self, model: SIDTransformer, action_values: bool) -> None:
        model.add_value_head(
            action_values=action_values, items=self.items if self.config.item_prior else None
        )

    def evaluate(
        self,
        model: SIDTransformer,
        split: str,
        rows: int | None = None,
        decoder: str = "beam",
        candidates: int | None = None,
        options: dict[str, Any] | None = None,
    ) -> dict[str, float]:
        """Scores on a split, or on a fixed random part of it; candidates and search as the config says, or
        as given."""
        if options is None:
            options = at_test(self.config.ved) if decoder == "ved" else {}
        return evaluate(
            model,
            getattr(self.dataset, split).part(rows),
            self.trie,
            candidates or self.config.candidates,
            decoder=decoder,
            options=options,
            true_reward=self.dataset.reward,
            title=split,
        )


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


def fit(
    job: Job,
    stage: str,
    model: SIDTransformer,
    optimizer: torch.optim.Optimizer,
    batches: Batches,
    step: Callable[[Tensor, float], dict[str, float]],
    *,
    steps: int,
    evals: int,
    warmup: int,
    decay: bool,
    metric: str,
) -> float:
    """Run a stage to its end, from its checkpoint if there is one; leave the best weights in ``model``.

    ``step(examples)`` computes the loss of this process' share of the examples, calls backward and returns
    figures to log. The learning rate rises over ``warmup`` steps and then stays, or falls along a cosine.
    ``metric`` on the valid split is looked at ``evals`` times, and ``config.patience`` times without a new
    best end the stage.

    Returns:
        Seconds spent, over all of the run's lives, without evaluation.
    """
    path, world = job.folder / f"{stage}.pt", job.world
    peak = [group["lr"] for group in optimizer.param_groups]
    every = max(1, math.ceil(steps / evals))
    now: dict[str, Any] = {"step": 0, "best": -math.inf, "bad": 0, "seconds": 0.0}
    now |= {"done": False, "metrics": 0}
    best_weights = {k: v.clone() for k, v in model.state_dict().items()}
    if world.broadcast(path.exists()):
        saved = checkpoint.load(path)
        now, best_weights = saved["now"], saved["best_weights"]
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        batches.plan, batches.position = saved["plan"], saved["position"]
        torch.set_rng_state(saved["rng"])
    log = checkpoint.MetricsFile(job.folder / f"{stage}.jsonl", now["metrics"]) if world.is_main else None

    def write(record: dict[str, Any]) -> None:
        if log:
            log.write(record)

    def validate() -> None:
        scores: dict[str, float] = {}
        if world.is_main:
            scores = job.evaluate(model, "valid", job.config.valid_rows, job.decoder(model))
        scores = world.broadcast(scores)
        write({"step": now["step"], "seconds": round(now["seconds"], 2), "valid": scores})
        now["bad"] += 1
        if scores[metric] > now["best"]:
            now.update(best=scores[metric], bad=0)
            best_weights.update({k: v.clone() for k, v in model.state_dict().items()})
        bar.set_postfix_str(f"valid {metric} {scores[metric]:.4f}, best {now['best']:.4f}")

    def save() -> None:
        if log is None:
            return
        now["metrics"] = log.position()
        state: dict[str, Any] = {"now": now, "model": model.state_dict(), "best_weights": best_weights}
        state |= {"optimizer": optimizer.state_dict(), "plan": batches.plan, "position": batches.position}
        checkpoint.save(path, state | {"rng": torch.get_rng_state()})

    quiet = None if world.is_main else True  # None: shown on a terminal
    with tqdm(total=steps, initial=now["step"], desc=f"seed {job.seed} {stage}", disable=quiet) as bar:
        if now["step"] == 0 and not now["done"]:
            validate()
            save()
        while not now["done"]:
            started = time.perf_counter()
            scale = min(1.0, (now["step"] + 1) / warmup)
            scale *= 0.02 + 0.98 * (1 + math.cos(math.pi * now["step"] / steps)) / 2 if decay else 1.0
            for group, lr in zip(optimizer.param_groups, peak):
                group["lr"] = lr * scale
            optimizer.zero_grad()
            record = step(next(batches), now["step"] / steps)
            policy, head = model.parts()
            record["grad_norm"] = nn.utils.clip_grad_norm_(policy, 1.0).item()
            if head:
                nn.utils.clip_grad_norm_(head, 1.0)
            optimizer.step()
            now["step"] += 1
            now["seconds"] += time.perf_counter() - started
            write({"step": now["step"], **record})
            bar.update()
            if now["step"] % every == 0 or now["step"] == steps:
                validate()
                now["done"] = now["step"] == steps or now["bad"] >= job.config.patience
                save()
            elif now["step"] % job.config.checkpoint_every == 0:
                save()
    if log:
        log.close()
    model.load_state_dict(best_weights)
    return now["seconds"]


def supervised(job: Job) -> tuple[SIDTransformer, float]:
    """Stage 1: next-token likelihood of the logged clicks, over the legal children of every prefix.

    All steps of a user are learned in one pass. Early stopping looks at NDCG@10.
    """
    c, trie = job.config, job.trie
    sequences = user_sequences(job.dataset.train)
    longest = job.dataset.train.history.shape[1] + 1
    torch.manual_seed(job.seed)
    model = job.model()
    run = job.world.wrap(model)
    lengths = torch.tensor([len(s) for s in sequences])

    def crops() -> tuple[Tensor, Tensor]:
        """A window ``(user, start, stop)`` of every user's sequence, of random size and place."""
        size = (2 + (torch.rand(len(lengths)) * (lengths - 1)).long()).minimum(lengths)
        start = (torch.rand(len(lengths)) * (lengths - size + 1)).long().minimum(lengths - size)
        stop, size = start + size, size.clamp(max=longest)
        return torch.stack([torch.arange(len(lengths)), stop - size, stop], 1), size

    def step(windows: Tensor, _: float) -> dict[str, float]:
        model.train()
        views = (sequences[user][start:stop] for user, start, stop in windows.tolist())
        items = [drop_items(view, c.item_dropout) for view in views]
        padded = nn.utils.rnn.pad_sequence(items, batch_first=True, padding_value=-1)  # [B, n, L]
        share = job.world.shard(padded)
        padded = share.rows
        prefixes = [trie.lookup(padded[..., :depth]) for depth in range(padded.shape[2] + 1)]
        node, child = (torch.stack(p, 2).flatten(1) for p in (prefixes[:-1], prefixes[1:]))
        branch = (padded >= 0).flatten(1) & (trie.num_children(node) > 1)
        with job.world.rank_rng():
            logits = run("forward", padded.flatten(1)[:, :-1])
        logp, smooth = legal_logp(logits[branch], trie, node[branch], child[branch])
        loss = -((1 - c.label_smoothing) * logp + c.label_smoothing * smooth).sum()
        loss = loss / branch.sum().clamp(min=1)
        (weight,) = share.weights(branch.sum())
        (weight * loss).backward()
        return share.averages({"loss": loss.detach()}, {"loss": weight})

    steps = c.sft_epochs * math.ceil(len(sequences) / c.sft_batch_size)
    seconds = fit(
        job,
        "sft",
        model,
        optimizer_of(model, c.sft_lr, c.weight_decay),
        Batches(crops, c.sft_batch_size),
        step,
        steps=steps,
        evals=c.sft_evals,
        warmup=100,
        decay=True,
        metric="NDCG@10",
    )
    return model, seconds


def reinforce(job: Job, variant: str, sft: SIDTransformer) -> tuple[SIDTransformer, float]:
    """Stage 2: policy gradient on the candidates of a decoder, from the supervised weights.

    ``variant`` is ``decoder+objective``. With ``ved`` a value head is learned along with the policy: each
    step searches with V as it stands, and then refines both on what the search has found. The policy's
    ``own`` among the candidates rise from that option's number to all of them at the last step: what the
    search finds teaches early, what the policy itself would answer is polished late.

    On-policy: a batch of candidates is used for one step, so the old policy is the current one and the
    ratio is 1 in value (its gradient is that of the log-probability). Dropout is off, so that the policy of
    the loss is the policy that searched. Early stopping looks at what the reward speaks of: the mean true
    reward of the top 10 for ``true``, NDCG@10 else.
    """
    c, trie, train = job.config, job.trie, job.dataset.train
    decoder, objective = variant.split("+")
    reward_of = make_reward(job.reward_name, job.dataset)
    torch.manual_seed(job.seed)
    model = job.model()
    model.load_state_dict(sft.state_dict())
    sft.eval()
    options = dict(c.ved) if decoder == "ved" else {}
    own, leaves = options.get("num_policy_candidates", 0), options.get("evaluate_leaves", True)
    valued = decoder == "ved" and options.get("value_weight", 1) != 0
    action_values = valued and options.get("child_values", False)
    if valued:
        job.add_value_head(model, action_values)
        returns_of = job.returns(reward_of)
    run = job.world.wrap(model)
    global_weight = 0.0 if objective == "sibling" else 1.0
    sibling_weight = {"grpo": 0.0, "sibling": 1.0, "joint": c.sibling_weight}[objective]

    def policy(rows: PackedRows) -> PackedScores:
        return run("packed", rows, action_values=action_values)

    def step(rows: Tensor, progress: float) -> dict[str, float]:
        model.eval()
        share = job.world.shard(rows)
        part = train[share.rows]
        seed = torch.zeros(0)
        if decoder != "beam":
            seed = job.world.shard(torch.randint(2**62, (len(rows),))).rows
        if own:
            options["num_policy_candidates"] = round(own + (c.candidates - own) * progress)
        found = decode(decoder, model, part.context, trie, c.candidates, seed, options)
        tokens = found.sequence.long()
        mask = found.node >= 0
        reward = reward_of(part, tokens)
        laid_out = candidate_rows(
            model, part.context, trie, tokens, values=valued, leaves=leaves, pack=c.pack
        )
        scores = laid_out.scores(policy, values=valued, action_values=action_values)
        with torch.no_grad():
            reference = laid_out.scores(sft.packed).logp
        per_request, per_candidate = share.weights(len(tokens), mask.sum())
        policy_loss = sibling_grpo_loss(
            scores.logp,
            tokens,
            reward,
            ref_logp=reference,
            mask=mask,
            global_weight=per_candidate * global_weight,
            sibling_weight=per_request * sibling_weight,
            kl_weight=per_candidate * c.kl_weight,
            clip=c.clip,
        )
        value_loss = torch.zeros(())
        if scores.value is not None:
            returns, value = returns_of(part, tokens, mask), scores.value
            if not leaves:  # what a leaf is worth is known, and nobody asks V for it
                value = torch.cat([value[..., :-1], returns[..., -1:]], 2)
            target = td_target(value, returns, c.gamma)
            value_loss = squared_error(value, target, mask)
            if scores.action_value is not None:
                value_loss = value_loss + squared_error(scores.action_value, target, mask)
        (policy_loss.loss + per_candidate * c.value_loss_weight * value_loss).backward()
        spread = reward.max(1).values > reward.masked_fill(~mask, torch.inf).min(1).values
        requests = {
            "best_reward": reward.max(1).values.mean(),
            "groups_with_signal": spread.float().mean(),
            "forward_tokens": found.forward_tokens.float().mean(),
        }
        candidates = {"reward": reward[mask].mean(), "kl": policy_loss.kl, "value_loss": value_loss}
        weights = dict.fromkeys(requests, per_request) | dict.fromkeys(candidates, per_candidate)
        return share.averages(requests | candidates, weights)

    seconds = fit(
        job,
        variant,
        model,
        optimizer_of(model, c.rl_lr, 0.0, c.value_lr),
        Batches(lambda: (torch.arange(len(train)), train.items), c.rl_batch_size),
        step,
        steps=c.rl_steps,
        evals=c.rl_evals,
        warmup=10,
        decay=False,
        metric="true_reward@10" if job.reward_name == "true" else "NDCG@10",
    )
    return model, seconds


def drop_items(items: Tensor, rate: float) -> Tensor:
    """A sequence ``[n, L]`` without some of its items; the last one, and at least two of them, remain."""
    if len(items) > 2:
        keep = torch.rand(len(items)) >= rate
        keep[-1] = True
        keep[-2] |= keep.sum() < 2
        items = items[keep]
    return items


def optimizer_of(
    model: SIDTransformer, lr: float, weight_decay: float, value_lr: float = 0.0
) -> torch.optim.Optimizer:
    """AdamW; biases and norms do not decay, the value head has a learning rate of its own."""
    policy, head = model.parts()
    groups: list[dict[str, Any]] = [
        {"params": [p for p in policy if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in policy if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if head:
        groups.append({"params": head, "weight_decay": weight_decay, "lr": value_lr})
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))


_DECODER = {"beam": "beam candidates", "topk": "top-k samples", "ved": "VED"}
_OBJECTIVE = {"grpo": "GRPO", "sibling": "sibling advantages only", "joint": "Sibling-GRPO"}


def row_name(stage: str) -> str:
    """What a stage is called in tables."""
    if "+" not in stage:
        return "SFT"
    decoder, objective = stage.split("+")
    prefix = "V-STAR: " if stage == "ved+joint" else "+ "
    return f"{prefix}{_OBJECTIVE[objective]} with {_DECODER[decoder]}"


def run_seed(job: Job) -> dict[str, dict[str, float]]:
    """Both stages; row name -> scores on the test split, which is looked at here, once, at the end.

    Empty in processes that do not lead.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    sft, seconds = supervised(job)
    stages = {"sft": (sft, seconds)}
    for variant in job.config.variants:
        stages[variant] = reinforce(job, variant, sft)
    results: dict[str, dict[str, float]] = {}
    for stage, (model, seconds) in stages.items() if job.world.is_main else ():
        checkpoint.save(job.folder / f"{stage}.weights.pt", model.state_dict())
        decoder = job.decoder(model)
        valid = job.evaluate(model, "valid", decoder=decoder)
        known = {"seconds": seconds, "valid_NDCG@10": valid["NDCG@10"]}
        results[row_name(stage)] = {**job.evaluate(model, "test", decoder=decoder), **known}
        if decoder != "beam":
            name = f"{row_name(stage)}, beam search at test"
            results[name] = {**job.evaluate(model, "test"), **known}
    return results
