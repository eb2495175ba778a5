"""The steps of top-k sampling between two forwards of a model, for a decoder of your own.

:func:`vstar_ops.decoding.topk_sampling` is built of them and of :func:`vstar_ops.expand_topk`, which lists
the children that each distinct prefix may be continued by.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference
from ._checks import INTS, check, check_floats, check_range, check_seed, validating
from ._registry import define


class DrawnChildren(NamedTuple):
    """The result of :func:`draw_children`."""

    sequence: Tensor
    node: Tensor
    logp: Tensor
    num_valid: Tensor


class DistinctRows(NamedTuple):
    """The result of :func:`distinct_rows`; ``N = B * K``."""

    row: Tensor
    parent: Tensor
    token: Tensor
    node: Tensor
    num_rows: Tensor
    num_tokens: Tensor


def _draw_fake(logp: Tensor, token: Tensor, node: Tensor, sequence: Tensor, *_: object) -> tuple[Tensor, ...]:
    batch, candidates, length = sequence.shape
    tokens = logp.new_empty((batch, candidates, length + 1), dtype=torch.int32)
    child = logp.new_empty((batch, candidates), dtype=torch.int32)
    number = logp.new_empty((batch,), dtype=torch.int32)
    return tokens, child, torch.empty_like(child, dtype=logp.dtype), number


def _rows_fake(node: Tensor, *_: object) -> tuple[Tensor, ...]:
    batch, candidates = node.shape
    parent = node.new_empty((batch * candidates,), dtype=torch.int64)
    row = node.new_empty((batch, candidates), dtype=torch.int32)
    its_node = torch.empty_like(parent, dtype=torch.int32)
    return row, parent, torch.empty_like(parent), its_node, row.new_empty((1,)), row.new_empty((batch,))


_draw = define(reference.draw_children, _draw_fake, double=("logp",))
_rows = define(reference.distinct_rows, _rows_fake)


def draw_children(
    logp: Tensor,
    token: Tensor,
    node: Tensor,
    sequence: Tensor,
    *,
    row: Tensor | None = None,
    prefix: Tensor | None = None,
    cum_logp: Tensor | None = None,
    seed: Tensor | int = 0,
    pack: bool = False,
) -> DrawnChildren:
    r"""Draw a child for each candidate, in proportion to the probabilities in the list of its prefix.

    By the Gumbel-max trick (Gumbel, 1954): candidate :math:`k` of request :math:`b`, whose list is
    :math:`r = \text{row}[b, k]`, draws the entry

    .. math::
        c^* = \arg\max_c \; \text{logp}[r, c] + g_{b,k,c}, \quad g \sim \text{Gumbel}(0, 1)

    ties to the first. The noise is a pure function of the seed
    :math:`s_b + (k + 1) \cdot \text{0x5851F42D4C957F2D}` (in 64 bits), the candidate's prefix and the entry's
    token. The sum is float64 on every backend, so all draw the same, save where two sums differ in the last
    bits of float64.

    Args:
        logp: float32 or float64 ``[R, C]``, the lists of the prefixes, as ``expand_topk`` returns them for
            ``R`` requests of one prefix. They need not be normalized. Entries at -inf or NaN are never drawn.
            float64 is taken by the reference implementation, and the results are float64 then.
        token, node: int32 or int64 ``[R, C]``, the children. Entries with a node below 0 are never drawn.
        sequence: int32 or int64 ``[B, K, l]``, the tokens of the candidates so far; ``l`` may be 0.
        row: int32 or int64 ``[B, K]``, the list of each candidate, ``b`` for None. A candidate without one
            (-1, or out of range) is lost, as is one with nothing to draw.
        prefix: int32 or int64 ``[B, K]``, the trie node of each candidate, the root for None.
        cum_logp: float ``[B, K]``, the log-probability of each candidate (0).
        seed: int64 seeds ``[B]``, or one int for seeds derived from it and ``b``
            (:func:`vstar_ops.derive_seeds`).
        pack: whether lost candidates come last. The others keep their order.

    Returns:
        A named tuple; candidates that are lost hold -1 and -inf:

        - ``sequence`` int32 ``[B, K, l + 1]``, with the token that was drawn
        - ``node`` int32 ``[B, K]``: the child
        - ``logp`` float32 ``[B, K]``: ``cum_logp`` and the child's
        - ``num_valid`` int32 ``[B]``: candidates that are not lost

        A request's draws are the same alone and in any batch. No gradient flows.

    Raises:
        TypeError, ValueError: an argument's type, shape, device or value, by name. Values of ``row`` are
            checked only under :func:`vstar_ops.validation`.

    Example:
        >>> lists = torch.tensor([[0.0, -1.0]]), torch.tensor([[3, 5]]), torch.tensor([[1, 2]])
        >>> drawn = vstar_ops.draw_children(*lists, torch.empty(1, 4, 0, dtype=torch.int32))
        >>> drawn.sequence[0, :, 0].tolist(), drawn.node.tolist()
        ([3, 5, 3, 3], [[1, 2, 1, 1]])
    """
    lists = check("logp", logp, (None, None), "[R, C]", (torch.float32, torch.float64)).shape
    device = logp.device
    for name, x in (("token", token), ("node", node)):
        check(name, x, lists, "[R, C]", INTS, device)
    batch, number, _ = check("sequence", sequence, (None, None, None), "[B, K, l]", INTS, device).shape
    for name, value in (("row", row), ("prefix", prefix)):
        if value is not None:
            check(name, value, (batch, number), "[B, K]", INTS, device)
    cum_logp = check_floats("cum_logp", cum_logp, (batch, number), "[B, K]", logp)
    seeds, base_seed = None, 0
    if isinstance(seed, Tensor):
        seeds = check("seed", seed, (batch,), "[B]", (torch.int64,), device)
    else:
        base_seed = check_seed("seed", seed)
    if validating() and row is not None:
        check_range("row", row, lists[0])
    drawn = _draw(device, logp, token, node, sequence, row, prefix, cum_logp, seeds, base_seed, bool(pack))
    return DrawnChildren(*drawn)


def distinct_rows(node: Tensor, token: Tensor, slot: Tensor, *, row: Tensor | None = None) -> DistinctRows:
    """The distinct prefixes of each request's candidates, as rows that a model runs, each once.

    Rows are numbered over all requests, by request and node.

    Args:
        node: int32 or int64 ``[B, K]``, the trie node of each candidate; below 0 it has none.
        token: int32 or int64 ``[B, K]``, its last token.
        slot: int32 or int64 ``[R]``, where the model keeps the prefixes without it.
        row: int32 or int64 ``[B, K]``, which of these each candidate extends, ``b`` for None.

    Returns:
        A named tuple; ``R'`` distinct prefixes fill the first ``R'`` of ``N`` places:

        - ``row`` int32 ``[B, K]``: the row of each candidate, -1 for none
        - ``parent``, ``token`` int64 ``[N]``: the slot that a row extends (of its first candidate; -1 where
          that is out of range), and by which token. Then -1 and 0
        - ``node`` int32 ``[N]``: the row's trie node. Then -1
        - ``num_rows`` int32 ``[1]``: ``R'``. All that a decoder must read on the host.
        - ``num_tokens`` int32 ``[B]``: rows of each request

        No gradient flows.

    Raises:
        TypeError, ValueError: an argument's type, shape or device, by name. Values of ``row`` are checked
            only under :func:`vstar_ops.validation`.

    Example:
        >>> rows = vstar_ops.distinct_rows(torch.tensor([[9, 8, 9, -1]]), torch.tensor([[5, 4, 5, -1]]),
        ...                                torch.tensor([70]))
        >>> rows.row.tolist(), rows.parent.tolist(), rows.token.tolist(), rows.num_rows.tolist()
        ([[1, 0, 1, -1]], [70, 70, -1, -1], [4, 5, 0, 0], [2])
    """
    shape = check("node", node, (None, None), "[B, K]", INTS).shape
    check("token", token, shape, "[B, K]", INTS, node.device)
    check("slot", slot, (None,), "[R]", INTS, node.device)
    if row is not None:
        check("row", row, shape, "[B, K]", INTS, node.device)
        if validating():
            check_range("row", row, len(slot))
    return DistinctRows(*_rows(node.device, node, token, slot, row))
