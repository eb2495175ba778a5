"""What a kernel can be compiled for, to be compiled ahead and have its resources recorded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

# Multiplications and additions are not fused, whatever Triton's default: a number has the same bits in every
# kernel and version.
OPTIONS = {"enable_fp_fusion": False}
FLOATS = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}


class Specialization(NamedTuple):
    """A kernel and what it is compiled for.

    Attributes:
        name: what tells it apart.
        kernel: the jit function.
        types: of its run-time arguments, in Triton's notation; ``"i32"`` for those that are not named. A
            multiple of 16 is ``"i32:16"``; pointers always are.
        constants: its compile-time arguments.
        warps: a program.
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    warps: int

    @property
    def options(self) -> dict[str, Any]:
        """What it is launched with."""
        return {"num_warps": self.warps, **OPTIONS}

    def signature(self) -> dict[str, str]:
        """Argument by argument, in order."""
        return {
            name: "constexpr" if name in self.constants else self.types.get(name, "i32")
            for name in self.kernel.arg_names
        }
