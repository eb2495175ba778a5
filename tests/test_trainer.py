"""The loop where things go wrong: what is not finite, other data on resume, no valid split, no terminal."""

from __future__ import annotations

import functools
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toy_data import ROOT, weights

from vstar_ops import Trie
from vstar_ops.train import __main__, checkpoint, metrics, trainer
from vstar_ops.train.__main__ import main
from vstar_ops.train.config import Config
from vstar_ops.train.model import SIDTransformer
from vstar_ops.train.synthetic import synthetic
from vstar_ops.train.trainer import Batches, Run, Schedule, optimizer_of

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 8


@functools.lru_cache
def tiny() -> Any:
    return synthetic(items=60, users=40, requests=10, codes=(4, 3))


class Stage:
    """A stage of a small model; ``spoil(step, model)`` changes gradients, or returns figures."""

    def __init__(
        self,
        folder: Path,
        *,
        values: bool = False,
        spoil: Callable[[int, SIDTransformer], dict[str, float] | None] = lambda *_: None,
        metric: Callable[[int], float] = lambda step: float(step),
        lr: float = 1e-3,
        **changes: Any,
    ) -> None:
        folder.mkdir(exist_ok=True)
        data = tiny()
        config = Config.synthetic().replace(**{"checkpoint_every": 1, "patience": 99} | changes)
        self.run = Run(config, data, Trie.from_sequences(data.sequences), folder, 0)
        torch.manual_seed(0)
        self.model = SIDTransformer(data.vocab, data.max_tokens, dim=16, layers=1, heads=2)
        if values:
            self.model.add_value_head(child_values=False)
        self.optimizer = optimizer_of(self.model, lr, 0.0, lr)
        self.spoil, self.metric, self.seen = spoil, metric, 0
        self.path, self.logged = folder / "sft.pt", folder / "sft.jsonl"

    def step(self, rows: torch.Tensor, _: float) -> dict[str, float]:
        self.seen += 1
        context = tiny().train[rows].context
        loss = self.model(context).square().mean()
        if self.model.value_head is not None:
            _, state = self.model.prefill(context)
            loss = loss + (self.model.value(state, torch.arange(len(rows))) - 1).square().mean()
        loss.backward()
        return {"loss": loss.item()} | (self.spoil(self.seen, self.model) or {})

    def fit(self) -> dict[str, float]:
        torch.manual_seed(1)
        batches = Batches(lambda: (torch.arange(16), torch.ones(16)), 4)
        return trainer.fit(
            self.run,
            "sft",
            self.model,
            self.optimizer,
            batches,
            self.step,
            lambda _: {"NDCG@10": self.metric(self.seen)},
            schedule=Schedule(steps=STEPS, evals=2, warmup=1),
            metric="NDCG@10",
        )

    def records(self) -> list[dict[str, Any]]:
        return [r for r in checkpoint.read_metrics(self.logged) if "loss" in r]


def spoil_gradient(part: int, at: set[int], with_: float) -> Callable[[int, SIDTransformer], None]:
    """One entry of the gradient of the policy (0) or of the value head (1) at these steps."""

    def spoil(step: int, model: SIDTransformer) -> None:
        if step in at:
            next(p for p in model.parts()[part] if p.grad is not None).grad.view(-1)[0] = with_

    return spoil


# ------------------------------------------------------------------ what is not finite


@pytest.mark.parametrize("number", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize(("part", "name"), [(0, "grad_norm"), (1, "value_grad_norm")])
def test_a_gradient_that_is_not_finite_moves_nothing(
    tmp_path: Path, capsys, number: float, part: int, name: str
) -> None:
    before = []
    stage = Stage(tmp_path, values=True, max_skipped=3)

    def spoil(step: int, model: SIDTransformer) -> None:
        if step in (3, 4, 6):
            before.append((step, {k: v.clone() for k, v in model.state_dict().items()}))
        if step in (4, 5, 7):  # the step after: what did the spoiled one move?
            same = all(torch.equal(v, model.state_dict()[k]) for k, v in before[-1][1].items())
            assert same or before[-1][0] != step - 1
        spoil_gradient(part, {3, 4, 6}, number)(step, model)

    stage.spoil = spoil
    figures = stage.fit()
    assert "3 steps skipped" in capsys.readouterr().out
    assert figures["skipped"] == 3 and figures["steps"] == STEPS
    skipped = {r["step"]: r["skipped"] for r in stage.records() if "skipped" in r}
    assert list(skipped) == [3, 4, 6] and all(text.startswith(f"{name} ") for text in skipped.values())
    assert all(w.isfinite().all() for w in stage.model.state_dict().values())
    assert all(
        json.loads(line, parse_constant=pytest.fail) for line in stage.logged.read_text().split("\n")[:-1]
    )


@pytest.mark.parametrize("name", ["loss", "value_loss"])
def test_a_loss_that_is_not_finite_is_skipped(tmp_path: Path, name: str) -> None:
    stage = Stage(tmp_path, spoil=lambda step, _: {name: torch.nan} if step == 2 else None)
    assert stage.fit()["skipped"] == 1
    (record,) = [r for r in stage.records() if "skipped" in r]
    assert record["step"] == 2 and record["skipped"] == f"{name} nan" and record[name] is None


def test_a_skipped_step_is_as_if_its_batch_had_been_left_out(tmp_path: Path) -> None:
    """The moments of the optimizer do not move either."""
    stages = [Stage(tmp_path / "a", spoil=spoil_gradient(0, {3}, torch.inf)), Stage(tmp_path / "b")]
    update = stages[1].optimizer.step

    def skipping(*_: Any) -> None:
        if stages[1].seen != 3:
            update()

    stages[1].optimizer.step = skipping  # type: ignore[method-assign]
    for stage in stages:
        stage.fit()
    for a, b in zip(stages[0].model.parameters(), stages[1].model.parameters()):
        assert torch.equal(a, b)


def test_steps_skipped_in_a_row_end_the_run(tmp_path: Path) -> None:
    """The last checkpoint is the one before them, whole and finite; a resumed run goes on counting."""
    stage = Stage(
        tmp_path, spoil=spoil_gradient(0, set(range(3, 99)), torch.inf), checkpoint_every=2, max_skipped=3
    )
    with pytest.raises(
        FloatingPointError, match=r"seed 0 sft, step 5: grad_norm (inf|nan); the last of 3 steps"
    ):
        stage.fit()
    saved = checkpoint.load(stage.path)
    assert saved["progress"]["step"] == 4 and saved["progress"]["in_a_row"] == 2
    assert all(w.isfinite().all() for w in saved["model"].values())
    again = Stage(tmp_path, spoil=spoil_gradient(0, {1}, torch.inf), checkpoint_every=2, max_skipped=3)
    with pytest.raises(FloatingPointError, match="step 5"):
        again.fit()
    Stage(tmp_path, checkpoint_every=2, max_skipped=3).fit()


def test_the_default_is_five_in_a_row(tmp_path: Path) -> None:
    assert Config().max_skipped == 5
    assert Stage(tmp_path / "a", spoil=spoil_gradient(0, {1, 2, 3, 4}, torch.nan)).fit()["skipped"] == 4
    with pytest.raises(FloatingPointError, match="step 5"):
        Stage(tmp_path / "b", spoil=spoil_gradient(0, {1, 2, 3, 4, 5}, torch.nan)).fit()


def test_no_checkpoint_of_broken_weights(tmp_path: Path) -> None:
    def spoil(step: int, model: SIDTransformer) -> None:
        if step == 4:
            model.bias.data[0] = torch.nan

    stage = Stage(tmp_path, spoil=spoil, max_skipped=99)
    with pytest.raises(FloatingPointError, match=r"seed 0 sft, step 4: the weights are not finite"):
        stage.fit()
    saved = checkpoint.load(stage.path)
    assert saved["progress"]["step"] == 3 and all(w.isfinite().all() for w in saved["model"].values())


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_a_metric_that_is_not_finite_is_an_error(tmp_path: Path, number: float) -> None:
    stage = Stage(tmp_path, metric=lambda step: number if step == 4 else 0.5)
    with pytest.raises(FloatingPointError, match=rf"step 4: NDCG@10 on the valid split is {number}"):
        stage.fit()
    assert checkpoint.load(stage.path)["progress"]["step"] == 3


# ------------------------------------------------------------------ without validation, without a terminal


OPTIONS = "--category Toy --threads 1 --sft-epochs 2 --rl-steps 3 --sft-batch-size 8 --rl-batch-size 8"
OPTIONS += " --candidates 4 --checkpoint-every 1 --sft-evals 2 --rl-evals 2 --patience 9"
OPTIONS += " --decoder beam --objective grpo"


def train(toy: Path, out: Path, *more: str) -> int:
    return main(["--data", str(toy), *OPTIONS.split(), *more, "--out", str(out)])


def test_training_without_a_valid_split(toy: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    """The last step's weights are kept, and the results say so."""
    shutil.rmtree(toy / "valid")
    asked, evaluate = [], metrics.evaluate
    monkeypatch.setattr(__main__, "evaluate", lambda *a: asked.append(a[4]) or evaluate(*a))
    run = tmp_path / "run"
    assert train(toy, run, "--no-validate") == 0
    assert set(asked) == {"test"}
    for row in json.loads((run / "results.json").read_text())["0"].values():
        assert row["best_step"] == row["steps"] > 0 and "valid_NDCG@10" not in row
        assert np.isfinite(list(row.values())).all()
    for stage in ("sft", "beam+grpo"):
        last = checkpoint.load(run / "seed-0" / f"{stage}.pt")
        assert all(torch.equal(w, last["model"][k]) for k, w in weights(run, stage).items())
    note = "Trained without validation: the weights are those of the last step."
    out = capsys.readouterr().out
    assert note in out and note in (run / "results.md").read_text()
    assert "seed 0 beam+grpo, step 2 of 3: reward " in out


def test_the_form_of_the_sibling_term(toy: Path, tmp_path: Path) -> None:
    """An option of the run, which its checkpoints know, and which decides what is learned."""
    learned = []
    for form, option in (("centered", []), ("paper", ["--sibling-form", "paper"])):
        assert train(toy, tmp_path / form, "--objective", "sibling", *option) == 0
        saved = checkpoint.load(tmp_path / form / "seed-0" / "beam+sibling.pt")
        assert saved["fingerprint"]["configuration"]["sibling_form"] == form
        learned.append(torch.cat([w.flatten() for w in saved["model"].values()]))
    assert not torch.equal(*learned)


def test_an_empty_valid_split_is_an_error_that_says_how_to_do_without(
    toy: Path, tmp_path: Path, capsys
) -> None:
    path = toy / "valid" / "Toy_5_2016.csv"
    path.write_text(path.read_text().split("\n")[0] + "\n")
    with pytest.raises(SystemExit) as left:
        train(toy, tmp_path / "run")
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert f"{path}: the valid split has no rows; --no-validate trains without" in error


@pytest.mark.parametrize("case", ["one item", "no histories", "one row"])
def test_the_smallest_data(toy: Path, tmp_path: Path, case: str) -> None:
    """Less than a batch, and nothing to choose from: no error, no NaN."""
    one = "<a_0><b_0><c_0>"
    if case == "one item":
        (toy / "index" / "Toy.index.json").write_text('{"5": ["<a_0>", "<b_0>", "<c_0>"]}')
    rows = {"one item": [f"U,\"['{one}']\",{one}"] * 3, "no histories": [f"U,[],{one}"] * 9}
    for split in ("train", "valid", "test"):
        lines = rows.get(case, [f"U,\"['{one}']\",{one}"])
        path = toy / split / "Toy_5_2016.csv"
        path.write_text("\n".join(["user_id,history_item_sid,item_sid", *lines]) + "\n")
    options = ["--decoder", "beam,ved", "--objective", "joint", "--rl-steps", "1", "--sft-epochs", "1"]
    assert train(toy, tmp_path / "run", *options) == 0
    rows = json.loads((tmp_path / "run" / "results.json").read_text())["0"]
    assert len(rows) == 3 and all(np.isfinite(list(row.values())).all() for row in rows.values())


def test_a_line_per_evaluation_without_a_terminal(toy: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    assert train(toy, tmp_path / "run") == 0
    lines = [line for line in capsys.readouterr().out.split("\n") if line.startswith("seed 0 ")]
    for stage, figure in (("sft", "loss"), ("beam+grpo", "reward")):
        evaluated = [
            r["step"]
            for r in checkpoint.read_metrics(tmp_path / "run/seed-0" / f"{stage}.jsonl")
            if "valid" in r
        ]
        of_stage = [line for line in lines if line.startswith(f"seed 0 {stage}, step ")]
        assert [int(line.split(" step ")[1].split()[0]) for line in of_stage] == evaluated and len(
            evaluated
        ) == 3
        assert all(f"{figure} " in line and "valid NDCG@10 0." in line for line in of_stage[1:])
        assert " s, at most " in of_stage[1] and " left" in of_stage[1] and "left" not in of_stage[-1]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert train(toy, tmp_path / "shown") == 0
    shown = capsys.readouterr()
    assert "seed 0 sft, step" not in shown.out and "seed 0 sft: " in shown.err


# ------------------------------------------------------------------ checkpoints know their data


def interrupted(call: Callable[[], Any], batches: int) -> None:
    """Interrupt training at this batch."""
    seen, following = 0, Batches.__next__

    def stop(self: Batches) -> torch.Tensor:
        nonlocal seen
        seen += 1
        if seen == batches:
            raise KeyboardInterrupt
        return following(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Batches, "__next__", stop)
        with pytest.raises(KeyboardInterrupt):
            call()


def refused(run: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The error on resume, which comes before the first batch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Batches, "__next__", lambda _: pytest.fail("it trains"))
        with pytest.raises(SystemExit) as left:
            main(["--resume", str(run)])
    assert left.value.code == 1
    return capsys.readouterr().err


def change(toy: Path, run: Path, what: str) -> None:
    path = toy / ("train" if what in ("rows", "clicks") else what) / "Toy_5_2016.csv"
    index = toy / "index" / "Toy.index.json"
    if what == "rows":
        path.write_text("\n".join(path.read_text().split("\n")[:-11]) + "\n")
    elif what in ("clicks", "valid", "test"):
        text = path.read_text()
        assert "<a_1><b_0><c_2>,3" in text
        path.write_text(text.replace("<a_1><b_0><c_2>,3", "<a_2><b_0><c_0>,7", 1))
    elif what == "items":
        index.write_text(json.dumps(json.loads(index.read_text()) | {"8": ["<a_3>", "<b_3>", "<c_3>"]}))
    elif what == "item ids":
        index.write_text(index.read_text().replace('"7"', '"9"'))
    else:
        config = json.loads((run / "config.json").read_text())
        config["ved" if what == "search" else "dropout"] = (
            0.5 if what == "dropout" else config["ved"] | {"budget": 7}
        )
        (run / "config.json").write_text(json.dumps(config))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "differs", "batches"),  # interrupted amid supervised training or amid reinforcement
    [
        ("clicks", "train", 4),
        ("clicks", "train", 12),
        ("rows", "train", 12),
        ("valid", "valid", 4),
        ("test", "test", 12),
        ("items", "catalogue", 4),
        ("items", "catalogue", 12),
        ("item ids", "catalogue", 4),
        ("dropout", "configuration (dropout was 0.2, is 0.5)", 4),
        ("search", "configuration (ved.budget was None, is 7)", 12),
    ],
)
def test_other_data_on_resume(toy: Path, tmp_path: Path, capsys, what, differs, batches) -> None:
    """One clear error that says what differs, before anything is trained."""
    run = tmp_path / "run"
    interrupted(lambda: train(toy, run, "--rl-steps", "6"), batches)
    assert (run / "seed-0" / "beam+grpo.pt").exists() == (batches == 12)
    before = {path: path.read_bytes() for path in (run / "seed-0").iterdir()}
    change(toy, run, what)
    error = refused(run, capsys)
    assert error.endswith(
        f"{run}/seed-0/sft.pt cannot be continued, since these differ from its own: {differs}\n"
    )
    assert {path: path.read_bytes() for path in (run / "seed-0").iterdir()} == before


@pytest.mark.parametrize("size", [0, 1000])
def test_damaged_checkpoint_on_resume(toy: Path, tmp_path: Path, capsys, size) -> None:
    run = tmp_path / "run"
    interrupted(lambda: train(toy, run), 4)
    path = run / "seed-0" / "sft.pt"
    path.write_bytes(path.read_bytes()[:size])
    assert f"{path} is no checkpoint, or damaged: " in refused(run, capsys)


def test_paths_threads_and_seeds_may_change(toy: Path, tmp_path: Path, capsys) -> None:
    run = tmp_path / "run"
    interrupted(lambda: train(toy, run), 4)
    moved = toy.rename(tmp_path / "moved")
    for split in ("train", "valid", "test"):
        path = moved / split / "Toy_5_2016.csv"
        path.rename(path.with_name("Other_5.csv"))
    (moved / "index" / "Toy.index.json").rename(moved / "index" / "Other.index.json")
    config = json.loads((run / "config.json").read_text())
    config |= {"data": str(moved), "category": "Other", "checkpoint_every": 7, "seeds": [0, 1]}
    (run / "config.json").write_text(json.dumps(config))
    assert main(["--resume", str(run)]) == 0
    finished = (run / "results.json").read_bytes()
    path = moved / "test" / "Other_5.csv"
    path.write_text("\n".join(path.read_text().split("\n")[:-3]) + "\n")
    assert "test" in refused(run, capsys)  # also where nothing is left to train
    assert (run / "results.json").read_bytes() == finished


def test_reinforcement_knows_the_policy_that_it_began_with(toy: Path, tmp_path: Path, capsys) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    interrupted(lambda: train(toy, run), 12)
    assert train(toy, other, "--rl-steps", "1", "--seeds", "1") == 0
    old, new = (checkpoint.load(folder / "sft.pt") for folder in (run / "seed-0", other / "seed-1"))
    new["fingerprint"] = old["fingerprint"]
    checkpoint.save(run / "seed-0" / "sft.pt", new)
    assert "beam+grpo.pt cannot be continued, since these differ from its own: initial weights\n" in refused(
        run, capsys
    )


def test_item_embeddings_are_known_by_their_content(toy: Path, tmp_path: Path, capsys) -> None:
    path, run = tmp_path / "items.npy", tmp_path / "run"
    np.save(path, np.eye(8, dtype=np.float32))
    interrupted(lambda: train(toy, run, "--item-embeddings", str(path)), 4)
    np.save(path, 2 * np.eye(8, dtype=np.float32))
    assert "these differ from its own: item embeddings\n" in refused(run, capsys)


def test_a_checkpoint_of_an_older_version(toy: Path, tmp_path: Path, capsys) -> None:
    run = tmp_path / "run"
    interrupted(lambda: train(toy, run), 4)
    path = run / "seed-0" / "sft.pt"
    saved = checkpoint.load(path)
    del saved["fingerprint"]
    checkpoint.save(path, saved)
    assert f"{path} does not say which data it was trained on" in refused(run, capsys)


# ------------------------------------------------------------------ memory and checkpoints

RESIDENT = """
import os, torch
torch.set_num_threads(1)
from vstar_ops import Trie
from vstar_ops.train.synthetic import synthetic
from vstar_ops.train.metrics import evaluate
from vstar_ops.train.decode import Decoder
from vstar_ops.train.model import SIDTransformer
def rss(): return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 2**20
data = synthetic(items=300, users=300, requests=300, codes=(8, 8))
trie = Trie.from_sequences(data.sequences)
model = SIDTransformer(data.vocab, data.max_tokens)
evaluate(model, data, trie, Decoder("beam", 4), "test", 4)
before = rss()
evaluate(model, data, trie, Decoder("topk", 16), "test")
print(rss() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the heap of another C library")
def test_an_evaluation_gives_its_memory_back() -> None:
    """Otherwise every seed of a run adds to what the process holds."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", RESIDENT]
    grown = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    assert int(grown) < 40  # MB; about 100 where freed memory stays in the process


def test_rows_that_never_moved_are_not_stored() -> None:
    torch.manual_seed(0)
    initial = {"table": torch.randn(2**16, 8), "dense": torch.randn(2**9, 2**9)}
    initial |= {"small": torch.randn(6, 4), "bias": torch.randn(3), "step": torch.tensor(2.0)}
    state = {name: x.clone() for name, x in initial.items()}
    state["table"][[3, 70]] += 1
    state["table"][9, 0] = torch.nan
    state["dense"] += 1
    saved = checkpoint.moved_rows(state, initial)
    assert saved["table"].shape == (3, 8)
    assert all(saved[name].shape == x.shape for name, x in state.items() if name != "table")
    restored = checkpoint.whole(saved, initial)
    assert restored.keys() == state.keys()
    for name, x in state.items():
        torch.testing.assert_close(restored[name], x, rtol=0, atol=0, equal_nan=True)


def test_a_checkpoint_is_not_larger_than_its_weights_need(toy: Path, tmp_path: Path, monkeypatch) -> None:
    """The policy, what moved of the value head, and the moments of both; at the end the weights alone."""
    sizes, save = [], checkpoint.save

    def spy(path: Path, state: dict[str, Any]) -> None:
        save(path, state)
        if path.name == "ved+joint.pt":
            sizes.append(path.stat().st_size)

    monkeypatch.setattr(checkpoint, "save", spy)
    run = tmp_path / "run"
    assert train(toy, run, "--decoder", "ved", "--objective", "joint", "--test-decoder", "ved") == 0
    policy = sum(4 * w.numel() for w in weights(run, "sft").values())
    assert len(sizes) == 4 and max(sizes) < 6 * policy and sizes[-1] < 3 * policy
    assert (run / "seed-0" / "sft.pt").stat().st_size < 2.2 * policy
    assert not any(
        name in key for key in weights(run, "ved+joint") for name in ("direction", "offset", "node")
    )
