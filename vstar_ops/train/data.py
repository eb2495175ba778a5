"""Data sets of next-item requests over semantic IDs, and the loader of MiniOneRec's folder layout."""

from __future__ import annotations

import ast
import csv
import io
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

TrueReward = Callable[[Tensor, Tensor], Tensor]  # (user[B], candidates[B, G, L]) -> reward[B, G]


@dataclass(frozen=True)
class Split:
    """Requests: a user's history, oldest item first, and the item that followed.

    Attributes:
        history: int64 ``[R, H, L]``, ``-1`` past the last item.
        target: int64 ``[R, L]``.
        user: int64 ``[R]``, an opaque number; never a feature.
    """

    history: Tensor
    target: Tensor
    user: Tensor

    def __len__(self) -> int:
        return len(self.target)

    def __getitem__(self, rows: Tensor | slice) -> Split:
        return Split(self.history[rows], self.target[rows], self.user[rows])

    def part(self, rows: int | None) -> Split:
        """A fixed random choice of ``rows`` requests; all of them if there are no more, or for None."""
        if rows is None or rows >= len(self):
            return self
        return self[torch.randperm(len(self), generator=torch.Generator().manual_seed(0))[:rows]]

    @property
    def context(self) -> Tensor:
        """int64 ``[R, H' * L]``: the prompts as tokens, cut to the longest history that occurs."""
        longest = int(self.items.max()) if len(self) else 0
        return self.history[:, :longest].flatten(1)

    @property
    def items(self) -> Tensor:
        """int64 ``[R]``: items in each history."""
        return (self.history[:, :, 0] >= 0).sum(1)


@dataclass(frozen=True, eq=False)  # equal to itself alone: tensors have no truth value
class Dataset:
    """A catalogue, three splits, and the true reward where it is known.

    Tokens are the logits' columns: code ``c`` of level ``l`` is ``sum(level_sizes[:l]) + c``. Item ids
    only label items; they carry time order in public data, so nothing is ever learned or sorted by them.

    Attributes:
        name: for tables and folders.
        sequences: int64 ``[N, L]``, the catalogue.
        item_ids: int64 ``[N]``.
        level_sizes: codes of each level.
        reward: true reward in ``[0, 1]`` of candidates, or None.
    """

    name: str
    sequences: Tensor
    item_ids: Tensor
    level_sizes: tuple[int, ...]
    train: Split
    valid: Split
    test: Split
    reward: TrueReward | None = None

    @property
    def vocab(self) -> int:
        return sum(self.level_sizes)

    @property
    def max_tokens(self) -> int:
        """The longest sequence a model meets: a full history and the item that follows."""
        return (self.train.history.shape[1] + 1) * self.sequences.shape[1]


def user_sequences(split: Split) -> list[Tensor]:
    """The sequences ``[n, L]`` that a split's rows are windows of.

    Next-item rows of one user repeat each other: each continues the one before by its target. Once merged,
    every step is learned once per epoch, and all steps of a user in one pass.
    """
    merged: list[Tensor] = []
    open_row: dict[int, int] = {}  # user -> the sequence that the user's next row may continue
    for row, (items, user) in enumerate(zip(split.items.tolist(), split.user.tolist())):
        history, target = split.history[row, :items], split.target[row, None]
        i = open_row.setdefault(user, len(merged))
        recent = merged[i][max(0, len(merged[i]) - items) :] if i < len(merged) else None
        if recent is not None and torch.equal(recent, history):
            merged[i] = torch.cat([merged[i], target])
        else:
            open_row[user] = len(merged)
            merged.append(torch.cat([history, target]))
    return merged


class UserWindows:
    """Examples of supervised training: windows of random size and place of every user's sequence."""

    def __init__(self, split: Split) -> None:
        self.sequences = user_sequences(split)
        self.longest = split.history.shape[1] + 1
        self.lengths = torch.tensor([len(sequence) for sequence in self.sequences])

    def __len__(self) -> int:
        return len(self.sequences)

    def draw(self) -> tuple[Tensor, Tensor]:
        """A window ``(user, start, stop)`` of each user, int64 ``[N, 3]``, and the sizes ``[N]``."""
        lengths = self.lengths
        size = (2 + (torch.rand(len(lengths)) * (lengths - 1)).long()).minimum(lengths)
        start = (torch.rand(len(lengths)) * (lengths - size + 1)).long().minimum(lengths - size)
        stop, size = start + size, size.clamp(max=self.longest)
        return torch.stack([torch.arange(len(lengths)), stop - size, stop], 1), size

    def items(self, windows: Tensor, dropout: float) -> Tensor:
        """The items of ``windows[B, 3]``, some dropped at random; int64 ``[B, n, L]``, padded by -1."""
        views = (self.sequences[user][start:stop] for user, start, stop in windows.tolist())
        kept = [_drop_items(view, dropout) for view in views]
        return nn.utils.rnn.pad_sequence(kept, batch_first=True, padding_value=-1)


def _drop_items(items: Tensor, rate: float) -> Tensor:
    """A sequence ``[n, L]`` without some of its items; the last one, and at least two of them, remain."""
    if len(items) > 2:
        keep = torch.rand(len(items)) >= rate
        keep[-1] = True
        keep[-2] |= keep.sum() < 2
        items = items[keep]
    return items


# ------------------------------------------------------------------ MiniOneRec's folder layout

_SID = re.compile(r"(?:<[a-z]+_\d+>)+")
_TOKEN = re.compile(r"<([a-z]+)_(\d+)>")


def load_minionerec(folder: str | Path, category: str, *, max_history: int = 10) -> Dataset:
    """Read ``{train,valid,test}/<category>*.csv`` and ``index/<category>.index.json`` below ``folder``.

    Of the CSV files the columns ``user_id``, ``history_item_sid`` and ``item_sid`` are read, by name.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is malformed; the message names file, row (as an editor counts lines) and column.
    """
    folder = Path(folder)
    catalogue, level_sizes = _read_index(folder / "index" / f"{category}.index.json")
    tokens = {sid: torch.tensor(row) for sid, row in catalogue.values()}
    paths = [_find_csv(folder / split, category) for split in ("train", "valid", "test")]
    train, valid, test = (_read_split(path, tokens, max_history) for path in paths)
    sequences = torch.tensor([row for _, row in catalogue.values()])
    item_ids = torch.tensor(list(catalogue))
    return Dataset(category, sequences, item_ids, level_sizes, train, valid, test)


def _read_index(path: Path) -> tuple[dict[int, tuple[str, list[int]]], tuple[int, ...]]:
    """item id -> (SID as text, tokens as columns), and the level sizes."""
    text = _read_text(path)

    def fail(key: str | None, problem: str) -> ValueError:
        row = text[: max(text.find(json.dumps(key)), 0)].count("\n") + 1
        return ValueError(f"{path}, row {row}, column {'-' if key is None else json.dumps(key)}: {problem}")

    try:
        index = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, row {error.lineno}, column {error.colno}: {error.msg}") from error
    if not isinstance(index, dict) or not index:
        raise fail(None, "expected an object of item id -> list of tokens")
    codes: dict[str, list[int]] = {}
    letters: list[str] = []
    for key, value in index.items():
        found = [_TOKEN.fullmatch(t) for t in value if isinstance(t, str)] if isinstance(value, list) else []
        if not found or not all(found) or len(found) != len(value):
            raise fail(key, f'expected a list of tokens like "<a_12>", got {value!r}')
        levels = [match[1] for match in found if match]
        letters = letters or levels
        if levels != letters:
            raise fail(key, f"expected the levels {letters} of the first item, got {levels}")
        if not key.isdecimal():
            raise fail(key, "expected a whole number as the item id")
        codes[key] = [int(match[2]) for match in found if match]
    sizes = tuple(max(level) + 1 for level in zip(*codes.values()))
    start = [sum(sizes[:level]) for level in range(len(sizes))]
    rows = {int(k): ("".join(index[k]), [s + c for s, c in zip(start, row)]) for k, row in codes.items()}
    return rows, sizes


def _find_csv(folder: Path, category: str) -> Path:
    found = sorted(folder.glob(f"{category}*.csv"))
    if not found:
        raise FileNotFoundError(f"no file {folder}/{category}*.csv")
    if len(found) > 1:
        raise ValueError(f"{folder}: {category}*.csv is ambiguous: {', '.join(p.name for p in found)}")
    return found[0]


def _read_split(path: Path, tokens: dict[str, Tensor], max_history: int) -> Split:
    histories, targets, users = [], [], []
    names: dict[str, int] = {}
    reader = csv.reader(io.StringIO(_read_text(path), newline=""), strict=True)
    header, line = [], 0

    def item(text: object, column: str) -> Tensor:
        if isinstance(text, str) and text in tokens:
            return tokens[text]
        good = isinstance(text, str) and _SID.fullmatch(text)
        problem = "is not in the catalogue's index" if good else 'is no semantic ID like "<a_1><b_2><c_3>"'
        raise ValueError(f"{path}, row {line}, column {column}: {text!r} {problem}")

    try:
        header = next(reader, [])
        for column in ("user_id", "history_item_sid", "item_sid"):
            if header.count(column) != 1:
                raise ValueError(f"{path}, row 1, column {column}: expected once in the header, got {header}")
        at_user, at_history, at_target = map(header.index, ("user_id", "history_item_sid", "item_sid"))
        line = reader.line_num + 1
        for row in filter(None, reader):  # blank lines are no rows
            if len(row) != len(header):
                problem = f"expected {len(header)} fields, got {len(row)}"
                raise ValueError(f"{path}, row {line}, column {min(len(row), len(header)) + 1}: {problem}")
            history = [item(text, "history_item_sid") for text in _parse_list(row[at_history], path, line)]
            histories.append(history[-max_history:])
            targets.append(item(row[at_target], "item_sid"))
            users.append(names.setdefault(row[at_user], len(names)))
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}, row {reader.line_num}, column -: {error}") from error

    length = len(next(iter(tokens.values())))
    padded = torch.full((len(targets), max_history, length), -1)
    for out, history in zip(padded, histories):
        if history:
            out[: len(history)] = torch.stack(history)
    target = torch.stack(targets) if targets else torch.empty(0, length, dtype=torch.int64)
    return Split(padded, target, torch.tensor(users, dtype=torch.int64))


def _parse_list(text: str, path: Path, line: int) -> list[object]:
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = None
    if not isinstance(value, list):
        shown = text if len(text) < 60 else text[:57] + "..."
        raise ValueError(f"{path}, row {line}, column history_item_sid: expected a list, got {shown!r}")
    return value


def _read_text(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        row = data[: error.start].count(b"\n") + 1
        start = data.rfind(b"\n", 0, error.start)
        raise ValueError(f"{path}, row {row}, column {error.start - start}: not UTF-8 text") from error
