"""Checks of arguments. An error names the argument, what was given and what is expected."""

from __future__ import annotations

import os
import sys
from array import array
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..reference import derive_seeds
from ..reference.filters import num_words
from ..trie import Trie

_validate = os.environ.get("VSTAR_OPS_VALIDATE", "0") not in ("", "0")

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FLOATS_OR_DOUBLE = (*FLOATS, torch.float64)  # of an argument that Op.double lists
INTS = (torch.int32, torch.int64)
INTEGERS = (*INTS, torch.int16, torch.int8, torch.uint8)
_NUMBERS = (int, float)
_LOWEST = -sys.float_info.max


@contextmanager
def validation(enabled: bool = True) -> Iterator[None]:
    """Also check values, not only shapes and dtypes, in calls inside the block (process-wide).

    Checks that need tensor contents, such as a node out of range, cost a pass over the tensor and on a
    GPU a synchronization, so they are off by default. ``VSTAR_OPS_VALIDATE=1`` turns them on everywhere.
    """
    global _validate
    previous, _validate = _validate, enabled
    try:
        yield
    finally:
        _validate = previous


def validating() -> bool:
    """Whether value checks are on."""
    return _validate


def check(
    name: str,
    value: Any,
    shape: tuple[int | None, ...],
    axes: str,
    dtypes: tuple[torch.dtype, ...],
    device: torch.device | None = None,
) -> Tensor:
    """Return ``value`` if it is a tensor of this shape (``None``: any size), dtype and device, else raise."""
    if isinstance(value, Tensor) and value.dtype in dtypes and (device is None or value.device == device):
        given = value.shape
        if given == shape or len(given) == len(shape) == shape.count(None):
            return value
        if len(given) == len(shape):
            for have, want in zip(given, shape):
                if want is not None and have != want:
                    break
            else:
                return value
    raise _mismatch(name, value, shape, axes, dtypes, device)


def _mismatch(
    name: str,
    value: Any,
    shape: tuple[int | None, ...],
    axes: str,
    dtypes: tuple[torch.dtype, ...],
    device: torch.device | None,
) -> Exception:
    """The error of what :func:`check` refuses."""
    if not isinstance(value, Tensor):
        return TypeError(f"{name} must be a tensor {axes}, got {type(value).__name__}")
    if value.dtype not in dtypes:
        expected = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        return TypeError(f"{name} must be {expected}, got {str(value.dtype).removeprefix('torch.')}")
    fits = all(want is None or have == want for have, want in zip(value.shape, shape))
    if len(value.shape) != len(shape) or not fits:
        letters = axes.strip("[]").split(", ") if len(shape) == axes.count(",") + 1 else shape
        sizes = f"[{', '.join(str(x if want is None else want) for x, want in zip(letters, shape))}]"
        sizes = f" = {sizes}" if sizes != axes and None not in letters else ""
        return ValueError(f"{name} must have the shape {axes}{sizes}, got {list(value.shape)}")
    return ValueError(f"{name} must be on {device} like the other tensors, got {value.device}")


def check_tokens(
    name: str, value: Any, shape: tuple[int | None, ...], axes: str, device: torch.device | None = None
) -> Tensor:
    """Token ids of any integer type, as int32 or int64."""
    check(name, value, shape, axes, INTEGERS, device)
    return value if value.dtype in INTS else value.to(torch.int32)


def check_seeds(name: str, value: Any, batch: int, device: torch.device, optional: bool = False) -> Tensor:
    """int64 seeds ``[B]``: given, or derived from one int."""
    if isinstance(value, Tensor):
        return check(name, value, (batch,), "[B]", (torch.int64,), device)
    return derive_seeds(check_seed(name, value, optional), batch, device)


def check_seed(name: str, value: Any, optional: bool = False) -> int:
    """Return the int that seeds are derived from."""
    if isinstance(value, bool) or not isinstance(value, int):
        expected = "None, an int" if optional else "an int"
        raise TypeError(f"{name} must be {expected} or int64 seeds [B], got {type(value).__name__}")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name} must fit in int64, got {value}")
    return value


def check_int(name: str, value: Any, low: int) -> int:
    """Return ``value`` if it is an int of at least ``low``, else raise."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < low:
        raise ValueError(f"{name} must be at least {low}, got {value}")
    return value


def floats_beside(x: Tensor) -> tuple[torch.dtype, ...]:
    """What other arguments may be: float64 only where ``x`` is."""
    return FLOATS_OR_DOUBLE if x.dtype is torch.float64 else FLOATS


def result_dtype(x: Tensor) -> torch.dtype:
    """Of the numbers that an op computes of ``x``."""
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def check_floats(name: str, value: Any, shape: tuple[int, ...], axes: str, like: Tensor) -> Tensor | None:
    """An optional float argument as float32, or beside float64 as float64."""
    if value is None:
        return None
    check(name, value, shape, axes, floats_beside(like), like.device)
    dtype = result_dtype(like)
    return value if value.dtype is dtype else value.to(dtype)


def check_finite(name: str, value: Any) -> float:
    """Return ``value`` as a float if it is a finite number, else raise."""
    if type(value) is float and _LOWEST <= value <= -_LOWEST:
        return value
    if isinstance(value, bool) or not isinstance(value, _NUMBERS):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not _LOWEST <= value <= -_LOWEST:
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)


def level_weights(name: str, weights: Any, length: int, dtype: torch.dtype, like: Tensor) -> Tensor:
    """``L`` finite numbers as a tensor ``[L]`` on the device of ``like``.

    It is kept: on a GPU a copy from the host would wait for all work before it, and cannot be captured in a
    graph. What is made while tracing, where tensors are no plain ones, is not kept.
    """
    if not isinstance(weights, Iterable):
        raise TypeError(f"{name} must be L = {length} numbers, got {type(weights).__name__}")
    levels = [check_finite(name, w) for w in weights]
    if len(levels) != length:
        raise ValueError(f"{name} must be L = {length} numbers, got {len(levels)}")
    if torch.compiler.is_dynamo_compiling() or type(like) not in (Tensor, torch.nn.Parameter):
        return _numbers(levels, dtype, like.device)
    key = array("d", levels).tobytes(), dtype, like.device  # as bits: -0 is not 0
    kept = _kept_numbers.get(key)
    if kept is None:
        with torch.inference_mode(False):
            kept = _numbers(levels, dtype, like.device)
        if len(_kept_numbers) >= 64:
            _kept_numbers.clear()
        if type(kept) is Tensor:
            _kept_numbers[key] = kept
    return kept


_kept_numbers: dict[tuple[bytes, torch.dtype, torch.device], Tensor] = {}


def _numbers(levels: list[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    if torch.compiler.is_dynamo_compiling() and any(map(varies, levels)):
        return torch.stack([as_tensor(x) for x in levels]).to(device, dtype)
    return torch.tensor(levels, dtype=dtype, device=device)


def varies(value: Any) -> bool:
    """Whether ``torch.compile``, which is tracing, takes this float for an input of the graph."""
    return isinstance(value, float) and not torch.fx.experimental.symbolic_shapes.has_static_value(value)


def as_tensor(value: Any) -> Any:
    """A float as a tensor of the graph: by a product, as that is among the operations that do not fix it."""
    return torch.ones((), dtype=torch.float64) * value if isinstance(value, float) else value


def check_positive(name: str, value: Any) -> float:
    """Return ``value`` as a float if it is a finite number above 0, else raise."""
    value = check_finite(name, value)
    if value <= 0:
        raise ValueError(f"{name} must be > 0, got {value}")
    return value


def check_trie(trie: Any, columns: int | None, device: torch.device) -> None:
    """A trie on the device whose tokens are columns of the logits that there are."""
    check_type("trie", trie, Trie)
    if columns is not None and trie.max_token >= columns:
        raise ValueError(
            f"logits must have a column for every token of the trie (V > {trie.max_token}), got V = {columns}"
        )
    if trie.offset.device != device:
        raise ValueError(f"trie must be on {device} like logits, got {trie.device}; use trie.to(...)")


def check_alive(trie: Trie, batch: int) -> None:
    """The bits of a restricted trie: one row for all requests, or one per request."""
    alive = trie.alive
    if alive is None:
        return
    words = num_words(trie.num_nodes)
    check("trie.alive", alive, (None, words), f"[R, {words}]", (torch.int32,), trie.device)
    if alive.shape[0] not in (1, batch):
        raise ValueError(f"trie is restricted for {alive.shape[0]} requests, got logits of {batch}")
    if not alive.is_contiguous():
        raise ValueError(f"trie.alive must be contiguous, got the strides {list(alive.stride())}")


def check_nodes(node: Tensor, trie: Trie) -> None:
    """Values of nodes."""
    check_range("node", node, trie.num_nodes)


def check_range(name: str, values: Tensor, end: int) -> None:
    """Indices below ``end``, or -1, which costs a look at them."""
    if values.numel():
        low, high = int(values.min()), int(values.max())
        if low < -1 or high >= end:
            raise ValueError(f"{name} must lie in [-1, {end}), got values in [{low}, {high}]")


def check_type(name: str, value: Any, kind: type) -> None:
    """Raise unless ``value`` is one of a class of this package."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be a vstar_ops.{kind.__name__}, got {type(value).__name__}")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise unless ``value`` is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")


def standardizer_options(eps: Any, ddof: Any, std_floor: Any, *, scaled: bool) -> tuple[float, int, float]:
    """The checked options of ``(x - mean) / (max(std, std_floor) + eps)``; not scaled, of ``x - mean``."""
    eps, std_floor = check_finite("eps", eps), check_finite("std_floor", std_floor)
    if eps < 0:
        raise ValueError(f"eps must be >= 0, got {eps}")
    if std_floor < 0:
        raise ValueError(f"std_floor must be >= 0, got {std_floor}")
    if scaled and eps == 0 and std_floor == 0:
        raise ValueError("eps and std_floor must not both be 0, the standard deviation may be 0")
    if ddof not in (0, 1):
        raise ValueError(f"ddof must be 0 or 1, got {ddof!r}")
    return eps, ddof, std_floor


def check_mask(mask: Any, shape: tuple[int, ...], device: torch.device) -> None:
    """An optional mask of candidates ``[B, G]``; where the shape is ``[B, G, L]``, perhaps of tokens."""
    if mask is None:
        return
    if len(shape) == 3 and isinstance(mask, Tensor) and mask.dim() == 3:
        check("mask", mask, shape, "[B, G, L]", (torch.bool,), device)
    else:
        check("mask", mask, shape[:2], "[B, G]", (torch.bool,), device)


def check_prefix_mask(mask: Any, shape: tuple[int, ...], device: torch.device) -> Tensor | None:
    """As :func:`check_mask`. Of tokens those before the first masked one, so that all prefixes are there."""
    check_mask(mask, shape, device)
    if mask is None or mask.dim() == 2:
        return mask
    return mask.to(torch.uint8).cumprod(2, dtype=torch.uint8).to(torch.bool)


def check_finite_rewards(rewards: Tensor, mask: Tensor | None) -> None:
    """Under validation, the rewards of the candidates that take part."""
    if validating():
        candidates = mask.any(2) if mask is not None and mask.dim() == 3 else mask
        if not bool(torch.isfinite(rewards if candidates is None else rewards[candidates]).all()):
            raise ValueError("rewards must be finite, got NaN or infinity")
