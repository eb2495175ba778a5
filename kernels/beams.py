"""The steps of beam search between two forwards, each one launch without a workspace.

``advance_beams`` takes one program per block of tokens of the new beams; the thread of a beam's last token
writes what else the beam has. In ``rows_to_run`` one program numbers the rows of all requests, one per stage
makes its list, block by block, and one per request counts the tokens that it costs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._array import Array, load_int, strided
from ._kernel import ADDRESS, I32, I64, Specialization, kernel

_BLOCK, _WARPS = {"BLOCK": 256}, 2
_ROWS, _ROW_WARPS = {"BLOCK": 512}, 4


def advance_beams(
    parent: Tensor,
    token: Tensor,
    node: Tensor,
    sequence: Tensor,
    slot: Tensor,
    evaluated: Tensor | None,
    row: Tensor | None,
    row_slot: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The dispatcher's signature; see :func:`vstar_ops.advance_beams`."""
    (batch, beams), (_, width, length) = parent.shape, sequence.shape
    tokens = parent.new_empty(batch, beams, length + 1, dtype=torch.int32)
    its_evaluated = parent.new_empty(batch, beams, dtype=torch.int32)
    its_slot, its_token = (torch.empty_like(its_evaluated, dtype=torch.int64) for _ in range(2))
    if tokens.numel():
        _advance_beams.launch(
            (-(-tokens.numel() // _BLOCK["BLOCK"]),), _WARPS,
            *strided(parent, 2), *strided(token, 2), *strided(node, 2), *strided(sequence, 3),
            *strided(slot, 2), *strided(evaluated, 2), *strided(row, 2), *strided(row_slot, 1), tokens,
            its_slot, its_token, its_evaluated, batch, beams, width, length,
            0 if row_slot is None else len(row_slot), **_BLOCK,
        )  # fmt: skip
    return tokens, its_slot, its_token, its_evaluated


@kernel
def _advance_beams(
    parent: ADDRESS, parent_type, p0, p1, token: ADDRESS, token_type, t0, t1, node: ADDRESS, node_type, n0,
    n1, sequence: ADDRESS, sequence_type, q0, q1, q2, slot: ADDRESS, slot_type, s0, s1, evaluated: ADDRESS,
    evaluated_type, e0, e1, row: ADDRESS, row_type, r0, r1, row_slot: ADDRESS, row_slot_type, x0,
    out_sequence: I32, out_slot: I64, out_token: I64, out_evaluated: I32, batch, beams, width, length, rows,
    BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    beam, i = at // (length + 1), at % (length + 1)
    b, k, inside = beam // beams, beam % beams, beam < batch.to(tl.int64) * beams
    w = load_int(Array(parent, parent_type, p0, p1, 0), b, k, 0, inside, -1)
    its_node = load_int(Array(node, node_type, n0, n1, 0), b, k, 0, inside, -1)
    live = inside & (its_node >= 0) & (w >= 0) & (w < width)
    own = load_int(Array(token, token_type, t0, t1, 0), b, k, 0, live, -1)
    above = load_int(Array(sequence, sequence_type, q0, q1, q2), b, w, i, live & (i < length), -1)
    tl.store(out_sequence + at, tl.where(i < length, above, own).to(tl.int32), inside)

    last = inside & (i == length)
    its_row = load_int(Array(row, row_type, r0, r1, 0), b, w, 0, live & last, -1)
    has_row = (its_row >= 0) & (its_row < rows)
    its_slot = load_int(Array(slot, slot_type, s0, s1, 0), b, w, 0, live & last, -1)
    from_row = load_int(Array(row_slot, row_slot_type, x0, 0, 0), its_row, 0, 0, has_row, -1)
    known = load_int(Array(evaluated, evaluated_type, e0, e1, 0), b, w, 0, live & last, 0)
    if evaluated_type < 0:
        known = tl.where(live, length, 0).to(tl.int64)
    tl.store(out_slot + beam, tl.where(has_row, from_row, its_slot), last)
    tl.store(out_evaluated + beam, tl.where(has_row, length, known).to(tl.int32), last)
    tl.store(out_token + beam, tl.where(live, own, 0), last)


def rows_to_run(
    offset: Tensor, node: Tensor, sequence: Tensor, slot: Tensor, evaluated: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The dispatcher's signature; see :func:`vstar_ops.rows_to_run`."""
    batch, width, length = sequence.shape
    row, num_rows, num_tokens = (offset.new_empty(*size) for size in ((batch, width), (length,), (batch,)))
    parent = offset.new_empty(batch * width, dtype=torch.int64)
    token, place = (parent.new_empty(length, batch * width) for _ in range(2))
    _rows_to_run.launch(
        (1 + length + batch,), _ROW_WARPS,
        offset, *strided(node, 2), *strided(sequence, 3), *strided(slot, 2), *strided(evaluated, 2), row,
        parent, token, place, num_rows, num_tokens, len(offset) - 1, batch, width, length, **_ROWS,
    )  # fmt: skip
    return row, parent, token, place, num_rows, num_tokens


@triton.jit
def _missing(offset, num_nodes, node, evaluated, b, w, length, inside):
    """The first length that is missing of a beam that has a row; ``length`` for one that has none."""
    n = load_int(node, b, w, 0, inside, -1)
    live = (n >= 0) & (n < num_nodes)
    children = tl.load(offset + n + 1, live, 0) - tl.load(offset + n, live, 0)
    known = tl.minimum(tl.maximum(load_int(evaluated, b, w, 0, live, 0), 0), length)
    return tl.where(children > 1, known, length).to(tl.int32)


@triton.jit
def _stage(
    offset, num_nodes, node, evaluated, sequence, token, place, stage, beams, width, length,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the list of a stage; returns how many rows it has."""
    rows = beams.to(tl.int32) * 0
    found = rows
    for start in range(0, beams, BLOCK):
        i = start + tl.arange(0, BLOCK).to(tl.int64)
        b, w = i // width, i % width
        missing = _missing(offset, num_nodes, node, evaluated, b, w, length, i < beams)
        lacks, there = (missing <= stage).to(tl.int32), (missing < length).to(tl.int32)
        to = found + tl.cumsum(lacks, 0) - 1
        tl.store(token + to, load_int(sequence, b, w, stage, lacks > 0, 0), lacks > 0)
        tl.store(place + to, (rows + tl.cumsum(there, 0) - 1).to(tl.int64), lacks > 0)
        rows += tl.sum(there, 0)
        found += tl.sum(lacks, 0)
    for start in range(0, beams, BLOCK):
        i = start + tl.arange(0, BLOCK).to(tl.int64)
        unused = (i >= found) & (i < beams)
        tl.store(token + i, tl.zeros((BLOCK,), tl.int64), unused)
        tl.store(place + i, tl.full((BLOCK,), -1, tl.int64), unused)
    return found


@triton.jit
def _number(offset, num_nodes, node, evaluated, slot, row, parent, beams, width, length, BLOCK: tl.constexpr):
    """Write the row of every beam, and the slots that the rows begin with."""
    rows = beams.to(tl.int32) * 0
    for start in range(0, beams, BLOCK):
        i = start + tl.arange(0, BLOCK).to(tl.int64)
        b, w = i // width, i % width
        there = _missing(offset, num_nodes, node, evaluated, b, w, length, i < beams) < length
        mine = rows + tl.cumsum(there.to(tl.int32), 0) - 1
        tl.store(parent + mine, load_int(slot, b, w, 0, there, -1), there)
        tl.store(row + i, tl.where(there, mine, -1), i < beams)
        rows += tl.sum(there.to(tl.int32), 0)
    for start in range(0, beams, BLOCK):
        i = start + tl.arange(0, BLOCK).to(tl.int64)
        tl.store(parent + i, tl.full((BLOCK,), -1, tl.int64), (i >= rows) & (i < beams))


@triton.jit
def _tokens(offset, num_nodes, node, evaluated, b, width, length, BLOCK: tl.constexpr):
    """That the rows of a request cost."""
    tokens = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, width, BLOCK):
        w = start + tl.arange(0, BLOCK).to(tl.int64)
        tokens += length - _missing(offset, num_nodes, node, evaluated, b + w * 0, w, length, w < width)
    return tl.sum(tokens, 0)


@kernel
def _rows_to_run(
    offset: I32, node: ADDRESS, node_type, n0, n1, sequence: ADDRESS, sequence_type, q0, q1, q2,
    slot: ADDRESS, slot_type, s0, s1, evaluated: ADDRESS, evaluated_type, e0, e1, row: I32, parent: I64,
    token: I64, place: I64, num_rows: I32, num_tokens: I32, num_nodes, batch, width, length,
    BLOCK: tl.constexpr,
):  # fmt: skip
    node, evaluated = Array(node, node_type, n0, n1, 0), Array(evaluated, evaluated_type, e0, e1, 0)
    sequence, slot = Array(sequence, sequence_type, q0, q1, q2), Array(slot, slot_type, s0, s1, 0)
    part = tl.program_id(0).to(tl.int64) - 1
    beams = batch.to(tl.int64) * width
    if part >= length:
        b = part - length
        tl.store(num_tokens + b, _tokens(offset, num_nodes, node, evaluated, b, width, length, BLOCK))
    elif part >= 0:
        token += part * beams
        place += part * beams
        rows = _stage(
            offset, num_nodes, node, evaluated, sequence, token, place, part, beams, width, length, BLOCK
        )
        tl.store(num_rows + part, rows)
    else:
        _number(offset, num_nodes, node, evaluated, slot, row, parent, beams, width, length, BLOCK)


def specializations() -> Iterator[Specialization]:
    """Everything that is compiled."""
    yield Specialization("advance_beams", _advance_beams, _WARPS, _BLOCK)
    yield Specialization("rows_to_run", _rows_to_run, _ROW_WARPS, _ROWS)
