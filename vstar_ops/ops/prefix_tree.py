"""``prefix_tree``: the distinct prefixes of each request's candidates, as packed arrays."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference
from .._deprecated import renamed_field
from ._checks import check_prefix_mask, check_tokens
from ._registry import define


class PrefixTree(NamedTuple):
    """The result of :func:`prefix_tree`: ``[B, N]`` with ``N = G * L``, ``node[B, G, L]``, ``size[B]``."""

    parent: Tensor
    token: Tensor
    depth: Tensor
    first: Tensor
    num_candidates: Tensor
    node: Tensor
    size: Tensor


PrefixTree.count = renamed_field("num_candidates")  # type: ignore[method-assign]


def _fake(tokens: Tensor, _: object) -> tuple[Tensor, ...]:
    batch, group, length = tokens.shape
    slots = (batch, group * length)

    def ints(*shape: int) -> Tensor:
        return tokens.new_empty(shape, dtype=torch.int32)

    token = tokens.new_empty(slots)
    return ints(*slots), token, ints(*slots), ints(*slots), ints(*slots), ints(*tokens.shape), ints(batch)


_op = define(
    reference.prefix_tree,
    _fake,
)


def prefix_tree(tokens: Tensor, mask: Tensor | None = None) -> PrefixTree:
    r"""The distinct prefixes of each request's candidates: its tree, without the root.

    Nodes are numbered level by level and lexicographically within a level, as :func:`sibling_advantage`
    numbers them: parents come before their children, siblings are neighbors in the order of their tokens.
    The numbering depends on the set of candidates alone, not on their order. Requests never mix; prefixes
    are compared exactly, token by token.

    Args:
        tokens: integers ``[B, G, L]`` of any value: ``G`` candidates per request.
        mask: bool ``[B, G]``, False for padded candidates, which take no part, or ``[B, G, L]``: a candidate
            ends before its first masked token, whatever follows.

    Returns:
        A named tuple of int32 (``token`` as wide as ``tokens``, int32 for narrower ones). There is room for
        ``N = G * L`` nodes per request, so no size is read on the host:

        - ``parent`` ``[B, N]``: the node above, -1 for the root, the empty prefix.
        - ``token`` ``[B, N]``: the prefix' last token.
        - ``depth`` ``[B, N]``: its tokens, 1 to ``L``.
        - ``first`` ``[B, N]``: the first candidate through it, so that
          ``tokens[b, first[b, n], : depth[b, n]]`` is the prefix.
        - ``num_candidates`` ``[B, N]``: candidates through it.
        - ``node`` ``[B, G, L]``: the node of a candidate's prefix of ``l + 1`` tokens, -1 where masked.
        - ``size`` ``[B]``: nodes of the request. Later slots hold -1; 0 in ``depth``, ``num_candidates``.

        The same for any number of threads. No gradient flows.

    Raises:
        TypeError, ValueError: an argument's type, shape or device, by name.

    Example:
        >>> tree = vstar_ops.prefix_tree(torch.tensor([[[1, 6], [1, 5], [2, 5], [1, 6]]]))
        >>> tree.token, tree.parent, tree.size
        (tensor([[ 1,  2,  5,  6,  5, -1, -1, -1]]),
         tensor([[-1, -1,  0,  0,  1, -1, -1, -1]], dtype=torch.int32), tensor([5], dtype=torch.int32))
        >>> tree.node[0].T
        tensor([[0, 0, 1, 0],
                [3, 2, 4, 3]], dtype=torch.int32)
    """
    tokens = check_tokens("tokens", tokens, (None, None, None), "[B, G, L]")
    mask = check_prefix_mask(mask, tuple(tokens.shape), tokens.device)
    return PrefixTree(*_op(tokens.device, tokens, mask))
