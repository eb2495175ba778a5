"""``sibling_grpo_loss``: a program a block of tokens, whatever requests they belong to, and one to add up.

What the terms are divided by is known before: from the sizes, or where a mask is given from a launch that
counts each request's tokens and sequences. So the launch over the tokens writes the gradient along with its
block's sums, and the last one adds these in order and writes loss and terms. Two launches, three with a mask.

Workspace: float64 ``[blocks, 8]``, and int32 ``[B, G + 2]`` with a mask.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._array import array, load_float, load_int
from ._specialization import OPTIONS, Specialization

_BLOCK, _WARPS = 512, 4  # tokens
_SEQUENCES = 128  # counted together
_REQUESTS = 256  # and blocks, added up together


def sibling_grpo_loss(
    logp: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    advantage: Tensor,
    valid: Tensor,
    count: Tensor,
    group_advantage: Tensor,
    mask: Tensor | None,
    depth_weight: Tensor | None,
    global_weight: float,
    sibling_weight: float,
    kl_weight: float,
    clip_low: float,
    clip_high: float,
    kl: int,
    by_node: bool,
    loss_type: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The dispatcher's signature; see :func:`vstar_ops.sibling_grpo_loss`."""
    batch, group, length = logp.shape
    device = logp.device
    gradient = torch.empty(logp.shape, device=device)
    if logp.numel() == 0:
        return torch.zeros((), device=device), torch.zeros(7, device=device), gradient
    loss, terms = torch.empty((), device=device), torch.empty(7, device=device)
    blocks = triton.cdiv(logp.numel(), _BLOCK)
    sizes = (64 * blocks, 4 * batch * (group + 2) if mask is not None else 0)
    workspace = torch.empty(sum(sizes), dtype=torch.uint8, device=device).split(sizes)
    sums, counts = workspace[0].view(torch.float64), workspace[1].view(torch.int32)
    if mask is not None:
        _count[(batch,)](
            *array(mask), counts, batch, group, length, *mask.stride(),
            SEQUENCES=_SEQUENCES, num_warps=1, **OPTIONS,
        )  # fmt: skip
    contiguous = [x if x is None else x.contiguous() for x in (logp, old_logp, ref_logp, depth_weight)]
    pairs = [y for x in (*contiguous, mask) for y in array(x)]
    others = [x.contiguous() for x in (advantage, valid, count, group_advantage)]
    mask_strides = (0, 0, 0) if mask is None else mask.stride()
    weights = (global_weight, sibling_weight, kl_weight)
    _tokens[(blocks,)](
        *pairs, *others, counts, gradient, sums, batch, group, length, *mask_strides, *weights, 1 - clip_low,
        1 + clip_high, kl, int(by_node), loss_type,
        MASKED=mask is not None, BLOCK=_BLOCK, REQUESTS=_REQUESTS, num_warps=_WARPS, **OPTIONS,
    )  # fmt: skip
    _add_up[(1,)](
        sums, counts, loss, terms, blocks, batch, group, length, *weights,
        MASKED=mask is not None, REQUESTS=_REQUESTS, num_warps=1, **OPTIONS,
    )  # fmt: skip
    return loss, terms, gradient


@triton.jit(do_not_specialize=["mask", "mask_type", "batch", "group", "length", "m0", "m1", "m2"])
def _count(
    mask: tl.int64, mask_type, counts, batch, group, length, m0, m1, m2, SEQUENCES: tl.constexpr
):  # fmt: skip
    """``counts``: tokens ``[B]`` and sequences ``[B]`` of requests, then tokens ``[B, G]`` of sequences."""
    b = tl.program_id(0).to(tl.int64)
    tokens = tl.zeros((SEQUENCES,), tl.int32)
    sequences = tl.zeros((SEQUENCES,), tl.int32)
    for start in range(0, group, SEQUENCES):
        g = start + tl.arange(0, SEQUENCES).to(tl.int64)
        number = tl.zeros((SEQUENCES,), tl.int32)
        for d in range(length):
            at = b * m0 + g * m1 + tl.cast(d, tl.int64) * m2
            number += (load_int(mask, mask_type, at, g < group, 0) != 0).to(tl.int32)
        tl.store(counts + 2 * batch + b * group + g, number, g < group)
        tokens += number
        sequences += (number > 0).to(tl.int32)
    tl.store(counts + b, tl.sum(tokens, 0))
    tl.store(counts + batch + b, tl.sum(sequences, 0))


@triton.jit
def _totals(counts, batch, group, length, MASKED: tl.constexpr, REQUESTS: tl.constexpr):
    """Tokens and sequences of the whole batch, as float64."""
    tokens = tl.zeros((REQUESTS,), tl.int64)
    sequences = tl.zeros((REQUESTS,), tl.int64)
    for start in range(0, batch, REQUESTS):
        b = start + tl.arange(0, REQUESTS)
        if MASKED:
            tokens += tl.load(counts + b, b < batch, 0)
            sequences += tl.load(counts + batch + b, b < batch, 0)
        else:
            tokens += tl.where(b < batch, group * length, 0)
            sequences += tl.where(b < batch, group, 0)
    return tl.sum(tokens, 0).to(tl.float64), tl.sum(sequences, 0).to(tl.float64)


@triton.jit
def _surrogate(ratio, low, high, a):
    """PPO's bound of ``ratio * a``, its derivative by the log-probability, and where it is cut."""
    plain = ratio * a
    bounded = tl.minimum(tl.maximum(ratio, low), high) * a
    cut = bounded < plain
    return tl.where(cut, bounded, plain), tl.where(cut, 0.0, plain), cut


@triton.jit(
    do_not_specialize=[
        "logp", "logp_type", "old", "old_type", "ref", "ref_type", "depth", "depth_type", "mask", "mask_type",
        "batch", "group", "length", "m0", "m1", "m2", "kl", "by_node", "loss_type",
    ]
)  # fmt: skip
def _tokens(
    logp: tl.int64, logp_type, old: tl.int64, old_type, ref: tl.int64, ref_type, depth: tl.int64, depth_type,
    mask: tl.int64, mask_type, advantage, valid, count, group_advantage, counts, gradient, sums, batch, group,
    length, m0, m1, m2, global_weight: tl.float64, sibling_weight: tl.float64, kl_weight: tl.float64, low, high,
    kl, by_node, loss_type, MASKED: tl.constexpr, BLOCK: tl.constexpr, REQUESTS: tl.constexpr,
):  # fmt: skip
    size = tl.cast(group, tl.int64) * length
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < batch * size
    sequence, d = i // length, i % length
    b, g = sequence // group, sequence % group
    there = inside & (load_int(mask, mask_type, b * m0 + g * m1 + d * m2, inside, 1) != 0)

    all_tokens, all_sequences = _totals(counts, batch, group, length, MASKED, REQUESTS)
    own = tl.zeros((BLOCK,), tl.int32) + length
    siblings = tl.zeros((BLOCK,), tl.int32) + group
    if MASKED:
        own = tl.load(counts + 2 * batch + sequence, inside, 1)
        siblings = tl.load(counts + batch + b, inside, 1)
    token_share = 1.0 / (tl.maximum(own, 1).to(tl.float64) * tl.maximum(all_sequences, 1.0))
    node_share = 1.0 / (tl.maximum(siblings, 1).to(tl.float64) * batch)
    if loss_type == 1:
        token_share = tl.zeros((BLOCK,), tl.float64) + 1.0 / tl.maximum(all_tokens, 1.0)
        node_share = tl.zeros((BLOCK,), tl.float64) + 1.0 / tl.maximum(all_sequences, 1.0)
    elif loss_type == 2:
        token_share = tl.zeros((BLOCK,), tl.float64) + 1.0 / (batch * size).to(tl.float64)
        node_share = tl.zeros((BLOCK,), tl.float64) + 1.0 / (batch * tl.cast(group, tl.int64)).to(tl.float64)
    used = there & (tl.load(valid + i, there, 0) != 0)
    if by_node:
        node_share = node_share / tl.maximum(tl.load(count + i, there, 1), 1).to(tl.float64)
    if depth_type >= 0:
        node_share = node_share * load_float(depth, depth_type, d, inside).to(tl.float64)
    token_share = tl.where(there, token_share, 0.0)
    node_share = tl.where(used, node_share, 0.0)

    x = load_float(logp, logp_type, i, there)
    ratio = tl.full((BLOCK,), 1.0, tl.float32)
    if old_type >= 0:
        ratio = tl.exp(x - load_float(old, old_type, i, there))
    a = tl.load(group_advantage + sequence, there, 0.0)
    value, slope, cut = _surrogate(ratio, low, high, a)
    up = global_weight * token_share * slope
    over_sequences = tl.sum(token_share * value, 0)
    global_cuts = tl.sum((cut & there).to(tl.int32), 0)
    value, slope, cut = _surrogate(ratio, low, high, tl.load(advantage + i, used, 0.0))
    up += tl.where(used, sibling_weight * node_share * slope, 0.0)
    over_nodes = tl.sum(tl.where(used, node_share * value, 0.0), 0)
    sibling_cuts = tl.sum((cut & used).to(tl.int32), 0)
    divergence = tl.zeros((), tl.float64)
    if ref_type >= 0:
        difference = load_float(ref, ref_type, i, there) - x
        apart = -difference
        falls = tl.full((BLOCK,), 1.0, tl.float32)
        if kl == 1:
            apart = 0.5 * difference * difference
            falls = -difference
        elif kl == 2:
            # e^d - 1 - d of a small d has no digits left in float32; its series has them all.
            series = difference * difference * (0.5 + difference * (1.0 / 6 + difference * (1.0 / 24)))
            small = tl.abs(difference) < 0.03
            rise = tl.where(small, difference + series, tl.exp(difference) - 1.0)
            apart = tl.where(small, series, rise - difference)
            falls = -rise
        up -= kl_weight * token_share * falls
        divergence = tl.sum(token_share * apart, 0)
    tl.store(gradient + i, tl.where(there, 0.0 - up, 0.0).to(tl.float32), inside)

    row = sums + tl.program_id(0).to(tl.int64) * 8
    tl.store(row, over_sequences)
    tl.store(row + 1, over_nodes)
    tl.store(row + 2, divergence)
    tl.store(row + 3, tl.sum(tl.where(there, ratio, 0.0).to(tl.float64), 0))
    tl.store(row + 4, global_cuts.to(tl.float64))
    tl.store(row + 5, sibling_cuts.to(tl.float64))
    tl.store(row + 6, tl.sum(used.to(tl.int32), 0).to(tl.float64))


@triton.jit
def _column(sums, blocks, column: tl.constexpr, REQUESTS: tl.constexpr):
    total = tl.zeros((REQUESTS,), tl.float64)
    for start in range(0, blocks, REQUESTS):
        i = start + tl.arange(0, REQUESTS).to(tl.int64)
        total += tl.load(sums + i * 8 + column, i < blocks, 0.0)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["blocks", "batch", "group", "length"])
def _add_up(
    sums, counts, loss, terms, blocks, batch, group, length, global_weight: tl.float64,
    sibling_weight: tl.float64, kl_weight: tl.float64, MASKED: tl.constexpr, REQUESTS: tl.constexpr,
):  # fmt: skip
    tokens, _ = _totals(counts, batch, group, length, MASKED, REQUESTS)
    tokens = tl.maximum(tokens, 1.0)
    over_sequences = _column(sums, blocks, 0, REQUESTS)
    over_nodes = _column(sums, blocks, 1, REQUESTS)
    divergence = _column(sums, blocks, 2, REQUESTS)
    valid = _column(sums, blocks, 6, REQUESTS)
    tl.store(
        loss,
        (kl_weight * divergence - global_weight * over_sequences - sibling_weight * over_nodes).to(
            tl.float32
        ),
    )
    tl.store(terms, over_sequences.to(tl.float32))
    tl.store(terms + 1, over_nodes.to(tl.float32))
    tl.store(terms + 2, divergence.to(tl.float32))
    tl.store(terms + 3, (_column(sums, blocks, 3, REQUESTS) / tokens).to(tl.float32))
    tl.store(terms + 4, (_column(sums, blocks, 4, REQUESTS) / tokens).to(tl.float32))
    tl.store(terms + 5, (_column(sums, blocks, 5, REQUESTS) / tl.maximum(valid, 1.0)).to(tl.float32))
    tl.store(terms + 6, (valid / tokens).to(tl.float32))


def specializations() -> Iterator[Specialization]:
    """Everything that is compiled."""
    addresses = dict.fromkeys(("logp", "old", "ref", "depth", "mask"), "i64")
    arrays = dict.fromkeys(("advantage", "group_advantage", "gradient", "loss", "terms"), "*fp32")
    numbers = {
        "global_weight": "fp64",
        "sibling_weight": "fp64",
        "kl_weight": "fp64",
        "low": "fp32",
        "high": "fp32",
    }
    types = {
        **addresses,
        **arrays,
        **numbers,
        "valid": "*u1",
        "count": "*i32",
        "counts": "*i32",
        "sums": "*fp64",
    }
    yield Specialization("sibling_grpo_loss count", _count, types, {"SEQUENCES": _SEQUENCES}, 1)
    for masked in (False, True):
        constants = {"MASKED": masked, "REQUESTS": _REQUESTS}
        name = f"sibling_grpo_loss{', masked' * masked}"
        yield Specialization(name, _tokens, types, constants | {"BLOCK": _BLOCK}, _WARPS)
        yield Specialization(f"{name}, sum", _add_up, types, constants, 1)
