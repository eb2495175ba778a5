"""Tables of a run: what stands in them, what is no score, why they end, how wide they are."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from vstar_ops import Trie
from vstar_ops.decoding import VEDConfig
from vstar_ops.train import __main__, pictures, report
from vstar_ops.train.config import Config, Variant
from vstar_ops.train.synthetic import synthetic
from vstar_ops.train.trainer import Run

pytestmark = pytest.mark.usefixtures("one_thread")

VARIANTS = tuple(map(Variant.parse, ("beam+grpo", "beam+joint", "topk+sibling", "ved+joint")))
METRICS = ("HR@1", "HR@10", "NDCG@1", "NDCG@10", "true_reward@10", "diversity", "best_reward")


def results(seeds: tuple[int, ...], variants: tuple[Variant, ...] = VARIANTS) -> dict[int, dict]:
    """Every cell is another number."""
    names = ["SFT", *(v.row_name for v in variants), f"{variants[-1].row_name}, beam search at test"]
    found: dict[int, dict] = {}
    for seed in seeds:
        for row, name in enumerate(names):
            cells = {m: 0.1 + row / 50 + seed / 1000 + i / 7000 for i, m in enumerate(METRICS)}
            cells |= {"forward_tokens": 33.0, "seconds": 60.0 * 10**seed, "steps": 100 + 10 * seed}
            found.setdefault(seed, {})[name] = cells | {"best_step": 50 + 10 * seed, "skipped": 0}
    return found


def logs(folder: Path, last: dict[tuple[int, str], int], seeds: tuple[int, ...] = (0, 1, 2)) -> None:
    for seed in seeds:
        (folder / f"seed-{seed}").mkdir(exist_ok=True)
        for variant in VARIANTS:
            steps = range(0, last.get((seed, str(variant)), 150) + 1, 30)
            records = [{"step": s, "valid": dict.fromkeys(METRICS, s / 1000)} for s in steps]
            text = "".join(json.dumps(r) + "\n" for r in records)
            (folder / f"seed-{seed}" / f"{variant}.jsonl").write_text(text)


def cells(table: str) -> dict[str, dict[str, str]]:
    """row -> column -> text"""
    head, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.split("\n")]
    return {row[0]: dict(zip(head[1:], row[1:])) for row in rows}


def test_steps_and_seconds_are_no_scores() -> None:
    """Seconds are a median, steps a range, and no gains are made of them."""
    table = cells(report.table(results((0, 1, 2))))
    for row in table.values():
        assert row["median seconds"] == "600" and row["steps"] == "100-120"
        assert row["best step"] == "50-70" and row["skipped steps"] == "0"
        assert "±" in row["NDCG@10"]
    one = cells(report.table(results((1,))))["SFT"]
    assert (one["median seconds"], one["steps"], one["best step"]) == ("600", "110", "60")
    gains = cells(report.table(results((0, 1, 2)), against="SFT"))
    head = set(next(iter(gains.values())))
    assert "NDCG@10" in head and not head & {
        "seconds",
        "median seconds",
        "steps",
        "best step",
        "skipped steps",
    }


@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2)])
@pytest.mark.parametrize("true_reward", [True, False])
def test_tables_fit_a_terminal(tmp_path: Path, seeds: tuple[int, ...], true_reward: bool) -> None:
    """The score that counts, best step and steps are shown there; results.md has everything."""
    logs(tmp_path, {}, seeds)
    found, metric = results(seeds), "true_reward@10" if true_reward else "NDCG@10"
    if not true_reward:
        for rows in found.values():
            for row in rows.values():
                del row["true_reward@10"]
    shown = report.write(tmp_path, "title", found, Config(rl_steps=150, variants=VARIANTS))
    assert max(map(len, shown.split("\n"))) <= 102
    lines = shown.split("\n")
    head, below = lines[2], next(i for i, line in enumerate(lines) if "|   beam search at test " in line)
    assert lines[below - 1].startswith("| V-STAR: Sibling-GRPO with VED ")
    assert f"| {report.COLUMNS[metric]} " in head and "| best step | steps " in head
    whole = (tmp_path / "results.md").read_text()
    assert all(f"| {report.COLUMNS[c]} " in whole for c in next(iter(found[0].values())))
    assert shown.count("gain over") == whole.count("gain over") == 2


def test_the_gains_say_when_and_why_they_end_early(tmp_path: Path) -> None:
    logs(tmp_path, {(1, "beam+joint"): 60, (2, "ved+joint"): 90, (2, "topk+sibling"): 60})
    text = report.write(tmp_path, "title", results((0, 1, 2)), Config(rl_steps=150, variants=VARIANTS))
    note = (
        "The gains end at step 60 of 150: early stopping ended beam+joint of seed 1, topk+sibling of seed 2"
    )
    assert note in text and note in (tmp_path / "results.md").read_text()
    assert "\n| 60 " in text and "\n| 90 " not in text
    every = {(seed, str(v)): 90 for seed in (0, 1, 2) for v in VARIANTS}
    logs(tmp_path, every)
    text = report.write(tmp_path, "title", results((0, 1, 2)), Config(rl_steps=150, variants=VARIANTS))
    assert "end at step 90 of 150" in text and "\n| 90 " in text
    logs(tmp_path, {})
    text = report.write(tmp_path, "title", results((0, 1, 2)), Config(rl_steps=150, variants=VARIANTS))
    assert "gains end at step" not in text and "\n| 150 " in text


def test_skipped_steps_are_told(tmp_path: Path) -> None:
    logs(tmp_path, {})
    found = results((0, 1))
    found[1]["SFT"]["skipped"] = 3
    text = report.write(tmp_path, "title", found, Config(rl_steps=150, variants=VARIANTS))
    assert "Steps were skipped, their loss or gradient not being finite: SFT of seed 1." in text
    assert cells(report.table(found))["SFT"]["skipped steps"] == "0-3"


def test_a_result_that_is_not_a_number_is_not_written(tmp_path: Path) -> None:
    logs(tmp_path, {})
    found = results((0,))
    found[0]["SFT"]["NDCG@10"] = math.nan
    with pytest.raises(ValueError, match="JSON"):
        report.write(tmp_path, "title", found, Config(variants=VARIANTS))


def test_every_row_has_its_own_value_on_valid(tmp_path: Path, monkeypatch) -> None:
    """The row of a beam search is measured by a beam search on the valid split too."""
    data = synthetic(items=60, users=40, requests=10, codes=(4, 3))
    changes = {"sft_epochs": 1, "rl_steps": 1, "candidates": 4, "test_decoder": "ved", "threads": 1}
    config = Config.synthetic().replace(**changes, variants=(Variant.parse("ved+joint"),))
    config = config.replace(ved=VEDConfig.training(value_weight=30.0))
    evaluate, asked = __main__.evaluate, []

    def told_apart(model, dataset, trie, decoder, split, rows):
        asked.append((split, decoder.name, rows))
        found = evaluate(model, dataset, trie, decoder, split, rows)
        return found | {"NDCG@10": {"beam": 0.25, "ved": 0.5}[decoder.name] + (split == "test") / 8}

    monkeypatch.setattr(__main__, "evaluate", told_apart)
    torch.manual_seed(0)
    run = Run(config, data, Trie.from_sequences(data.sequences), tmp_path / "seed-0", 0)
    rows = __main__.run_seed(run)
    found = {name: (row["valid_NDCG@10"], row["NDCG@10"]) for name, row in rows.items()}
    name = VARIANTS[-1].row_name
    assert found == {"SFT": (0.25, 0.375), name: (0.5, 0.625), f"{name}, beam search at test": (0.25, 0.375)}
    for row in rows.values():
        assert row["steps"] > 0 and 0 <= row["best_step"] <= row["steps"] and row["skipped"] == 0


def test_a_sentence_says_what_was_shown() -> None:
    found = results((0, 1))
    said = report.in_short(found)
    assert said.startswith(
        "In short: V-STAR: Sibling-GRPO with VED, beam search at test raises true reward@10 from "
    )
    assert "NDCG@10 goes from" in said and said.endswith("and keeps what they click.")
    forgetful = {s: rows | {"SFT": rows["SFT"] | {"NDCG@10": 1.0}} for s, rows in found.items()}
    assert report.in_short(forgetful).endswith("and forgets much of what they click.")
    worse = {seed: {row: rows[row] for row in reversed(rows)} for seed, rows in found.items()}
    assert "did not raise true reward@10 above" in report.in_short(worse)
    for rows in found.values():
        for row in rows.values():
            del row["true_reward@10"]
    assert "raises NDCG@10 from" in report.in_short(found) and "clicks" not in report.in_short(found)


def test_the_shares_of_levels_are_those_of_the_variance() -> None:
    """The first token decides all of the first request's reward, the second all of the other's."""
    tokens = torch.tensor([[[1, 5], [1, 6], [2, 5], [2, 6]], [[1, 5], [1, 6], [2, 5], [2, 6]]])
    mask = torch.ones(2, 4, dtype=torch.bool)
    first, second = torch.tensor([[1.0, 1.0, 0.0, 0.0]]), torch.tensor([[1.0, 0.0, 1.0, 0.0]])
    assert pictures.level_shares(tokens[:1], first, mask[:1]) == [1, 0]
    assert pictures.level_shares(tokens[:1], second, mask[:1]) == [0, 1]
    both = pictures.level_shares(tokens, torch.cat([first, 2 * second]), mask)
    assert both == pytest.approx([0.2, 0.8])
