"""Checkpoints and metrics that survive being killed at any moment."""

from __future__ import annotations

import json
import math
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from .._files import replacing


class Mismatch(ValueError):
    """A checkpoint is damaged, or belongs to other data or settings than those it was to be used with."""


T = TypeVar("T")


def require(path: Path, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Compare the fingerprint in what was ``saved`` at ``path`` with that of the run that reads it.

    A fingerprint has a hash or a value per part, or a dict of them. Checkpoints of versions that stored none
    are refused, since nothing tells what they were trained on.

    Raises:
        Mismatch: the fingerprint is missing, or parts differ; the message names them.
    """
    found = saved.get("fingerprint")
    if found is None:
        raise Mismatch(
            f"{path} does not say which data it was trained on (an older version wrote it), so it cannot be "
            "continued: start a new run in another folder"
        )
    parts = []
    for part, value in wanted.items():
        if isinstance(value, dict):
            known = found.get(part, {})
            changed = [k for k, x in value.items() if k in known and known[k] != x]
            if changed:
                parts.append(
                    f"{part} ({', '.join(f'{k} was {known[k]!r}, is {value[k]!r}' for k in changed)})"
                )
        elif found.get(part) != value:
            parts.append(part)
    if parts:
        raise Mismatch(f"{path} cannot be continued, since these differ from its own: {', '.join(parts)}")


_ROWS = "; rows"  # added to the name of a matrix that is stored in part
_LARGE = 2**18  # entries


def moved_rows(state: Mapping[str, Tensor], initial: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state``, of large matrices only the rows that differ from ``initial``, and their numbers beside them.

    Most rows of a hashed table belong to no prefix of the catalogue and never move.
    """
    result: dict[str, Tensor] = {}
    for name, x in state.items():
        result[name] = x
        if x.ndim == 2 and x.numel() >= _LARGE:
            moved = (x.view(torch.uint8) != initial[name].view(torch.uint8)).any(1).nonzero()[:, 0]
            if 2 * len(moved) < len(x):
                result |= {name: x[moved], name + _ROWS: moved}
    return result


def whole(saved: Mapping[str, Tensor], initial: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What :func:`moved_rows` was given, out of its result."""
    result: dict[str, Tensor] = {}
    for name, x in saved.items():
        if not name.endswith(_ROWS):
            rows = saved.get(name + _ROWS)
            result[name] = x if rows is None else initial[name].index_copy(0, rows, x)
    return result


def on_cpu(state: T) -> T:
    """``state`` with all its tensors on the CPU, so that it can be continued on any device."""
    return tree_map_only(Tensor, Tensor.cpu, state)


def save(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` (tensors, numbers, strings, dicts, lists) atomically."""
    with replacing(path) as temporary:
        torch.save(state, temporary)


def load(path: Path) -> dict[str, Any]:
    """Read what :func:`save` wrote. Nothing in the file is executed.

    Raises:
        Mismatch: it is not what :func:`save` wrote.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise Mismatch(f"{path} is no checkpoint, or damaged: {error or 'it ends too early'}") from error


def save_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


class MetricsFile:
    """JSON lines, appended. ``position`` belongs in a checkpoint: what a killed run wrote after its last
    checkpoint is cut off on resume, because the resumed run writes it again."""

    def __init__(self, path: Path, position: int = 0) -> None:
        self.file = open(path, "r+b" if path.exists() else "w+b")  # noqa: SIM115, closed by close()
        self.file.truncate(position)
        self.file.seek(position)

    def write(self, record: dict[str, Any]) -> None:
        """Append a record; numbers that are not finite, which JSON does not know, become null."""
        bad = [k for k, x in record.items() if isinstance(x, float) and not math.isfinite(x)]
        record = record | dict.fromkeys(bad)
        self.file.write(json.dumps(record).encode() + b"\n")
        self.file.flush()

    def position(self) -> int:
        """Bytes written, safely on the disk."""
        self.file.flush()
        os.fsync(self.file.fileno())
        return self.file.tell()

    def close(self) -> None:
        self.file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All records of a metrics file."""
    return [json.loads(line) for line in path.read_text().splitlines()]
