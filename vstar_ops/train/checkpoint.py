"""Checkpoints and metrics that survive being killed at any moment."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch


def save(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` (tensors, numbers, strings, dicts, lists) atomically.

    A reader sees the old file or the new one, never a part: the bytes go to a temporary file in the same
    folder, reach the disk, and only then take the name.
    """
    with replacing(path) as file:
        torch.save(state, file)


def load(path: Path) -> dict[str, Any]:
    """Read what :func:`save` wrote. Nothing in the file is executed."""
    return torch.load(path, map_location="cpu", weights_only=True)


def save_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with replacing(path) as file:
        file.write(text.encode())


class replacing:
    """``with replacing(path) as file:`` a file that takes the place of ``path`` if the block succeeds."""

    def __init__(self, path: Path) -> None:
        self.path, self.temporary = path, path.with_name(f".{path.name}.tmp")

    def __enter__(self) -> Any:
        self.file = open(self.temporary, "wb")
        return self.file

    def __exit__(self, kind: object, *_: object) -> None:
        with self.file:
            if kind is None:
                self.file.flush()
                os.fsync(self.file.fileno())
        if kind is not None:
            self.temporary.unlink()
            return
        os.replace(self.temporary, self.path)
        folder = os.open(self.path.parent, os.O_RDONLY)  # the rename itself must reach the disk too
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


class MetricsFile:
    """JSON lines, appended. ``position`` belongs in a checkpoint: what a killed run wrote after its last
    checkpoint is cut off on resume, because the resumed run writes it again."""

    def __init__(self, path: Path, position: int = 0) -> None:
        self.file = open(path, "r+b" if path.exists() else "w+b")  # noqa: SIM115, closed by close()
        self.file.truncate(position)
        self.file.seek(position)

    def write(self, record: dict[str, Any]) -> None:
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
