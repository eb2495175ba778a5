"""The order of scores as integers; see csrc/common/order.h."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def ordered(score):
    """float32 as int32 of the same order; -0.0 equals 0.0."""
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def from_ordered(bits):
    """The inverse."""
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
