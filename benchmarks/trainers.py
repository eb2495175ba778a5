"""Advantages against verl's, packed prefix trees inside TRL's loss; a part of ``benchmarks.integrations``."""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

import vstar_ops

from . import harness

ROWS, GROUP, LENGTH = 4096, 16, 4


def measure(report: harness.Report, rounds: int) -> None:
    """Whatever is installed."""
    for package, part in (("verl", advantages), ("trl", loss)):
        if find_spec(package) is None:
            print(f"{package} is not installed")
        else:
            part(report, rounds)


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

    from .integrations import qwen2

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
