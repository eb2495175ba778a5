"""``sibling_grpo_loss``: one program per block of tokens, of any requests, and one to add up.

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

from ._array import Array, array, load_float, load_int, strided
from ._kernel import ADDRESS, BOOL, F32, F64, I32, Specialization, kernel, options, workspace

_BLOCK, _WARPS = 512, 4  # tokens
_SEQUENCES = 128  # counted together
_REQUESTS = 256  # and blocks, added up together


def sibling_grpo_loss(
    logp, old_logp, ref_logp, advantage, valid, count, group_advantage, mask, depth_weight, global_weight,
    sibling_weight, kl_weight, clip_low, clip_high, kl, by_node, loss_type,
):  # fmt: skip
    """The dispatcher's signature; see :func:`vstar_ops.sibling_grpo_loss`."""
    sizes = batch, group, _ = logp.shape
    device = logp.device
    gradient = torch.empty(logp.shape, device=device)
    if logp.numel() == 0:
        return torch.zeros((), device=device), torch.zeros(7, device=device), gradient
    loss, terms = torch.empty((), device=device), torch.empty(7, device=device)
    blocks, masked = triton.cdiv(logp.numel(), _BLOCK), mask is not None
    counted = batch * (group + 2) if masked else 0
    sums, counts = workspace(device, (8 * blocks, torch.float64), (counted, torch.int32))
    if masked:
        _count[(batch,)](*strided(mask, 3), counts, *sizes, SEQUENCES=_SEQUENCES, **options(1))
    optional = [x if x is None else x.contiguous() for x in (logp, old_logp, ref_logp, depth_weight)]
    arrays = [part for x in optional for part in array(x)]
    others = [x.contiguous() for x in (advantage, valid, count, group_advantage)]
    weights = {
        "global_weight": global_weight, "sibling_weight": sibling_weight, "kl_weight": kl_weight,
        "MASKED": masked, "REQUESTS": _REQUESTS,
    }  # fmt: skip
    _tokens[(blocks,)](
        *arrays, *strided(mask, 3), *others, counts, gradient, sums, *sizes, low=1 - clip_low,
        high=1 + clip_high, kl_type=kl, by_node=int(by_node), loss_type=loss_type, **weights, BLOCK=_BLOCK,
        **options(_WARPS),
    )  # fmt: skip
    _add_up[(1,)](sums, counts, loss, terms, blocks, *sizes, **weights, **options(1))
    return loss, terms, gradient


@kernel
def _count(
    mask: ADDRESS, mask_type, m0, m1, m2, counts: I32, batch, group, length, SEQUENCES: tl.constexpr,
):  # fmt: skip
    """``counts``: tokens ``[B]`` and sequences ``[B]`` of requests, then tokens ``[B, G]`` of sequences."""
    mask = Array(mask, mask_type, m0, m1, m2)
    b = tl.program_id(0).to(tl.int64)
    tokens = tl.zeros((SEQUENCES,), tl.int32)
    sequences = tl.zeros((SEQUENCES,), tl.int32)
    for start in range(0, group, SEQUENCES):
        g = start + tl.arange(0, SEQUENCES).to(tl.int64)
        number = tl.zeros((SEQUENCES,), tl.int32)
        for d in range(length):
            number += (load_int(mask, b, g, tl.cast(d, tl.int64), g < group, 0) != 0).to(tl.int32)
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


@triton.jit
def _shares(
    counts, sequence, b, inside, batch, group, length, loss_type, MASKED: tl.constexpr, BLOCK: tl.constexpr,
    REQUESTS: tl.constexpr,
):  # fmt: skip
    """What a token counts in the mean over tokens, and a node in the mean over nodes; float64."""
    all_tokens, all_sequences = _totals(counts, batch, group, length, MASKED, REQUESTS)
    tokens = tl.zeros((BLOCK,), tl.int32) + length  # of this sequence
    sequences = tl.zeros((BLOCK,), tl.int32) + group  # of this request
    if MASKED:
        tokens = tl.load(counts + 2 * batch + sequence, inside, 1)
        sequences = tl.load(counts + batch + b, inside, 1)
    token_share = 1.0 / (tl.maximum(tokens, 1).to(tl.float64) * tl.maximum(all_sequences, 1.0))
    node_share = 1.0 / (tl.maximum(sequences, 1).to(tl.float64) * batch)
    if loss_type == 1:
        token_share = tl.zeros((BLOCK,), tl.float64) + 1.0 / tl.maximum(all_tokens, 1.0)
        node_share = tl.zeros((BLOCK,), tl.float64) + 1.0 / tl.maximum(all_sequences, 1.0)
    elif loss_type == 2:
        candidates = batch * tl.cast(group, tl.int64)
        token_share = tl.zeros((BLOCK,), tl.float64) + 1.0 / (candidates * length).to(tl.float64)
        node_share = tl.zeros((BLOCK,), tl.float64) + 1.0 / candidates.to(tl.float64)
    return token_share, node_share


@triton.jit
def _divergence(difference, kl_type):
    """The estimate of the KL divergence from ``ref_logp - logp``, and its derivative by ``logp``."""
    kl = -difference
    dkl = tl.full(difference.shape, 1.0, tl.float32)
    if kl_type == 1:
        kl = 0.5 * difference * difference
        dkl = -difference
    elif kl_type == 2:
        # e^d - 1 - d of a small d has no digits left in float32; its series has them all.
        series = difference * difference * (0.5 + difference * (1.0 / 6 + difference * (1.0 / 24)))
        small = tl.abs(difference) < 0.03
        rise = tl.where(small, difference + series, tl.exp(difference) - 1.0)
        kl = tl.where(small, series, rise - difference)
        dkl = -rise
    return kl, dkl


@kernel
def _tokens(
    logp: ADDRESS, logp_type, old: ADDRESS, old_type, ref: ADDRESS, ref_type, depth_weight: ADDRESS,
    depth_weight_type, mask: ADDRESS, mask_type, m0, m1, m2, advantage: F32, valid: BOOL, count: I32,
    group_advantage: F32, counts: I32, gradient: F32, sums: F64, batch, group, length,
    global_weight: tl.float64, sibling_weight: tl.float64, kl_weight: tl.float64, low: tl.float32,
    high: tl.float32, kl_type, by_node, loss_type, MASKED: tl.constexpr, BLOCK: tl.constexpr,
    REQUESTS: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < batch * (tl.cast(group, tl.int64) * length)
    sequence, d = i // length, i % length
    b, g = sequence // group, sequence % group
    present = inside & (load_int(Array(mask, mask_type, m0, m1, m2), b, g, d, inside, 1) != 0)
    usable = present & (tl.load(valid + i, present, 0) != 0)
    token_share, node_share = _shares(
        counts, sequence, b, inside, batch, group, length, loss_type, MASKED, BLOCK, REQUESTS
    )
    if by_node:
        node_share = node_share / tl.maximum(tl.load(count + i, present, 1), 1).to(tl.float64)
    if depth_weight_type >= 0:
        weight = load_float(Array(depth_weight, depth_weight_type, 1, 0, 0), d, 0, 0, inside)
        node_share = node_share * weight.to(tl.float64)
    token_share = tl.where(present, token_share, 0.0)
    node_share = tl.where(usable, node_share, 0.0)

    x = load_float(Array(logp, logp_type, 1, 0, 0), i, 0, 0, present)
    ratio = tl.full((BLOCK,), 1.0, tl.float32)
    if old_type >= 0:
        ratio = tl.exp(x - load_float(Array(old, old_type, 1, 0, 0), i, 0, 0, present))
    a = tl.load(group_advantage + sequence, present, 0.0)
    value, slope, cut = _surrogate(ratio, low, high, a)
    grad = global_weight * token_share * slope
    over_sequences = tl.sum(token_share * value, 0)
    global_cuts = tl.sum((cut & present).to(tl.int32), 0)
    value, slope, cut = _surrogate(ratio, low, high, tl.load(advantage + i, usable, 0.0))
    grad += tl.where(usable, sibling_weight * node_share * slope, 0.0)
    over_nodes = tl.sum(tl.where(usable, node_share * value, 0.0), 0)
    sibling_cuts = tl.sum((cut & usable).to(tl.int32), 0)
    divergence = tl.zeros((), tl.float64)
    if ref_type >= 0:
        kl, dkl = _divergence(load_float(Array(ref, ref_type, 1, 0, 0), i, 0, 0, present) - x, kl_type)
        grad -= kl_weight * token_share * dkl
        divergence = tl.sum(token_share * kl, 0)
    tl.store(gradient + i, tl.where(present, 0.0 - grad, 0.0).to(tl.float32), inside)

    row = sums + tl.program_id(0).to(tl.int64) * 8
    tl.store(row, over_sequences)
    tl.store(row + 1, over_nodes)
    tl.store(row + 2, divergence)
    tl.store(row + 3, tl.sum(tl.where(present, ratio, 0.0).to(tl.float64), 0))
    tl.store(row + 4, global_cuts.to(tl.float64))
    tl.store(row + 5, sibling_cuts.to(tl.float64))
    tl.store(row + 6, tl.sum(usable.to(tl.int32), 0).to(tl.float64))


@triton.jit
def _column(sums, blocks, column: tl.constexpr, REQUESTS: tl.constexpr):
    total = tl.zeros((REQUESTS,), tl.float64)
    for start in range(0, blocks, REQUESTS):
        i = start + tl.arange(0, REQUESTS).to(tl.int64)
        total += tl.load(sums + i * 8 + column, i < blocks, 0.0)
    return tl.sum(total, 0)


@kernel
def _add_up(
    sums: F64, counts: I32, loss: F32, terms: F32, blocks, batch, group, length, global_weight: tl.float64,
    sibling_weight: tl.float64, kl_weight: tl.float64, MASKED: tl.constexpr, REQUESTS: tl.constexpr,
):  # fmt: skip
    tokens, _ = _totals(counts, batch, group, length, MASKED, REQUESTS)
    tokens = tl.maximum(tokens, 1.0)
    over_sequences = _column(sums, blocks, 0, REQUESTS)
    over_nodes = _column(sums, blocks, 1, REQUESTS)
    divergence = _column(sums, blocks, 2, REQUESTS)
    valid = _column(sums, blocks, 6, REQUESTS)
    value = kl_weight * divergence - global_weight * over_sequences - sibling_weight * over_nodes
    tl.store(loss, value.to(tl.float32))
    tl.store(terms, over_sequences.to(tl.float32))
    tl.store(terms + 1, over_nodes.to(tl.float32))
    tl.store(terms + 2, divergence.to(tl.float32))
    tl.store(terms + 3, (_column(sums, blocks, 3, REQUESTS) / tokens).to(tl.float32))
    tl.store(terms + 4, (_column(sums, blocks, 4, REQUESTS) / tokens).to(tl.float32))
    tl.store(terms + 5, (_column(sums, blocks, 5, REQUESTS) / tl.maximum(valid, 1.0)).to(tl.float32))
    tl.store(terms + 6, (valid / tokens).to(tl.float32))


def specializations() -> Iterator[Specialization]:
    """Everything that is compiled."""
    yield Specialization("sibling_grpo_loss count", _count, 1, {"SEQUENCES": _SEQUENCES})
    for masked in (False, True):
        constants = {"MASKED": masked, "REQUESTS": _REQUESTS}
        name = f"sibling_grpo_loss{', masked' * masked}"
        yield Specialization(name, _tokens, _WARPS, constants | {"BLOCK": _BLOCK})
        yield Specialization(f"{name}, sum", _add_up, 1, constants)
