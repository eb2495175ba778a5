"""Sums of ``p`` and ``p log2 p`` over a row in one pass.

Logits come in tiles ``[R, L]`` whose rows lie in one thread each. Every row of the tile has a running maximum
and sums of its own: no thread waits for another before the end.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._floats import FLOAT32_MAX

LOG2E, LOG2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)


@triton.jit
def tile(ROWS: tl.constexpr, LANES: tl.constexpr, WIDE: tl.constexpr):
    """Columns of a tile: a row has neighbors, which are read at once, or every ``ROWS``-th one."""
    row, lane = tl.arange(0, ROWS)[:, None], tl.arange(0, LANES)[None, :]
    return row * LANES + lane if WIDE else lane * ROWS + row


@triton.jit
def finite(z):
    """``cleaned`` of _floats.py in two instructions; what is not there is loaded as -inf."""
    return tl.minimum(tl.maximum(z, float("-inf")), FLOAT32_MAX)


@triton.jit
def in_octaves(x, inv_temperature):
    """A logit minus a larger one, divided by the temperature and log 2.

    2 to the power of the bound is 0. As it is finite, no product is 0 times infinity.
    """
    second = tl.cast(tl.minimum(inv_temperature.second * LOG2E, FLOAT32_MAX), tl.float32)
    return tl.maximum(x * inv_temperature.first * second, -200.0)


@triton.jit
def nothing(ROWS: tl.constexpr):
    """Maximum and sums before the first tile."""
    zero = tl.zeros((ROWS,), tl.float32)
    return tl.full((ROWS,), -FLOAT32_MAX, tl.float32), zero, zero


@triton.jit
def add(z, most, mass, weighted, inv_temperature):
    """Take a tile into the running maxima and sums."""
    new = tl.maximum(most, tl.max(z, 1))
    shift = in_octaves(most - new, inv_temperature)
    x = in_octaves(z - new[:, None], inv_temperature)
    power, scale = tl.exp2(x), tl.exp2(shift)
    weighted = (weighted + shift * mass) * scale + tl.sum(power * x, 1)
    return new, mass * scale + tl.sum(power, 1), weighted


@triton.jit
def alike(most, mass, weighted, inv_temperature):
    """The largest maximum, and the sums in relation to it."""
    largest = tl.max(most, 0)
    shift = in_octaves(most - largest, inv_temperature)
    scale = tl.exp2(shift)
    return largest, mass * scale, (weighted + shift * mass) * scale
