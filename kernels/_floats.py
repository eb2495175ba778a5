"""Floats as the ops read and order them; see csrc/common/floats.h and order.h."""

from __future__ import annotations

import functools
from collections import namedtuple

import triton
import triton.language as tl

FLOAT32_MAX = tl.constexpr(3.4028234663852886e38)
LOWEST = tl.constexpr(-(2**63))  # the key of what is no candidate


# What logits are multiplied by; see csrc/common/temperature.h.
InverseTemperature = namedtuple("InverseTemperature", "first second")


@functools.lru_cache(1024)
def inverse_of(temperature: float) -> InverseTemperature:
    """1 / temperature as two normal floats, the second 1 for ordinary temperatures."""
    least, most, largest = 2.0**-126, 2.0**126, 3.4028234663852886e38
    if 1 / most <= temperature <= 1 / least:
        return InverseTemperature(1.0 / temperature, 1.0)
    first = least if temperature > 1 else most
    return InverseTemperature(first, min(max(1.0 / first / temperature, least), largest))


@triton.jit
def divided(x, inv_temperature):
    """``x`` divided by a temperature."""
    return x * inv_temperature.first * inv_temperature.second


@triton.jit
def cleaned(z, inside):
    """A logit: NaN reads as -inf, +inf as the largest finite float32; -inf where not inside."""
    return tl.where(inside & (z == z), tl.minimum(z, FLOAT32_MAX), float("-inf"))


@triton.jit
def ordered(score):
    """float32 as int32 of the same order; -0.0 equals 0.0."""
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def from_ordered(bits):
    """The inverse of :func:`ordered`."""
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
