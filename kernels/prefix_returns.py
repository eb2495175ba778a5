"""``prefix_returns``: the numbering of ``sibling_advantage``, then a program a candidate and level.

A program whose candidate is not the first of its bucket ends at once. The others add up the embeddings of
their bucket in float64, in candidate order within fixed tiles, 64 numbers at a time, and write the result to
all of its members. Two launches; every embedding is read once a level. The one workspace is the numbering's.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._array import array, load_int
from ._specialization import FLOATS, OPTIONS, Specialization
from .sibling_advantage import number_prefixes

_ROWS, _COLUMNS, _MEMBERS = 16, 64, 128  # of a tile of embeddings; candidates looked at together


def prefix_returns(
    tokens: Tensor,
    embedding: Tensor,
    target: Tensor,
    target_embedding: Tensor,
    mask: Tensor | None,
    weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The dispatcher's signature; see :func:`vstar_ops.prefix_returns`."""
    batch, group, length = tokens.shape
    returns, similarity = (torch.empty(tokens.shape, device=tokens.device) for _ in range(2))
    node, count = (torch.empty(tokens.shape, dtype=torch.int32, device=tokens.device) for _ in range(2))
    if tokens.numel():
        workspace = torch.empty(2, batch, group, dtype=torch.int32, device=tokens.device)
        number_prefixes(tokens, mask, workspace[0], workspace[1], node, count)
        _prefix_returns[(batch * group, length)](
            *array(tokens), embedding, *array(target), target_embedding, weights, node, returns, similarity,
            group, length, embedding.shape[2], *tokens.stride(), *embedding.stride(), *target.stride(),
            *target_embedding.stride(), weights.stride(0),
            ROWS=_ROWS, COLUMNS=_COLUMNS, MEMBERS=_MEMBERS, num_warps=1, **OPTIONS,
        )  # fmt: skip
    return returns, similarity, node, count


@triton.jit(
    do_not_specialize=[
        "tokens", "tokens_type", "target", "target_type", "group", "length", "width", "t0", "t1", "t2", "e0",
        "e1", "y0", "y1", "z0", "z1", "weight_stride",
    ]
)  # fmt: skip
def _prefix_returns(
    tokens: tl.int64, tokens_type, embedding, target: tl.int64, target_type, target_embedding, weights, node,
    returns, similarity, group, length, width, t0, t1, t2, e0, e1, e2, y0, y1, z0, z1, weight_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, MEMBERS: tl.constexpr,
):  # fmt: skip
    row, depth = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, g = row // group, row % group
    node += b * group * length + depth
    own = tl.load(node + g * length)
    members = tl.arange(0, MEMBERS).to(tl.int64)
    earlier = 0
    for start in range(0, g, MEMBERS):
        j = start + members
        earlier += tl.sum((tl.load(node + j * length, j < g, -2) == own).to(tl.int32), 0)

    if (own >= 0) & (earlier == 0):
        square = tl.zeros((), tl.float64)
        dot = tl.zeros((), tl.float64)
        target_square = tl.zeros((), tl.float64)
        for column in range(0, width, COLUMNS):
            e = column + tl.arange(0, COLUMNS).to(tl.int64)
            total = tl.zeros((COLUMNS,), tl.float64)
            for first in range(0, group, ROWS):
                j = first + tl.arange(0, ROWS).to(tl.int64)
                same = tl.load(node + j * length, j < group, -2) == own
                at = embedding + b * e0 + j[:, None] * e1 + e[None, :] * e2
                item = tl.load(at, same[:, None] & (e < width)[None, :], 0.0)
                total += tl.sum(item.to(tl.float64), 0)
            wanted = tl.load(target_embedding + b * z0 + e * z1, e < width, 0.0).to(tl.float64)
            square += tl.sum(total * total, 0)
            dot += tl.sum(total * wanted, 0)
            target_square += tl.sum(wanted * wanted, 0)
        norm = tl.sqrt(square) * tl.sqrt(target_square)
        cosine = tl.where(norm == 0, 0.0, dot / norm).to(tl.float32)

        missed = 0
        for level in range(0, depth + 1):
            token = load_int(tokens, tokens_type, b * t0 + g * t1 + level * t2, True, 0)
            missed += (token != load_int(target, target_type, b * y0 + level * y1, True, 0)).to(tl.int32)
        weight = tl.load(weights + depth * weight_stride)
        result = tl.where(missed == 0, weight, -weight * (1.0 - cosine.to(tl.float64))).to(tl.float32)
        _store(returns, similarity, node, b, depth, own, result, cosine, group, length, MEMBERS)
    elif own < 0:
        at = row * length + depth
        tl.store(returns + at, 0.0)
        tl.store(similarity + at, 0.0)


@triton.jit
def _store(returns, similarity, node, b, depth, own, result, cosine, group, length, MEMBERS: tl.constexpr):
    """Write a bucket's result to all of its members."""
    for start in range(0, group, MEMBERS):
        j = start + tl.arange(0, MEMBERS).to(tl.int64)
        same = tl.load(node + j * length, j < group, -2) == own
        at = (b * group + j) * length + depth
        tl.store(returns + at, tl.zeros((MEMBERS,), tl.float32) + result, same)
        tl.store(similarity + at, tl.zeros((MEMBERS,), tl.float32) + cosine, same)


def specializations() -> Iterator[Specialization]:
    """Everything that is compiled for embeddings whose last stride is 1."""
    constants = {"ROWS": _ROWS, "COLUMNS": _COLUMNS, "MEMBERS": _MEMBERS, "e2": 1}
    types = {"weights": "*fp64", "node": "*i32", "returns": "*fp32", "similarity": "*fp32"}
    types |= {"tokens": "i64", "target": "i64"}
    for dtype, floats in FLOATS.items():
        given = {**types, "embedding": floats, "target_embedding": floats}
        yield Specialization(f"prefix_returns {dtype}", _prefix_returns, given, constants, 1)
