"""A device that is not there: its tensors say that they are on it, and are computed on the CPU.

So code that must run on a GPU is run where there is none. A tensor that was made on the wrong device meets
one of the other and is refused, as torch would refuse it, and every place where the host would wait for the
device is counted. ``lazy`` is a name of a device that every torch knows and none has.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

OTHER = torch.device("lazy", 0)
aten = torch.ops.aten
_COPIES = {aten._to_copy.default, aten.copy_.default}
# What looks at the device's memory from the host; so do copies to it, and masks as indices.
_WAITS = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.bincount.default,
    aten._unique2.default,
    aten.masked_select.default,
    aten.equal.default,
}
_INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}


class Elsewhere(torch.Tensor):
    """A tensor of the device; ``held`` is where its numbers are."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> Elsewhere:
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        made = torch.Tensor._make_wrapper_subclass(cls, held.size(), device=OTHER, **layout)
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(op, args, kwargs or {}, Counter())


class _Device(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(op, args, kwargs or {}, self.waits)


def _run(op: Any, args: Any, kwargs: dict[str, Any], waits: Counter[str]) -> Any:
    """The op on the CPU. Its results are on the device that was asked for, or else on that of its tensors."""
    leaves = tree_leaves((args, kwargs))
    there = [x for x in leaves if isinstance(x, Elsewhere)]
    here = [x for x in leaves if isinstance(x, torch.Tensor) and not isinstance(x, Elsewhere) and x.ndim]
    asked = kwargs.get("device")
    onto = asked.type == OTHER.type if asked is not None else bool(there)
    if op is aten.copy_.default:
        onto = isinstance(args[0], Elsewhere)
    elif there and here and op not in _COPIES:
        raise RuntimeError(f"{op}: expected all tensors to be on the same device, got {OTHER} and cpu")
    masks = op in _INDEXING and any(x.dtype == torch.bool for x in tree_leaves(args[1]) if x is not None)
    if there and (op in _WAITS or masks or (op in _COPIES and not onto)):
        waits[str(op)] += 1
    args, kwargs = tree_map(_held, args), tree_map(_held, kwargs)
    if asked is not None:
        kwargs["device"] = torch.device("cpu")
    found = op(*args, **kwargs)
    known = {id(x.held): x for x in there}  # what is changed in place is the same tensor afterwards

    def sent(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        return known[id(x)] if id(x) in known else Elsewhere(x)

    return tree_map(sent, found) if onto else found


def _held(x: Any) -> Any:
    return x.held if isinstance(x, Elsewhere) else x


@contextmanager
def other_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Inside, :data:`OTHER` is a device; yields how often the host waited for it, by op."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    # A parameter is moved by making a new one, since its class changes.
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=...) copies by an op that is seen
    try:
        with _Device() as device:
            yield device.waits
    finally:
        torch._C._set_only_lift_cpu_tensors(False)
        torch.__future__.set_overwrite_module_params_on_conversion(before)
