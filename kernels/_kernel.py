"""How a kernel is declared, launched and compiled ahead, and how its workspace is laid out."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Types of a kernel's arguments. Without a type an argument is an integer.
F32, F64, I32, I64, BOOL = map(tl.pointer_type, (tl.float32, tl.float64, tl.int32, tl.int64, tl.int1))
ANY = tl.pointer_type(tl.void)  # of a dtype that a specialization names
ADDRESS = tl.int64  # of an array whose element type the kernel looks up; see _array.py
LONG = tl.int64  # an integer of 64 bits
ALIGNED = tl.int32  # an integer that the compiler looks at: a stride decides how much is read at once
FLOATS = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}
_NOTATION = {  # of annotations as they are spelled
    "ANY": "", "F32": "*fp32", "F64": "*fp64", "I32": "*i32", "I64": "*i64", "BOOL": "*u1",
    "ADDRESS": "i64", "LONG": "i64", "ALIGNED": "i32:16", "tl.float32": "fp32",
    "tl.float64": "fp64", "tl.constexpr": "constexpr",
}  # fmt: skip
_BOUND = {
    "ADDRESS": "tl.int64",
    "LONG": "tl.int64",
    **{x: x for x in ("tl.float32", "tl.float64", "tl.constexpr")},
}

BLOCKS = (32, 64, 128, 256, 512, 1024)


def kernel(function: Callable[..., Any]) -> Any:
    """``triton.jit``, where the annotations are the types of the arguments.

    A kernel is compiled once for all values of its integers, but for those that are ``ALIGNED``.
    """
    spelled = function.__annotations__
    whole = "ADDRESS", "LONG"
    integers = [x for x in inspect.signature(function).parameters if spelled.get(x, "LONG") in whole]
    # Triton finds the types of tensors and of ALIGNED integers by itself.
    function.__annotations__ = {name: _BOUND[x] for name, x in spelled.items() if x in _BOUND}
    made = triton.jit(do_not_specialize=integers)(function)
    made.types = {name: _NOTATION[x] for name, x in spelled.items()}
    return made


def options(warps: int) -> dict[str, Any]:
    """What a kernel is launched with.

    Multiplications and additions are not fused, whatever Triton's default: a number has the same bits in
    every kernel and version.
    """
    return {"num_warps": warps, "enable_fp_fusion": False}


def block_for(count: int) -> tuple[int, int]:
    """The block that reads ``count`` items, at once or in turns, and its warps."""
    block = next((block for block in BLOCKS if count <= block), BLOCKS[-1])
    return block, max(1, block // 128)


def workspace(device: torch.device, *parts: tuple[int, torch.dtype]) -> list[Tensor]:
    """One allocation, as a vector for each pair of length and dtype; some are a little longer.

    Every part begins at a multiple of 16 bytes. Triton compiles a variant for pointers that do not, which
    must not depend on the sizes of a call.
    """
    sizes = [-(-count * dtype.itemsize // 16) * 16 for count, dtype in parts]
    memory = torch.empty(sum(sizes), dtype=torch.uint8, device=device).split(sizes)
    return [part.view(dtype) for part, (_, dtype) in zip(memory, parts)]


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
