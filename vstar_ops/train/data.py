"""Data sets of next-item requests over semantic IDs, and the loader of MiniOneRec's folder layout."""

from __future__ import annotations

import ast
import csv
import functools
import hashlib
import io
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

SPLITS = ("train", "valid", "test")


class TrueReward(Protocol):
    """The reward of candidates where it is known."""

    def __call__(self, user: Tensor, candidates: Tensor) -> Tensor:
        """``[B, G]`` of ``candidates[B, G, L]`` for ``user[B]``, all on one device."""
        ...

    def to(self, device: torch.device) -> TrueReward:
        """The reward of candidates that are on a device."""
        ...


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

    def on(self, device: torch.device) -> Split:
        """A batch on a device, its histories cut to the longest that occurs."""
        tensors = self._cut_history, self.target, self.user
        return Split(*(on_device(x, device) for x in tensors))

    @property
    def context(self) -> Tensor:
        """int64 ``[R, H' * L]``: the prompts as tokens, cut to the longest history that occurs.

        On a GPU, where this would make the host wait, as :meth:`on` has cut them.
        """
        return (self._cut_history if self.history.device.type == "cpu" else self.history).flatten(1)

    @property
    def _cut_history(self) -> Tensor:
        return self.history[:, : int(self.items.max()) if len(self) else 0]

    @property
    def items(self) -> Tensor:
        """int64 ``[R]``: items in each history."""
        return (self.history[:, :, 0] >= 0).sum(1)


@dataclass(frozen=True, eq=False)  # equal to itself alone: tensors have no truth value
class Dataset:
    """A catalogue, three splits, and the true reward where it is known.

    Tokens are the logits' columns: those of level ``l`` begin at ``sum(level_sizes[:l])``. Item ids only
    label items; they carry time order in public data, so nothing is ever learned or sorted by them.

    Attributes:
        name: for tables and folders.
        sequences: int64 ``[N, L]``, the catalogue.
        item_ids: int64 ``[N]``.
        level_sizes: columns of each level.
        reward: true reward in ``[0, 1]`` of candidates, or None.
        codes: int64 ``[vocab]``, the code that each column stands for; None where column ``c`` of a level is
            code ``c``. A SID is mapped back to its text by it.
    """

    name: str
    sequences: Tensor
    item_ids: Tensor
    level_sizes: tuple[int, ...]
    train: Split
    valid: Split
    test: Split
    reward: TrueReward | None = None
    codes: Tensor | None = None

    @property
    def vocab(self) -> int:
        return sum(self.level_sizes)

    @functools.cached_property
    def fingerprint(self) -> dict[str, str]:
        """A hash of the content of the catalogue and of each split, whatever the files are called.

        The splits are hashed as codes, so that they stay equal when another catalogue moves the columns.
        """
        codes = self.codes
        if codes is None:
            codes = torch.cat([torch.arange(size) for size in self.level_sizes])
        codes = torch.cat([codes, codes.new_tensor([-1])])  # padding stays -1

        def digest(*tensors: Tensor) -> str:
            found = hashlib.sha256()
            for tensor in tensors:
                found.update(f"{list(tensor.shape)}".encode())
                found.update(tensor.contiguous().numpy().tobytes())
            return found.hexdigest()

        parts = {"catalogue": digest(codes[self.sequences], self.item_ids, torch.tensor(self.level_sizes))}
        for name in SPLITS:
            split: Split = getattr(self, name)
            parts[name] = digest(codes[split.history], codes[split.target], split.user)
        return parts

    @property
    def max_tokens(self) -> int:
        """The longest sequence a model meets: a full history and the item that follows."""
        return (self.train.history.shape[1] + 1) * self.sequences.shape[1]


def on_device(x: Tensor, device: torch.device) -> Tensor:
    """``x`` on a device; to a GPU by way of pinned memory, so that the host does not wait."""
    if device.type == "cpu" or x.device == device:
        return x.to(device)
    return x.contiguous().pin_memory().to(device, non_blocking=True)


def user_sequences(split: Split) -> list[Tensor]:
    """The sequences ``[n, L]`` that a split's rows are windows of.

    Next-item rows of one user repeat each other: each continues the one before by its target. Once merged,
    every step is learned once per epoch, and all steps of a user in one pass. A history continues a sequence
    if it is all of it, or its end and as long as the longest of the split, where histories are cut. An empty
    history continues nothing.
    """
    merged: list[Tensor] = []
    open_row: dict[int, int] = {}  # user -> the sequence that the user's next row may continue
    longest = int(split.items.max()) if len(split) else 0
    for row, (items, user) in enumerate(zip(split.items.tolist(), split.user.tolist())):
        history, target = split.history[row, :items], split.target[row, None]
        i = open_row.get(user)
        so_far = merged[i] if i is not None else target[:0]
        whole = len(so_far) == items or items == longest
        if i is not None and items and whole and torch.equal(so_far[-items:], history):
            merged[i] = torch.cat([so_far, target])
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

_SID = re.compile(r"(?:<(?:s_)?[a-z]+_[0-9]+>)+")
_TOKEN = re.compile(r"<(?:s_)?([a-z]+)_([0-9]+)>")  # the letters before the code name the level
_AS_IT_IS = 4096  # a level whose codes are all smaller is not renumbered


def load_minionerec(
    folder: str | Path, category: str, *, max_history: int = 10, validate: bool = True
) -> Dataset:
    """Read ``{train,valid,test}/<category>*.csv`` and ``index/<category>.index.json`` below ``folder``.

    Of the CSV files the columns ``user_id``, ``history_item_sid`` and ``item_sid`` are read, by name. Tokens
    look like ``<a_12>`` or ``<s_a_12>``. In a level with codes of 4096 and more, column ``c`` is the ``c``-th
    smallest code that occurs; elsewhere it is code ``c``. ``Dataset.codes`` tells which code a column is.

    Args:
        max_history: items of a history, its last ones.
        validate: False leaves the valid split empty and does not read its file.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is malformed, or a split has no rows; the message names file, row (as an editor
            counts lines) and column.
    """
    folder = Path(folder)
    index = _read_index(folder / "index" / f"{category}.index.json")
    tokens = dict(zip(index.names, index.sequences))
    paths = [_find_csv(folder / name, category) for name in SPLITS if validate or name != "valid"]
    with _long_fields():
        train, *valid, test = (_read_split(path, tokens, max_history) for path in paths)
    splits = train, valid[0] if valid else train[:0], test
    return Dataset(category, index.sequences, index.item_ids, index.level_sizes, *splits, codes=index.codes)


class _Index(NamedTuple):
    """A catalogue: SIDs as text, and the fields of :class:`Dataset`."""

    names: list[str]
    sequences: Tensor
    item_ids: Tensor
    level_sizes: tuple[int, ...]
    codes: Tensor


class _Pairs(list[tuple[str, Any]]):
    """A JSON object with all its keys, also those that occur twice."""


def _read_index(path: Path) -> _Index:
    text = _read_text(path)

    def fail(key: str | None, problem: str, occurrence: int = 0) -> ValueError:
        at = [m.start() for m in re.finditer(rf"{re.escape(json.dumps(key))}\s*:", text)] or [0]
        row = text[: at[min(occurrence, len(at) - 1)]].count("\n") + 1
        return ValueError(f"{path}, row {row}, column {'-' if key is None else json.dumps(key)}: {problem}")

    try:
        index = json.loads(text, object_pairs_hook=_Pairs)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, row {error.lineno}, column {error.colno}: {error.msg}") from error
    except (ValueError, RecursionError) as error:  # a number of too many digits, too many brackets
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(index, _Pairs) or not index:
        raise fail(None, "expected an object of item id -> list of tokens")
    rows: list[list[int]] = []
    items: dict[int, str] = {}
    spelled: dict[tuple[int, int], str] = {}  # (level, code) -> token
    letters: list[str] = []
    for key, value in index:
        found = [_TOKEN.fullmatch(t) for t in value if isinstance(t, str)] if isinstance(value, list) else []
        if not found or not all(found) or len(found) != len(value):
            raise fail(key, f'expected a list of tokens like "<a_12>", got {value!r}')
        levels = [match[1] for match in found if match]
        letters = letters or levels
        if levels != letters:
            raise fail(key, f"expected the levels {letters} of the first item, got {levels}")
        item = _whole_number(key)
        if item is None:
            raise fail(key, "expected a whole number below 2^63 as the item id")
        if (other := items.setdefault(item, key)) != key or len(items) == len(rows):
            raise fail(key, f"item {item} occurs twice, before as {json.dumps(other)}", int(other == key))
        codes = [_whole_number(match[2]) for match in found if match]
        for level, (code, token) in enumerate(zip(codes, value)):
            if code is None:
                raise fail(key, f"expected a code below 2^63, got {token}")
            if (same := spelled.setdefault((level, code), token)) != token:
                raise fail(key, f"{token} is the code of {same} in other spelling")
        rows.append([code for code in codes if code is not None])
    sequences, sizes, columns = _columns(torch.tensor(rows))
    names = ["".join(value) for _, value in index]
    return _Index(names, sequences, torch.tensor(list(items)), sizes, columns)


def _whole_number(text: str) -> int | None:
    """The int64 that the digits ``text`` stand for, None for other texts."""
    if not (text.isascii() and text.isdecimal()) or len(text.lstrip("0")) > 19:
        return None
    number = int(text.lstrip("0") or "0")
    return number if number < 2**63 else None


def _columns(codes: Tensor) -> tuple[Tensor, tuple[int, ...], Tensor]:
    """Columns for ``codes[N, L]``, the number of columns of each level, and the code of every column."""
    columns: list[Tensor] = []
    names: list[Tensor] = []
    for level in codes.unbind(1):
        known, column = level.unique(return_inverse=True)
        if int(known[-1]) < _AS_IT_IS:
            known, column = torch.arange(int(known[-1]) + 1), level
        columns.append(column + sum(len(n) for n in names))
        names.append(known)
    return torch.stack(columns, 1), tuple(len(n) for n in names), torch.cat(names)


def _find_csv(folder: Path, category: str) -> Path:
    found = sorted(folder.glob(f"{category}*.csv"))
    if not found:
        raise FileNotFoundError(f"no file {folder}/{category}*.csv")
    if len(found) > 1:
        raise ValueError(f"{folder}: {category}*.csv is ambiguous: {', '.join(p.name for p in found)}")
    return found[0]


_FIELD_LIMIT = threading.Lock()


@contextmanager
def _long_fields() -> Iterator[None]:
    """Let ``csv`` read fields of any length. Its limit belongs to the whole process, so it is put back."""
    with _FIELD_LIMIT:
        before = csv.field_size_limit(2**31 - 1)  # the most that a C long holds everywhere
        try:
            yield
        finally:
            csv.field_size_limit(before)


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

    if not targets:
        left_out = "; --no-validate trains without a valid split" if path.parent.name == "valid" else ""
        raise ValueError(f"{path}: the {path.parent.name} split has no rows{left_out}")
    length = len(next(iter(tokens.values())))
    padded = torch.full((len(targets), max_history, length), -1)
    for out, history in zip(padded, histories):
        if history:
            out[: len(history)] = torch.stack(history)
    return Split(padded, torch.stack(targets), torch.tensor(users, dtype=torch.int64))


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
