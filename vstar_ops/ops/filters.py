"""``filter_items``: allow or ban items of a catalogue; the bits of all nodes above them follow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..reference.filters import num_words
from ..trie import Trie
from ._checks import INTS, check, check_type
from ._registry import define


@dataclass
class ItemFilter:
    """Which items of a catalogue are allowed, for all requests (``R = 1``) or for each of ``R = B``.

    Attributes:
        alive: int32 ``[R, words]``. Bit ``n & 31`` of word ``n >> 5`` says that an allowed item lies at or
            below node ``n``. ``words = (num_nodes + 31) // 32 + 1``; bits past the last node are 0.
        allowed: int32 ``[R, words]``, the same of the items, in the order of ``trie.item_ids``.
    """

    alive: Tensor
    allowed: Tensor


class _Links(NamedTuple):
    """How to go up in a trie: the parent of each node, the leaf of each item, where levels begin."""

    parent: Tensor
    leaf: Tensor
    level_offset: Tensor


def _links(trie: Trie) -> _Links:
    """Made at the first use, 4 bytes per node and per item."""
    trie = trie.unrestricted
    if trie._links is None:
        child = torch.arange(trie.num_nodes, dtype=torch.int32, device=trie.device)
        inner, edges = trie.level_offset[-2], trie.token.numel()
        number = (trie.offset[1 : inner + 1] - trie.offset[:inner]).long()
        parent = torch.repeat_interleave(child[:inner], number, output_size=edges)
        number = (trie.item_offset[1:] - trie.item_offset[:-1]).long()
        leaf = torch.repeat_interleave(child[inner:], number, output_size=trie.num_items)
        levels = torch.tensor(trie.level_offset, dtype=torch.int32, device=trie.device)
        trie._links = _Links(torch.cat([child[:1] - 1, parent]), leaf, levels)
    return trie._links


_op = define(
    reference.filter_items,
    lambda *_: None,
    mutates=("alive", "allowed"),
)


def filter_items(
    bits: ItemFilter, trie: Trie, row: Tensor | None, *, allow: bool, within: Tensor | None = None
) -> None:
    r"""Allow or ban items, in place; what :meth:`vstar_ops.RestrictedTrie.update` calls.

    A leaf is alive while any of its items is allowed, a node while any of its children is alive:
    :math:`a_n = \bigvee_{c} a_c`. Only nodes above listed items are computed, level by level from the leaves
    up; no count is kept. Bits that do not change are written by nobody.

    Args:
        bits: ``alive`` and ``allowed`` change, and must belong together before the call.
        trie: the catalogue.
        row: int32 or int64 ``[R, M]``, positions in ``trie.item_ids``. Whatever is none (-1, or out of range)
            is skipped, and one may come several times. None computes ``alive`` of all nodes from
            ``allowed``, which then does not change.
        allow: whether the listed items become allowed, or banned.
        within: int32 ``[1, words]`` or ``[R, words]``, bits as ``allowed``: items outside are not allowed,
            whoever asks.

    The result is the same for any number of threads, and the host waits for nothing.

    Raises:
        TypeError, ValueError: an argument's type, shape or device, by name.

    Example:
        >>> trie = Trie.from_sequences([[0, 3], [0, 4], [2, 3]])
        >>> bits = vstar_ops.ItemFilter(torch.zeros(1, 2).int(), torch.zeros(1, 2).int())
        >>> vstar_ops.filter_items(bits, trie, torch.tensor([[1]]), allow=True)
        >>> f"{bits.alive[0, 0]:06b}"  # the nodes 4, 1 and 0
        '010011'
    """
    check_type("trie", trie, Trie)
    check_type("bits", bits, ItemFilter)
    words, int32 = num_words(trie.num_nodes), (torch.int32,)
    alive = check("bits.alive", bits.alive, (None, words), f"[R, {words}]", int32, trie.device)
    requests, words = alive.shape[0], num_words(trie.num_items)
    check("bits.allowed", bits.allowed, (requests, words), "[R, words]", int32, trie.device)
    for name, x in (("alive", alive), ("allowed", bits.allowed)):
        if not x.is_contiguous():
            raise ValueError(f"bits.{name} must be contiguous, got the strides {list(x.stride())}")
    if row is not None:
        check("row", row, (requests, None), "[R, M]", INTS, trie.device)
    if within is not None:
        shape = (1 if isinstance(within, Tensor) and len(within) == 1 else requests, words)
        within = check("within", within, shape, "[1 or R, words]", int32, trie.device).contiguous()
    if not isinstance(allow, bool):
        raise TypeError(f"allow must be a bool, got {type(allow).__name__}")
    arrays = trie.offset, trie.item_offset, *_links(trie)
    _op(trie.device, alive, bits.allowed, *arrays, row, within, allow)
