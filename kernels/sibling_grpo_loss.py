"""``sibling_grpo_loss``: one program per block of tokens, of any requests, and one to add up.

What the terms are divided by is known before: from the sizes, or where a mask is given, or ratios of whole
sequences are asked for, from a launch that counts each request's tokens and sequences. So the launch over
the tokens writes the gradient along with its block's sums, and the last one adds these in order and writes
loss and terms. Two launches, three with a mask or for ratios of whole sequences.

Workspace: float64 ``[blocks, 8]``, where tokens are counted int32 ``[B, G + 2]``, and for ratios of whole
sequences float64 ``[B, G]``.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from ._array import Array, array, load_float, load_int, strided
from ._kernel import ADDRESS, BOOL, F32, F64, I32, Specialization, kernel, workspace

_BLOCK, _WARPS = 512, 4  # tokens
_SEQUENCES = 128  # counted together
_REQUESTS = 256  # and blocks, added up together
# Log-ratios and advantages of at most so much are computed in float32, as in csrc.
_MOST, _MOST_ADVANTAGE = tl.constexpr(80.0), tl.constexpr(1024.0)

# What the means divide by, float64.
Counts = namedtuple("Counts", "requests candidates sequences tokens")
# Of tokens: the advantages, and the weights of both in the loss, all float64.
Advantages = namedtuple("Advantages", "whole apart whole_weight apart_weight")
# Bounds of the ratio; ``cap`` where the advantage is negative.
Bounds = namedtuple("Bounds", "low high cap")


def sibling_grpo_loss(
    logp, old_logp, ref_logp, advantage, valid, count, group_advantage, mask, depth_weight, normalizer,
    global_weight, sibling_weight, kl_weight, clip_low, clip_high, dual_clip, log_ratio_bound, horizon,
    choices,
):  # fmt: skip
    """The dispatcher's signature; see :func:`vstar_ops.sibling_grpo_loss`."""
    loss_type, kl, weighting, level, clip_terms = choices.split()
    sizes = batch, group, length = logp.shape
    device = logp.device
    gradient = torch.empty(batch, group, length, device=device)
    if logp.numel() == 0:
        return torch.zeros((), device=device), torch.zeros(7, device=device), gradient
    loss, terms = torch.empty((), device=device), torch.empty(7, device=device)
    averaged = level == "sequence" and old_logp is not None
    blocks, counted = -(-logp.numel() // _BLOCK), averaged or mask is not None
    sums, averages, counts = workspace(
        device, (8 * blocks, torch.float64), (batch * group * averaged, torch.float64),
        (batch * (group + 2) * counted, torch.int32),
    )  # fmt: skip
    optional = [x if x is None else x.contiguous() for x in (logp, old_logp, ref_logp, depth_weight)]
    arrays = [part for x in optional for part in array(x)]
    if counted:
        _count.launch(
            (batch,), 1,
            *strided(mask, 3), *arrays[:4], counts, averages, *sizes, averaged=int(averaged),
            SEQUENCES=_SEQUENCES,
        )  # fmt: skip
    others = [x.contiguous() for x in (advantage, valid, count, group_advantage)]
    window, _ = array(None if normalizer is None else normalizer.contiguous())
    weights = {
        "global_weight": global_weight, "sibling_weight": sibling_weight, "kl_weight": kl_weight,
        "joint": int(clip_terms == "joint"), "COUNTED": counted, "REQUESTS": _REQUESTS,
    }  # fmt: skip
    _tokens.launch(
        (blocks,), _WARPS,
        *arrays, *strided(mask, 3), *others, counts, averages, window, gradient, sums, *sizes,
        low=1 - clip_low, high=1 + clip_high, cap=dual_clip, log_bound=log_ratio_bound,
        kl_type=("k1", "k2", "k3").index(kl), by_node=int(weighting == "node"), averaged=int(averaged),
        loss_type=("grpo", "bnpo", "dr_grpo").index(loss_type), horizon=float(horizon), **weights,
        BLOCK=_BLOCK,
    )  # fmt: skip
    _add_up.launch((1,), 1, sums, counts, loss, terms, blocks, *sizes, **weights)
    return loss, terms, gradient


@kernel
def _count(
    mask: ADDRESS, mask_type, m0, m1, m2, logp: ADDRESS, logp_type, old: ADDRESS, old_type, counts: I32,
    averages: F64, batch, group, length, averaged, SEQUENCES: tl.constexpr,
):  # fmt: skip
    """``counts``: tokens ``[B]`` and sequences ``[B]`` of requests, then tokens ``[B, G]`` of sequences.

    ``averages`` ``[B, G]``: of the log-ratios of a sequence, if it is asked for.
    """
    mask = Array(mask, mask_type, m0, m1, m2)
    b = tl.program_id(0).to(tl.int64)
    tokens = tl.zeros((SEQUENCES,), tl.int32)
    sequences = tl.zeros((SEQUENCES,), tl.int32)
    for start in range(0, group, SEQUENCES):
        g = start + tl.arange(0, SEQUENCES).to(tl.int64)
        number = tl.zeros((SEQUENCES,), tl.int32)
        total = tl.zeros((SEQUENCES,), tl.float64)
        for d in range(length):
            there = (g < group) & (load_int(mask, b, g, tl.cast(d, tl.int64), g < group, 1) != 0)
            number += there.to(tl.int32)
            if averaged:
                i = (b * group + g) * length + d
                x = load_float(Array(logp, logp_type, 1, 0, 0), i, 0, 0, there)
                total += x.to(tl.float64) - load_float(Array(old, old_type, 1, 0, 0), i, 0, 0, there)
        tl.store(counts + 2 * batch + b * group + g, number, g < group)
        if averaged:
            tl.store(averages + b * group + g, total / tl.maximum(number, 1), g < group)
        tokens += number
        sequences += (number > 0).to(tl.int32)
    tl.store(counts + b, tl.sum(tokens, 0))
    tl.store(counts + batch + b, tl.sum(sequences, 0))


@triton.jit
def _totals(counts, batch, group, length, COUNTED: tl.constexpr, REQUESTS: tl.constexpr):
    """Tokens and sequences of the whole batch, as float64."""
    tokens = tl.zeros((REQUESTS,), tl.int64)
    sequences = tl.zeros((REQUESTS,), tl.int64)
    for start in range(0, batch, REQUESTS):
        b = start + tl.arange(0, REQUESTS)
        if COUNTED:
            tokens += tl.load(counts + b, b < batch, 0)
            sequences += tl.load(counts + batch + b, b < batch, 0)
        else:
            tokens += tl.where(b < batch, group * length, 0)
            sequences += tl.where(b < batch, group, 0)
    return tl.sum(tokens, 0).to(tl.float64), tl.sum(sequences, 0).to(tl.float64)


@triton.jit
def _loss_counts(window, counts, batch, group, length, COUNTED: tl.constexpr, REQUESTS: tl.constexpr):
    """What the means divide by: of ``window``, or of this call where its address is 0."""
    requests = tl.cast(batch, tl.float64)
    candidates = (batch * tl.cast(group, tl.int64)).to(tl.float64)
    tokens, sequences = tl.zeros((), tl.float64), tl.zeros((), tl.float64)
    if window == 0:
        tokens, sequences = _totals(counts, batch, group, length, COUNTED, REQUESTS)
    else:
        given = window.to(tl.pointer_type(tl.int64))
        requests, candidates = tl.load(given).to(tl.float64), tl.load(given + 1).to(tl.float64)
        sequences, tokens = tl.load(given + 2).to(tl.float64), tl.load(given + 3).to(tl.float64)
    return Counts(requests, candidates, sequences, tokens)


@triton.jit
def _mean_shares(
    all_counts, counts, sequence, b, inside, batch, group, length, loss_type, horizon, COUNTED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """What a token counts in the mean over tokens, and a node in the mean over nodes; float64."""
    tokens = tl.zeros((BLOCK,), tl.int32) + length  # of this sequence
    sequences = tl.zeros((BLOCK,), tl.int32) + group  # of this request
    if COUNTED:
        tokens = tl.load(counts + 2 * batch + sequence, inside, 1)
        sequences = tl.load(counts + batch + b, inside, 1)
    requests = tl.maximum(all_counts.requests, 1.0)
    all_sequences = tl.maximum(all_counts.sequences, 1.0)
    token_share = 1.0 / (tl.maximum(tokens, 1).to(tl.float64) * all_sequences)
    node_share = 1.0 / (tl.maximum(sequences, 1).to(tl.float64) * requests)
    if loss_type == 1:
        token_share = tl.zeros((BLOCK,), tl.float64) + 1.0 / tl.maximum(all_counts.tokens, 1.0)
        node_share = tl.zeros((BLOCK,), tl.float64) + 1.0 / all_sequences
    elif loss_type == 2:
        candidates = tl.maximum(all_counts.candidates, 1.0)
        token_share = tl.zeros((BLOCK,), tl.float64) + 1.0 / (candidates * horizon)
        node_share = tl.zeros((BLOCK,), tl.float64) + 1.0 / candidates
    return token_share, node_share


@triton.jit
def _weighted(weight, x):
    """A weight of 0 turns a term off, even one that is infinite."""
    return tl.where(weight == 0, 0.0, weight * x)


@triton.jit
def _rounded(x, wide):
    """Round to float32 where not ``wide``: so a product of float32 numbers in float64 is that in float32."""
    return tl.where(wide, x, x.to(tl.float32).to(tl.float64))


@triton.jit
def _factor(ratio, bounds, a, wide):
    """What multiplies an advantage, the ratio or a bound in its place, and where it is a bound."""
    bounded = _rounded(tl.minimum(tl.maximum(ratio, bounds.low), bounds.high), wide)
    cut = _rounded(bounded * a, wide) < _rounded(ratio * a, wide)
    factor = tl.where(cut, bounded, ratio)
    cap = _rounded(bounds.cap, wide)
    capped = (a < 0) & (_rounded(factor * a, wide) < _rounded(cap * a, wide))
    return tl.where(capped, cap, factor), cut | capped


@triton.jit
def _times(factor, a, wide):
    """An advantage of 0 has no term, even if the ratio is infinite."""
    return tl.where((a == 0) & (factor == factor), 0.0, _rounded(factor * a, wide))


@triton.jit
def _objective(ratio, advantages, bounds, wide, joint):
    """Both terms before their weights, where they are cut, their weighted sum if it is clipped as one, and
    the derivative by the log-probability."""
    both = tl.zeros(ratio.shape, tl.float64)
    if joint:
        both = _weighted(advantages.whole_weight, advantages.whole)
        both += _weighted(advantages.apart_weight, advantages.apart)
        exact = wide | True
        factor, cut = _factor(ratio, bounds, both, exact)
        apart_cut = cut
        over_sequences = _times(factor, advantages.whole, exact)
        over_nodes = _times(factor, advantages.apart, exact)
        both = _times(factor, both, exact)
        slope = tl.where(cut, 0.0, both)
    else:
        factor, cut = _factor(ratio, bounds, advantages.whole, wide)
        over_sequences = _times(factor, advantages.whole, wide)
        factor, apart_cut = _factor(ratio, bounds, advantages.apart, wide)
        over_nodes = _times(factor, advantages.apart, wide)
        slope = _weighted(advantages.whole_weight, tl.where(cut, 0.0, over_sequences))
        slope += _weighted(advantages.apart_weight, tl.where(apart_cut, 0.0, over_nodes))
    return over_sequences, over_nodes, cut, apart_cut, both, slope


@triton.jit
def _divergence(difference, kl_type):
    """The estimate of the KL divergence from ``ref_logp - logp``, and its derivative by ``logp``."""
    kl = -difference
    dkl = tl.full(difference.shape, 1.0, difference.dtype)
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
    return kl.to(tl.float64), dkl.to(tl.float64)


@triton.jit
def _hold(x, bound):
    """Keep ``x`` within the bound, NaN as it is; and where it was beyond."""
    beyond = tl.abs(x) > bound
    return tl.where(beyond, tl.where(x < 0, -bound, bound), x), beyond


@kernel
def _tokens(
    logp: ADDRESS, logp_type, old: ADDRESS, old_type, ref: ADDRESS, ref_type, depth_weight: ADDRESS,
    depth_weight_type, mask: ADDRESS, mask_type, m0, m1, m2, advantage: F32, valid: BOOL, count: I32,
    group_advantage: F32, counts: I32, averages: F64, window: ADDRESS, gradient: F32, sums: F64, batch, group,
    length, global_weight: tl.float64, sibling_weight: tl.float64, kl_weight: tl.float64, low: tl.float64,
    high: tl.float64, cap: tl.float64, log_bound: tl.float64, kl_type, by_node, averaged, joint, loss_type,
    horizon: tl.float64, COUNTED: tl.constexpr, BLOCK: tl.constexpr, REQUESTS: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < batch * (tl.cast(group, tl.int64) * length)
    sequence, d = i // length, i % length
    b, g = sequence // group, sequence % group
    present = inside & (load_int(Array(mask, mask_type, m0, m1, m2), b, g, d, inside, 1) != 0)
    usable = present & (tl.load(valid + i, present, 0) != 0)
    all_counts = _loss_counts(window, counts, batch, group, length, COUNTED, REQUESTS)
    token_share, node_share = _mean_shares(
        all_counts, counts, sequence, b, inside, batch, group, length, loss_type, horizon, COUNTED, BLOCK
    )
    if by_node:
        node_share = node_share / tl.maximum(tl.load(count + i, present, 1), 1).to(tl.float64)
    if depth_weight_type >= 0:
        weight = load_float(Array(depth_weight, depth_weight_type, 1, 0, 0), d, 0, 0, inside)
        node_share = node_share * weight.to(tl.float64)
    token_share = tl.where(present, token_share, 0.0)
    node_share = tl.where(usable, node_share, 0.0)

    x = load_float(Array(logp, logp_type, 1, 0, 0), i, 0, 0, present)
    other = x  # on policy the old policy is this one
    if old_type >= 0:
        other = load_float(Array(old, old_type, 1, 0, 0), i, 0, 0, present)
    ratio, exact_log_ratio = tl.exp(x - other), x.to(tl.float64) - other
    if averaged:
        exact_log_ratio = tl.load(averages + sequence, present, 0.0)
    difference, exact_difference = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float64)
    if ref_type >= 0:
        other = load_float(Array(ref, ref_type, 1, 0, 0), i, 0, 0, present)
        difference, exact_difference = other - x, other.to(tl.float64) - x
    whole = tl.load(group_advantage + sequence, present, 0.0)
    apart = tl.load(advantage + i, usable, 0.0)
    limit = tl.full((), log_bound, tl.float64)
    most = tl.minimum(limit, _MOST)
    ordinary = (tl.abs(exact_log_ratio) <= most) & (tl.abs(exact_difference) <= most)
    ordinary = ordinary & (tl.abs(whole) <= _MOST_ADVANTAGE) & (tl.abs(apart) <= _MOST_ADVANTAGE)
    wide = present & ((averaged != 0) | (ordinary == 0))

    rho, held = ratio.to(tl.float64), tl.zeros((BLOCK,), tl.int1)
    kl, dkl = _divergence(difference, kl_type)
    if tl.max(wide.to(tl.int32), 0) > 0:
        exact_log_ratio, held = _hold(exact_log_ratio, limit)
        rho = tl.where(wide, tl.exp(exact_log_ratio), rho)
        exact_difference, difference_held = _hold(exact_difference, limit)
        exact_kl, exact_dkl = _divergence(exact_difference, kl_type)
        kl, dkl = tl.where(wide, exact_kl, kl), tl.where(wide, tl.where(difference_held, 0.0, exact_dkl), dkl)
    advantages = Advantages(
        whole.to(tl.float64),
        apart.to(tl.float64),
        global_weight * token_share,
        _weighted(sibling_weight, node_share),
    )
    bounds = Bounds(tl.full((), low, tl.float64), tl.full((), high, tl.float64), tl.full((), cap, tl.float64))
    over_sequences, over_nodes, cut, apart_cut, both, slope = _objective(rho, advantages, bounds, wide, joint)
    slope = tl.where(held, 0.0, slope)
    divergence = tl.zeros((), tl.float64)
    if ref_type >= 0:
        slope -= _weighted(kl_weight * token_share, dkl)
        divergence = tl.sum(token_share * kl, 0)
    tl.store(gradient + i, tl.where(present, 0.0 - slope, 0.0).to(tl.float32), inside)

    row = sums + tl.program_id(0).to(tl.int64) * 8
    tl.store(row, tl.sum(token_share * over_sequences, 0))
    tl.store(row + 1, tl.sum(_weighted(node_share, over_nodes), 0))
    tl.store(row + 2, divergence)
    tl.store(row + 3, tl.sum(tl.where(present, rho, 0.0), 0))
    tl.store(row + 4, tl.sum((cut & present).to(tl.int32), 0).to(tl.float64))
    tl.store(row + 5, tl.sum((apart_cut & usable).to(tl.int32), 0).to(tl.float64))
    tl.store(row + 6, tl.sum(usable.to(tl.int32), 0).to(tl.float64))
    tl.store(row + 7, tl.sum(both, 0))


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
    sibling_weight: tl.float64, kl_weight: tl.float64, joint, COUNTED: tl.constexpr, REQUESTS: tl.constexpr,
):  # fmt: skip
    tokens, _ = _totals(counts, batch, group, length, COUNTED, REQUESTS)
    tokens = tl.maximum(tokens, 1.0)
    over_sequences = _column(sums, blocks, 0, REQUESTS)
    over_nodes = _column(sums, blocks, 1, REQUESTS)
    divergence = _column(sums, blocks, 2, REQUESTS)
    valid = _column(sums, blocks, 6, REQUESTS)
    value = _weighted(kl_weight, divergence)
    if joint:
        value -= _column(sums, blocks, 7, REQUESTS)
    else:
        value = value - _weighted(global_weight, over_sequences) - _weighted(sibling_weight, over_nodes)
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
    for counted in (False, True):
        constants = {"COUNTED": counted, "REQUESTS": _REQUESTS}
        name = f"sibling_grpo_loss{', masked' * counted}"
        yield Specialization(name, _tokens, _WARPS, constants | {"BLOCK": _BLOCK})
        yield Specialization(f"{name}, sum", _add_up, 1, constants)
