"""The steps of beam search between two forwards of a model, for a decoder of your own.

:func:`vstar_ops.decoding.beam_search` is built of them and of :func:`vstar_ops.expand_topk`. Beams are
prefixes of one length. A model keeps each prefix that it has evaluated in a *slot*, as
:class:`vstar_ops.decoding.PrefixModel` says.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..trie import Trie
from ._checks import INTS, check, check_nodes, check_range, check_type, validating
from ._registry import REFUSED, define


class AdvancedBeams(NamedTuple):
    """The result of :func:`advance_beams`."""

    sequence: Tensor
    slot: Tensor
    token: Tensor
    evaluated: Tensor


class RowsToRun(NamedTuple):
    """The result of :func:`rows_to_run`; ``N = B * W``."""

    row: Tensor
    parent: Tensor
    token: Tensor
    place: Tensor
    num_rows: Tensor
    num_tokens: Tensor


def _advance_fake(
    parent: Tensor, token: Tensor, node: Tensor, sequence: Tensor, *_: object
) -> tuple[Tensor, ...]:
    tokens = parent.new_empty((*parent.shape, sequence.shape[2] + 1), dtype=torch.int32)
    slot = parent.new_empty(parent.shape, dtype=torch.int64)
    return tokens, slot, torch.empty_like(slot), parent.new_empty(parent.shape, dtype=torch.int32)


def _rows_fake(offset: Tensor, node: Tensor, sequence: Tensor, *_: object) -> tuple[Tensor, ...]:
    batch, width, length = sequence.shape
    beams, row = batch * width, offset.new_empty((batch, width))
    parent = offset.new_empty((beams,), dtype=torch.int64)
    token = offset.new_empty((length, beams), dtype=torch.int64)
    number = offset.new_empty((length,))
    return row, parent, token, torch.empty_like(token), number, offset.new_empty((batch,))


_advance = define(reference.advance_beams, _advance_fake)
_rows = define(reference.rows_to_run, _rows_fake)


def advance_beams(
    parent: Tensor,
    token: Tensor,
    node: Tensor,
    sequence: Tensor,
    slot: Tensor,
    *,
    evaluated: Tensor | None = None,
    row: Tensor | None = None,
    row_slot: Tensor | None = None,
) -> AdvancedBeams:
    r"""The winners of :func:`vstar_ops.expand_topk` as beams, with what a model needs to run them.

    With :math:`w = \text{parent}[b, k]`, new beam :math:`k` is beam :math:`w` and one token more:

    .. math::
        \text{sequence}'[b, k] = (\text{sequence}[b, w],\; \text{token}[b, k])

    A winner that is missing (``node`` or ``parent`` below 0, or ``parent`` no beam) is a dead beam.

    Args:
        parent, token, node: int32 or int64 ``[B, K]``, as ``expand_topk`` returns them.
        sequence: int32 or int64 ``[B, W, l]``, the tokens of the beams so far; ``l`` may be 0.
        slot: int32 or int64 ``[B, W]``, where the model keeps each beam, or its longest evaluated prefix.
        evaluated: None, or int32 or int64 ``[B, W]``, the length of that prefix (``l``).
        row, row_slot: None, or int32 or int64 ``[B, W]`` and ``[R]``: beams that have a row (not -1, nor out
            of range) have been run, and the model keeps them in ``row_slot[row]`` instead of ``slot``; see
            :func:`rows_to_run`.

    Returns:
        A named tuple of new tensors:

        - ``sequence`` int32 ``[B, K, l + 1]``, -1 in dead beams
        - ``slot`` int64 ``[B, K]``, of what has been evaluated of ``w``: the ``parent`` that a model takes;
          -1 in dead beams
        - ``token`` int64 ``[B, K]``, the ``token`` that a model takes, 0 in dead beams
        - ``evaluated`` int32 ``[B, K]``, the length of what ``slot`` holds, 0 in dead beams

        Shapes do not depend on values, and no request sees another. No gradient flows.

    Raises:
        TypeError, ValueError: an argument's type, shape or device, by name. Values of ``parent`` and ``row``
            are checked only under :func:`vstar_ops.validation`.

    Example:
        >>> winners = torch.tensor([[1, 0, -1]]), torch.tensor([[5, 6, -1]]), torch.tensor([[9, 8, -1]])
        >>> beams = vstar_ops.advance_beams(*winners, torch.tensor([[[3], [4]]]), torch.tensor([[10, 11]]))
        >>> beams.sequence.tolist(), beams.slot.tolist(), beams.token.tolist()
        ([[[4, 5], [3, 6], [-1, -1]]], [[11, 10, -1]], [[5, 6, 0]])
    """
    if (row is None) != (row_slot is None):
        names = ("row", "row_slot") if row is None else ("row_slot", "row")
        raise ValueError("{} must be given where {} is, got None".format(*names))
    given = parent, token, node, sequence, slot, evaluated, row, row_slot
    found = _advance.attempt(*given)
    if found is REFUSED:
        _check_winners(*given)
        found = _advance(parent.device, *given)
    return AdvancedBeams(*found)


def _check_winners(
    parent: Tensor,
    token: Tensor,
    node: Tensor,
    sequence: Tensor,
    slot: Tensor,
    evaluated: Tensor | None,
    row: Tensor | None,
    row_slot: Tensor | None,
) -> None:
    """What C++ may have refused, and under validation values."""
    batch, winners = check("parent", parent, (None, None), "[B, K]", INTS).shape
    device = parent.device
    for name, x in (("token", token), ("node", node)):
        check(name, x, (batch, winners), "[B, K]", INTS, device)
    beams = check("sequence", sequence, (batch, None, None), "[B, W, l]", INTS, device).shape[:2]
    check("slot", slot, beams, "[B, W]", INTS, device)
    for name, optional in (("evaluated", evaluated), ("row", row)):
        if optional is not None:
            check(name, optional, beams, "[B, W]", INTS, device)
    if row_slot is not None:
        check("row_slot", row_slot, (None,), "[R]", INTS, device)
    if validating():
        check_range("parent", parent, beams[1])
        if row is not None and row_slot is not None:
            check_range("row", row, len(row_slot))


def rows_to_run(trie: Trie, node: Tensor, sequence: Tensor, slot: Tensor, evaluated: Tensor) -> RowsToRun:
    """What a model must run before beams are expanded, where forced tokens are not run.

    The log-probability of a single legal child is 0 under ``normalize="legal"``, by any finite logit, so its
    parent needs no forward. A beam with several children that has not been evaluated gets a *row*; rows are
    numbered in the order of ``(b, w)``. What a row lacks is run one token after the other, since its shorter
    prefixes may have been skipped too: ``parent[i]`` is the slot of its longest evaluated prefix, and
    in stage ``s``, ``0 <= s < l``, the rows ``place[s, : num_rows[s]]`` are appended their tokens of position
    ``s``, ``token[s, : num_rows[s]]``. All rows take part in the last stage.

    Args:
        trie: the catalogue.
        node: int32 or int64 ``[B, W]``, the trie node of each beam; whatever is not a node has no row.
        sequence: int32 or int64 ``[B, W, l]``, the tokens of the beams.
        slot, evaluated: int32 or int64 ``[B, W]``, the slot of the longest evaluated prefix of each beam, and
            its length, 0 to ``l``, as :func:`advance_beams` returns them.

    Returns:
        A named tuple:

        - ``row`` int32 ``[B, W]``: the row of each beam, -1 for none, as ``expand_topk`` takes it
        - ``parent`` int64 ``[N]``; -1 behind the last row
        - ``token``, ``place`` int64 ``[l, N]``; 0 and -1 behind those of a stage
        - ``num_rows`` int32 ``[l]``: rows of each stage. All that a decoder must read on the host.
        - ``num_tokens`` int32 ``[B]``: tokens that the model runs for each request

        The order is fixed, on any backend and number of threads. No gradient flows.

    Raises:
        TypeError, ValueError: an argument's type, shape or device, by name. Values of ``node`` are checked
            only under :func:`vstar_ops.validation`.

    Example:
        >>> trie = Trie.from_sequences([[0, 3, 1], [0, 3, 2], [7, 3, 1]])  # only (0, 3) has two children
        >>> beams, nothing = torch.tensor([[[0, 3], [7, 3]]]), torch.tensor([[0, 0]])
        >>> rows = vstar_ops.rows_to_run(trie, trie.lookup(beams), beams, slot=nothing, evaluated=nothing)
        >>> rows.row.tolist(), rows.num_rows.tolist(), rows.token[:, 0].tolist()
        ([[0, -1]], [1, 1], [0, 3])
    """
    check_type("trie", trie, Trie)
    given = trie.offset, node, sequence, slot, evaluated
    found = _rows.attempt(*given)
    if found is REFUSED:
        device = trie.device
        beams = check("node", node, (None, None), "[B, W]", INTS, device).shape
        check("sequence", sequence, (*beams, None), "[B, W, l]", INTS, device)
        check("slot", slot, beams, "[B, W]", INTS, device)
        check("evaluated", evaluated, beams, "[B, W]", INTS, device)
        if validating():
            check_nodes(node, trie)
        found = _rows(device, *given)
    return RowsToRun(*found)
