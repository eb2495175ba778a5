"""``expand_topk``: score all legal one-token extensions of a batch of prefixes, keep the best."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference
from .._deprecated import renamed_arguments, renamed_field
from ..trie import Trie
from ._checks import (
    FLOATS_OR_DOUBLE,
    INTS,
    check,
    check_alive,
    check_finite,
    check_floats,
    check_nodes,
    check_positive,
    check_range,
    check_seeds,
    check_trie,
    floats_beside,
    result_dtype,
    validating,
)
from ._registry import define

_SIZES = (int, torch.SymInt)


class ExpandTopK(NamedTuple):
    """The result of :func:`expand_topk`."""

    score: Tensor
    logp: Tensor
    parent: Tensor
    token: Tensor
    node: Tensor
    num_valid: Tensor
    entropy: Tensor


ExpandTopK.count = renamed_field("num_valid")  # type: ignore[method-assign]


def _fake(
    logits: Tensor,
    offset: Tensor,
    token: Tensor,
    alive: Tensor | None,
    node: Tensor,
    row: Tensor | None,
    k: int,
    *_: object,
) -> tuple[Tensor, ...]:
    (batch, width), dtype = node.shape, result_dtype(logits)
    score, logp = (logits.new_empty((batch, k), dtype=dtype) for _ in range(2))
    parent, chosen, child = (logits.new_empty((batch, k), dtype=torch.int32) for _ in range(3))
    count = logits.new_empty((batch,), dtype=torch.int32)
    return score, logp, parent, chosen, child, count, logits.new_empty((batch, width), dtype=dtype)


_op = define(
    reference.expand_topk,
    _fake,
    double=("logits",),
)


@renamed_arguments(gumbel="gumbel_seed")
def expand_topk(
    logits: Tensor,
    trie: Trie,
    node: Tensor,
    k: int,
    *,
    row: Tensor | None = None,
    cum_logp: Tensor | None = None,
    value: Tensor | None = None,
    bonus: Tensor | None = None,
    child_value: Tensor | None = None,
    logp_weight: float = 1.0,
    value_weight: float = 0.0,
    entropy_weight: float = 0.0,
    temperature: float = 1.0,
    normalize: str = "legal",
    gumbel_seed: Tensor | int | None = None,
) -> ExpandTopK:
    r"""The ``k`` best legal one-token extensions of each request's ``W`` prefixes, exactly.

    For a live prefix :math:`w` with legal children :math:`C(w)` (the trie's), and :math:`D = C(w)` for
    ``normalize="legal"`` or all ``V`` columns for ``"vocab"``:

    .. math::
        \log\pi(v|w) &= z_v/\tau - \log\textstyle\sum_{u \in D} \exp(z_u/\tau) \\
        H(w) &= -\textstyle\sum_{u \in C(w)} p_u \log p_u, \quad p = \text{softmax of } z/\tau
            \text{ over } C(w) \\
        \text{logp}(w, v) &= \text{cum\_logp}[w] + \log\pi(v|w) \\
        \text{score}(w, v) &= \alpha \, \text{logp}(w, v)
            + \beta_v (\text{value}[w] + \text{child\_value}[w, v]) + \lambda H(w) + \text{bonus}[w]
            \; (+\, g_{w,v})

    which is the priority :math:`G = V + \lambda H` of V-STAR (Eq. 10) with a log-probability prior.
    Winners are ordered by score descending, then ``w`` ascending, then token ascending, a total order,
    so ties come out the same on every backend, device and thread count. Masking precedes all pruning:
    the result is exact, and no illegal token is ever returned.

    Args:
        logits: float32, bfloat16, float16 or float64 ``[B, W, V]``, or with ``row`` ``[R, V]``, any strides.
            NaN reads as -inf, +inf as the largest finite float32. With ``"legal"`` only legal children's
            logits are read. float64 ones are taken by the reference implementation, which computes in
            float64; the other floats may then be float64, and the results are.
        trie: the catalogue; its tokens are columns of ``logits``. Children without an allowed item
            below them, where the trie is restricted, are not in :math:`C(w)`; its bits are read at each call.
        node: int32 or int64 ``[B, W]``, the trie node of each prefix. Whatever is not a node (-1, or out
            of range) is a dead beam: it has no children.
        k: winners per request, any number >= 1.
        row: None, or int32 or int64 ``[B, W]``, the row of ``logits`` and ``child_value`` of each prefix, for
            prefixes that share rows or were not run. -1 (or what is out of range) stands for a row of
            zeros: a single legal child is then certain, as it is by any finite logit.
        cum_logp: float ``[B, W]``, log-probability of each prefix (0). A prefix at -inf or NaN has no
            winners.
        value: float ``[B, W]``, V(w) (0).
        bonus: float ``[B, W]`` (0).
        child_value: float, shaped as ``logits``: what each next token adds to ``value`` (0).
        logp_weight: :math:`\alpha`.
        value_weight: :math:`\beta_v`. A term whose weight is 0 is not read.
        entropy_weight: :math:`\lambda`.
        temperature: any finite :math:`\tau > 0`. At 1e-39 a logit 0.5 below the largest has the
            log-probability -5e38, which is -inf in float32, so that it cannot win. Nor can one more than
            3.4e38 below it at any temperature, save in the reference implementation.
        normalize: ``"legal"`` or ``"vocab"``.
        gumbel_seed: None, or int64 seeds ``[B]``, one per request, or one int for seeds derived from it and
            ``b`` (:func:`vstar_ops.derive_seeds`). Adds Gumbel(0, 1) noise to every score, a pure
            function of (seed, node, token): top-k of perturbed log-probabilities is sampling without
            replacement.

    Returns:
        A named tuple; ``C`` children in all leave ``min(C, k)`` winners:

        - ``score``, ``logp`` float32 ``[B, k]``; ``logp`` without value, entropy, bonus and noise
        - ``parent`` int32 ``[B, k]``: ``w``; ``token``: the child's token; ``node``: the child's node
        - ``num_valid`` int32 ``[B]``: winners that exist. Later slots hold -inf and -1.
        - ``entropy`` float32 ``[B, W]``: H(w), exactly 0 for dead beams and single children

        A child whose log-probability or score is -inf or NaN is never a winner.
        No gradient flows through the result.

    Raises:
        TypeError, ValueError: an argument's type, shape, device or value, by name. Values of ``node`` and
            ``row`` are checked only under :func:`vstar_ops.validation`.

    Example:
        >>> trie = Trie.from_sequences([[0, 3], [0, 4], [2, 3]])
        >>> out = vstar_ops.expand_topk(torch.zeros(1, 1, 5), trie, torch.zeros(1, 1, dtype=torch.int32), 4)
        >>> out.token, out.node
        (tensor([[ 0,  2, -1, -1]], dtype=torch.int32), tensor([[ 1,  2, -1, -1]], dtype=torch.int32))
        >>> out.num_valid
        tensor([2], dtype=torch.int32)
    """
    if row is None:
        logits = check("logits", logits, (None, None, None), "[B, W, V]", FLOATS_OR_DOUBLE)
        batch, width, columns = logits.shape
    else:
        logits = check("logits", logits, (None, None), "[R, V]", FLOATS_OR_DOUBLE)
        batch, width = check("row", row, (None, None), "[B, W]", INTS, logits.device).shape
        columns = logits.shape[1]
    device = logits.device
    check_trie(trie, columns, device)
    check_alive(trie, batch)
    node = check("node", node, (batch, width), "[B, W]", INTS, device)
    if type(k) is not int and (isinstance(k, bool) or not isinstance(k, _SIZES)):
        raise TypeError(f"k must be an int, got {type(k).__name__}")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    beams = (batch, width)
    cum_logp = check_floats("cum_logp", cum_logp, beams, "[B, W]", logits)
    value = check_floats("value", value, beams, "[B, W]", logits)
    bonus = check_floats("bonus", bonus, beams, "[B, W]", logits)
    if child_value is not None:
        axes = "[B, W, V]" if row is None else "[R, V]"
        check("child_value", child_value, logits.shape, axes, floats_beside(logits), device)
    if normalize not in ("legal", "vocab"):
        raise ValueError(f"normalize must be 'legal' or 'vocab', got {normalize!r}")
    temperature = check_positive("temperature", temperature)
    seed = (
        None if gumbel_seed is None else check_seeds("gumbel_seed", gumbel_seed, batch, device, optional=True)
    )
    if validating():
        check_nodes(node, trie)
        if row is not None:
            check_range("row", row, len(logits))
    if row is not None:  # every request has the same table
        logits = logits.expand(batch, *logits.shape)
        child_value = None if child_value is None else child_value.expand(logits.shape)
    return ExpandTopK(
        *_op(
            device,
            logits,
            trie.offset,
            trie.token,
            trie.alive,
            node,
            row,
            k,
            cum_logp,
            value,
            bonus,
            child_value,
            seed,
            check_finite("logp_weight", logp_weight),
            check_finite("value_weight", value_weight),
            check_finite("entropy_weight", entropy_weight),
            temperature,
            normalize == "vocab",
            trie.max_children,
        )
    )
