"""Data that users have: empty splits, long fields, codes and ids of any kind, unrelated histories."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from toy_data import sid

from vstar_ops import Trie
from vstar_ops.train import metrics
from vstar_ops.train.config import Config
from vstar_ops.train.data import Split, load_minionerec, user_sequences
from vstar_ops.train.decode import Decoder
from vstar_ops.train.model import SIDTransformer
from vstar_ops.train.synthetic import synthetic
from vstar_ops.train.trainer import Run

pytestmark = pytest.mark.usefixtures("one_thread")

# ------------------------------------------------------------------ splits without rows


@pytest.mark.parametrize("name", ["train", "valid", "test"])
@pytest.mark.parametrize("blank", ["", "\n\n"])
def test_a_split_without_rows_names_file_and_split(toy: Path, name: str, blank: str) -> None:
    path = toy / name / "Toy_5_2016.csv"
    path.write_text(path.read_text().split("\n")[0] + "\n" + blank)
    with pytest.raises(ValueError, match=rf"{name}/Toy_5_2016\.csv: the {name} split has no rows"):
        load_minionerec(toy, "Toy")


def test_the_valid_split_can_be_left_out(toy: Path) -> None:
    with_it = load_minionerec(toy, "Toy")
    (toy / "valid" / "Toy_5_2016.csv").unlink()
    with pytest.raises(FileNotFoundError, match="valid"):
        load_minionerec(toy, "Toy")
    data = load_minionerec(toy, "Toy", validate=False)
    assert len(data.valid) == 0 and data.valid.history.shape[1:] == with_it.valid.history.shape[1:]
    assert torch.equal(data.train.history, with_it.train.history) and len(data.test) == len(with_it.test)


def test_nothing_is_measured_on_no_requests(tmp_path: Path) -> None:
    data = synthetic(items=60, users=40, requests=0, codes=(4, 3))
    trie = Trie.from_sequences(data.sequences)
    with pytest.raises(ValueError, match="synthetic: the valid split is empty"):
        Run(Config.synthetic(), data, trie, tmp_path, 0)
    with pytest.raises(ValueError, match="synthetic: the test split is empty"):
        Run(Config.synthetic().replace(validate=False), data, trie, tmp_path, 0)
    model = SIDTransformer(data.vocab, data.max_tokens, dim=16, layers=1, heads=2)
    with pytest.raises(ValueError, match="the test split is empty"):
        metrics.evaluate(model, data, trie, Decoder("beam", 4), "test")
    with pytest.raises(ValueError, match="rank must be that of at least one request"):
        metrics.accuracy(torch.empty(0))


def test_a_score_that_is_not_finite_is_an_error() -> None:
    data = synthetic(items=60, users=40, requests=5, codes=(4, 3))
    object.__setattr__(data, "reward", lambda user, tokens: torch.full(tokens.shape[:2], torch.nan))
    model = SIDTransformer(data.vocab, data.max_tokens, dim=16, layers=1, heads=2)
    with pytest.raises(FloatingPointError, match="synthetic: best_reward is nan over 5 requests of test"):
        metrics.evaluate(model, data, Trie.from_sequences(data.sequences), Decoder("beam", 4), "test")


# ------------------------------------------------------------------ long fields


def test_fields_of_any_length(toy: Path) -> None:
    """Also in columns that are not read; the limit of the user's process stays what it was."""
    path = toy / "train" / "Toy_5_2016.csv"
    history = [sid(i % 8) for i in range(12_000)]
    path.write_text(path.read_text() + f'long,{"t" * 200_000},"{history}",{sid(0)},0\n')
    before = csv.field_size_limit(1234)
    try:
        train = load_minionerec(toy, "Toy").train
        assert csv.field_size_limit() == 1234
        path.write_text(path.read_text() + "one field\n")
        with pytest.raises(ValueError, match="expected 5 fields, got 1"):
            load_minionerec(toy, "Toy")
        assert csv.field_size_limit() == 1234
    finally:
        csv.field_size_limit(before)
    assert len(train) == 41 and int(train.items[-1]) == 10
    assert torch.equal(train.history[-1, -1], train.history[-1, 1])  # items 12,000 - 1 and - 9, modulo 8


# ------------------------------------------------------------------ the index


def write_index(toy: Path, items: list[tuple[str, list[str]]]) -> None:
    """An index with these keys, one per line, and splits with a row on the last two."""
    text = ",\n".join(f"{json.dumps(key)}: {json.dumps(tokens)}" for key, tokens in items)
    (toy / "index" / "Toy.index.json").write_text("{\n" + text + "\n}\n")
    first, last = ("".join(tokens) for _, tokens in items[-2:])
    for split in ("train", "valid", "test"):
        rows = ["user_id,history_item_sid,item_sid", f"U,\"['{first}']\",{last}"]
        (toy / split / "Toy_5_2016.csv").write_text("\n".join(rows) + "\n")


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([("7", ["<a_0>"]), ("8", ["<a_1>"]), ("7", ["<a_2>"])], 'row 4, column "7": item 7 occurs twice'),
        ([("1", ["<a_0>"]), ("01", ["<a_1>"])], 'row 3, column "01": item 1 occurs twice, before as "1"'),
        ([("1", ["<a_0>"]), ("9" * 20, ["<a_1>"])], f'row 3, column "{"9" * 20}": expected a whole number'),
        ([("1", ["<a_0>"]), (str(2**63), ["<a_1>"])], "row 3, column .*: expected a whole number below"),
        ([("1", ["<a_0>"]), ("9" * 5000, ["<a_1>"])], "row 3, column .*: expected a whole number below"),
        ([("1", ["<a_0>"]), ("-3", ["<a_1>"])], 'row 3, column "-3": expected a whole number'),
        ([("1", ["<a_0>"]), ("\u0664", ["<a_1>"])], "row 3, column .*: expected a whole number"),
        ([("1", ["<a_0>"]), ("2", [f"<a_{'9' * 20}>"])], 'row 3, column "2": expected a code below 2\\^63'),
        ([("1", ["<a_0>"]), ("2", [f"<a_{2**63}>"])], 'row 3, column "2": expected a code below 2\\^63'),
        ([("1", ["<a_0>"]), ("2", [f"<a_{'9' * 5000}>"])], 'row 3, column "2": expected a code below'),
        ([("1", ["<a_0>"]), ("2", ["<a_-1>"])], 'row 3, column "2": expected a list of tokens .*<a_-1>'),
        ([("1", ["<a_0>"]), ("2", ["<a_\u0664>"])], 'row 3, column "2": expected a list of tokens'),
        ([("1", ["<a_1>"]), ("2", ["<a_01>"])], 'row 3, column "2": <a_01> is the code of <a_1>'),
        ([("1", ["<s_a_1>"]), ("2", ["<a_1>"])], 'row 3, column "2": <a_1> is the code of <s_a_1>'),
        ([("1", ["<a_0>"]), ("2", ["<a_0>", "<b_0>"])], 'row 3, column "2": expected the levels'),
        ([("1", ["<a_0>", "<b_0>"]), ("2", ["<a_0>"])], 'row 3, column "2": expected the levels'),
        ([("1", ["<s_a_0>"]), ("2", ["<s_b_0>"])], 'row 3, column "2": expected the levels'),
        ([("1", ["<a_0>"]), ("2", [])], 'row 3, column "2": expected a list of tokens'),
    ],
)
def test_index_errors_name_file_row_and_item(
    toy: Path, items: list[tuple[str, list[str]]], message: str
) -> None:
    write_index(toy, items)
    with pytest.raises(ValueError, match=rf"Toy\.index\.json, {message}"):
        load_minionerec(toy, "Toy")


@pytest.mark.parametrize("text", ['{"1": ' + "[" * 100_000, '{"1": [' + "9" * 5000 + "]}"])
def test_json_that_python_refuses(toy: Path, text: str) -> None:
    (toy / "index" / "Toy.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"Toy\.index\.json"):
        load_minionerec(toy, "Toy")


@pytest.mark.parametrize("large", [4096, 10**6, 4 * 10**8, 3 * 10**9, 2**63 - 1])
def test_large_codes_are_renumbered_in_their_order(toy: Path, large: int) -> None:
    """Level by level: one with small codes keeps them, gaps and all."""
    codes = [(5, 7), (0, large), (2, 7), (0, 9)]
    write_index(toy, [(str(3 * i), [f"<a_{a}>", f"<b_{b}>"]) for i, (a, b) in enumerate(codes)])
    data = load_minionerec(toy, "Toy")
    assert data.level_sizes == (6, 3) and data.item_ids.tolist() == [0, 3, 6, 9]
    assert data.sequences.tolist() == [[5, 6], [0, 8], [2, 6], [0, 7]]
    assert data.codes is not None and data.codes.tolist() == [0, 1, 2, 3, 4, 5, 7, 9, large]
    assert [tuple(row) for row in data.codes[data.sequences].tolist()] == codes  # back to the text
    assert data.train.target.tolist() == [[0, 7]] and data.train.history[0, 0].tolist() == [2, 6]


def test_small_codes_are_their_own_columns(toy: Path) -> None:
    write_index(toy, [("1", ["<a_4095>", "<b_3>"]), ("2", ["<a_1>", "<b_0>"])])
    data = load_minionerec(toy, "Toy")
    assert data.level_sizes == (4096, 4) and data.sequences.tolist() == [[4095, 4099], [1, 4096]]
    assert data.codes is not None and data.codes.tolist() == [*range(4096), *range(4)]


def test_tokens_whose_level_follows_an_s(toy: Path) -> None:
    items = [("1", ["<s_a_340>", "<s_b_12>"]), ("2", ["<s_a_3>", "<s_b_0>"])]
    write_index(toy, items)
    data = load_minionerec(toy, "Toy")
    assert data.level_sizes == (341, 13) and data.sequences.tolist() == [[340, 353], [3, 341]]
    path = toy / "test" / "Toy_5_2016.csv"
    path.write_text(path.read_text() + "U,[],<s_a_9><s_b_0>\n")
    with pytest.raises(ValueError, match="row 3, column item_sid: .* is not in the catalogue's index"):
        load_minionerec(toy, "Toy")


# ------------------------------------------------------------------ what is one sequence


def split_of(rows: list[tuple[list[int], int]], users: list[int] | None = None, width: int = 4) -> Split:
    history = torch.full((len(rows), width, 1), -1)
    for out, (items, _) in zip(history, rows):
        out[: len(items), 0] = torch.tensor(items, dtype=torch.int64)
    return Split(history, torch.tensor([[t] for _, t in rows]), torch.tensor(users or [0] * len(rows)))


@pytest.mark.parametrize(
    ("rows", "merged"),
    [
        ([([], 1), ([], 2)], [[1], [2]]),
        ([([], 1), ([], 1)], [[1], [1]]),
        ([([], 1), ([1], 2), ([1, 2], 3)], [[1, 2, 3]]),
        ([([], 1), ([1], 2), ([], 3), ([3], 4)], [[1, 2], [3, 4]]),
        ([([1, 2], 3), ([3], 4)], [[1, 2, 3], [3, 4]]),  # [3] would be [1, 2, 3]
        ([([1], 1), ([1], 2), ([1, 2], 5)], [[1, 1], [1, 2, 5]]),
        ([([1], 2), ([1], 3)], [[1, 2], [1, 3]]),
        ([([1, 2], 3), ([2, 3], 4), ([3, 4], 5)], [[1, 2, 3, 4, 5]]),  # histories are cut to two items
        ([([1], 2), ([2], 3), ([3], 4)], [[1, 2, 3, 4]]),  # to one
        ([([1, 2], 3), ([1, 3], 4)], [[1, 2, 3], [1, 3, 4]]),
    ],
)
def test_rows_are_merged_where_the_history_continues(
    rows: list[tuple[list[int], int]], merged: list[list[int]]
) -> None:
    assert [s[:, 0].tolist() for s in user_sequences(split_of(rows))] == merged


def test_rows_of_two_users_are_not_merged() -> None:
    found = user_sequences(split_of([([1], 2), ([1, 2], 3), ([1, 2], 4), ([1, 2, 3], 5)], [0, 1, 0, 1]))
    assert [s[:, 0].tolist() for s in found] == [[1, 2, 4], [1, 2, 3, 5]]
    assert user_sequences(split_of([])) == []
