"""``prefix_tree``: the numbering of ``sibling_advantage``, then a program a block of a request's candidates.

A program looks, level by level, for the first candidate of each of its candidates' nodes; where that is the
candidate itself it writes the node, so every slot has one writer. The slots past the last node are cleared by
all programs of the request, each a share. Two launches. The one workspace, int32 ``[2 + L, B, G]``, is the
numbering's and holds the size of every candidate's nodes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._specialization import OPTIONS, Specialization
from .sibling_advantage import number_prefixes

_OWN, _OTHERS, _SLOTS = 32, 16, 128  # candidates a program; rows of a tile; slots looked at together


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
    workspace = tokens.new_empty(2 + length, batch, group, dtype=torch.int32)
    members = workspace[2:].view(tokens.shape)
    number_prefixes(tokens, mask, workspace[0], workspace[1], node, members)
    blocks = triton.cdiv(group, _OWN)
    _prefix_tree[(batch * blocks,)](
        tokens, node, members, parent, token, depth, first, count, size, group, length, blocks,
        *tokens.stride(), OWN=_OWN, OTHERS=_OTHERS, SLOTS=_SLOTS, num_warps=1, **OPTIONS,
    )  # fmt: skip
    return parent, token, depth, first, count, node, size


@triton.jit(do_not_specialize=["group", "length", "blocks", "t0", "t1", "t2"])
def _prefix_tree(
    tokens, node, members, parent, token, depth, first, count, size, group, length, blocks, t0, t1, t2,
    OWN: tl.constexpr, OTHERS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    b = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    g = block.to(tl.int64) * OWN + tl.arange(0, OWN)
    base = b * group * length
    for level in range(0, length):
        here = base + g * length + level
        own = tl.load(node + here, g < group, -1)
        least = tl.full((OWN,), 2147483647, tl.int32)
        for start in range(0, group, OTHERS):
            j = start + tl.arange(0, OTHERS)
            other = tl.load(node + base + j.to(tl.int64) * length + level, j < group, -2)
            same = other[:, None] == own[None, :]
            least = tl.minimum(least, tl.min(tl.where(same, j[:, None], 2147483647), 0))
        stands = (own >= 0) & (least == g)
        slot = base + own
        above = tl.full((OWN,), -1, tl.int32)
        if level > 0:
            above = tl.load(node + here - 1, g < group, -1)
        tl.store(parent + slot, above, stands)
        tl.store(token + slot, tl.load(tokens + b * t0 + g * t1 + level * t2, g < group, 0), stands)
        tl.store(depth + slot, tl.zeros((OWN,), tl.int32) + level + 1, stands)
        tl.store(first + slot, least, stands)
        tl.store(count + slot, tl.load(members + here, g < group, 0), stands)

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
    outputs = ("node", "members", "parent", "depth", "first", "count", "size")
    constants = {"OWN": _OWN, "OTHERS": _OTHERS, "SLOTS": _SLOTS}
    for width, tokens in {"int32": "*i32", "int64": "*i64"}.items():
        types = {**dict.fromkeys(outputs, "*i32"), "tokens": tokens, "token": tokens}
        yield Specialization(f"prefix_tree {width} tokens", _prefix_tree, types, constants, 1)
