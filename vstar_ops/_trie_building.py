"""How the arrays of a trie are made: of any rows by one sort, of a trie and a few more rows by a merge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

INT32_MAX = 2**31 - 1


class Arrays(NamedTuple):
    """The fields of :class:`vstar_ops.Trie`, on the CPU."""

    offset: np.ndarray
    token: np.ndarray
    item_offset: np.ndarray
    item_ids: np.ndarray
    level_offset: tuple[int, ...]

    @property
    def edges(self) -> list[np.ndarray]:
        """The tokens of each level's nodes."""
        return [self.token[a - 1 : b - 1] for a, b in zip(self.level_offset[1:], self.level_offset[2:])]

    def columns(self) -> list[np.ndarray]:
        """The rows of all items, sorted, as ``L`` columns ``[N]``."""
        starts = self.item_offset[:-1]  # the first item of every node of a level
        found = [np.repeat(self.edges[-1], np.diff(self.item_offset))]
        for depth in reversed(range(1, len(self.edges))):
            first, end = self.level_offset[depth : depth + 2]
            starts = starts[self.offset[first:end] + 1 - self.level_offset[depth + 1]]
            count = np.diff(np.append(starts, len(self.item_ids)))
            found.append(np.repeat(self.edges[depth - 1], count))
        return found[::-1]


def build(columns: Sequence[np.ndarray], item_ids: np.ndarray) -> Arrays:
    """Of sorted rows, given as columns ``[N]``."""
    num = len(item_ids)
    starts = np.zeros(1, np.int32)  # the first row of each node of the level above
    fresh = np.zeros(num, bool)  # whether a row begins a new prefix of the depth at hand
    fresh[:1] = True
    tokens: list[np.ndarray] = []
    offsets: list[np.ndarray] = []
    level_offset = [0, 1]
    for column in columns:
        fresh[1:] |= column[1:] != column[:-1]
        children = np.flatnonzero(fresh).astype(np.int32)
        tokens.append(column[children].astype(np.int32))
        first_edge = level_offset[-1] - 1
        if num:
            offsets.append((np.searchsorted(children, starts) + first_edge).astype(np.int32))
        else:
            offsets.append(np.full(level_offset[-1] - level_offset[-2], first_edge, np.int32))
        level_offset.append(level_offset[-1] + len(children))
        starts = children
    edges = level_offset[-1] - 1
    offsets.append(np.full(level_offset[-1] - level_offset[-2] + 1, edges, np.int32))
    item_offset = np.append(starts if num else starts[:0], num).astype(np.int32)
    return Arrays(np.concatenate(offsets), np.concatenate(tokens), item_offset, item_ids, tuple(level_offset))


def merged(arrays: Arrays, rows: np.ndarray, item_ids: np.ndarray) -> Arrays:
    """With more rows ``[M, L]``, in any order; of equal ones those of ``arrays`` come first."""
    order = lexicographic_order(rows)
    columns, rows = arrays.columns(), rows[order]
    low, high = np.zeros(len(rows), np.int64), np.full(len(rows), len(arrays.item_ids))
    for column, wanted in zip(columns, rows.T):  # the items that begin as each row does
        low, high = (_bound(column, low, high, wanted, above) for above in (False, True))
    columns = [np.insert(old, high, new) for old, new in zip(columns, rows.T)]
    return build(columns, np.insert(arrays.item_ids, high, item_ids[order]))


def without(arrays: Arrays, item_ids: np.ndarray) -> Arrays:
    """Without all items of some ids.

    Raises:
        ValueError: there is no such item.
    """
    gone = np.isin(arrays.item_ids, item_ids)
    unknown = np.setdiff1d(item_ids, arrays.item_ids[gone])
    if len(unknown):
        raise ValueError(f"item_ids must be ids of the trie's items, got {unknown[0]}, which is none")
    return build([column[~gone] for column in arrays.columns()], arrays.item_ids[~gone])


def _bound(
    column: np.ndarray, low: np.ndarray, high: np.ndarray, wanted: np.ndarray, above: bool
) -> np.ndarray:
    """The places of ``wanted[M]`` in the sorted parts ``low[M] .. high[M]`` of a column, below or above what
    is equal."""
    while (searched := low < high).any():
        middle = (low + high) // 2
        value = column[np.where(searched, middle, 0)]
        right = searched & ((value <= wanted) if above else (value < wanted))
        low, high = np.where(right, middle + 1, low), np.where(searched & ~right, middle, high)
    return low


def catalogue(sequences: Any) -> np.ndarray:
    """Rows ``[N, L]`` of legal tokens.

    Raises:
        TypeError: values are not integers.
        ValueError: wrong shape, a negative or too large token.
    """
    rows = integers("sequences", sequences)
    if rows.ndim != 2 or rows.shape[1] == 0:
        raise ValueError(f"sequences must have the shape [N, L] with L >= 1, got {list(rows.shape)}")
    if len(rows) and (low := int(rows.min())) < 0:
        raise ValueError(f"sequences must hold tokens >= 0, got {low}")
    if len(rows) and (high := int(rows.max())) > INT32_MAX - 1:
        raise ValueError(f"sequences must hold tokens < 2^31 - 1, got {high}")
    return rows.astype(np.int64) if rows.dtype == np.uint64 else rows  # which does not mix with int64


def check_size(num: int, length: int) -> None:
    """Raise if nodes could not be numbered in 31 bits."""
    if num * length >= INT32_MAX:
        raise ValueError(f"sequences must hold fewer than 2^31 - 1 tokens in all, got {num} x {length}")


def ids(item_ids: Any, num: int) -> np.ndarray:
    """Item ids int64 ``[N]``.

    Raises:
        TypeError, ValueError: they are not integers of the right shape, -1, or do not fit in int64.
    """
    given = integers("item_ids", item_ids)
    if given.shape != (num,):
        raise ValueError(f"item_ids must have the shape [N] = [{num}], got {list(given.shape)}")
    if num and (largest := int(given.max())) >= 2**63:
        raise ValueError(f"item_ids must fit in int64, got {largest}")
    if (given == -1).any():
        raise ValueError("item_ids must not hold -1, which stands for no item")
    return given.astype(np.int64)


def integers(name: str, value: Any) -> np.ndarray:
    """``value`` as a NumPy integer array, without a copy where it is one already."""
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise ValueError(
            f"{name} must be rectangular, got rows of different lengths; short items end with an end token"
        ) from error
    if array.size == 0 and not isinstance(value, np.ndarray):
        array = array.astype(np.int64)
    if array.dtype.kind not in "iu":
        exact = np.asarray(value, object)  # integers of more than 64 bits are floats or objects in NumPy
        wide = [x for x in exact.flat if type(x) is int and not -(2**63) <= x < 2**63]
        if wide:
            raise ValueError(f"{name} must fit in int64, got {wide[0]}")
        raise TypeError(f"{name} must be integers, got {array.dtype}")
    return array


def lexicographic_order(rows: np.ndarray) -> np.ndarray:
    """A stable permutation that sorts the rows, by as few 63-bit keys as their ranges allow."""
    num, length = rows.shape
    if num == 0:
        return np.zeros(0, np.int64)
    keys: list[np.ndarray] = []
    bits_left = 0
    for depth in range(length):
        column = rows[:, depth]
        low = int(column.min())
        bits = (int(column.max()) - low).bit_length()
        if not keys or bits > bits_left:
            keys.append(np.zeros(num, np.int64))
            bits_left = 63
        keys[-1] <<= bits
        keys[-1] |= column.astype(np.int64) - low if low else column
        bits_left -= bits
    return np.argsort(keys[0], kind="stable") if len(keys) == 1 else np.lexsort(keys[::-1])


def is_trie(arrays: dict[str, Tensor], levels: tuple[int, ...], max_children: int) -> bool:
    """Whether the arrays of a file, by name, form a trie."""
    offset, token = arrays["offset"].numpy(), arrays["token"].numpy()
    items, ids = arrays["item_offset"].numpy(), arrays["item_ids"]
    fanout = np.diff(offset)
    inner, edges = levels[-2], len(token)
    rising = np.diff(token) > 0
    rising[offset[1:inner][offset[1:inner] < edges] - 1] = True  # a new parent may begin anywhere
    return bool(
        levels[:2] == (0, 1)
        and all(a <= b for a, b in zip(levels, levels[1:]))
        and levels[-2] <= len(token) + 1
        and all(offset[level] == nxt - 1 for level, nxt in zip(levels[:-2], levels[1:-1]))
        and np.all(fanout[:inner] > 0) | (edges == 0)
        and np.all(offset[inner:] == edges)
        and int(fanout.max()) == max_children
        and np.all(token >= 0)
        and np.all(rising)
        and items[0] == 0
        and items[-1] == ids.numel()
        and np.all(np.diff(items) > 0)
        and ids.numpy().dtype == np.int64
    )
