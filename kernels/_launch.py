"""How a kernel is launched: past Triton's binder once a variant is compiled.

``kernel[grid](...)`` looks closely at every argument to find the compiled variant, which takes ten times as
long as the launch. Here a function is written for each kernel that looks only at what tells its variants
apart: the device, the warps, the constants, the dtypes of the pointers and which of them are no multiples of
16, and of an ``ALIGNED`` integer whether it is 1 or a multiple of 16. A first call goes through Triton; so
does one with an integer beyond 32 bits, which is another variant, and one under a profiler's hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import triton
from triton import knobs
from triton.runtime import driver

from .._backends import interpreting

# How a compiled kernel is called belongs to the version of Triton.
_VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
PAST_THE_BINDER = not interpreting() and (3, 6) <= _VERSION < (3, 10)

_SOURCE = """
def launch(grid, warps, {parameters}):
    driver = drivers.active
    device = driver.get_current_device()
    {addresses}
    key = (device, warps, ({bits}) & 15 and ({misaligned}), {traits})
    fits = min({integers}) >= -0x80000000 and max({integers}) < 0x80000000
    found = known.get(key)
    if found is None or not fits or called(hooks.launch_enter_hook) or called(hooks.launch_exit_hook):
        launched = kernel[grid]({arguments}, **options(warps))
        if fits and launched is not None:
            # The kernel as well: it unloads its code when it is deleted.
            known[key] = launched, launched.run, launched.function, launched.packed_metadata
        return
    _, run, function, metadata = found
    x, y = grid if len(grid) == 2 else (grid[0], 1)
    run(x, y, 1, driver.get_current_stream(device), function, metadata, None, None, None, {values})
"""


def options(warps: int) -> dict[str, Any]:
    """What a kernel is compiled with.

    Multiplications and additions are not fused, whatever Triton's default: a number has the same bits in
    every kernel and version.
    """
    return {"num_warps": warps, "enable_fp_fusion": False}


def launcher(kernel: Any, spelled: Mapping[str, str]) -> Callable[..., None]:
    """``launch(grid, warps, *arguments)`` of a kernel whose arguments are annotated so."""
    kinds = {name: spelled.get(name, "integer") for name in kernel.arg_names}
    if not PAST_THE_BINDER:

        def launch(grid: tuple[int, ...], warps: int, *arguments: Any, **others: Any) -> None:
            kernel[grid](**dict(zip(kinds, arguments)), **others, **options(warps))

        return launch

    pointers = [x for x, kind in kinds.items() if kind in POINTERS]
    constants = [x for x, kind in kinds.items() if kind == "tl.constexpr"]
    aligned = [x for x, kind in kinds.items() if kind == "ALIGNED"]
    integers = [x for x, kind in kinds.items() if kind in ("integer", "ALIGNED")]
    traits = [f"{x}.dtype" for x in pointers] + [f"{x} == 1 or {x} & 15 and 2" for x in aligned] + constants
    source = _SOURCE.format(
        parameters=", ".join(kinds),
        traits=", ".join(traits),
        addresses="; ".join(f"{x}_at = {x}.data_ptr()" for x in pointers),
        bits=" | ".join(f"{x}_at" for x in pointers),
        misaligned="".join(f"{x}_at & 15 != 0, " for x in pointers),
        integers=", ".join(("0", "0", *integers)),
        arguments=", ".join(f"{x}={x}" if x in constants else x for x in kinds),
        values=", ".join(f"{x}_at" if x in pointers else x for x in kinds),
    )
    known: dict[Any, Any] = {}
    space = {"kernel": kernel, "known": known, "options": options, "drivers": driver, "hooks": knobs.runtime}
    space["called"] = _called
    exec(compile(source, f"<launch of {kernel.fn.__name__}>", "exec"), space)
    return space["launch"]


def _called(hook: Any) -> Any:
    """Whether there is anything to call before or after a launch."""
    return getattr(hook, "calls", hook)


POINTERS = ("ANY", "F32", "F64", "I32", "I64", "BOOL")


class Part:
    """A stretch of a workspace, as a kernel's argument; a tensor would take longer to make."""

    __slots__ = ("address", "dtype", "memory")

    def __init__(self, memory: torch.Tensor, address: int, dtype: torch.dtype) -> None:
        self.memory, self.address, self.dtype = memory, address, dtype

    def data_ptr(self) -> int:
        """As of a tensor."""
        return self.address

    def view(self, dtype: torch.dtype) -> Part:
        """As of a tensor."""
        return Part(self.memory, self.address, dtype)
