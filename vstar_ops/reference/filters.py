"""``filter_items`` by unpacking all bits: every node is computed anew."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


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
    requests, items, nodes = len(alive), len(leaf), len(offset) - 1
    item = unpack_bits(allowed, items)
    if row is not None:
        known = torch.where((row >= 0) & (row < items), row, items).long()
        listed = item.new_zeros(requests, items + 1).scatter_(1, known, True)[:, :items]
        if allow:
            item |= listed if within is None else listed & unpack_bits(within, items)
        else:
            item &= ~listed
        allowed.copy_(pack_bits(item))
    node = torch.zeros(requests, nodes, dtype=torch.uint8, device=alive.device)
    node.scatter_reduce_(1, leaf.long().expand(requests, items), item.byte(), "amax")
    above = parent[1:].long().expand(requests, nodes - 1)
    for _ in range(len(level_offset) - 2):
        node.scatter_reduce_(1, above, node[:, 1:].clone(), "amax")
    alive.copy_(pack_bits(node))


def num_words(bits: int) -> int:
    """32-bit words for so many bits; the last one is spare, so that two words may be read anywhere."""
    return (bits + 31) // 32 + 1


def pack_bits(bits: Tensor) -> Tensor:
    """int32 ``[R, words]`` of bool ``[R, n]``: bit ``i & 31`` of word ``i >> 5``."""
    missing = num_words(bits.shape[1]) * 32 - bits.shape[1]
    bytes_of = pad(bits.byte(), (0, missing)).unflatten(1, (-1, 8))
    packed = bytes_of[..., 0].clone(memory_format=torch.contiguous_format)
    for i in range(1, 8):
        packed |= bytes_of[..., i] << i
    return packed.view(torch.int32)


def bits_at(words: Tensor, row: Tensor, index: Tensor) -> Tensor:
    """The bits ``index[...]`` of the rows ``row`` of int32 ``[R, words]``; both are broadcast."""
    return (words[row, index >> 5] >> (index & 31)) & 1 != 0


def unpack_bits(words: Tensor, n: int) -> Tensor:
    """bool ``[R, n]`` of int32 ``[R, words]``."""
    shift = torch.arange(32, dtype=torch.int32, device=words.device)
    return ((words[..., None] >> shift) & 1).bool().flatten(1)[:, :n]
