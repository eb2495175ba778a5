"""The edges of a trie's nodes; see csrc/common/trie.h."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def edges(offset, node, num_nodes, num_edges):
    """First edge and one past the last of a node; none for what is not a node, and in a damaged trie."""
    valid = (node >= 0) & (node < num_nodes)
    begin = tl.load(offset + node, valid, 0)
    end = tl.load(offset + node + 1, valid, 0)
    sound = (begin >= 0) & (end <= num_edges) & (begin <= end)
    return tl.where(sound, begin, 0), tl.where(sound, end, 0)
