"""How every op is registered: schema, shape function, reference; and the checks they share.

An op's module calls :func:`define` once. Native backends add kernels for their device type by
themselves when their library is loaded (``STABLE_TORCH_LIBRARY_IMPL`` in ``csrc/``).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .._backends import reference_wanted

_library = torch.library.Library("vstar_ops", "DEF")
_validate = os.environ.get("VSTAR_OPS_VALIDATE", "0") not in ("", "0")

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INTS = (torch.int32, torch.int64)


def define(name: str, schema: str, reference: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Register ``vstar_ops::name`` with its pure-torch implementation for every device.

    The outputs are selections and statistics that carry no gradient, so the autograd keys fall through.
    """
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, reference, "CompositeExplicitAutograd")
    _library.impl(name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"vstar_ops::{name}", fake, lib=_library)


_library.define("simd_level() -> str")


def pick(name: str, reference: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """What a public function calls: the dispatched op, or the reference under ``use_backend``."""
    if reference_wanted(device.type):
        return torch.no_grad()(reference)
    return getattr(torch.ops.vstar_ops, name).default


@contextmanager
def validation(enabled: bool = True) -> Iterator[None]:
    """Also check values, not only shapes and dtypes, in calls inside the block (process-wide).

    Checks that need tensor contents, such as a node out of range, cost a pass over the tensor and on a
    GPU a synchronisation, so they are off by default. ``VSTAR_OPS_VALIDATE=1`` turns them on everywhere.
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
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor {axes}, got {type(value).__name__}")
    if value.dtype not in dtypes:
        expected = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name} must be {expected}, got {str(value.dtype).removeprefix('torch.')}")
    given = value.shape
    if len(given) != len(shape) or any(w is not None and w != g for w, g in zip(shape, given)):
        sizes = "" if all(s is None for s in shape) else f" = {['any' if s is None else s for s in shape]}"
        raise ValueError(f"{name} must have the shape {axes}{sizes}, got {list(given)}")
    if device is not None and value.device != device:
        raise ValueError(f"{name} must be on {device} like the other tensors, got {value.device}")
    return value


def finite(name: str, value: Any) -> float:
    """Return ``value`` as a float if it is a finite number, else raise."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)
