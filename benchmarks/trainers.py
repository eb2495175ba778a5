"""verl's and TRL's functions beside ours, where they are installed.

:func:`functions` is a part of ``benchmarks.competitors``: advantages, log-probabilities and losses alone.
:func:`measure` is one of ``benchmarks.integrations``: what our plugins for both do, whole.
"""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

import vstar_ops

from . import harness

ROWS, GROUP, LENGTH = 4096, 16, 4


def installed(*packages: str) -> Iterator[str]:
    """Those that are; the others are named."""
    for package in packages:
        if find_spec(package):
            yield package
        else:
            print(f"{package} is not installed")


def functions(report: harness.Report, rounds: int, small: bool = False) -> None:
    """Ours against theirs, on what both compute; results and gradients are compared first."""
    for package in installed("verl", "trl"):
        find = {"verl": verl_functions, "trl": trl_functions}[package]
        for case, variants in find(4 if small else 64, 100 if small else 50_257).items():
            want = variants["ours"]()
            for name, call in variants.items():
                for x, y in zip(call(), want, strict=True):
                    worst = (x - y).abs().max()
                    assert worst <= 1e-4, f"{case}: {name} differs by {worst:.1e}"
            clock = harness.Clock()
            samples = {name: clock.sample(lambda _, call=call: call()) for name, call in variants.items()}
            report.add(f"{case}, as {package} has it", clock.interleave(samples, rounds))


Calls = Mapping[str, Callable[[], tuple[Tensor, ...]]]


def differentiated(by: Tensor, call: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """A result and its gradient."""
    out = call(by)
    return out.detach(), torch.autograd.grad(out.sum(), by)[0]


def log_probabilities(
    rows: int, columns: int, theirs: Callable[[Tensor, Tensor], Tensor]
) -> tuple[str, Calls]:
    """Of the whole vocabulary, forward and backward."""
    logits, target = torch.randn(rows, columns).requires_grad_(), torch.randint(columns, (rows,))
    calls: Calls = {
        "ours": lambda: differentiated(logits, lambda x: vstar_ops.token_logp(x, target).logp),
        f"{theirs.__module__.partition('.')[0]} {theirs.__name__}": lambda: differentiated(
            logits, lambda x: theirs(x, target)
        ),
    }
    return f"token_logp fp32 [{rows}, {columns}] forward, backward", calls


class Policy:
    """What a loss takes: a grid of candidates for ours, and rows for theirs, with one advantage per token."""

    def __init__(self, groups: int, normalizer: str) -> None:
        shape = groups, GROUP, LENGTH
        self.tokens, self.rewards = torch.randint(8, shape), torch.rand(shape[:2])
        self.old = -torch.rand(shape)
        self.logp = (self.old + 0.3 * torch.randn(shape)).requires_grad_()
        self.siblings = vstar_ops.sibling_advantage(self.tokens, self.rewards)
        self.over_group = vstar_ops.group_advantage(self.rewards)
        self.rows = self.tokens.flatten(0, 1)
        self.mask = torch.ones_like(self.rows)
        self.advantages = vstar_ops.token_advantages(
            self.rows, self.rewards.flatten(), GROUP, normalizer=normalizer, form="paper"
        )

    def ours(self, **options: Any) -> tuple[Tensor, Tensor]:
        given: dict[str, Any] = {"sibling_advantage": self.siblings, "group_advantage": self.over_group}
        given |= {"old_logp": self.old, "form": "paper", "clip": (0.2, 0.2), "clip_terms": "joint", **options}
        return differentiated(self.logp, lambda x: vstar_ops.sibling_grpo_loss(x, **given).loss)


def verl_functions(groups: int, columns: int) -> dict[str, Calls]:
    """GRPO's advantages, log-probabilities, the policy loss with verl's defaults."""
    from verl.trainer.ppo import core_algos
    from verl.utils.torch_functional import logprobs_from_logits
    from verl.workers.config import ActorConfig

    rewards, one = torch.rand(4 * groups, GROUP), torch.ones(4 * groups * GROUP, 1)
    uid = np.array([str(uuid.uuid4()) for _ in range(4 * groups)], dtype=object).repeat(GROUP)

    def advantages(estimator: Callable[..., Any]) -> tuple[Tensor, ...]:
        return (estimator(rewards.view(-1, 1), one, uid, epsilon=1e-4)[0].view_as(rewards),)

    policy = Policy(groups, "token")
    config = ActorConfig(strategy="fsdp", rollout_n=GROUP, ppo_micro_batch_size_per_gpu=1)
    flat = policy.old.flatten(0, 1), policy.advantages, policy.mask

    def loss(logp: Tensor) -> Tensor:
        old, advantage, mask = flat
        return core_algos.compute_policy_loss_vanilla(
            old, logp.flatten(0, 1), advantage, mask, "token-mean", config
        )[0]

    return {
        f"group_advantage B={4 * groups} G={GROUP}": {
            "ours": lambda: (vstar_ops.group_advantage(rewards),),
            "verl grpo_vectorized": lambda: advantages(core_algos.compute_grpo_vectorized_outcome_advantage),
            "verl grpo": lambda: advantages(core_algos.compute_grpo_outcome_advantage),
        },
        **dict([log_probabilities(8 * groups, columns, logprobs_from_logits)]),
        f"sibling_grpo_loss B={groups} G={GROUP} L={LENGTH} forward, backward": {
            "ours": lambda: policy.ours(loss_type="bnpo", dual_clip=3.0, log_ratio_bound=20.0),
            "verl compute_policy_loss_vanilla": lambda: differentiated(policy.logp, loss),
        },
    }


def trl_functions(groups: int, columns: int) -> dict[str, Calls]:
    """Log-probabilities and the loss. TRL's advantages are lines of its trainer, not a function."""
    from trl.trainer.utils import selective_log_softmax

    policy, trainer = Policy(groups, "sequence"), trainer_of(vocab=64, loss_type="grpo")
    batch = {
        "prompt_ids": policy.rows[:, :1],
        "prompt_mask": policy.mask[:, :1],
        "completion_ids": policy.rows,
        "completion_mask": policy.mask,
        "advantages": policy.advantages,
        "old_per_token_logps": policy.old.flatten(0, 1),
    }

    def loss(logp: Tensor) -> Tensor:
        flat = logp.flatten(0, 1)
        trainer._get_per_token_logps_and_entropies = lambda *_, **__: (flat, torch.zeros_like(flat), None)
        return trainer._compute_loss(trainer.model, batch)

    return {
        **dict([log_probabilities(8 * groups, columns, selective_log_softmax)]),
        f"sibling_grpo_loss B={groups} G={GROUP} L={LENGTH} forward, backward": {
            "ours": lambda: policy.ours(loss_type="grpo"),
            "TRL _compute_loss": lambda: differentiated(policy.logp, loss),
        },
    }


def measure(report: harness.Report, rounds: int) -> None:
    """Whatever is installed."""
    for package in installed("verl", "trl"):
        {"verl": advantages, "trl": loss}[package](report, rounds)


def advantages(report: harness.Report, rounds: int) -> None:
    """4,096 responses of 256 prompts in any order, against verl's estimators without siblings."""
    from verl.trainer.ppo import core_algos

    from vstar_ops.integrations.verl import sibling_grpo

    names = [str(uuid.uuid4()) for _ in range(ROWS // GROUP)]
    uid = np.array([names[i // GROUP] for i in torch.randperm(ROWS).tolist()], dtype=object)
    tokens, ends = torch.randint(8, (ROWS, LENGTH)), torch.randint(LENGTH - 1, LENGTH + 1, (ROWS, 1))
    mask = (torch.arange(LENGTH) < ends).long()
    rewards = torch.zeros(ROWS, LENGTH).scatter_(1, ends - 1, torch.randint(2, (ROWS, 1)).float())
    config = {"sibling": {"loss_agg_mode": "token-mean", "sibling_weight": 0.0}}
    theirs = core_algos.compute_grpo_vectorized_outcome_advantage
    worst = (sibling_grpo(rewards, mask, uid, config, tokens)[0] - theirs(rewards, mask, uid)[0]).abs().max()
    assert worst < 1e-5, f"without siblings the advantages differ by {worst:.1e}"
    calls: dict[str, Callable[[], Any]] = {
        "sibling_grpo": lambda: sibling_grpo(rewards, mask, uid, config, tokens),
        "verl grpo_vectorized": lambda: theirs(rewards, mask, uid),
        "verl grpo": lambda: core_algos.compute_grpo_outcome_advantage(rewards, mask, uid),
    }
    clock = harness.Clock()
    samples = {name: clock.sample(lambda _, call=call: call()) for name, call in calls.items()}
    timing = clock.interleave(samples, 4 * rounds)
    report.add(f"advantages of {ROWS} rows", timing, {"verl grpo_vectorized": 1.0})


def loss(report: harness.Report, rounds: int) -> None:
    """Forward and backward of TRL's loss: two whole groups, prompts of 200 tokens, the whole vocabulary."""
    from trl.trainer import utils

    # TRL's head for completions alone, as on a GPU; on a CPU it would run at the prompts' positions, too.
    utils._use_triton = lambda device: True
    trainer = trainer_of(vocab=20_000, packed=True)
    prompt, candidates = 200, 2 * GROUP
    trie = vstar_ops.Trie.from_sequences(torch.randint(10_000, 10_256, (10_000, 3)))
    items = trie.sequences(trie.num_nodes - 1 - torch.randperm(trie.num_sequences)[:candidates]).long()
    batch = {
        "prompt_ids": torch.randint(5, 1000, (2, prompt)).repeat_interleave(GROUP, 0),
        "prompt_mask": torch.ones(candidates, prompt, dtype=torch.int64),
        "completion_ids": torch.cat([items, torch.ones(candidates, 1, dtype=torch.int64)], 1),
        "completion_mask": torch.ones(candidates, 4, dtype=torch.int64),
        "advantages": torch.randn(candidates, 4),
        "num_items_in_batch": torch.tensor(candidates * 4.0),
    }

    def gradients(packed: bool) -> list[Tensor]:
        trainer.packed = packed
        trainer.model.zero_grad()
        trainer._compute_loss(trainer.model, batch).backward()
        return [weight.grad for weight in trainer.model.parameters()]

    want = [x.clone() for x in gradients(False)]
    worst = max(((x - y).norm() / y.norm()).item() for x, y in zip(gradients(True), want))
    assert worst < 1e-5, f"gradients differ by {worst:.1e}"
    calls = {"packed": lambda: gradients(True), "TRL": lambda: gradients(False)}
    name = f"TRL's loss, forward, backward, 2 x {GROUP}, {prompt} prompt tokens"
    report.add(name, harness.compare(calls, rounds), {"TRL": 5.0})
    print(f"greatest relative difference of a gradient: {worst:.1e}")


def trainer_of(
    vocab: int,
    kind: Any = None,
    *,
    group: int = GROUP,
    reward: Callable[..., list[float]] = lambda prompts, **_: [0.0] * len(prompts),
    rollout_func: Any = None,
    **options: Any,
) -> Any:
    """A trainer of a tiny model, two groups per batch. Options of ``GRPOConfig`` are told by their names."""
    import transformers
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from trl import GRPOConfig

    from vstar_ops.integrations.trl import SiblingGRPOTrainer

    from .tiny import qwen2

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    names = {"pad_token": "<pad>", "eos_token": "<eos>"}
    known = set(GRPOConfig.__dataclass_fields__)
    args = GRPOConfig(
        tempfile.mkdtemp(),
        per_device_train_batch_size=2 * group,
        num_generations=group,
        gradient_checkpointing=False,
        report_to=[],
        use_cpu=True,
        bf16=False,
        **{name: value for name, value in options.items() if name in known},
    )
    trainer = (kind or SiblingGRPOTrainer)(
        qwen2(vocab, 128, 2),
        reward,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": ["a"] * 8}),
        processing_class=transformers.PreTrainedTokenizerFast(tokenizer_object=words, **names),
        rollout_func=rollout_func,
        **{name: value for name, value in options.items() if name not in known},
    )
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer
