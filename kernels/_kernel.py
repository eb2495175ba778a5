"""How a kernel is declared and compiled ahead, and how its workspace is laid out."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .._backends import interpreting
from ._launch import Part, launcher, options

# Types of a kernel's arguments. Without a type an argument is an integer.
F32, F64, I32, I64, BOOL = map(tl.pointer_type, (tl.float32, tl.float64, tl.int32, tl.int64, tl.int1))
ANY = tl.pointer_type(tl.void)  # of a dtype that a specialization names
ADDRESS = tl.int64  # of an array whose element type the kernel looks up; see _array.py
LONG = tl.int64  # an integer of 64 bits
NUMBERS = tl.float32  # a tuple of floats and of such tuples
ALIGNED = tl.int32  # an integer that the compiler looks at: a stride decides how much is read at once
FLOATS = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}
_NOTATION = {  # of annotations as they are spelled
    "ANY": "", "F32": "*fp32", "F64": "*fp64", "I32": "*i32", "I64": "*i64", "BOOL": "*u1",
    "ADDRESS": "i64", "LONG": "i64", "ALIGNED": "i32:16", "NUMBERS": "", "tl.float32": "fp32",
    "tl.float64": "fp64", "tl.constexpr": "constexpr",
}  # fmt: skip
_BOUND = {
    "ADDRESS": "tl.int64",
    "LONG": "tl.int64",
    **{x: x for x in ("tl.float32", "tl.float64", "tl.constexpr")},
}

_INTERPRETED = interpreting()  # Triton, too, looks once

BLOCKS = (32, 64, 128, 256, 512, 1024)


def kernel(function: Callable[..., Any]) -> Any:
    """``triton.jit``, where the annotations are the types of the arguments.

    What it returns has a method more, ``launch(grid, warps, *arguments)``.

    A kernel is compiled once for all values of its integers, but for those that are ``ALIGNED``.
    """
    spelled = function.__annotations__
    plain = "ADDRESS", "LONG", "NUMBERS"
    integers = [x for x in inspect.signature(function).parameters if spelled.get(x, "LONG") in plain]
    # Triton finds the types of tensors and of ALIGNED integers by itself.
    function.__annotations__ = {name: _BOUND[x] for name, x in spelled.items() if x in _BOUND}
    made = triton.jit(do_not_specialize=integers)(function)
    made.types = {name: _NOTATION[x] for name, x in spelled.items()}
    made.launch = launcher(made, spelled)
    return made


def block_for(count: int) -> tuple[int, int]:
    """The block that reads ``count`` items, at once or in turns, and its warps."""
    block = next((block for block in BLOCKS if count <= block), BLOCKS[-1])
    return block, max(1, block // 128)


def workspace(device: torch.device, *parts: tuple[int, torch.dtype]) -> list[Any]:
    """One allocation, as an argument of a kernel for each pair of length and dtype.

    Every part begins at a multiple of 16 bytes. Triton compiles a variant for pointers that do not, which
    must not depend on the sizes of a call. Only the interpreter needs tensors.
    """
    size, starts = _layout(parts)
    memory = torch.empty(size, dtype=torch.uint8, device=device)
    if _INTERPRETED:
        return [
            memory[start : start + count * dtype.itemsize].view(dtype)
            for start, (count, dtype) in zip(starts, parts)
        ]
    address = memory.data_ptr()
    return [Part(memory, address + start, dtype) for start, (_, dtype) in zip(starts, parts)]


@functools.lru_cache(1024)
def _layout(parts: tuple[tuple[int, torch.dtype], ...]) -> tuple[int, list[int]]:
    """Bytes of a workspace, and where its parts begin."""
    *starts, size = accumulate((-(-count * dtype.itemsize // 16) * 16 for count, dtype in parts), initial=0)
    return size, starts


class Specialization(NamedTuple):
    """A kernel and what it is compiled for.

    Attributes:
        name: what tells it apart.
        kernel: the jit function.
        warps: per program.
        constants: its compile-time arguments.
        types: of its arguments that are ``ANY``, and of tuples, element by element.
    """

    name: str
    kernel: Any
    warps: int
    constants: Mapping[str, Any]
    types: Mapping[str, Any] = {}

    @property
    def options(self) -> dict[str, Any]:
        """What it is launched with."""
        return options(self.warps)

    def signature(self) -> dict[str, Any]:
        """The type of every argument, in order. A multiple of 16 is ``"i32:16"``; pointers always are."""
        types = {**self.kernel.types, **self.types, **dict.fromkeys(self.constants, "constexpr")}
        return {name: types.get(name, "i32") for name in self.kernel.arg_names}
