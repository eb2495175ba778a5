"""The training part: data, model, objectives, metrics, and the loop with kill-and-resume."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import loss_reference
import pytest
import torch
from toy_data import finish, kill_at, start, untimed, weights

from benchmarks.rank_correlation import spearman
from vstar_ops import Trie, group_advantage, sibling_advantage
from vstar_ops.decoding import VEDConfig, beam_search
from vstar_ops.train import __main__, checkpoint, metrics, pictures, report, rewards, scoring, trainer
from vstar_ops.train.__main__ import main
from vstar_ops.train.config import Config, Variant
from vstar_ops.train.data import load_minionerec, user_sequences
from vstar_ops.train.decode import Decoder
from vstar_ops.train.model import SIDTransformer
from vstar_ops.train.synthetic import synthetic

pytestmark = pytest.mark.usefixtures("one_thread")


# Of the modules of training, each imports only those before it; no stage imports evaluation.
ORDER = "config data synthetic rewards value model scoring decode checkpoint parallel trainer"
ORDER += " supervised reinforce metrics report pictures __main__"


def test_nothing_imports_upward() -> None:
    folder, below = Path(trainer.__file__).parent, {"__init__"}
    assert {path.stem for path in folder.glob("*.py")} == {*ORDER.split(), "__init__"}
    for name in ORDER.split():
        imports = re.findall(r"^from \.(\w*) import (.*)", (folder / f"{name}.py").read_text(), re.MULTILINE)
        found = {
            one.strip() for module, names in imports for one in ([module] if module else names.split(","))
        }
        assert found <= below, f"{name} imports {found - below}"
        below.add(name)


# ------------------------------------------------------------------ data


def test_loader_reads_columns_by_name(toy: Path) -> None:
    data = load_minionerec(toy, "Toy")
    assert data.level_sizes == (3, 3, 3) and data.vocab == 9
    assert data.sequences.tolist()[3] == [1, 3 + 0, 6 + 2]
    assert len(data.train) == 40 and data.train.items[:5].tolist() == [1, 2, 3, 4, 1]
    row = data.train[torch.tensor([2])]  # history 2, 3, 4, then item 5
    assert row.history[0, :3].tolist() == data.sequences[[2, 3, 4]].tolist()
    assert (row.history[0, 3:] == -1).all()
    assert row.target[0].tolist() == data.sequences[5].tolist()
    assert row.context.shape == (1, 9)
    short = load_minionerec(toy, "Toy", max_history=2).train
    assert short.history[2].tolist() == data.sequences[[3, 4]].tolist()


@pytest.mark.parametrize(
    ("old", "new", "row", "column"),
    [
        # The title of every record takes two lines, so record r begins in line 2 r.
        ("<a_1><b_0><c_2>,3", "<a_9><b_0><c_2>,3", 4, "item_sid"),
        ("<a_1><b_0><c_2>,3", "rubbish,3", 4, "item_sid"),
        ("\"['<a_0><b_0><c_1>', ", '"[<a_0>, ', 4, "history_item_sid"),
        ("\"['<a_0><b_0><c_1>', ", "\"[7, '<a_0><b_0><c_0>', ", 4, "history_item_sid"),
        ("<a_0><b_0><c_1>,1", "<a_0><b_0><c_1>", 2, "5"),
        (",item_sid", ",item_SID", 1, "item_sid"),
    ],
)
def test_malformed_csv_names_file_row_column(toy: Path, old: str, new: str, row: int, column: str) -> None:
    path = toy / "valid" / "Toy_5_2016.csv"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ValueError, match=rf"Toy_5_2016\.csv, row {row}, column {column}: "):
        load_minionerec(toy, "Toy")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"<b_1>"', '"b1"', 'row 12, column "2": expected a list of tokens'),
        ('"<b_1>"', '"<x_1>"', 'row 12, column "2": expected the levels'),
        ('"7"', '"seven"', 'row 37, column "seven": expected a whole number'),
        ('"7": [', '"7": ', "row 39, column 10: Expecting"),
    ],
)
def test_malformed_index(toy: Path, old: str, new: str, message: str) -> None:
    path = toy / "index" / "Toy.index.json"
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(ValueError, match=rf"Toy\.index\.json, {message}"):
        load_minionerec(toy, "Toy")


def test_loader_other_failures(toy: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_minionerec(toy, "Office")
    path = toy / "train" / "Toy_5_2016.csv"
    whole = path.read_bytes()
    path.write_bytes(whole + b"U1,\xff\n")
    with pytest.raises(ValueError, match="row 82, column 4: not UTF-8"):
        load_minionerec(toy, "Toy")
    path.write_bytes(whole + b'U1,"never closed\n')
    with pytest.raises(ValueError, match=r"Toy_5_2016\.csv, row 8"):
        load_minionerec(toy, "Toy")
    path.write_bytes(whole)
    (toy / "train" / "Toy_6.csv").write_bytes(whole)
    with pytest.raises(ValueError, match="ambiguous"):
        load_minionerec(toy, "Toy")


def test_user_sequences_merge_rows_that_continue() -> None:
    data = synthetic(items=200, users=50, requests=20, codes=(8, 4))
    merged = user_sequences(data.train)
    assert len(merged) == len(data.train.user.unique())
    assert sum(len(s) - 1 for s in merged) == len(data.train)


def test_synthetic_properties() -> None:
    data = synthetic(items=600, users=400, requests=200, codes=(16, 8))
    again = synthetic(items=600, users=400, requests=200, codes=(16, 8))
    assert torch.equal(data.train.history, again.train.history)
    assert torch.equal(data.sequences, again.sequences)
    trie = Trie.from_sequences(data.sequences)
    assert 0.9 * 600 < trie.num_sequences < 600  # some SIDs collide
    assert data.reward is not None
    every = trie.sequences(torch.arange(trie.level_offset[-2], trie.num_nodes)).long()
    reward = data.reward(data.test.user, every.expand(200, -1, -1))
    assert float(reward.min()) >= 0 and float(reward.max()) <= 1
    assert (data.reward(torch.tensor([0]), torch.full((1, 1, 3), -1)) == 0).all()
    clicked = data.reward(data.test.user, data.test.target[:, None]).mean()
    # Clicks are worth much more than chance, and less than what there is.
    assert 5 * reward.mean() < clicked < 0.8 * reward.topk(10, 1).values.mean()
    known = {tuple(row) for row in data.test.history[:, :, 0].tolist()}
    assert len(known) > 150  # histories differ between users


def agreement(seed: int, **options: float) -> float:
    """Spearman's correlation of how often an item is clicked with the reward that it gives on average."""
    data = synthetic(seed=seed, items=1500, users=1500, requests=1000, codes=(16, 8), **options)
    trie = Trie.from_sequences(data.sequences)
    leaves = torch.arange(trie.level_offset[-2], trie.num_nodes)
    assert data.reward is not None
    reward = data.reward(data.test.user, trie.sequences(leaves).long().expand(1000, -1, -1)).mean(0)
    clicks = torch.bincount(trie.lookup(data.train.target).long(), minlength=trie.num_nodes)[leaves]
    return spearman(clicks[None], reward[None], torch.ones(1, len(leaves), dtype=torch.bool)).item()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_clicks_and_rewards_agree_in_part(seed: int) -> None:
    """What is clicked more is often better, but far from always; the option says how often."""
    assert 0.1 < agreement(seed) < 0.6
    assert agreement(seed, agreement=-0.6) < -0.2 and agreement(seed, agreement=1.0) > 0.7


# ------------------------------------------------------------------ model


@pytest.fixture
def model() -> SIDTransformer:
    torch.manual_seed(0)
    model = SIDTransformer(9, 15, dim=16, layers=2, heads=2).double().eval()
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)
    return model


def test_extend_equals_plain_forward(model: SIDTransformer) -> None:
    torch.manual_seed(1)
    lengths = [6, 0, 9, 3]
    rows = [torch.randint(9, (n,)) for n in lengths]
    left = torch.stack([torch.cat([torch.full((10 - n,), -1), r]) for n, r in zip(lengths, rows)])
    right = torch.stack([torch.cat([r, torch.full((10 - n,), -1)]) for n, r in zip(lengths, rows)])

    def plain(request: int, *tokens: int) -> torch.Tensor:
        return model(torch.cat([rows[request], torch.tensor(tokens, dtype=torch.int64)])[None])[0, -1]

    for context in (left, right):
        logits, state = model.prefill(context)
        prefixes: list[tuple[int, ...]] = [(b,) for b in range(4)]
        for b in range(4):
            torch.testing.assert_close(logits[b], plain(b))
        # Ragged over requests, of mixed depths, with unused rows.
        for parents in ([2, 0, 2, -1, 3, 2], [4, 0, 8, 6, -1], [9, 9, 1, 5]):
            tokens = torch.randint(9, (len(parents),))
            logits, slots = model.extend(state, torch.tensor(parents), tokens)
            for i, parent in enumerate(parents):
                if parent < 0:
                    continue
                assert int(slots[i]) == len(prefixes)
                prefixes.append((*prefixes[parent], int(tokens[i])))
                torch.testing.assert_close(logits[i], plain(*prefixes[-1]))
    none, slots = model.extend(state, torch.tensor([-1]), torch.tensor([0]))
    assert none.shape == (1, 9) and slots.tolist() == [-1]


def test_rows_by_request_equal_the_same_rows_without_order(model: SIDTransformer) -> None:
    torch.manual_seed(2)
    context = torch.randint(9, (3, 5))
    (_, flat), (_, state) = model.prefill(context), model.prefill(context)
    slots, flat_slots = torch.arange(3)[:, None], torch.arange(3)[:, None]
    for width, unused in ((2, ()), (4, ((0, 1), (2, 0), (2, 3))), (3, ((1, 0), (1, 1), (1, 2)))):
        picked, token = torch.randint(slots.shape[1], (3, width)), torch.randint(9, (3, width))
        parent, flat_parent = slots.gather(1, picked), flat_slots.gather(1, picked)
        for b, p in unused:
            parent[b, p] = flat_parent[b, p] = -1
        used = parent >= 0
        logits, slot = model.extend(state, parent, token)
        expected, flat_slot = model.extend(flat, flat_parent[used], token[used])
        assert logits.shape == (3, width, 9) and torch.equal(slot >= 0, used)
        torch.testing.assert_close(logits[used], expected)
        every = torch.full_like(slot, -1).masked_scatter(used, flat_slot)
        alive = used.all(0)
        slots, flat_slots = slot[:, alive], every[:, alive]
        if not alive.any():
            break


@pytest.mark.parametrize("name", ["beam", "topk", "ved"])
def test_constant_shapes_find_the_same_candidates(model: SIDTransformer, name: str) -> None:
    torch.manual_seed(3)
    trie = Trie.from_sequences(torch.randint(9, (60, 3)))
    model.add_value_head(child_values=True)
    model.float()
    context, seed = torch.randint(9, (7, 5)), torch.arange(7)
    config = VEDConfig.training(num_policy_candidates=2, beam_width=3, num_value_beams=1)
    free, constant = (
        Decoder(name, 8, config, constant_shapes=constant)(model, context, trie, seed)
        for constant in (False, True)
    )
    assert torch.equal(free.sequence, constant.sequence) and torch.equal(free.node, constant.node)
    torch.testing.assert_close(free.logp, constant.logp)
    assert (free.forward_tokens <= constant.forward_tokens).all()


def test_gradients_through_the_cache_equal_plain(model: SIDTransformer) -> None:
    context, tokens = torch.tensor([[1, 4, 7]]), [2, 5]
    model(torch.tensor([[1, 4, 7, *tokens]]))[0, -1].square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    _, state = model.prefill(context)
    for slot, token in enumerate(tokens):
        logits, _ = model.extend(state, torch.tensor([slot]), torch.tensor([token]))
    logits.square().sum().backward()
    for p, e in zip(model.parameters(), expected):
        torch.testing.assert_close(p.grad, e)


# ------------------------------------------------------------------ objective

CATALOGUE = torch.tensor([[0, 3, 6], [0, 3, 7], [0, 4, 6], [1, 3, 8], [1, 5, 6], [2, 4, 7]])


def legal_by_hand(model: SIDTransformer, context: torch.Tensor, sequence: list[int]) -> torch.Tensor:
    out = []
    for depth, token in enumerate(sequence):
        legal = sorted({r[depth] for r in CATALOGUE.tolist() if r[:depth] == sequence[:depth]})
        tail = torch.tensor(sequence[:depth], dtype=torch.int64)
        logits = model(torch.cat([context, tail])[None])[0, -1]
        out.append(logits[token] - torch.logsumexp(logits[torch.tensor(legal)], 0))
    return torch.stack(out)


@pytest.mark.parametrize("pack", [True, False])
def test_candidate_logp(model: SIDTransformer, pack: bool) -> None:
    model.float()
    trie = Trie.from_sequences(CATALOGUE)
    context = torch.tensor([[1, 4, 7], [2, 5, -1]])
    candidates = torch.stack([CATALOGUE[[0, 1, 3, 3]], CATALOGUE[[5, 4, 2, 0]]])
    candidates[1, 3] = -1
    logp = scoring.candidate_scores(model, context, trie, candidates, pack=pack).logp
    for b in range(2):
        for g in range(4):
            row = candidates[b, g].tolist()
            prompt = context[b][context[b] >= 0]
            by_hand = legal_by_hand(model, prompt, row) if row[0] >= 0 else torch.zeros(3)
            torch.testing.assert_close(logp[b, g], by_hand)
    assert (logp[0, 2, 2] == 0) and (logp[1, 0, 1:] == 0).all()  # forced tokens, exactly


def test_candidate_logp_agrees_with_beam_search(model: SIDTransformer) -> None:
    model.float()
    trie = Trie.from_sequences(CATALOGUE)
    context = torch.randint(9, (3, 6))
    beams = beam_search(model, context, trie, 8)
    logp = scoring.candidate_scores(model, context, trie, beams.sequence).logp
    there = beams.node >= 0
    torch.testing.assert_close(logp.sum(2)[there], beams.logp[there])


def test_forced_prefix_above_a_branch_is_run(model: SIDTransformer) -> None:
    """A prefix with a single child must be run where a longer one needs it."""
    model.float()
    global_catalogue = torch.tensor([[0, 3, 6], [0, 3, 7], [1, 4, 6]])
    trie = Trie.from_sequences(global_catalogue)
    logp = scoring.candidate_scores(model, torch.tensor([[2, 5]]), trie, global_catalogue[None, :2]).logp
    plain = model(torch.tensor([[2, 5, 0, 3]]))[0, -1]
    torch.testing.assert_close(logp[0, 0, 2], plain[6] - torch.logsumexp(plain[6:8], 0))
    assert logp[0, 0, 1] == 0


def test_terms_against_hand_computed_values() -> None:
    tokens = torch.tensor([[[0, 3], [0, 4], [1, 3], [1, 3]]])
    reward = torch.tensor([[1.0, 0.0, 0.5, 0.0]])
    mask = torch.ones(1, 4, dtype=torch.bool)
    logp = torch.log(torch.tensor([[[0.5, 0.25], [0.5, 0.75], [0.5, 1], [0.5, 1]]], dtype=torch.float64))
    logp.requires_grad_()
    sibling = sibling_advantage(tokens, reward, mask)
    # Level 1: means .5 and .25, so +-.125 / (.125 + 1e-4).
    # Level 2, below 0: means 1 and 0, so +-.5 / (.5 + 1e-4).
    first, second = 0.125 / 0.1251, 0.5 / 0.5001
    term = loss_reference.sibling_term(logp, logp.detach(), sibling, mask)
    assert term.item() == pytest.approx(0.0, abs=1e-6)  # ratio 1: the advantages of siblings cancel
    (gradient,) = torch.autograd.grad(term, logp)
    half = first / 2
    expected = torch.tensor([[[half, second], [half, -second], [-half, 0], [-half, 0]]]) / 4
    torch.testing.assert_close(gradient.float(), expected, atol=1e-5, rtol=0)
    weighted = loss_reference.sibling_term(logp, logp.detach(), sibling, mask, weighting="candidate")
    assert torch.autograd.grad(weighted, logp)[0][0, 0, 0].item() == pytest.approx(first / 4, abs=1e-5)

    advantage = group_advantage(reward, mask)
    grpo = loss_reference.grpo_term(logp, logp.detach(), advantage, mask)
    (gradient,) = torch.autograd.grad(grpo, logp)
    torch.testing.assert_close(gradient.float(), advantage[..., None].expand(1, 4, 2) / 8)

    assert loss_reference.kl_term(logp, logp.detach(), mask).item() == 0
    d = 0.3
    kl = loss_reference.kl_term(logp, logp.detach() + d, mask)
    assert kl.item() == pytest.approx(math.exp(d) - d - 1, rel=1e-6)


def test_clipping_stops_the_gradient_only_where_it_helps() -> None:
    logp = torch.tensor([0.5, 0.5, -0.5, -0.5], requires_grad=True)
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0])
    loss_reference.surrogate(logp, torch.zeros(4), advantage, (0.2, 0.3)).sum().backward()
    assert logp.grad is not None and (logp.grad != 0).tolist() == [False, True, True, False]


# ------------------------------------------------------------------ rewards and metrics


def test_rewards_by_hand() -> None:
    candidates = torch.tensor([[[0, 1], [0, 2], [3, 1], [-1, -1]], [[0, 1], [0, 2], [3, 1], [3, 2]]])
    target = torch.tensor([[0, 2], [9, 9]])
    assert rewards.rule(candidates, target).tolist() == [[0, 1, 0, 0], [0, 0, 0, 0]]
    d = [1.0, 1 / 1.5849625, 0.5]
    expected = torch.tensor([[-d[0] / sum(d), 1.0, -d[2] / sum(d), 0.0], [0.0] * 4])
    torch.testing.assert_close(rewards.ranking(candidates, target), expected)
    assert rewards.prefix(candidates, target).tolist() == [[0.5, 1, 0, 0], [0, 0, 0, 0]]


def test_ranks_accuracy_diversity_by_hand() -> None:
    candidates = torch.tensor([[[0, 1], [0, 1], [0, 2], [3, 1]], [[0, 1], [0, 2], [0, 3], [-1, -1]]])
    rank = metrics.target_rank(candidates, torch.tensor([[0, 2], [8, 8]]))
    assert rank.tolist() == [1, metrics.MISSING]  # the repeat takes no rank
    scores = metrics.accuracy(rank)
    assert scores["HR@1"] == 0 and scores["HR@3"] == 0.5 and scores["HR@10"] == 0.5  # also where K < 10
    assert scores["NDCG@3"] == pytest.approx(0.5 / 1.5849625)
    # Pairs of request 0: 01-01 0, 01-02 .5 twice, 01-31 1 twice, 02-31 1. Of request 1: three of .5.
    assert metrics.diversity(candidates).tolist() == pytest.approx([4 / 6, 0.5])


def test_intervals_and_tables() -> None:
    mean, half = report.mean_interval([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.303 / 3**0.5)
    results = {s: {"SFT": {"HR@1": 0.1 * s}, "RL": {"HR@1": 0.1 * s + 0.05}} for s in (1, 2, 3)}
    assert "0.2000 ± 0.2484" in report.table(results)
    assert "+0.0500 ± 0.0000" in report.table(results, against="SFT")


def test_gains_by_step(tmp_path: Path) -> None:
    for seed, base in ((3, 0.1), (4, 0.2)):
        for variant, gain in (("beam+grpo", 0.0), ("ved+joint", 0.05 * seed)):
            folder = tmp_path / f"seed-{seed}"
            folder.mkdir(exist_ok=True)
            steps = (0, 5, 10) if variant == "ved+joint" or seed == 4 else (0, 5)  # one has stopped early
            valid = [{"NDCG@10": base, "best_reward": base + gain * step} for step in steps]
            records = [{"step": 1, "loss": 0.5}] + [{"step": s, "valid": v} for s, v in zip(steps, valid)]
            text = "\n".join(json.dumps(r) for r in records) + "\n"
            (folder / f"{variant}.jsonl").write_text(text)
    text = report.gains_by_step(tmp_path, [3, 4], [Variant("beam", "grpo"), Variant("ved", "joint")])
    lines = [[cell.strip() for cell in line.split("|")] for line in text.split("\n")]
    assert [cells[1] for cells in lines[2:]] == ["0", "5"]
    assert lines[0][2:4] == ["NDCG@10, beam+grpo", "NDCG@10, ved+joint"]
    _, _, base, no_gain, _, gain, _ = lines[3]
    assert base.startswith("0.1500 ± ") and no_gain == "+0.0000 ± 0.0000"
    assert gain.startswith("+0.8750 ± ")  # 0.75 and 1, paired


# ------------------------------------------------------------------ checkpoints and the loop


def test_atomic_write_and_truncated_metrics(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    checkpoint.save(path, {"x": 1})
    with pytest.raises(AttributeError):
        checkpoint.save(path, {"x": 2, "not to be pickled": lambda: None})
    assert checkpoint.load(path) == {"x": 1} and list(tmp_path.iterdir()) == [path]
    log = checkpoint.MetricsFile(tmp_path / "m.jsonl")
    log.write({"step": 1})
    position = log.position()
    log.write({"step": 2})
    log = checkpoint.MetricsFile(tmp_path / "m.jsonl", position)
    log.write({"step": 2})
    assert [r["step"] for r in checkpoint.read_metrics(tmp_path / "m.jsonl")] == [1, 2]


OPTIONS = "--category Toy --threads 1 --sft-epochs 6 --rl-steps 9 --sft-batch-size 8 --rl-batch-size 8"
OPTIONS += " --candidates 6 --checkpoint-every 1 --sft-evals 3 --rl-evals 3 --patience 9"
OPTIONS += " --decoder ved --objective joint"


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(toy: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    options = ["--data", str(toy), *OPTIONS.split()]
    first, process = start(toy, *options, "--out", str(whole)), start(toy, *options, "--out", str(cut))
    for stage, step in (("sft", 7), ("ved+joint", 4)):
        kill_at(process, cut, stage, step)
        assert not (cut / "results.md").exists()
        process = start(toy, "--resume", str(cut))
    finish(first)
    output = finish(process)
    assert "V-STAR: Sibling-GRPO with VED" in output and "NDCG@10" in output
    for stage in ("sft", "ved+joint"):
        a, b = (weights(run, stage) for run in (whole, cut))
        assert all(torch.equal(a[k], b[k]) for k in a)
        a, b = (checkpoint.load(run / "seed-0" / f"{stage}.pt")["model"] for run in (whole, cut))
        assert all(torch.equal(a[k], b[k]) for k in a)
        assert untimed(whole, stage) == untimed(cut, stage)
    for run in (whole, cut):
        page = (run / "report.html").read_text()
        assert page.count("<svg") == 3 and "V-STAR: Sibling-GRPO with VED</td>" in page


@pytest.mark.slow
def test_killed_between_two_stages_checkpoints(toy: Path, tmp_path: Path, monkeypatch) -> None:
    """Also before a stage's first step, and when the checkpoint is some steps behind."""
    options = ["--data", str(toy), *OPTIONS.split(), "--sft-epochs", "1", "--rl-steps", "3"]
    options += ["--checkpoint-every", "2", "--patience", "3"]
    assert main([*options, "--out", str(tmp_path / "whole")]) == 0
    following, calls = trainer.Batches.__next__, 0

    def killed(batches: trainer.Batches) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls in (1, 5, 11):
            raise KeyboardInterrupt
        return following(batches)

    monkeypatch.setattr(trainer.Batches, "__next__", killed)
    argv = [*options, "--out", str(tmp_path / "cut")]
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            main(argv)
        argv = ["--resume", str(tmp_path / "cut")]
    assert main(argv) == 0
    for stage in ("sft", "ved+joint"):
        assert untimed(tmp_path / "whole", stage) == untimed(tmp_path / "cut", stage)
        a, b = (weights(tmp_path / run, stage) for run in ("whole", "cut"))
        assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.slow
def test_the_policys_part_of_the_candidates_rises(toy: Path, tmp_path: Path, monkeypatch) -> None:
    seen, search = [], Decoder.__call__

    def spy(decoder: Decoder, *arguments):
        if decoder.name == "ved":
            seen.append(decoder.ved.num_policy_candidates)
        return search(decoder, *arguments)

    monkeypatch.setattr(Decoder, "__call__", spy)
    monkeypatch.setattr(pictures, "of_seed", lambda *_: None)  # draws a search of its own
    options = ["--data", str(toy), *OPTIONS.split(), "--rl-steps", "4", "--sft-epochs", "1", "--ved"]
    assert main([*options, "num_policy_candidates=2", "--out", str(tmp_path / "ours")]) == 0
    assert seen == [2, 3, 4, 5]  # of 6
    seen.clear()
    assert main([*options, "paper", "--out", str(tmp_path / "paper")]) == 0
    assert seen == [0] * 4


@pytest.mark.slow
@pytest.mark.parametrize("prior", [True, False])
def test_ved_at_test(toy: Path, tmp_path: Path, monkeypatch, prior: bool) -> None:
    """It stops early by the decoder of the test, and beam search is one more row."""
    asked, evaluate = [], metrics.evaluate

    def spy(model, data, trie, decoder, split, rows):
        asked.append((split, decoder.name))
        return evaluate(model, data, trie, decoder, split, rows)

    monkeypatch.setattr(__main__, "evaluate", spy)
    run = tmp_path / "run"
    options = [
        "--data",
        str(toy),
        *OPTIONS.split(),
        "--rl-steps",
        "2",
        "--sft-epochs",
        "1",
        "--out",
        str(run),
    ]
    assert main([*options, "--test-decoder", "ved", *([] if prior else ["--no-item-prior"])]) == 0
    results = json.loads((run / "results.json").read_text())["0"]
    row = "V-STAR: Sibling-GRPO with VED"
    assert list(results) == ["SFT", row, f"{row}, beam search at test"]
    assert results[row]["forward_tokens"] <= 13
    stopping = asked[: asked.index(("test", "beam"))]
    assert {decoder for _, decoder in stopping} == {"beam", "ved"} and stopping[0][1] == "beam"
    assert asked[-2:] == [("test", "ved"), ("test", "beam")]
    for stage, name in (("ved+joint", "value_head.prior"), ("ved+joint", "prior"), ("sft", "prior")):
        assert (name in weights(run, stage)) == prior


def test_variants_and_configs_as_text() -> None:
    variant = Variant.parse("ved+joint")
    assert variant == Variant("ved", "joint") and str(variant) == "ved+joint"
    assert variant.row_name == "V-STAR: Sibling-GRPO with VED"
    assert Variant("topk", "grpo").row_name == "+ GRPO with top-k samples"
    for text in ("ved", "ved+ppo", "greedy+joint", ""):
        with pytest.raises(ValueError, match=r"(decoder|objective) must be one of .*, got '"):
            Variant.parse(text)
    for config in (Config(), Config.synthetic().replace(seeds=(1, 2), variants=(variant,), threads=1)):
        assert Config.from_json(config.to_json()) == config
    with pytest.raises(ValueError, match=r"sibling_form must be one of .*, got 'ours'"):
        Config(sibling_form="ours")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--kl-weight nan", "kl_weight must be finite, got nan"),
        ("--sibling-weight inf", "sibling_weight must be finite, got inf"),
        ("--sft-lr inf", "sft_lr must be finite, got inf"),
        ("--gamma nan", "gamma must be finite, got nan"),
        ("--rl-lr -1", "rl_lr must be >= 0, got -1.0"),
        ("--dropout 1.5", "dropout must lie in [0, 1], got 1.5"),
        ("--label-smoothing 2", "label_smoothing must lie in [0, 1], got 2.0"),
    ],
)
def test_numbers_that_cannot_be_trained_with(toy: Path, tmp_path: Path, capsys, option, message) -> None:
    """Known before the first stage, and not as a later one begins."""
    run = tmp_path / "run"
    with pytest.raises(SystemExit):
        main(["--data", str(toy), "--category", "Toy", "--out", str(run), *option.split()])
    assert capsys.readouterr().err.endswith(f"error: {message}\n") and not run.exists()


@pytest.mark.slow
def test_several_seeds(toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    options = (
        "--category Toy --seeds 0,1 --decoder beam,topk --objective grpo,sibling --reward rule --threads 1"
    )
    options += " --sft-epochs 1 --rl-steps 2 --candidates 4"
    assert main(["--data", str(toy), "--out", str(run), *options.split()]) == 0
    text = capsys.readouterr().out
    assert "| valid, step | NDCG@10, beam+grpo | NDCG@10, beam+sibling |" in text
    assert "interval over 2 seeds" in text and text.count("+ GRPO with beam candidates") == 3
    assert "gain over SFT" in text and "gain over + GRPO with beam candidates" in text
    results = json.loads((run / "results.json").read_text())
    assert set(results) == {"0", "1"} and len(results["0"]) == 5


@pytest.mark.slow
def test_packing_changes_no_result(toy: Path, tmp_path: Path) -> None:
    """A run with packed rows is one with a row per candidate."""
    options = ["--data", str(toy), *OPTIONS.split(), "--sft-epochs", "1", "--rl-steps", "3"]
    assert main([*options, "--out", str(tmp_path / "packed")]) == 0
    assert main([*options, "--out", str(tmp_path / "whole"), "--no-pack"]) == 0
    for run, packed in (("packed", True), ("whole", False)):
        assert json.loads((tmp_path / run / "config.json").read_text())["pack"] is packed
    logs = [checkpoint.read_metrics(tmp_path / r / "seed-0" / "ved+joint.jsonl") for r in ("packed", "whole")]
    steps = [[r for r in log if "reward" in r] for log in logs]
    assert len(steps[0]) == 3
    for got, want in zip(*steps):
        assert got == pytest.approx(want, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--objective", "ppo"], "expected some of grpo, sibling, joint"),
        (["--decoder", "greedy"], "expected some of beam, topk, ved"),
        (["--ved", "budgets=3"], "expected paper or OPTION=VALUE"),
        (["--ved", "budget=many"], "budget must be a whole number or none, got 'many'"),
        (["--ved", "expand_root=1"], "expand_root must be true or false, got '1'"),
        (["--item-embeddings", "/nonexistent.npy"], "nonexistent"),
        (["--seeds", "a"], "whole numbers"),
        (["--candidates", "0"], "at least 1"),
        (["--data", "/nonexistent"], "nonexistent"),
        (["--resume", "/nonexistent"], "holds no run"),
    ],
)
def test_bad_arguments(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(argv)
    assert message in capsys.readouterr().err
