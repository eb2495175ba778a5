"""Results of a call by name, and how far they are from what they should be."""

from __future__ import annotations

import math
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

Results = dict[str, Tensor]  # "".join(("out", name)) is Python that yields the tensor


class Problem(NamedTuple):
    """Where a result is wrong, what is there, what should be, and by how much they may differ."""

    where: str
    got: Any
    want: Any
    allowed: float = 0.0


class Want(NamedTuple):
    """What a result should be. Of floats ``limit * scale`` is how far off it may be; None: exactly this."""

    value: Any
    scale: Any = None
    limit: float = 1e-5


class Verdict:
    """What came of comparisons: the largest error, per scale and per limit, and what is wrong."""

    def __init__(self) -> None:
        self.error = self.of_limit = 0.0
        self.mismatches = 0  # of integers and choices
        self.problems: list[Problem] = []

    def floats(self, name: str, got: Tensor, want: Want) -> None:
        """Count the error of floats."""
        value = np.asarray(want.value, np.float64)
        if not self._same_shape(name, got, value):
            return
        value = torch.from_numpy(value).to(got.dtype).double().numpy()
        with np.errstate(all="ignore"):
            is_ = got.detach().double().cpu().numpy()
            same = (is_ == value) | (np.isnan(is_) & np.isnan(value))
            error = np.where(same, 0.0, np.abs(is_ - value) / want.scale)
            error = np.where(np.isfinite(error), error, math.inf)
        if error.size:
            self.error = max(self.error, float(error.max()))
            self.of_limit = max(self.of_limit, float(error.max()) / want.limit)
        if len(wrong := np.argwhere(error > want.limit)):
            i = tuple(wrong[0])
            allowed = want.limit * float(np.broadcast_to(want.scale, value.shape)[i])
            self.problems.append(Problem(name + _at(i), float(is_[i]), float(value[i]), allowed))

    def exactly(self, name: str, got: Tensor, want: Any) -> None:
        """Count the integers that differ."""
        value = np.asarray(want)
        if self._same_shape(name, got, value):
            is_ = got.cpu().numpy()
            wrong = np.argwhere(is_ != value)
            self.mismatches += len(wrong)
            for i in map(tuple, wrong[:1]):
                self.problems.append(Problem(name + _at(i), is_[i].item(), value[i].item()))

    def choice(self, where: str, got: Any, want: Any) -> None:
        """Count one wrong choice."""
        self.mismatches += 1
        self.problems.append(Problem(where, got, want))

    def _same_shape(self, name: str, got: Tensor, value: np.ndarray) -> bool:
        if tuple(got.shape) != value.shape:
            self.choice(f"{name}.shape", tuple(got.shape), value.shape)
        return tuple(got.shape) == value.shape


def _at(index: tuple[Any, ...]) -> str:
    return f"[{', '.join(str(int(i)) for i in index)}].item()" if index else ".item()"


def results(out: Any, name: str = "") -> Results:
    """The tensors of a result by name."""
    if isinstance(out, Tensor):
        return {name: out}
    if is_dataclass(out):
        parts = [(f".{f.name}", getattr(out, f.name)) for f in fields(out)]
    elif hasattr(out, "_fields"):
        parts = [(f".{field}", getattr(out, field)) for field in out._fields]
    else:
        parts = [(f"[{i}]", x) for i, x in enumerate(out)]
    return {k: v for part, x in parts for k, v in results(x, name + part).items()}


def limit_of(x: Tensor, limit: float) -> float:
    """float64 arguments are computed with in float64."""
    return 1e-12 if x.dtype == torch.float64 else limit
