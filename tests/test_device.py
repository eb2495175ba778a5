"""Training as it would run on a GPU, where there is none: no tensor on the wrong device, few waits."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from other_device import OTHER, Elsewhere, other_device

from vstar_ops import Trie
from vstar_ops.train import __main__, reinforce, supervised, trainer
from vstar_ops.train.config import Config, Variant
from vstar_ops.train.parallel import World, choose_device
from vstar_ops.train.synthetic import synthetic
from vstar_ops.train.trainer import Run

pytestmark = pytest.mark.usefixtures("one_thread")

VARIANTS = tuple(map(Variant.parse, ("beam+grpo", "ved+joint", "topk+joint")))
# Waits of one step: for the averages that are logged; VED's for the end of its one round.
WAITS = {"sft": 1, "beam+grpo": 1, "ved+joint": 2, "topk+joint": 1}


def config(**changes: Any) -> Config:
    small = {"sft_epochs": 1, "sft_evals": 1, "rl_steps": 4, "rl_evals": 1, "rl_batch_size": 8}
    return Config.synthetic().replace(**{**small, "variants": VARIANTS, **changes})


def train(folder: Path, config: Config, device: torch.device | None = None) -> dict[str, Any]:
    """The scores of a run; seconds, which are no result, left out."""
    data = synthetic(items=120, users=40, requests=10, codes=(5, 4))
    __main__.run(config, data, folder, World(device=device))
    found = json.loads((folder / "seed-0" / "results.json").read_text())
    return {row: {k: x for k, x in scores.items() if k != "seconds"} for row, scores in found.items()}


def test_the_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with other_device(monkeypatch) as waits:
        x = torch.arange(6.0, device=OTHER)
        assert isinstance(x, Elsewhere) and x.device == OTHER
        with pytest.raises(RuntimeError, match="expected all tensors to be on the same device"):
            x + torch.ones(6)
        weight = torch.nn.Linear(6, 1).to(OTHER)
        weight(x).backward()
        assert weight.weight.grad.device == OTHER and not waits
        assert x.sum().item() == 15 and x[x > 2].cpu().tolist() == [3, 4, 5]
        assert set(waits.values()) == {1} and len(waits) == 3


@pytest.fixture
def same_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU those of a GPU, by which sums are rounded."""
    monkeypatch.setattr(World, "constant_shapes", True)


@pytest.mark.usefixtures("same_shapes")
def test_training_is_that_of_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = train(tmp_path / "here", config())
    with other_device(monkeypatch):
        assert train(tmp_path / "there", config(), OTHER) == here


@pytest.mark.usefixtures("same_shapes")
def test_a_checkpoint_moves_to_another_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There and back again: killed in the middle of the first stage, and in the middle of the second."""
    settings = config(checkpoint_every=1, sft_epochs=6, variants=VARIANTS[1:2])
    want = train(tmp_path / "stays", settings)
    update, left = trainer._update, 0

    def until_killed(*arguments: Any) -> str:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return update(*arguments)

    monkeypatch.setattr(trainer, "_update", until_killed)
    left = 3
    with other_device(monkeypatch), pytest.raises(KeyboardInterrupt):
        train(tmp_path / "moves", settings, OTHER)
    left = 3 + 2
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "moves", settings)
    left = 2
    with other_device(monkeypatch):
        assert train(tmp_path / "moves", settings, OTHER) == want


def test_how_often_a_step_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: dict[str, int] = {}
    with other_device(monkeypatch) as waits:

        def one_step(
            run: Any, stage: str, model: Any, optimizer: Any, batches: Any, step: Any, *_: Any, **__: Any
        ):
            before = waits.total()
            step(next(batches), 0.5)
            counted[stage] = waits.total() - before
            return {}

        monkeypatch.setattr(supervised, "fit", one_step)
        monkeypatch.setattr(reinforce, "fit", one_step)
        data = synthetic(items=120, users=40, requests=10, codes=(5, 4))
        assert data.reward is not None
        data = dataclasses.replace(data, reward=data.reward.to(OTHER))
        run = Run(
            config(), data, Trie.from_sequences(data.sequences).to(OTHER), tmp_path, 0, World(device=OTHER)
        )
        model, _ = supervised.supervised(run, dict)
        for variant in VARIANTS:
            reinforce.reinforce(run, variant, model, dict)
    assert counted == WAITS


def test_bfloat16(tmp_path: Path) -> None:
    """Weights stay float32; the scores are those of float32, roughly."""
    full, half = (
        train(tmp_path / dtype, config(dtype=dtype, rl_steps=20)) for dtype in ("float32", "bfloat16")
    )
    weights = torch.load(tmp_path / "bfloat16" / "seed-0" / "ved+joint.weights.pt")
    assert {x.dtype for x in weights.values()} == {torch.float32}
    for row, scores in full.items():
        assert half[row]["true_reward@10"] == pytest.approx(scores["true_reward@10"], abs=0.05)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tpu", "must be auto, cpu, cuda or cuda:N, got 'tpu'"),
        ("meta", "must be auto, cpu, cuda or cuda:N, got 'meta'"),
        ("cuda:99", "--device cuda:99: GPU 99 is not there, torch sees"),
    ],
)
def test_devices_that_are_refused(name: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=message):
        choose_device(name)
    with pytest.raises(SystemExit):
        __main__.main(["--device", name])
    assert message.removesuffix("torch sees") in capsys.readouterr().err


def test_several_processes_share_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto") == torch.device("cuda", 0)
    assert choose_device("cuda:1") == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert choose_device("cuda") == torch.device("cuda", 1)
    with pytest.raises(ValueError, match="must be cuda under torchrun"):
        choose_device("cuda:0")
