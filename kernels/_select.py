"""The best of a program's candidates, one block of them after the other.

A candidate is an int64 key, the larger the better: its score in the upper half, and a number, so that no two
are equal. A list of keys lies in memory that the program alone uses. Only what is better than a bound is
appended; where the list is full it is shortened to the best, and the bound is raised. So nothing is sorted,
however many candidates there are. The order within the list means nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._floats import ordered

NONE = tl.constexpr(-0x7F80000000000001)  # the best key of a score of -inf, which is no candidate


@triton.jit
def key(score, number):
    """An integer that orders candidates: score descending, then number ascending; the larger is better."""
    return (ordered(score).to(tl.int64) << 32) | (0xFFFFFFFF - number.to(tl.int64))


@triton.jit
def number_of(key):
    """The number within a key."""
    return (-1 - key).to(tl.int32)


@triton.jit
def spread(x, BLOCK: tl.constexpr):
    """A number per column of a block, for all of the column's eight candidates, which lie in one thread."""
    return tl.reshape(tl.broadcast_to(x[None, :], (8, BLOCK // 8)), (BLOCK,))


@triton.jit
def append(kept, count, keys, bound, BLOCK: tl.constexpr):
    """Append what of a block of keys is better than a bound; returns the new number in the list."""
    keys = tl.reshape(keys, (8, BLOCK // 8))
    number = tl.sum((keys > bound).to(tl.int32), 0)
    at = count + tl.cumsum(number, 0) - number
    row = tl.arange(0, 8)[:, None]
    for i in tl.static_range(8):  # a store of the whole tile might lay it over the threads in another way
        mine = tl.sum(tl.where(row == i, keys, 0), 0)
        tl.store(kept + at, mine, mine > bound)
        at += (mine > bound).to(tl.int32)
    return count + tl.sum(number, 0)


@triton.jit
def _range(kept, count, BLOCK: tl.constexpr):
    """The least key with the worst score, and the largest with the best."""
    worst, best = tl.full((BLOCK,), 2**31 - 1, tl.int32), tl.full((BLOCK,), -(2**31), tl.int32)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        score = (tl.load(kept + i, i < count, NONE) >> 32).to(tl.int32)
        worst, best = tl.where(i < count, tl.minimum(worst, score), worst), tl.maximum(best, score)
    worst, best = tl.min(worst, 0).to(tl.int64), tl.max(best, 0).to(tl.int64)
    return worst << 32, (best << 32) | 0xFFFFFFFF


@triton.jit
def _reaching(kept, count, bound, BLOCK: tl.constexpr):
    """How many keys reach a bound."""
    number = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        number += (tl.load(kept + i, i < count, NONE) >= bound).to(tl.int32)
    return tl.sum(number, 0)


@triton.jit
def shorten(kept, count, bound, wanted, room, BLOCK: tl.constexpr):
    """Keep the ``wanted`` best keys and no more than there is room for.

    Returns a new bound, which at least as many keys exceed, and the number of those that are kept. The range
    of keys is halved until few enough are in its upper part. The bound stays where fewer are listed than
    wanted.
    """
    tl.debug_barrier()
    if count >= wanted:
        low, high = _range(kept, count, BLOCK)
        reach = count
        while reach > room:  # from `low` on; fewer than are wanted are above `high`
            middle = (low | high) - ((low ^ high) >> 1)  # half their sum, rounded up
            number = _reaching(kept, count, middle, BLOCK)
            if number >= wanted:
                low, reach = middle, number
            else:
                high = middle - 1
        bound = low - 1
        if reach < count:
            number = count * 0
            for start in range(0, count, BLOCK):
                i = start + tl.arange(0, BLOCK)
                keys = tl.load(kept + i, i < count, NONE)
                tl.debug_barrier()  # what follows overwrites only what has been read
                number = append(kept, number, keys, bound, BLOCK)
            count = number
    tl.debug_barrier()
    return bound, count
