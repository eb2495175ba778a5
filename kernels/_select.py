"""The best of a program's scores, one block of them after the other.

A list lies in memory that the program alone uses: scores as ordered integers (_floats.py) and places, in the
order in which they came. Only what is better than a bound is appended; where the list is full it is shortened
to the best, and the bound is raised. So nothing is sorted, however many scores there are. Places rise, and of
equal scores the first are the best.
"""

from __future__ import annotations

from collections import namedtuple

import triton
import triton.language as tl

LEAST = tl.constexpr(-(2**31))  # the score of what is no candidate
# Where scores and places lie, and how many there are.
List = namedtuple("List", "score place count")


@triton.jit
def append(kept, score, place, bound):
    """Append what is better than a bound; returns the new number."""
    better = (score > bound).to(tl.int32)
    at = kept.count + tl.cumsum(better, 0) - 1
    tl.store(kept.score + at, score, better > 0)
    tl.store(kept.place + at, place, better > 0)
    return kept.count + tl.sum(better, 0)


@triton.jit
def _range(kept, BLOCK: tl.constexpr):
    """The least and the largest score."""
    least, most = tl.full((BLOCK,), 2**31 - 1, tl.int32), tl.full((BLOCK,), LEAST, tl.int32)
    for start in range(0, kept.count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        score = tl.load(kept.score + i, i < kept.count, LEAST)
        least, most = tl.where(i < kept.count, tl.minimum(least, score), least), tl.maximum(most, score)
    return tl.min(least, 0), tl.max(most, 0)


@triton.jit
def _reaching(kept, bound, BLOCK: tl.constexpr):
    """How many scores reach a bound."""
    number = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, kept.count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        number += (tl.load(kept.score + i, i < kept.count, LEAST) >= bound).to(tl.int32)
    return tl.sum(number, 0)


@triton.jit
def shorten(kept, bound, wanted, room, BLOCK: tl.constexpr):
    """Keep the ``wanted`` best and no more than there is room for; returns what they reach, and their number.

    The bound is looked for by halving the range of scores, until few enough reach it. If that many are equal,
    the first of them are kept. Where there are fewer than are wanted, the bound is the one that was given.
    """
    tl.debug_barrier()
    reach, above = kept.count, kept.count * 0
    if kept.count >= wanted:
        bound, high = _range(kept, BLOCK)
        high += 1
        while (reach > room) & (bound + 1 < high):
            middle = (bound & high) + ((bound ^ high) >> 1)  # their sum may be beyond 32 bits
            number = _reaching(kept, middle, BLOCK)
            if number >= wanted:
                bound, reach = middle, number
            else:
                high, above = middle, number
    count = kept.count
    if reach < kept.count:
        equals = tl.where(reach > room, wanted - above, reach)  # how many at the bound are kept
        count, seen = above * 0, above * 0
        for start in range(0, kept.count, BLOCK):
            i = start + tl.arange(0, BLOCK)
            score = tl.load(kept.score + i, i < kept.count, LEAST)
            place = tl.load(kept.place + i, i < kept.count, 0)
            tl.debug_barrier()  # what follows overwrites only what has been read
            equal = (score == bound).to(tl.int32)
            first = (score > bound) | ((equal > 0) & (seen + tl.cumsum(equal, 0) <= equals))
            seen += tl.sum(equal, 0)
            score = tl.where(first, score, LEAST)
            count = append(List(kept.score, kept.place, count), score, place, LEAST)
    tl.debug_barrier()
    return bound, count
