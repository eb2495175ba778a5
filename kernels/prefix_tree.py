"""``prefix_tree``: the numbering of ``sibling_advantage``, then one program per block of candidates.

A program looks, level by level, for the first candidate of each of its candidates' nodes; where that is the
candidate itself it writes the node, so every slot has one writer. The slots past the last node are cleared by
all programs of the request, each a share. Two launches, and more for a mask of tokens. Workspace: the size of
every candidate's nodes, int32 ``[B, G, L]``, and what the numbering needs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton.language as tl
from torch import Tensor

from ._kernel import ANY, I32, Specialization, kernel
from .sibling_advantage import number_prefixes

# Candidates per program; candidates that they are compared with together; slots that are cleared together.
_BLOCK = 32
_TILE = {"BLOCK": _BLOCK, "CHUNK": 16, "SLOTS": 128}


def prefix_tree(
    tokens: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The dispatcher's signature; see :func:`vstar_ops.prefix_tree`."""
    batch, group, length = tokens.shape
    token = tokens.new_empty(batch, group * length)
    parent, depth, first, count = (torch.empty_like(token, dtype=torch.int32) for _ in range(4))
    node = tokens.new_empty(tokens.shape, dtype=torch.int32)
    if not tokens.numel():
        return parent, token, depth, first, count, node, tokens.new_zeros(batch, dtype=torch.int32)
    size = tokens.new_empty(batch, dtype=torch.int32)
    members = torch.empty_like(node)
    number_prefixes(tokens, mask, node, members)
    blocks = -(-group // _BLOCK)
    _prefix_tree.launch(
        (batch * blocks,), 1,
        tokens, *tokens.stride(), node, members, parent, token, depth, first, count, size, group, length,
        blocks, **_TILE,
    )  # fmt: skip
    return parent, token, depth, first, count, node, size


@kernel
def _prefix_tree(
    tokens: ANY, t0, t1, t2, node: I32, members: I32, parent: I32, token: ANY, depth: I32, first: I32,
    count: I32, size: I32, group, length, blocks, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    SLOTS: tl.constexpr,
):  # fmt: skip
    b = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    g = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    base = b * group * length
    for level in range(0, length):
        at = base + g * length + level
        prefix = tl.load(node + at, g < group, -1)
        earliest = tl.full((BLOCK,), 2147483647, tl.int32)
        for start in range(0, group, CHUNK):
            j = start + tl.arange(0, CHUNK)
            other = tl.load(node + base + j.to(tl.int64) * length + level, j < group, -2)
            same = other[:, None] == prefix[None, :]
            earliest = tl.minimum(earliest, tl.min(tl.where(same, j[:, None], 2147483647), 0))
        is_first = (prefix >= 0) & (earliest == g)
        slot = base + prefix
        parent_slot = tl.full((BLOCK,), -1, tl.int32)
        if level > 0:
            parent_slot = tl.load(node + at - 1, g < group, -1)
        tl.store(parent + slot, parent_slot, is_first)
        tl.store(token + slot, tl.load(tokens + b * t0 + g * t1 + level * t2, g < group, 0), is_first)
        tl.store(depth + slot, tl.zeros((BLOCK,), tl.int32) + level + 1, is_first)
        tl.store(first + slot, earliest, is_first)
        tl.store(count + slot, tl.load(members + at, g < group, 0), is_first)

    slots = tl.arange(0, SLOTS).to(tl.int64)
    capacity = group * length
    highest = tl.full((SLOTS,), -1, tl.int32)
    for start in range(0, capacity, SLOTS):
        highest = tl.maximum(highest, tl.load(node + base + start + slots, start + slots < capacity, -1))
    used = tl.max(highest, 0) + 1
    if block == 0:
        tl.store(size + b, used)
    nothing = tl.full((SLOTS,), -1, tl.int32)
    for start in range(block * SLOTS, capacity, blocks * SLOTS):
        slot = start + slots
        unused = (slot >= used) & (slot < capacity)
        tl.store(parent + base + slot, nothing, unused)
        tl.store(token + base + slot, nothing, unused)
        tl.store(depth + base + slot, nothing + 1, unused)
        tl.store(first + base + slot, nothing, unused)
        tl.store(count + base + slot, nothing + 1, unused)


def specializations() -> Iterator[Specialization]:
    """Everything that is compiled."""
    for width, tokens in {"int32": "*i32", "int64": "*i64"}.items():
        types = {"tokens": tokens, "token": tokens}
        yield Specialization(f"prefix_tree {width} tokens", _prefix_tree, 1, _TILE, types)
