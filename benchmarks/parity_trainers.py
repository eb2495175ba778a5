"""TRL's and verl's numbers against ours; a part of ``benchmarks.parity``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vstar_ops import group_advantage, sibling_grpo_loss

from . import trainers
from .parity_table import Table, siblings_by_hand

SIZES = (5, 3, 8, 1)  # of verl's groups
CLIPPED = {"grpo": "grpo", "dapo": "bnpo", "bnpo": "bnpo", "dr_grpo": "dr_grpo", "luspo": "dr_grpo"}
SAME_SLOPE = {"sapo": "grpo", "cispo": "bnpo", "vespo": "bnpo"}  # other functions of the ratio
LOSS_AGG_MODES = {
    "token-mean": "bnpo",
    "token-sum": "dr_grpo",
    "seq-mean-token-mean": "grpo",
    "seq-mean-token-sum": "dr_grpo",
    "seq-mean-token-sum-norm": "dr_grpo",
}


# ---------------------------------------------------------------- TRL


def trl(table: Table) -> None:
    """Training, losses of a captured batch, and packed rows in TRL's trainer."""
    import transformers
    from trl import GRPOTrainer

    transformers.logging.set_verbosity_error()

    def trained(kind: Any = None, **options: Any) -> list[Tensor]:
        trainer = made(kind, **options)
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        return [weight.detach() for weight in trainer.model.parameters()]

    def made(kind: Any = None, **options: Any) -> Any:
        torch.manual_seed(0)
        return trainers.trainer_of(
            64, kind, group=4, rollout_func=rollout, reward=reward, max_completion_length=6, **options
        )

    run = {"max_steps": 3, "learning_rate": 1e-2, "save_strategy": "no", "disable_tqdm": True}
    plain = trained(GRPOTrainer, **run)
    without = trained(sibling_weight=0.0, **run)
    table.add(
        "trainer, `sibling_weight=0`", "`GRPOTrainer`", "weights after 3 steps", without, plain, bound=0
    )
    assert not torch.equal(trained(**run)[0], plain[0]), "siblings change nothing"
    for loss_type in (*CLIPPED, *SAME_SLOPE):
        captured(
            table, made(loss_type=loss_type, epsilon_high=5.0 if loss_type == "cispo" else 0.2), loss_type
        )
    results = []
    for is_packed in (False, True):
        trainer = made(packed=is_packed, loss_type="grpo")
        batch = batch_of(trainer)
        ids, seen = (torch.cat([batch[f"prompt_{x}"], batch[f"completion_{x}"]], 1) for x in ("ids", "mask"))
        loss, gradient = differentiated(trainer, trainer._compute_loss(trainer.model, batch))
        length = batch["completion_ids"].shape[1]
        logp, entropy, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, seen, length, compute_entropy=True
        )
        there = batch["completion_mask"]
        results.append((logp * there, entropy * there, loss, gradient))
    for quantity, theirs, ours in zip(("log-probabilities", "entropies", "loss", "gradient"), *results):
        relative = quantity in ("loss", "gradient")
        table.add("trainer, `packed=True`", "one row per candidate", quantity, ours, theirs, 1e-5, relative)


def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
    """Prompts of 2 to 4 tokens; completions of 2 to 5, few of them different."""
    number = len(prompts)
    group = [i // trainer.num_generations for i in range(number)]
    drawn, ends = torch.randint(11, 15, (number, 4)).tolist(), torch.randint(1, 5, (number,)).tolist()
    return {
        "prompt_ids": [list(range(2 + g, 4 + 2 * g)) for g in group],
        "completion_ids": [[*row[:end], 1] for row, end in zip(drawn, ends)],
        "logprobs": None,
    }


def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Of a completion's tokens."""
    return [c[0] % 2 + sum(c) % 3 / 3 for c in completion_ids]


def batch_of(trainer: Any) -> dict[str, Any]:
    """A batch as the trainer makes it of two prompts; the policy that drew it was another one."""
    torch.manual_seed(5)
    trainer.current_gradient_accumulation_steps = 1
    return trainer._generate_and_score_completions([{"prompt": "a"}] * 4 + [{"prompt": "b"}] * 4)


def differentiated(trainer: Any, loss: Tensor) -> tuple[Tensor, list[Tensor]]:
    """A loss and its gradient."""
    trainer.model.zero_grad()
    loss.backward()
    return loss.detach(), [weight.grad.clone() for weight in trainer.model.parameters()]


def captured(table: Table, trainer: Any, loss_type: str) -> None:
    """TRL's loss with our advantages, against ``sibling_grpo_loss``: ratios other than 1, some clipped."""
    batch = batch_of(trainer)
    ids, mask = batch["completion_ids"], batch["completion_mask"].bool()
    grid = (2, 4, ids.shape[1])
    everything, seen = (
        torch.cat([batch[f"prompt_{x}"], batch[f"completion_{x}"]], 1) for x in ("ids", "mask")
    )
    logits = trainer.model(input_ids=everything, attention_mask=seen).logits[:, -grid[2] - 1 : -1]
    logp = logits.log_softmax(-1).gather(2, ids[..., None])[..., 0]
    spread = 0.3 if loss_type in CLIPPED else 0.0
    batch["old_per_token_logps"] = old = logp.detach() + spread * torch.randn(ids.shape)
    ours = sibling_grpo_loss(
        logp.view(grid),
        ids.view(grid),
        torch.tensor(reward([row[there].tolist() for row, there in zip(ids, mask)])).view(grid[:2]),
        mask=mask.view(grid),
        old_logp=old.view(grid),
        loss_type={**CLIPPED, **SAME_SLOPE}[loss_type],
        horizon={"dr_grpo": 6, "luspo": 1}.get(loss_type),
        clip=(0.2, 0.2),
        clip_terms="joint",
    )
    assert (ours.global_clip_fraction > 0.1) == (loss_type in CLIPPED)
    want, want_gradient = differentiated(trainer, ours.loss)
    value, gradient = differentiated(trainer, trainer._compute_loss(trainer.model, batch))
    if loss_type in CLIPPED:
        table.add("`sibling_grpo_loss`", f"TRL, `{loss_type}`", "loss", want, value, 1e-6)
    at = "gradient" if loss_type in CLIPPED else "gradient at ratio 1"
    table.add("`sibling_grpo_loss`", f"TRL, `{loss_type}`", at, want_gradient, gradient, 1e-5, relative=True)


# ---------------------------------------------------------------- verl


def verl(table: Table) -> None:
    """Advantages through verl's ``compute_advantage``, and its policy loss under each ``loss_agg_mode``."""
    from verl.trainer.ppo import core_algos

    group = torch.arange(len(SIZES)).repeat_interleave(torch.tensor(SIZES))[torch.randperm(sum(SIZES))]
    rows = len(group)
    length = torch.randint(1, 5, (rows, 1))
    length[0] = 4
    mask = torch.arange(4) < length
    tokens, score = torch.randint(3, (rows, 4)), torch.rand(rows).round(decimals=1)
    data = {
        "responses": tokens,
        "response_mask": mask.long(),
        "token_level_rewards": torch.zeros(rows, 4).scatter_(1, length - 1, score[:, None]),
    }
    uid = np.array([f"uid-{b}" for b in group.tolist()], dtype=object)
    theirs, _ = core_algos.compute_grpo_outcome_advantage(
        data["token_level_rewards"], data["response_mask"], uid
    )
    without = estimated(data, uid, "+algorithm.sibling.sibling_weight=0")
    table.add("`sibling_grpo`, weight 0", "verl, `grpo`", "advantages", without, theirs, 2e-6)
    alone = group == len(SIZES) - 1
    table.add(
        "`sibling_grpo`, group of one", "verl, `grpo`", "advantage", without[alone], theirs[alone], 2e-6
    )
    zero = estimated(data, uid, "+algorithm.sibling.singleton=zero")[alone]
    table.add("`singleton=zero`, group of one", "verl, `grpo`", "advantage", zero, theirs[alone])
    siblings, number = siblings_by_hand(tokens, score, mask, group)
    factor = mask.sum() / rows
    table.add(
        "`sibling_grpo`",
        "verl's `grpo` + Eqs. 17, 18 by hand",
        "advantages",
        estimated(data, uid, "+algorithm.sibling.form=paper"),
        theirs + mask * factor * siblings / number.clamp(min=1),
        1e-5,
    )
    every, same = torch.ones(7, 4, dtype=torch.int64), np.array(["a"] * 7, dtype=object)
    equal = {
        "responses": torch.randint(3, (7, 4)),
        "response_mask": every,
        "token_level_rewards": torch.tensor([0, 0, 0, 0.35]).expand(7, 4).clone(),
    }
    noise, _ = core_algos.compute_grpo_outcome_advantage(equal["token_level_rewards"], every, same)
    table.add(
        "`sibling_grpo`, seven scores 0.35", "verl, `grpo`", "advantages", estimated(equal, same), noise
    )
    for mode in LOSS_AGG_MODES:
        policy_loss(table, mode, data, uid, group, score)


def configuration(*overrides: str) -> Any:
    """Of a run with ``algorithm.adv_estimator=sibling_grpo``, as verl's command line makes it."""
    import verl
    from hydra import compose, initialize_config_dir

    folder = str(Path(verl.__file__).parent / "trainer" / "config")
    with initialize_config_dir(config_dir=folder, version_base=None):
        return compose("ppo_trainer", ["algorithm.adv_estimator=sibling_grpo", *overrides])


def estimated(data: dict[str, Tensor], uid: Any, *overrides: str) -> Tensor:
    """Advantages by verl's own function, called as its trainer does."""
    from verl import DataProto
    from verl.trainer.ppo import ray_trainer

    import vstar_ops.integrations.verl  # noqa: F401 (verl's plug-in, if it is not installed as one)

    config = configuration(*overrides).algorithm
    proto = DataProto.from_dict(tensors=dict(data), non_tensors={"uid": uid})
    out = ray_trainer.compute_advantage(proto, adv_estimator=config.adv_estimator, config=config)
    return out.batch["advantages"]


def policy_loss(
    table: Table, mode: str, data: dict[str, Tensor], uid: Any, group: Tensor, score: Tensor
) -> None:
    """The actor's loss with verl's defaults of clipping, against ours with the same."""
    from verl.trainer.ppo import core_algos
    from verl.utils.config import omega_conf_to_dataclass

    from vstar_ops.advantages import GroupLayout

    overrides = (f"actor_rollout_ref.actor.loss_agg_mode={mode}", "+algorithm.sibling.singleton=zero")
    batch_size = "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1"
    actor = omega_conf_to_dataclass(configuration(batch_size, *overrides).actor_rollout_ref.actor)
    mask = data["response_mask"]
    old = -torch.rand(mask.shape)
    logp = (old + 0.3 * torch.randn(mask.shape)).requires_grad_()
    advantages = estimated(data, uid, *overrides)
    theirs, _ = core_algos.get_policy_loss_fn("vanilla")(old, logp, advantages, mask, mode, actor)
    layout = GroupLayout.of(group, len(group), mask.device)
    rewards, there = layout.grid(score), layout.grid(mask).bool()
    found = sibling_grpo_loss(
        layout.grid(logp),
        layout.grid(data["responses"]),
        rewards,
        mask=there,
        old_logp=layout.grid(old),
        group_advantage=group_advantage(rewards, there.any(2), eps=1e-6),
        loss_type=LOSS_AGG_MODES[mode],
        horizon={"token-sum": 1, "seq-mean-token-sum": 1}.get(mode),
        clip=(0.2, 0.2),
        dual_clip=3.0,
        log_ratio_bound=20.0,
        clip_terms="joint",
    )
    assert found.global_clip_fraction > 0.1
    # "dr_grpo" divides by the places of the grid, verl by its rows, or under token-sum by nothing.
    share = rewards.numel() if mode == "token-sum" else rewards.numel() / len(group)
    ours = found.loss * (share if LOSS_AGG_MODES[mode] == "dr_grpo" else 1)
    pair = [torch.autograd.grad(loss, logp)[0] for loss in (ours, theirs)]
    table.add("`sibling_grpo_loss`", f"verl, `{mode}`", "loss", ours, theirs, 1e-5, relative=True)
    table.add("`sibling_grpo_loss`", f"verl, `{mode}`", "gradient", *pair, 1e-5, relative=True)
