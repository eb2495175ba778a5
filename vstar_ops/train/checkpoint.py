"""Checkpoints and metrics that survive being killed at any moment."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from .._files import replacing


def save(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` (tensors, numbers, strings, dicts, lists) atomically."""
    with replacing(path) as temporary:
        torch.save(state, temporary)


def load(path: Path) -> dict[str, Any]:
    """Read what :func:`save` wrote. Nothing in the file is executed."""
    return torch.load(path, map_location="cpu", weights_only=True)


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
