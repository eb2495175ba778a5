"""Arrays whose element type and strides a kernel looks up: one compiled kernel serves all dtypes.

For reads that are gathers anyway. Where a row is streamed, a typed pointer lets the compiler read 16 bytes at
once, and the kernel is compiled for each dtype.
"""

from __future__ import annotations

from collections import namedtuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_TYPES = {
    torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int32: 3, torch.int64: 4, torch.bool: 5,
}  # fmt: skip


def array(x: Tensor | None) -> tuple[int, int]:
    """A kernel's first two arguments for a tensor: address and element type, -1 for None."""
    return (0, -1) if x is None else (x.data_ptr(), _TYPES[x.dtype])


def strided(x: Tensor | None, dims: int) -> tuple[int, ...]:
    """All its arguments: also the strides of ``dims`` dimensions."""
    return (0, -1, *(0,) * dims) if x is None else (x.data_ptr(), _TYPES[x.dtype], *x.stride())


# The same inside of a kernel, with three strides.
Array = namedtuple("Array", "address dtype s0 s1 s2")


@triton.jit
def load_float(x, i, j, k, inside):
    """float32, bfloat16 or float16 at ``[i, j, k]`` as float32; 0 where not inside."""
    address, at = x.address.to(tl.int64), i * x.s0 + j * x.s1 + k * x.s2
    result = tl.zeros(at.shape, tl.float32)
    if x.dtype == 0:
        result = tl.load(address.to(tl.pointer_type(tl.float32)) + at, inside, 0.0)
    elif x.dtype == 1:
        result = tl.load(address.to(tl.pointer_type(tl.bfloat16)) + at, inside, 0.0).to(tl.float32)
    elif x.dtype == 2:
        result = tl.load(address.to(tl.pointer_type(tl.float16)) + at, inside, 0.0).to(tl.float32)
    return result


@triton.jit
def load_int(x, i, j, k, inside, other: tl.constexpr):
    """int32, int64 or bool at ``[i, j, k]`` as int64; ``other`` where not inside, everywhere for None."""
    address, at = x.address.to(tl.int64), i * x.s0 + j * x.s1 + k * x.s2
    result = tl.full(at.shape, other, tl.int64)
    if x.dtype == 3:
        result = tl.load(address.to(tl.pointer_type(tl.int32)) + at, inside, other).to(tl.int64)
    elif x.dtype == 4:
        result = tl.load(address.to(tl.pointer_type(tl.int64)) + at, inside, other)
    elif x.dtype == 5:
        result = tl.load(address.to(tl.pointer_type(tl.int8)) + at, inside, other).to(tl.int64)
    return result


@triton.jit
def store_float(address, dtype, at, value, inside):
    """Write float32 numbers as float32, bfloat16 or float16."""
    address = address.to(tl.int64)
    if dtype == 0:
        tl.store(address.to(tl.pointer_type(tl.float32)) + at, value, inside)
    elif dtype == 1:
        tl.store(address.to(tl.pointer_type(tl.bfloat16)) + at, value.to(tl.bfloat16), inside)
    elif dtype == 2:
        tl.store(address.to(tl.pointer_type(tl.float16)) + at, value.to(tl.float16), inside)
