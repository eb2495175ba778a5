"""``prefix_returns``: dense returns of prefixes for training a value model (V-STAR, Eqs. 6-8)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference
from .._deprecated import renamed_field
from ._checks import (
    FLOATS_OR_DOUBLE,
    check,
    check_prefix_mask,
    check_tokens,
    floats_beside,
    level_weights,
    result_dtype,
)
from ._registry import define


class PrefixReturns(NamedTuple):
    """The result of :func:`prefix_returns`; all ``[B, G, L]``."""

    returns: Tensor
    similarity: Tensor
    node: Tensor
    num_candidates: Tensor


PrefixReturns.count = renamed_field("num_candidates")  # type: ignore[method-assign]


def _fake(tokens: Tensor, embedding: Tensor, *_: object) -> tuple[Tensor, ...]:
    floats = tokens.new_empty(tokens.shape, dtype=result_dtype(embedding))
    ints = tokens.new_empty(tokens.shape, dtype=torch.int32)
    return floats, torch.empty_like(floats), ints, torch.empty_like(ints)


_op = define(
    reference.prefix_returns,
    _fake,
    double=("embedding",),
)


def prefix_returns(
    tokens: Tensor,
    embedding: Tensor,
    target: Tensor,
    target_embedding: Tensor,
    mask: Tensor | None = None,
    *,
    weights: Sequence[float] | None = None,
) -> PrefixReturns:
    r"""What each prefix of the candidates has earned, judged by the items below it (arXiv 2602.10699).

    The bucket of a prefix :math:`y_{\le\ell}` holds the request's candidates that share it (6); its embedding
    :math:`\bar e` is the mean embedding of the bucket, duplicates counting (7); and its dense return is (8)

    .. math::
        r_\ell = w_\ell \text{ if } y_{\le\ell} = y^*_{\le\ell},
        \text{ else } -w_\ell (1 - \cos(\bar e, e(y^*))).

    Requests never mix. Prefixes are compared exactly, token by token.

    Args:
        tokens: integers ``[B, G, L]`` of any value: ``G`` candidates per request.
        embedding: float32, bfloat16, float16 or float64 ``[B, G, E]``, of the candidates' items.
        target: integers ``[B, L]``, the logged item :math:`y^*`.
        target_embedding: float32, bfloat16 or float16 ``[B, E]``, of the target; float64 beside a float64
            ``embedding``.
        mask: bool ``[B, G]``, False for padded candidates, which take no part, or ``[B, G, L]``: a candidate
            ends before its first masked token, whatever follows.
        weights: :math:`w_\ell`, ``L`` numbers. Default: (0.3, 0.5, 1.0) for three levels, as in the paper;
            for other lengths the same rise from 0.3 to 1, read off at ``L`` equal steps; (1.0,) for one.

    Returns:
        A named tuple, each ``[B, G, L]``, entry ``[b, g, l]`` speaking of the prefix of ``l + 1`` tokens;
        0 where masked, and ``node`` is -1:

        - ``returns`` float32, :math:`r_\ell`; float64 for a float64 ``embedding``, which the reference
          implementation takes.
        - ``similarity`` of the same dtype, the cosine; 0 where either embedding is zero, NaN where one
          holds NaN or infinity. The return is then NaN too, except for prefixes of the target.
        - ``node`` int32, the number of the distinct prefix, as :func:`sibling_advantage` counts them.
        - ``num_candidates`` int32, candidates in the bucket.

    Sums are float64, in an order that does not depend on the number of threads or on the other requests.
    No gradient flows: returns are targets.

    Raises:
        TypeError, ValueError: an argument's type, shape, device or value, by name.

    Example:
        >>> tokens, target = torch.tensor([[[1, 5], [1, 6], [2, 5]]]), torch.tensor([[1, 5]])
        >>> item = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]])
        >>> vstar_ops.prefix_returns(tokens, item, target, item[:, 0], weights=(0.5, 1.0)).returns
        tensor([[[ 0.5000,  1.0000],
                 [ 0.5000, -1.0000],
                 [-0.5000, -1.0000]]])
    """
    tokens = check_tokens("tokens", tokens, (None, None, None), "[B, G, L]")
    batch, group, length = tokens.shape
    device = tokens.device
    check("embedding", embedding, (batch, group, None), "[B, G, E]", FLOATS_OR_DOUBLE, device)
    target = check_tokens("target", target, (batch, length), "[B, L]", device)
    width = embedding.shape[2]
    check("target_embedding", target_embedding, (batch, width), "[B, E]", floats_beside(embedding), device)
    mask = check_prefix_mask(mask, tuple(tokens.shape), device)
    if weights is None:
        weights = _default_weights(length)
    weight = level_weights("weights", weights, length, torch.float64, tokens)
    return PrefixReturns(*_op(device, tokens, embedding, target, target_embedding, mask, weight))


def _default_weights(length: int) -> list[float]:
    if length == 1:
        return [1.0]
    points = [2 * depth / (length - 1) for depth in range(length)]  # 0 .. 2 on the paper's three levels
    return [0.3 + 0.2 * x if x <= 1 else 0.5 + 0.5 * (x - 1) for x in points]
