"""The edges of a trie's nodes, and which nodes are alive; see csrc/common/trie.h."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


def filter_of(alive: Tensor | None, batch: int, stand_in: Tensor) -> tuple[Tensor, int, int]:
    """A filter as a kernel takes it: its bits, the words of a row, how many requests share one.

    Without a filter a kernel is given any int32 tensor, which it does not read.
    """
    if alive is None:
        return stand_in, 0, 1
    rows, words = alive.shape
    return alive, words, max(1, batch // max(1, rows))


@triton.jit
def is_alive(alive, node, inside):
    """Whether nodes are alive, by the bits of their request; False where not inside."""
    word = tl.load(alive + (node >> 5), inside, 0)
    return ((word >> (node & 31).to(tl.int32)) & 1) != 0


@triton.jit
def edges(offset, node, num_nodes, num_edges):
    """First edge and one past the last of a node; none for what is not a node, and in a damaged trie."""
    valid = (node >= 0) & (node < num_nodes)
    begin = tl.load(offset + node, valid, 0)
    end = tl.load(offset + node + 1, valid, 0)
    sound = (begin >= 0) & (end <= num_edges) & (begin <= end)
    return tl.where(sound, begin, 0), tl.where(sound, end, 0)
