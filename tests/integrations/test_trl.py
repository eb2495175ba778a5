"""``SiblingGRPOTrainer`` and ``trie_rollout`` in TRL's own trainer, with tiny random models."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from needs import needs
from torch import Tensor

needs("trl", "transformers", "datasets", "accelerate")
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # rollout_func

import datasets
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from trl import GRPOConfig, GRPOTrainer

import vstar_ops
from vstar_ops import Trie
from vstar_ops.decoding import VEDConfig
from vstar_ops.integrations.trl import NORMALIZER, SiblingGRPOTrainer, trie_rollout

PAD, EOS, VOCAB, GROUP = 0, 1, 64, 4
PROMPTS = ["w2 w3 w4", "w5 w6", "w7 w8 w9 w2"]
ITEMS = torch.unique(
    torch.cat(
        [torch.randint(a, a + 8, (40, 1), generator=torch.Generator().manual_seed(a)) for a in (10, 20, 40)],
        1,
    ),
    dim=0,
)
TRIE = Trie.from_sequences(ITEMS)


def tokenizer() -> Any:
    """A word is a token: w7 is 7."""
    words = {"<pad>": PAD, "<eos>": EOS, **{f"w{i}": i for i in range(2, VOCAB)}}
    made = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>")


def tiny_model(kind: str = "Qwen2", **changes: Any) -> Any:
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": PAD,
        "bos_token_id": None,
        "eos_token_id": EOS,
    }
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**sizes, **changes})
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    for weight in model.parameters():
        weight.data.mul_(4 if weight.ndim > 1 else 1)  # logits that differ
    return model


def reward(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
    """None, not scored, where the first token is 13."""
    return [None if c[0] == 13 else c[0] % 2 + sum(c) % 3 / 3 for c in completion_ids]


def random_rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
    """Completions of 1 to 4 tokens, few of them different."""
    drawn = torch.randint(11, 15, (len(prompts), 4))
    ends = torch.randint(1, 5, (len(prompts),))
    rows = [[*row[:end], EOS] for row, end in zip(drawn.tolist(), ends.tolist())]
    return {"prompt_ids": trainer._tokenize_prompts(prompts)[0], "completion_ids": rows, "logprobs": None}


def make(
    folder: Path,
    kind: type = SiblingGRPOTrainer,
    model: Any = None,
    rollout: Any = random_rollout,
    **options: Any,
) -> Any:
    """A trainer of batches of two groups. Options of ``GRPOConfig`` are told by their names."""
    known = set(GRPOConfig.__dataclass_fields__)
    config = {name: value for name, value in options.items() if name in known}
    defaults = {
        "per_device_train_batch_size": 2 * GROUP,
        "num_generations": GROUP,
        "max_completion_length": 6,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
    }
    return kind(
        model or tiny_model(),
        reward,
        args=GRPOConfig(str(folder), **{**defaults, **config}),
        train_dataset=datasets.Dataset.from_dict({"prompt": PROMPTS * 4}),
        processing_class=tokenizer(),
        rollout_func=rollout,
        **{name: value for name, value in options.items() if name not in known},
    )


def weights(trainer: Any) -> list[Tensor]:
    return [weight.detach().clone() for weight in trainer.model.parameters()]


def batch_of(trainer: Any) -> dict[str, Any]:
    """A batch as the trainer makes it of two prompts."""
    torch.manual_seed(5)
    rows = [{"prompt": prompt} for prompt in PROMPTS[:2] for _ in range(GROUP)]
    trainer.current_gradient_accumulation_steps = 1
    return trainer._generate_and_score_completions(rows)


def loss_and_gradient(trainer: Any, loss: Callable[[], Tensor]) -> tuple[Tensor, list[Tensor]]:
    trainer.model.zero_grad()
    value = loss()
    value.backward()
    return value.detach(), [weight.grad.clone() for weight in trainer.model.parameters()]


def assert_gradients(got: list[Tensor], want: list[Tensor], tolerance: float = 1e-5) -> None:
    for x, y in zip(got, want, strict=True):
        assert (x - y).abs().max() <= tolerance * max(1e-3, y.abs().max())


# ---------------------------------------------------------------- advantages


@pytest.mark.parametrize(
    "options", [{}, {"steps_per_generation": 2, "num_iterations": 2, "loss_type": "grpo"}]
)
def test_with_sibling_weight_0_the_weights_are_those_of_trl_bit_for_bit(tmp_path: Path, options: Any) -> None:
    def trained(kind: type, **more: Any) -> list[Tensor]:
        trainer = make(tmp_path / str(len(runs)), kind, **more, **options)
        trainer.train()
        return weights(trainer)

    runs: list[list[Tensor]] = []
    for kind, more in (
        (SiblingGRPOTrainer, {"sibling_weight": 0}),
        (GRPOTrainer, {}),
        (SiblingGRPOTrainer, {}),
    ):
        runs.append(trained(kind, **more))
    without, theirs, joint = runs
    assert all(torch.equal(x, y) for x, y in zip(without, theirs))
    assert not torch.equal(joint[0], theirs[0])
    assert not torch.equal(theirs[0], tiny_model().get_input_embeddings().weight)


EQUAL = {"grpo": "grpo", "dapo": "bnpo", "bnpo": "bnpo", "dr_grpo": "dr_grpo", "luspo": "dr_grpo"}
SAME_SLOPE = {"sapo": "grpo", "cispo": "bnpo", "vespo": "bnpo"}  # other losses, of one gradient at ratio 1


@pytest.mark.parametrize("loss_type", NORMALIZER)
@pytest.mark.parametrize("options", [{}, {"form": "paper"}, {"form": "paper", "weighting": "candidate"}])
def test_loss_and_gradient_of_a_captured_batch_are_ours(
    tmp_path: Path, loss_type: str, options: dict[str, str]
) -> None:
    """Rows of different lengths, with a completion that was not scored, against sibling_grpo_loss."""
    # CISPO cuts ratios at epsilon_high itself, not at 1 + epsilon_high.
    cut = {"epsilon_high": 5.0} if loss_type == "cispo" else {}
    trainer = make(tmp_path, loss_type=loss_type, sibling_weight=1.5, **cut, **options)
    batch = batch_of(trainer)
    value, gradient = loss_and_gradient(trainer, lambda: trainer._compute_loss(trainer.model, batch))

    ids, mask = batch["completion_ids"], batch["completion_mask"].bool()
    there, rewards = mask.clone(), torch.zeros(len(ids))
    for row, given in enumerate(reward(ids.tolist())):
        there[row] &= given is not None
        rewards[row] = given or 0.0
    assert 0 < there.any(1).sum() < len(ids)
    grid = (2, GROUP, ids.shape[1])
    ours = {"grpo": "grpo", **EQUAL, **SAME_SLOPE}[loss_type]

    def loss() -> Tensor:
        everything = torch.cat([batch["prompt_ids"], ids], 1)
        seen = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
        logits = trainer.model(input_ids=everything, attention_mask=seen).logits[:, -grid[2] - 1 : -1]
        logp = logits.log_softmax(-1).gather(2, ids[..., None])[..., 0]
        return vstar_ops.sibling_grpo_loss(
            logp.view(grid),
            ids.view(grid),
            rewards.view(grid[:2]),
            mask=there.view(grid),
            old_logp=logp.detach().view(grid),
            sibling_weight=1.5,
            **options,
            loss_type=ours,
            horizon={"dr_grpo": 6, "luspo": 1}.get(loss_type),
        ).loss

    want, want_gradient = loss_and_gradient(trainer, loss)
    # TRL counts the rows and tokens that were not scored, too.
    share = {"grpo": there.any(1).sum() / len(ids), "bnpo": there.sum() / mask.sum(), "dr_grpo": 1}[ours]
    assert_gradients(gradient, [share * x for x in want_gradient])
    if loss_type in EQUAL:
        assert abs(value - share * want) < 1e-6


def test_rows_that_were_not_scored_have_no_advantage(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    batch = batch_of(trainer)
    advantages, ids = batch["advantages"], batch["completion_ids"]
    unscored = torch.tensor([given is None for given in reward(ids.tolist())])
    assert advantages.shape == ids.shape and unscored.any()
    assert (advantages[unscored] == 0).all()
    assert 0 < trainer._metrics["train"]["sibling_advantage/nonzero"][-1] < 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"multi_objective_aggregation": "normalize_then_sum"}, "cannot do multi_objective_aggregation"),
        ({"off_policy_mask_threshold": 0.5}, "cannot do off_policy_mask_threshold"),
        ({"trie": TRIE, "cast_lm_head_to_fp32": True}, "cannot do trie with cast_lm_head_to_fp32"),
        ({"form": "ours"}, "form must be one of"),
        ({"weighting": "prefix"}, "weighting must be one of"),
        ({"sibling_weight": float("inf")}, "sibling_weight must be finite"),
    ],
)
def test_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(tmp_path, **options)


def test_two_processes(tmp_path: Path) -> None:
    """A group whose rows lie in both processes gets the advantages of one process."""
    script = Path(__file__).with_name("trl_two_processes.py")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(vstar_ops.__file__).parents[1]), *sys.path]),
    }
    got = []
    for processes in (1, 2):
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [sys.executable, *launch, str(script), str(tmp_path / f"{processes}.pt")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-4000:]
        got.append(torch.load(tmp_path / f"{processes}.pt"))
    one, two = got
    assert one["advantages"].abs().max() > 0
    torch.testing.assert_close(two["advantages"], one["advantages"], rtol=1e-6, atol=1e-6)
    assert "must be whole groups" in two["error"]


# ---------------------------------------------------------------- rollouts


@pytest.mark.parametrize("decoder", ["sample", "beam", "ved"])
def test_a_constrained_run(tmp_path: Path, decoder: str) -> None:
    """Every completion is an item with EOS behind it; the run learns, and is the same run twice."""
    policy = VEDConfig(value_weight=0.0, child_values=False, num_value_beams=0)
    options = {"config": policy} if decoder == "ved" else {}
    seen: list[list[int]] = []

    def watched(prompts: list[str], trainer: Any) -> dict[str, Any]:
        out = trie_rollout(TRIE, decoder, **options)(prompts, trainer)
        seen.extend(out["completion_ids"])
        return out

    runs = []
    for name in ("a", "b"):
        trainer = make(tmp_path / name, rollout=watched, trie=TRIE)
        trainer.train()
        runs.append(weights(trainer))
    assert all(torch.equal(x, y) for x, y in zip(*runs))
    items = set(map(tuple, ITEMS.tolist()))
    assert len(seen) == 2 * 2 * 2 * GROUP
    assert all(tuple(row[:-1]) in items and row[-1] == EOS for row in seen)
    if decoder != "sample":
        assert all(len(set(map(tuple, seen[i : i + GROUP]))) == GROUP for i in range(0, len(seen), GROUP))
    logged = [entry for entry in trainer.state.log_history if "entropy" in entry]
    assert logged[-1]["completions/clipped_ratio"] == 0
    assert trainer.model.training


def test_sampling_follows_the_policy(tmp_path: Path) -> None:
    """Shares of the first token over many draws, against the model's own probabilities."""
    trainer = make(tmp_path, per_device_train_batch_size=2000, num_generations=2000, temperature=1.5)
    torch.manual_seed(0)
    rollout = trie_rollout(TRIE)([PROMPTS[1]] * 2000, trainer)
    first = torch.tensor(rollout["completion_ids"])[:, 0]
    legal = ITEMS[:, 0].unique()
    with torch.no_grad():
        logits = trainer.model(input_ids=torch.tensor([[5, 6]])).logits[0, -1, legal]
    want = (logits / 1.5).softmax(0)
    got = (first[:, None] == legal).double().mean(0)
    assert (got - want).abs().max() < 0.04


def test_an_item_with_eos_of_its_own_gets_no_other(tmp_path: Path) -> None:
    from vstar_ops.integrations.transformers import append_eos

    trie = Trie.from_sequences(append_eos([[11, 21], [11, 21, 41], [12, 22], [14, 22, 42]], EOS))
    trainer = make(tmp_path, rollout=trie_rollout(trie, "beam"), trie=trie)
    batch = batch_of(trainer)
    rows = {
        tuple(row[mask.bool()].tolist())
        for row, mask in zip(batch["completion_ids"], batch["completion_mask"])
    }
    assert rows == {(11, 21, EOS), (11, 21, 41, EOS), (12, 22, EOS), (14, 22, 42, EOS)}
    trainer.train()


@pytest.mark.parametrize(
    ("options", "prompts", "message"),
    [
        ({}, PROMPTS, "prompts must be whole groups of num_generations = 4 in every process, got 3"),
        ({}, [PROMPTS[0]] * 3 + [PROMPTS[1]], "prompts must be whole groups"),
        ({"top_p": 0.9}, [PROMPTS[0]] * 4, "cannot sample with top_p=0.9, only 1.0"),
        ({"max_completion_length": 3}, [PROMPTS[0]] * 4, "max_completion_length must be at least 4, .*got 3"),
        (
            {"num_generations": 50, "per_device_train_batch_size": 50},
            [PROMPTS[0]] * 50,
            "catalogue must have",
        ),
    ],
)
def test_refused_rollouts(tmp_path: Path, options: Any, prompts: list[str], message: str) -> None:
    trainer = make(tmp_path, **options)
    decoder = "beam" if "num_generations" in options else "sample"
    with pytest.raises(ValueError, match=message):
        trie_rollout(TRIE, decoder)(prompts, trainer)
    with pytest.raises(ValueError, match="decoder must be one of"):
        trie_rollout(TRIE, "greedy")
    with pytest.raises(
        TypeError, match=r"options of 'beam' must be some of .*'temperature'\], got \['top_k'\]"
    ):
        trie_rollout(TRIE, "beam", top_k=3)


def test_a_restricted_trie(tmp_path: Path) -> None:
    """Of all requests alike, rollouts hold allowed items only; filters per request are refused."""
    allowed = TRIE.item_ids[:12]
    view = TRIE.restrict(allow=allowed)
    trainer = make(tmp_path, rollout=trie_rollout(view), trie=view)
    trainer.train()
    rollout = trie_rollout(view)([PROMPTS[0]] * GROUP, trainer)
    sequences = TRIE.sequences(TRIE.level_offset[-2] + torch.arange(12)).tolist()
    assert all(row[:3] in sequences for row in rollout["completion_ids"])
    for refused in (
        lambda: trie_rollout(TRIE.restrict(ban=[[], []])),
        lambda: make(tmp_path, trie=TRIE.restrict(ban=[[], []])),
    ):
        with pytest.raises(ValueError, match="^trie must be restricted for all requests alike"):
            refused()


# ---------------------------------------------------------------- packed prefix trees


class Counting:
    """The tokens that a model runs."""

    def __init__(self, model: Any) -> None:
        self.tokens = 0
        model.model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: Any, args: Any, kwargs: Any) -> None:
        self.tokens += kwargs["input_ids"].numel()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["Qwen2", "Llama", "Mistral"])
def test_packed_is_trls_loss(tmp_path: Path, kind: str, checkpointing: bool) -> None:
    """Log-probabilities, entropies, loss and gradient of the same batch, with fewer tokens run."""
    changes = {"sliding_window": 3} if kind == "Mistral" else {}
    options = {
        "entropy_coef": 0.1,
        "gradient_checkpointing": checkpointing,
        "temperature": 1.3,
        "loss_type": "grpo",
    }
    results, ran, inputs = [], [], None
    for packed in (False, True):
        trainer = make(tmp_path / str(packed), model=tiny_model(kind, **changes), packed=packed, **options)
        batch = batch_of(trainer)
        counting = Counting(trainer.accelerator.unwrap_model(trainer.model))
        results.append(loss_and_gradient(trainer, lambda t=trainer, b=batch: t._compute_loss(t.model, b)))
        inputs = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        seen = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
        length = batch["completion_ids"].shape[1]
        ran.append(counting.tokens)
        with torch.no_grad():
            both = trainer._get_per_token_logps_and_entropies(
                trainer.model, inputs, seen, length, batch_size=3, compute_entropy=True
            )[:2]
        results[-1] += tuple(x * batch["completion_mask"] for x in both)
    (loss, gradient, *theirs), (packed_loss, packed_gradient, *ours) = results
    assert abs(loss - packed_loss) < 1e-6
    assert_gradients(packed_gradient, gradient)
    for x, y in zip(ours, theirs):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    assert ran[1] < 0.7 * ran[0]


def test_trie_normalizes_over_legal_tokens(tmp_path: Path) -> None:
    trainer = make(tmp_path, rollout=trie_rollout(TRIE), trie=TRIE)
    batch = batch_of(trainer)
    inputs = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    seen = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    with torch.no_grad():
        logits = trainer.model(input_ids=inputs, attention_mask=seen).logits[:, -5:-1]
        logp, entropy, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, inputs, seen, 4, compute_entropy=True
        )
    for row, tokens in enumerate(batch["completion_ids"].tolist()):
        for depth, token in enumerate(tokens):
            legal = (
                sorted({i[depth] for i in ITEMS.tolist() if i[:depth] == tokens[:depth]})
                if depth < 3
                else [EOS]
            )
            policy = logits[row, depth, legal].log_softmax(0)
            assert abs(logp[row, depth] - policy[legal.index(token)]) < 1e-5
            assert abs(entropy[row, depth] + (policy.exp() * policy).sum()) < 1e-5

    illegal = make(tmp_path / "illegal", trie=TRIE)
    with pytest.raises(ValueError, match="a completion must be an item of the trie, got"):
        illegal._compute_loss(illegal.model, batch_of(illegal))


def test_models_that_cannot_be_packed_are_refused_at_once(tmp_path: Path) -> None:
    for packed in ({"packed": True}, {"trie": TRIE}):
        with pytest.raises(TypeError, match="cannot be a prefix model"):
            make(tmp_path, model=tiny_model("Bloom", n_head=4, n_layer=1), **packed)


@pytest.mark.parametrize(
    ("example", "said"),
    [
        (["trl_sibling_grpo.py", "--steps", "3"], "mean reward of sampled items: 0."),
        (
            ["minionerec.py", "--epochs", "0.04"],
            "2 steps, 56 items; share of requests with a hit in 16 beams",
        ),
    ],
)
def test_the_examples_run(example: list[str], said: str) -> None:
    root = Path(vstar_ops.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *sys.path])}
    command = [sys.executable, str(root / "examples" / example[0]), *example[1:]]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert said in done.stdout
