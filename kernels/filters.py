"""``filter_items``: one launch for the items, then one per level from the leaves up, without a workspace.

With a list, a program takes a block of listed items, and in the launch of a level the nodes above them.
Without one, programs take the words of a level, 32 nodes each. Bits are set and cleared by atomics on
integers: whoever changes the same bit agrees on it, and other bits of its word belong to others.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from ._array import Array, load_int, strided
from ._kernel import ADDRESS, I32, Specialization, kernel

_BLOCK, _WARPS = {"BLOCK": 128}, 4
_WORDS, _LEVEL_WARPS = {"WORDS": 8}, 4
_PROGRAMS = 1024  # per request, where each takes several blocks of words


def filter_items(
    alive: Tensor,
    allowed: Tensor,
    offset: Tensor,
    item_offset: Tensor,
    parent: Tensor,
    leaf: Tensor,
    level_offset: Tensor,
    row: Tensor | None,
    within: Tensor | None,
    allow: bool,
) -> None:
    """The dispatcher's signature; see :func:`vstar_ops.filter_items`."""
    (requests, words), item_words, nodes = alive.shape, allowed.shape[1], len(offset) - 1
    sizes = words, item_words, nodes, len(item_offset) - 1, len(leaf)
    levels = len(level_offset) - 1
    if row is None:
        if requests == 0:
            return
        programs = min(-(-words // _WORDS["WORDS"]), _PROGRAMS)
        for level in reversed(range(levels)):
            _level.launch(
                (requests * programs,), _LEVEL_WARPS,
                alive, allowed, offset, item_offset, level_offset, level, int(level + 1 == levels), programs,
                *sizes, **_WORDS,
            )  # fmt: skip
        return
    count = row.numel()
    if count == 0:
        return
    step = 0 if within is None or len(within) == 1 else item_words
    listed = *strided(row, 2), row.shape[1], count, *strided(within, 0)[:2], step, int(allow)
    for up in range(-1, levels):  # -1: the items themselves
        _listed.launch(
            (-(-count // _BLOCK["BLOCK"]),), _WARPS,
            alive, allowed, offset, item_offset, parent, leaf, *listed, up, *sizes, **_BLOCK,
        )  # fmt: skip


@triton.jit
def _any(bits, begin, end, size, inside):
    """Whether one of the bits ``begin .. end - 1`` is set."""
    inside &= (begin >= 0) & (end <= size) & (begin < end)
    word, last = begin >> 5, (end - 1) >> 5
    found = begin < 0
    more = inside
    while tl.max(more.to(tl.int32)) > 0:
        at = word << 5
        keep = tl.where(begin > at, -1 << tl.maximum(begin - at, 0).to(tl.int32), -1)
        high = tl.minimum(tl.maximum(end - at, 1), 32).to(tl.int32)  # bits before the end
        keep &= tl.where(high < 32, (1 << (high & 31)) - 1, -1)
        found |= more & ((tl.load(bits + word, more, 0) & keep) != 0)
        word += 1
        more &= (found == 0) & (word <= last)
    return found


@triton.jit
def _lives(alive, allowed, offset, item_offset, node, nodes, leaves, items, inside):
    """Whether a node has an allowed item, or a child that is alive, by the bits of its request."""
    its_leaf = node - (nodes - leaves)
    is_leaf = inside & (its_leaf >= 0)
    begin = tl.load(item_offset + its_leaf, is_leaf, 0).to(tl.int64)
    end = tl.load(item_offset + its_leaf + 1, is_leaf, 0).to(tl.int64)
    found = _any(allowed, begin, end, items, is_leaf)
    inner = inside & (its_leaf < 0)
    begin = tl.load(offset + node, inner, 0).to(tl.int64) + 1
    end = tl.load(offset + node + 1, inner, 0).to(tl.int64) + 1
    return found | _any(alive, begin, end, nodes, inner)


@kernel
def _listed(
    alive: I32, allowed: I32, offset: I32, item_offset: I32, parent: I32, leaf: I32, row: ADDRESS, row_type,
    r0, r1, rows, count, within: ADDRESS, within_type, within_step, allow, up, words, item_words, nodes,
    leaves, items, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    r, i, inside = at // rows, at % rows, at < count
    item = load_int(Array(row, row_type, r0, r1, 0), r, i, 0, inside, -1)
    inside &= (item >= 0) & (item < items)
    if (within_type >= 0) & (allow != 0):
        word = load_int(Array(within, within_type, within_step, 1, 0), r, item >> 5, 0, inside, 0)
        inside &= ((word >> (item & 31)) & 1) != 0
    alive, allowed = alive + r * words, allowed + r * item_words  # of each item's request
    if up < 0:
        _change(allowed, item, tl.where(inside, allow, 0) != 0, inside)
    else:
        node = tl.load(leaf + item, inside, -1).to(tl.int64)
        inside &= (node >= 0) & (node < nodes)
        for _ in range(up):
            node = tl.load(parent + node, inside, -1).to(tl.int64)
            inside &= (node >= 0) & (node < nodes)
        lives = _lives(alive, allowed, offset, item_offset, node, nodes, leaves, items, inside)
        _change(alive, node, lives, inside)


@triton.jit
def _change(bits, index, value, inside):
    """Make a bit what it should be."""
    mask = (index * 0 + 1).to(tl.int32) << (index & 31).to(tl.int32)
    word = bits + (index >> 5)
    was = (tl.load(word, inside, 0) & mask) != 0
    tl.atomic_or(word, mask, inside & value & (was == 0), sem="relaxed")
    tl.atomic_and(word, ~mask, inside & (value == 0) & was, sem="relaxed")


@kernel
def _level(
    alive: I32, allowed: I32, offset: I32, item_offset: I32, level_offset: I32, level, last, programs, words,
    item_words, nodes, leaves, items, WORDS: tl.constexpr,
):  # fmt: skip
    r, part = tl.program_id(0) // programs, tl.program_id(0) % programs
    alive += r.to(tl.int64) * words
    allowed += r.to(tl.int64) * item_words
    first = tl.load(level_offset + level)
    end = tl.minimum(tl.load(level_offset + level + 1), nodes)
    if last:  # bits past the last node are cleared
        end = words * 32
    lanes = tl.arange(0, 32)[None, :]
    for block in range((first >> 5) + part * WORDS, (end + 31) >> 5, programs * WORDS):
        word = block + tl.arange(0, WORDS)
        node = word[:, None] * 32 + lanes
        mine = (node >= first) & (node < end)
        there = mine & (node < nodes)
        lives = _lives(alive, allowed, offset, item_offset, node.to(tl.int64), nodes, leaves, items, there)
        bit = (node * 0 + 1) << lanes
        mask = tl.sum(tl.where(mine, bit, 0), 1)
        value = tl.sum(tl.where(mine & lives, bit, 0), 1)
        some = mask != 0
        differ = (tl.load(alive + word, some, 0) ^ value) & mask
        tl.atomic_or(alive + word, differ & value, (differ & value) != 0, sem="relaxed")
        tl.atomic_and(alive + word, ~(differ & ~value), (differ & ~value) != 0, sem="relaxed")


def specializations() -> Iterator[Specialization]:
    """Everything that is compiled."""
    yield Specialization("filter_items, a list", _listed, _WARPS, _BLOCK)
    yield Specialization("filter_items, a level", _level, _LEVEL_WARPS, _WORDS)
