"""``prefix_returns``: the numbering of ``sibling_advantage``, then one program per candidate and level.

A program whose candidate is not the first of its bucket ends at once. The others add up the embeddings of
their bucket in float64, in candidate order within fixed tiles, 64 numbers at a time, and write the result to
all of its members. Two launches; every embedding is read once per level. Workspace: what the numbering needs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from ._array import Array, load_int, strided
from ._kernel import ADDRESS, ALIGNED, ANY, F32, F64, FLOATS, I32, Specialization, kernel
from .sibling_advantage import number_prefixes

# Rows and columns of a tile of embeddings; candidates that are compared together.
_TILE = {"ROWS": 16, "COLUMNS": 64, "MEMBERS": 128}


def prefix_returns(tokens, embedding, target, target_embedding, mask, weights):
    """The dispatcher's signature; see :func:`vstar_ops.prefix_returns`."""
    batch, group, length = tokens.shape
    returns = torch.empty(batch, group, length, device=tokens.device)
    node = torch.empty_like(returns, dtype=torch.int32)
    similarity, count = torch.empty_like(returns), torch.empty_like(node)
    if tokens.numel():
        number_prefixes(tokens, mask, node, count)
        _prefix_returns.launch(
            (batch * group, length), 1,
            *strided(tokens, 3), *strided(target, 2), embedding, *embedding.stride(), target_embedding,
            *target_embedding.stride(), weights, weights.stride(0), node, returns, similarity, group, length,
            embedding.shape[2], **_TILE,
        )  # fmt: skip
    return returns, similarity, node, count


@kernel
def _prefix_returns(
    tokens: ADDRESS, tokens_type, t0, t1, t2, target: ADDRESS, target_type, y0, y1, embedding: ANY, e0, e1,
    e2: ALIGNED, target_embedding: ANY, z0, z1, weights: F64, weight_stride, node: I32, returns: F32,
    similarity: F32, group, length, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr, MEMBERS: tl.constexpr,
):  # fmt: skip
    tokens, target = Array(tokens, tokens_type, t0, t1, t2), Array(target, target_type, y0, y1, 0)
    row, depth = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, g = row // group, row % group
    node += b * group * length + depth
    prefix = tl.load(node + g * length)
    members = tl.arange(0, MEMBERS).to(tl.int64)
    earlier = 0
    for start in range(0, g, MEMBERS):
        j = start + members
        earlier += tl.sum((tl.load(node + j * length, j < g, -2) == prefix).to(tl.int32), 0)

    if (prefix >= 0) & (earlier == 0):
        square = tl.zeros((), tl.float64)
        dot = tl.zeros((), tl.float64)
        target_square = tl.zeros((), tl.float64)
        for column in range(0, width, COLUMNS):
            e = column + tl.arange(0, COLUMNS).to(tl.int64)
            total = tl.zeros((COLUMNS,), tl.float64)
            for first in range(0, group, ROWS):
                j = first + tl.arange(0, ROWS).to(tl.int64)
                same = tl.load(node + j * length, j < group, -2) == prefix
                at = embedding + b * e0 + j[:, None] * e1 + e[None, :] * e2
                item = tl.load(at, same[:, None] & (e < width)[None, :], 0.0)
                total += tl.sum(item.to(tl.float64), 0)
            target_item = tl.load(target_embedding + b * z0 + e * z1, e < width, 0.0).to(tl.float64)
            square += tl.sum(total * total, 0)
            dot += tl.sum(total * target_item, 0)
            target_square += tl.sum(target_item * target_item, 0)
        norm = tl.sqrt(square) * tl.sqrt(target_square)
        cosine = tl.where(norm == 0, 0.0, dot / norm).to(tl.float32)

        missed = 0
        for level in range(0, depth + 1):
            token = load_int(tokens, b, g, level, True, 0)
            missed += (token != load_int(target, b, level, 0, True, 0)).to(tl.int32)
        weight = tl.load(weights + depth * weight_stride)
        result = tl.where(missed == 0, weight, -weight * (1.0 - cosine.to(tl.float64))).to(tl.float32)
        _store(returns, similarity, node, b, depth, prefix, result, cosine, group, length, MEMBERS)
    elif prefix < 0:
        at = row * length + depth
        tl.store(returns + at, 0.0)
        tl.store(similarity + at, 0.0)


@triton.jit
def _store(returns, similarity, node, b, depth, prefix, result, cosine, group, length, MEMBERS: tl.constexpr):
    """Write a bucket's result to all of its members."""
    for start in range(0, group, MEMBERS):
        j = start + tl.arange(0, MEMBERS).to(tl.int64)
        same = tl.load(node + j * length, j < group, -2) == prefix
        at = (b * group + j) * length + depth
        tl.store(returns + at, tl.zeros((MEMBERS,), tl.float32) + result, same)
        tl.store(similarity + at, tl.zeros((MEMBERS,), tl.float32) + cosine, same)


def specializations() -> Iterator[Specialization]:
    """Everything that is compiled for embeddings whose last stride is 1."""
    for dtype, floats in FLOATS.items():
        types = {"embedding": floats, "target_embedding": floats}
        yield Specialization(f"prefix_returns {dtype}", _prefix_returns, 1, {**_TILE, "e2": 1}, types)
