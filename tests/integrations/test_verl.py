"""The estimator ``sibling_grpo`` in verl's own functions, trainers and configuration."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from needs import needs
from torch import Tensor

needs("verl", "ray", "transfer_queue", "hydra")

import verl
import verl.trainer.ppo.ray_trainer
import verl.trainer.ppo.v1.trainer_base
from hydra import compose, initialize_config_dir
from tensordict import TensorDict
from verl import DataProto
from verl.trainer.ppo import core_algos
from verl.utils.config import omega_conf_to_dataclass

import vstar_ops
import vstar_ops.integrations.verl as plugin

SIZES = (5, 3, 8, 1)
ROOT = Path(vstar_ops.__file__).parents[1]
CONFIGS = str(Path(verl.__file__).parent / "trainer" / "config")


def configuration(*overrides: str) -> Any:
    """That of a run with ``algorithm.adv_estimator=sibling_grpo``, as verl's command line makes it."""
    with initialize_config_dir(config_dir=CONFIGS, version_base=None):
        return compose("ppo_trainer", ["algorithm.adv_estimator=sibling_grpo", *overrides])


class Batch:
    """Groups of unequal sizes, shuffled, responses of 1 to 4 tokens."""

    def __init__(self, sizes: tuple[int, ...] = SIZES, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        rows = sum(sizes)
        group = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        self.group = group[torch.randperm(rows, generator=g)]
        self.uid = np.array([f"uid-{b}" for b in self.group.tolist()], dtype=object)
        self.length = torch.randint(1, 5, (rows,), generator=g)
        self.length[0] = 4
        self.mask = (torch.arange(4) < self.length[:, None]).long()
        self.responses = torch.randint(0, 3, (rows, 4), generator=g)
        self.score = torch.rand(rows, generator=g).round(decimals=1)
        self.rewards = torch.zeros(rows, 4).scatter_(1, self.length[:, None] - 1, self.score[:, None])
        self.old = -torch.rand(rows, 4, generator=g)
        self.logp = self.old + 0.3 * torch.randn(rows, 4, generator=g)

    def proto(self, **changed: Tensor) -> DataProto:
        tensors = {
            "responses": self.responses,
            "response_mask": self.mask,
            "token_level_rewards": self.rewards,
            **changed,
        }
        return DataProto.from_dict(tensors=tensors, non_tensors={"uid": self.uid})

    def grid(self, x: Tensor) -> Tensor:
        """``[B, G, ...]``, group by group."""
        out = x.new_zeros(int(self.group.max()) + 1, int(self.group.bincount().max()), *x.shape[1:])
        for b in range(len(out)):
            rows = (self.group == b).nonzero()[:, 0]
            out[b, : len(rows)] = x[rows]
        return out


def advantages(batch: Batch, *overrides: str, data: DataProto | None = None) -> Tensor:
    """By the older trainer's ``compute_advantage``, which its fit() calls like this."""
    config = configuration(*overrides)
    out = verl.trainer.ppo.ray_trainer.compute_advantage(
        data or batch.proto(),
        adv_estimator=config.algorithm.adv_estimator,
        norm_adv_by_std_in_grpo=config.algorithm.get("norm_adv_by_std_in_grpo", True),
        config=config.algorithm,
    )
    assert torch.equal(out.batch["advantages"], out.batch["returns"])
    return out.batch["advantages"]


def by_hand(batch: Batch, row: int, place: int) -> tuple[float, float, int]:
    """verl's advantage of a row, the sibling advantage of a token and the responses through its node."""
    mates = [i for i in range(len(batch.group)) if batch.group[i] == batch.group[row]]
    scores = batch.score[mates].double()
    alone = len(mates) == 1
    mean, std = (0.0, 1.0) if alone else (scores.mean(), scores.std())
    of_row = float((batch.score[row].double() - mean) / (std + 1e-6))
    prefix = batch.responses[row, :place].tolist()
    children: dict[int, list[float]] = {}
    for i in mates:
        if batch.length[i] > place and batch.responses[i, :place].tolist() == prefix:
            children.setdefault(int(batch.responses[i, place]), []).append(float(batch.score[i]))
    means = np.array([np.mean(x) for x in children.values()])
    token = int(batch.responses[row, place])
    sibling = 0.0
    if len(children) > 1 and means.max() > means.min():
        sibling = (np.mean(children[token]) - means.mean()) / (means.std() + 1e-4)
    return of_row, float(sibling), len(children[token])


def test_against_every_row_by_hand() -> None:
    batch = Batch()
    weights = "+algorithm.sibling.sibling_weight=0.5", "+algorithm.sibling.global_weight=2.0"
    got = advantages(batch, *weights, "+algorithm.sibling.form=paper")
    factor = int(batch.mask.sum()) / len(batch.group)  # token-mean, verl's default
    for row, place in np.ndindex(*batch.mask.shape):
        if not batch.mask[row, place]:
            assert got[row, place] == 0
            continue
        of_row, sibling, number = by_hand(batch, row, place)
        assert abs(got[row, place] - (2 * of_row + 0.5 * factor * sibling / number)) < 1e-5


@pytest.mark.parametrize("scaled", [True, False])
def test_with_sibling_weight_0_it_is_verls_grpo(scaled: bool) -> None:
    batch = Batch()
    overrides = ["+algorithm.sibling.sibling_weight=0", f"algorithm.norm_adv_by_std_in_grpo={scaled}"]
    got = advantages(batch, *overrides)
    want, _ = core_algos.compute_grpo_outcome_advantage(
        batch.rewards.clone(), batch.mask, batch.uid, norm_adv_by_std_in_grpo=scaled
    )
    torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-6)
    alone = batch.group == 3
    assert got[alone, 0] == batch.score[alone]
    assert advantages(batch, *overrides, "+algorithm.sibling.singleton=zero")[alone, 0] == 0


def test_equal_scores_give_exactly_nothing() -> None:
    batch = Batch((7,))
    batch.rewards = torch.zeros(7, 4).scatter_(1, batch.length[:, None] - 1, 0.35)
    assert torch.equal(advantages(batch), torch.zeros(7, 4))


LOSS_TYPES = {"token-mean": "bnpo", "seq-mean-token-mean": "grpo", "seq-mean-token-sum-norm": "dr_grpo"}


@pytest.mark.parametrize("mode", LOSS_TYPES)
@pytest.mark.parametrize("sizes", [(4, 4, 4), SIZES])
@pytest.mark.parametrize("options", [{}, {"form": "paper"}, {"form": "paper", "weighting": "candidate"}])
def test_the_actors_loss_is_sibling_grpo_loss(
    mode: str, sizes: tuple[int, ...], options: dict[str, str]
) -> None:
    """verl's own policy loss under the actor's configuration."""
    batch = Batch(sizes)
    overrides = [f"actor_rollout_ref.actor.loss_agg_mode={mode}"]
    overrides += [f"+algorithm.sibling.{name}={value}" for name, value in options.items()]
    advantage = advantages(batch, *overrides, "+algorithm.sibling.singleton=zero")
    actor = configuration(
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1", *overrides
    ).actor_rollout_ref
    logp = batch.logp.double().requires_grad_()
    value, _ = core_algos.get_policy_loss_fn("vanilla")(
        batch.old.double(), logp, advantage.double(), batch.mask, mode, omega_conf_to_dataclass(actor.actor)
    )
    value.backward()

    ours = batch.logp.clone().requires_grad_()
    tokens, there = batch.grid(batch.responses), batch.grid(batch.mask).bool()
    rewards = batch.grid(batch.score)
    want = vstar_ops.sibling_grpo_loss(
        batch.grid(ours),
        tokens,
        rewards,
        mask=there,
        old_logp=batch.grid(batch.old),
        group_advantage=vstar_ops.group_advantage(rewards, there.any(2), eps=1e-6),
        **options,
        loss_type=LOSS_TYPES[mode],
        clip=(0.2, 0.2),  # verl's defaults, as are the next two
        dual_clip=3.0,
        log_ratio_bound=20.0,
        clip_terms="joint",
    )
    assert want.global_clip_fraction > 0.1
    want = want.loss
    want.backward()
    more = rewards.numel() / len(batch.group) if mode.endswith("norm") else 1  # ours counts the grid's places
    assert abs(value - more * want) < 1e-6
    assert (logp.grad - more * ours.grad).abs().max() < 1e-6


def test_the_newer_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its method, with a queue that is a dictionary: the advantages of the older one; others unchanged."""
    base = verl.trainer.ppo.v1.trainer_base
    batch = Batch()
    rows = range(len(batch.group))

    def nested(x: Tensor) -> Tensor:
        rows_of = [x[i, : batch.length[i]] for i in rows]
        return torch.nested.as_nested_tensor(rows_of, layout=torch.jagged)

    queue = {
        "uid": batch.uid,
        "response_mask": nested(batch.mask),
        "responses": nested(batch.responses),
        "rm_scores": nested(batch.rewards),
    }
    asked, written = [], {}

    def get(keys: list[str], partition_id: str, select_fields: list[str]) -> TensorDict:
        asked.append(select_fields)
        found = {name: queue[name] for name in select_fields if name in queue}
        uid = found.pop("uid", None)
        out = TensorDict(found, batch_size=len(keys))
        if uid is not None:
            verl.utils.tensordict_utils.assign_non_tensor_stack(out, "uid", list(uid))
        return out

    def put(keys: list[str], partition_id: str, fields: TensorDict) -> Any:
        written.update(fields.items())
        return keys

    monkeypatch.setattr(base, "tq", SimpleNamespace(kv_batch_get=get, kv_batch_put=put))

    class Keys(SimpleNamespace):
        def __len__(self) -> int:
            return len(self.keys)

    keys = Keys(keys=[f"{uid}_{i}_0" for i, uid in enumerate(batch.uid)], partition_id="train")
    for estimator in ("sibling_grpo", "rloo_vectorized"):
        config = configuration(
            f"algorithm.adv_estimator={estimator}", "+algorithm.sibling.sibling_weight=0.5"
        )
        base.PPOTrainer._compute_advantage(SimpleNamespace(config=config), keys, {})
        if estimator == "sibling_grpo":
            got = written["advantages"].to_padded_tensor(padding=0)
            assert torch.equal(got, advantages(batch, "+algorithm.sibling.sibling_weight=0.5"))
            assert asked.pop(0) == ["responses"]
    assert len(asked) == 2 and not any("responses" in fields for fields in asked)


def test_other_estimators_and_callers_are_left_alone() -> None:
    batch = Batch()
    data = batch.proto()
    del data.batch["responses"]
    compute_advantage = verl.trainer.ppo.ray_trainer.compute_advantage
    out = compute_advantage(data, adv_estimator="rloo_vectorized", config=configuration().algorithm)
    assert torch.equal(
        out.batch["advantages"],
        core_algos.get_adv_estimator_fn("rloo_vectorized")(batch.rewards, batch.mask, batch.uid)[0],
    )
    with pytest.raises(RuntimeError, match="sibling_grpo needs the tokens"):
        advantages(batch, data=data)
    assert verl.trainer.ppo.v1.utils.compute_advantage is compute_advantage


def test_padding_rows_take_no_part() -> None:
    """The newer trainer fills a batch up with rows of a uid of their own, whose mask is empty."""
    batch = Batch()
    want = advantages(batch, "actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean")
    for name in ("responses", "mask", "rewards"):
        x = getattr(batch, name)
        setattr(batch, name, torch.cat([x, torch.zeros_like(x[:2])]))
    batch.uid = np.append(batch.uid, ["pad", "pad"])
    got = advantages(batch, "actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean")
    assert torch.equal(got, torch.cat([want, torch.zeros(2, 4)]))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["+algorithm.sibling.w_sib=1"], "algorithm.sibling must hold only global_weight, .*, got w_sib"),
        (
            ["+algorithm.sibling.loss_agg_mode=mean"],
            "loss_agg_mode must be the loss's, one of .*, got 'mean'",
        ),
        (["+algorithm.sibling.baseline=mean"], "baseline must be one of"),
        (["+algorithm.sibling.singleton=skip"], "singleton must be one of"),
    ],
)
def test_wrong_options(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        advantages(Batch(), *overrides)


def test_wrong_input() -> None:
    batch = Batch()
    config = configuration("+algorithm.sibling.loss_agg_mode=token-mean").algorithm
    with pytest.raises(ValueError, match="needs a uid for every response"):
        plugin.sibling_grpo(batch.rewards, batch.mask, None, config, batch.responses)
    with pytest.raises(ValueError, match="loss_agg_mode must be the loss's, .* got None"):
        plugin.sibling_grpo(batch.rewards, batch.mask, batch.uid, None, batch.responses)
    batch.rewards[3, 0] = float("nan")
    with pytest.raises(ValueError, match="token_level_rewards must be finite"):
        plugin.sibling_grpo(batch.rewards, batch.mask, batch.uid, config, batch.responses)
    batch.mask[3] = 0
    plugin.sibling_grpo(batch.rewards, batch.mask, batch.uid, config, batch.responses)


def in_a_new_process(folder: Path, *arguments: str) -> str:
    """What python prints where the metadata of the package are installed, as pip would."""
    declared = (ROOT / "pyproject.toml").read_text()
    line = 'vstar_ops = "vstar_ops.integrations.verl"'
    assert f'[project.entry-points."verl.plugins"]\n{line}\n' in declared
    info = folder / "vstar_ops_plugin-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vstar_ops_plugin\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[verl.plugins]\n" + line.replace('"', "") + "\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT), *sys.path])}
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_verl_loads_it_by_its_entry_point(tmp_path: Path) -> None:
    """``import verl`` alone, and no trainer with it; the trainers are wrapped when they are imported."""
    code = """
import sys, verl
assert "verl.trainer.ppo.ray_trainer" not in sys.modules
assert "vstar_ops.integrations.verl" in sys.modules
from verl.trainer.ppo.core_algos import get_adv_estimator_fn
get_adv_estimator_fn("sibling_grpo")
import verl.trainer.ppo.v1.utils as utils, verl.trainer.ppo.ray_trainer as ray_trainer
assert utils.compute_advantage is ray_trainer.compute_advantage
assert ray_trainer.compute_advantage.__wrapped__
from verl.trainer.ppo.v1 import PPOTrainer
assert PPOTrainer._compute_advantage.__wrapped__
"""
    in_a_new_process(tmp_path, "-c", code)


def test_an_untested_version_is_told_of_while_verl_loads(tmp_path: Path) -> None:
    """verl itself would only log at debug level that a plugin failed."""
    code = """
import importlib.metadata as metadata, warnings
true = metadata.version
metadata.version = lambda name: "0.10.0" if name == "verl" else true(name)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import verl
print(*[str(w.message) for w in caught if "vstar_ops" in str(w.message)])
"""
    told = in_a_new_process(tmp_path, "-c", code)
    assert "vstar_ops.integrations.verl was tested with verl>=0.9.1,<0.10" in told and "0.10.0" in told


def test_the_example_runs(tmp_path: Path) -> None:
    told = in_a_new_process(tmp_path, str(ROOT / "examples" / "verl_sibling_grpo" / "advantages.py"))
    assert "<a_1><b_2><c_3>  reward 1.00  advantages   3.22   2.53   2.53" in told
