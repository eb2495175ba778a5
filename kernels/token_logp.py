"""``token_logp`` and its gradient: the logits are read once a pass, and the gradient written once.

Over the whole vocabulary a program of the forward pass streams a row through running maximum, mass and
``sum p log p``; a program of the backward pass takes a block of a row's columns. Over a trie's legal children
a program takes a row, whose few logits are gathered, and the gradient is zeroed before. The entries of the
targets are written last, over the others, in float64 by a program a row: a target's own gradient and its
part of the row's cancel where it is nearly certain, so they must not be rounded apart.

Two numbers a row, its maximum and the logarithm of its mass, go from one pass to the other. No workspace.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import next_power_of_2

from ._array import array, load_float, load_int, store_float
from ._specialization import FLOATS, OPTIONS, Specialization

_BLOCK, _WARPS = 4096, 8  # columns that are streamed together, and warps
_GRADIENT_BLOCK, _GRADIENT_WARPS = 2048, 4
_TARGETS = 32


def token_logp(
    logits: Tensor,
    targets: Tensor,
    offset: Tensor | None,
    token: Tensor | None,
    node: Tensor | None,
    temperature: float,
    max_children: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The dispatcher's signature; see :func:`vstar_ops.token_logp`."""
    batch, width, columns = logits.shape
    number = targets.shape[2]
    logp = torch.empty(targets.shape, device=logits.device)
    entropy, top, log_mass = (torch.empty(batch, width, device=logits.device) for _ in range(3))
    results = logp, entropy, top, log_mass
    if entropy.numel() == 0:
        return results
    sizes = (width, columns, number, *logits.stride(), *targets.stride())
    scale = min(1.0 / temperature, 3e38)
    if offset is None or token is None or node is None:
        _vocab_statistics[(batch * width,)](
            logits, *array(targets), *results, *sizes, scale,
            BLOCK=_BLOCK, TARGETS=_TARGETS, num_warps=_WARPS, **OPTIONS,
        )  # fmt: skip
    else:
        block, warps = _children(max_children)
        _legal_statistics[(batch * width,)](
            *array(logits), *array(targets), offset, token, *array(node), *results, *sizes, *node.stride(),
            offset.numel() - 1, token.numel(), max_children.bit_length(), scale,
            BLOCK=block, TARGETS=_TARGETS, num_warps=warps, **OPTIONS,
        )  # fmt: skip
    return results


def token_logp_backward(
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    logits: Tensor,
    targets: Tensor,
    offset: Tensor | None,
    token: Tensor | None,
    node: Tensor | None,
    logp: Tensor,
    entropy: Tensor,
    top: Tensor,
    log_mass: Tensor,
    temperature: float,
    max_children: int,
) -> Tensor:
    """The dispatcher's signature; the entropy's gradient is left out where it is None."""
    batch, width, columns = logits.shape
    number = targets.shape[2]
    legal = node is not None
    make = torch.zeros if legal else torch.empty
    gradient = make(logits.shape, dtype=logits.dtype, device=logits.device)
    if gradient.numel() == 0:
        return gradient
    scale = min(1.0 / temperature, 3e38)
    # All are [B, W] or [B, W, T] and small; contiguous ones need no strides.
    logp, entropy, top, log_mass, targets = (x.contiguous() for x in (logp, entropy, top, log_mass, targets))
    given = [None if x is None else x.contiguous() for x in (grad_logp, grad_entropy)]
    saved = (*array(targets), *array(given[0]), *array(given[1]), logp, entropy)
    sizes = (width, columns, number, *logits.stride())
    if offset is None or token is None or node is None:
        blocks = triton.cdiv(columns, _GRADIENT_BLOCK)
        _vocab_gradient[(batch * width * blocks,)](
            logits, *saved, top, log_mass, gradient, *sizes, blocks, scale,
            BLOCK=_GRADIENT_BLOCK, TARGETS=_TARGETS, num_warps=_GRADIENT_WARPS, **OPTIONS,
        )  # fmt: skip
    else:
        block, warps = _children(max_children)
        _legal_gradient[(batch * width,)](
            *array(logits), *saved, top, log_mass, *array(gradient), offset, token, *array(node), *sizes,
            *node.stride(), offset.numel() - 1, token.numel(), scale,
            BLOCK=block, TARGETS=_TARGETS, num_warps=warps, **OPTIONS,
        )  # fmt: skip
    if number:
        _target_gradient[(batch * width,)](
            *saved, *array(gradient), columns, number, scale, TARGETS=_TARGETS, num_warps=1, **OPTIONS
        )
    return gradient


def _children(most: int) -> tuple[int, int]:
    """Children that are looked at together, and warps."""
    block = min(1024, max(32, next_power_of_2(most)))
    return block, max(1, block // 256)


@triton.jit
def _clean(z, inside):
    """NaN reads as -inf, +inf as the largest finite float; -inf where not inside."""
    return tl.where(inside & (z == z), tl.minimum(z, 3.4028234663852886e38), float("-inf"))


@triton.jit
def _add(z, best, mass, weighted, scale):
    """Take a block of logits into a row's running maximum and sums, a sum a lane."""
    new = tl.maximum(best, tl.max(z, 0))
    center = tl.where(new == float("-inf"), 0.0, new)
    # What lies far below is 0 either way; bounded, no product is 0 times infinity.
    fall = tl.where(best == float("-inf"), 0.0, tl.maximum((best - center) * scale, -100.0))
    d = tl.maximum((z - center) * scale, -100.0)
    e = tl.where(z == float("-inf"), 0.0, tl.exp(d))
    shrink = tl.exp(fall)
    return new, mass * shrink + e, (weighted + fall * mass) * shrink + e * d


@triton.jit
def _finish(r, best, mass, weighted, entropy, top, log_mass):
    """Write a row's statistics."""
    total = tl.sum(mass.to(tl.float64), 0)
    total = tl.where(total > 0, total, 1.0)
    log_total = tl.log(total)
    h = tl.maximum(log_total - tl.sum(weighted.to(tl.float64), 0) / total, 0.0)
    tl.store(entropy + r, h.to(tl.float32))
    tl.store(top + r, best)
    tl.store(log_mass + r, log_total.to(tl.float32))
    return log_total.to(tl.float32)


@triton.jit
def _write_logp(logp, at, inside, target, found, z, best, log_total, scale):
    """Padding has 0, what is not found or at -inf has -inf."""
    alive = found & (z > float("-inf"))
    value = tl.where(alive, (tl.where(alive, z, 0.0) - best) * scale - log_total, float("-inf"))
    tl.store(logp + at, tl.where(target < 0, 0.0, value), inside)


_INTEGERS = ["targets", "targets_type", "width", "number", "t0", "t1", "t2"]
_ROW = ["columns", "z0", "z1"]  # where rows are streamed, their alignment decides how much is read at once


@triton.jit(do_not_specialize=_INTEGERS)
def _vocab_statistics(
    logits, targets: tl.int64, targets_type, logp, entropy, top, log_mass, width, columns, number, z0, z1, z2,
    t0, t1, t2, scale, BLOCK: tl.constexpr, TARGETS: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64)
    b, w = r // width, r % width
    row = logits + b * z0 + w * z1
    best = tl.full((), float("-inf"), tl.float32)
    mass = tl.zeros((BLOCK,), tl.float32)
    weighted = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        v = start + tl.arange(0, BLOCK).to(tl.int64)
        z = _clean(tl.load(row + v * z2, v < columns, 0.0).to(tl.float32), v < columns)
        best, mass, weighted = _add(z, best, mass, weighted, scale)
    log_total = _finish(r, best, mass, weighted, entropy, top, log_mass)
    for start in range(0, number, TARGETS):
        t = start + tl.arange(0, TARGETS).to(tl.int64)
        target = load_int(targets, targets_type, b * t0 + w * t1 + t * t2, t < number, -1)
        found = (target >= 0) & (target < columns)
        z = _clean(tl.load(row + tl.where(found, target, 0) * z2, found, 0.0).to(tl.float32), found)
        _write_logp(logp, r * number + t, t < number, target, found, z, best, log_total, scale)


@triton.jit
def _edges(offset, node, node_type, at, num_nodes, num_edges):
    """First edge and one past the last of a node; none for what is not a node."""
    n = load_int(node, node_type, at, True, -1)
    live = (n >= 0) & (n < num_nodes)
    begin = tl.load(offset + n, live, 0)
    end = tl.load(offset + n + 1, live, 0)
    sound = (begin >= 0) & (end <= num_edges) & (begin <= end)
    return tl.where(sound, begin, 0), tl.where(sound, end, 0)


@triton.jit(
    do_not_specialize=[
        *_INTEGERS, *_ROW, "logits", "logits_type", "node", "node_type", "z2", "n0", "n1", "num_nodes",
        "num_edges", "bits",
    ]
)  # fmt: skip
def _legal_statistics(
    logits: tl.int64, logits_type, targets: tl.int64, targets_type, offset, token, node: tl.int64, node_type,
    logp, entropy, top, log_mass, width, columns, number, z0, z1, z2, t0, t1, t2, n0, n1, num_nodes,
    num_edges, bits, scale, BLOCK: tl.constexpr, TARGETS: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64)
    b, w = r // width, r % width
    row = b * z0 + w * z1
    begin, end = _edges(offset, node, node_type, b * n0 + w * n1, num_nodes, num_edges)
    best = tl.full((), float("-inf"), tl.float32)
    mass = tl.zeros((BLOCK,), tl.float32)
    weighted = tl.zeros((BLOCK,), tl.float32)
    for start in range(begin, end, BLOCK):
        edge = start + tl.arange(0, BLOCK)
        v = tl.load(token + edge, edge < end, -1).to(tl.int64)
        inside = (v >= 0) & (v < columns)
        z = _clean(load_float(logits, logits_type, row + v * z2, inside), inside)
        best, mass, weighted = _add(z, best, mass, weighted, scale)
    log_total = _finish(r, best, mass, weighted, entropy, top, log_mass)
    for start in range(0, number, TARGETS):
        t = start + tl.arange(0, TARGETS).to(tl.int64)
        target = load_int(targets, targets_type, b * t0 + w * t1 + t * t2, t < number, -1)
        low = tl.zeros((TARGETS,), tl.int32) + begin  # children are sorted: the first not below the target
        high = tl.zeros((TARGETS,), tl.int32) + end
        for _ in range(bits):
            middle = (low + high) // 2
            below = (low < high) & (tl.load(token + middle, low < high, 0).to(tl.int64) < target)
            high = tl.where(below | (low >= high), high, middle)
            low = tl.where(below, middle + 1, low)
        found = (low < end) & (target >= 0) & (target < columns)
        found = found & (tl.load(token + low, found, -1).to(tl.int64) == target)
        z = _clean(load_float(logits, logits_type, row + target * z2, found), found)
        _write_logp(logp, r * number + t, t < number, target, found, z, best, log_total, scale)


@triton.jit
def _coefficients(
    r, targets, targets_type, g_logp, g_logp_type, g_entropy, g_entropy_type, logp, entropy, number,
    TARGETS: tl.constexpr,
):  # fmt: skip
    """``slope`` and ``curve`` of the row's gradient ``p_v (slope + curve log p_v) / tau``, in float64."""
    pulls = tl.zeros((TARGETS,), tl.float64)
    for start in range(0, number, TARGETS):
        t = start + tl.arange(0, TARGETS).to(tl.int64)
        _, g = _pull(targets, targets_type, g_logp, g_logp_type, logp, r * number + t, t < number)
        pulls += g
    one = tl.zeros((1,), tl.int64)
    curve = -tl.sum(load_float(g_entropy, g_entropy_type, one + r, True).to(tl.float64), 0)
    return curve * tl.load(entropy + r).to(tl.float64) - tl.sum(pulls, 0), curve


@triton.jit
def _pull(targets, targets_type, g_logp, g_logp_type, logp, at, inside):
    """Targets, -1 for those without a gradient (padding, -inf), and their gradients in float64."""
    target = load_int(targets, targets_type, at, inside, -1)
    target = tl.where(tl.load(logp + at, inside, 0.0) > float("-inf"), target, -1)
    return target, load_float(g_logp, g_logp_type, at, target >= 0).to(tl.float64)


@triton.jit
def _slopes(z, best, log_total, slope, curve, scale):
    """The gradient of a block of logits."""
    alive = z > float("-inf")
    d = tl.where(alive, (tl.where(alive, z, 0.0) - best) * scale - log_total, -100.0)
    d = tl.maximum(d, -100.0)
    return tl.where(alive, tl.exp(d) * (slope + curve * d), 0.0)


_SAVED = [
    "targets", "targets_type", "g_logp", "g_logp_type", "g_entropy", "g_entropy_type", "number"
]  # fmt: skip


@triton.jit(do_not_specialize=[*_SAVED, "width", "blocks"])
def _vocab_gradient(
    logits, targets: tl.int64, targets_type, g_logp: tl.int64, g_logp_type, g_entropy: tl.int64,
    g_entropy_type, logp, entropy, top, log_mass, gradient, width, columns, number, z0, z1, z2, blocks,
    scale, BLOCK: tl.constexpr, TARGETS: tl.constexpr,
):  # fmt: skip
    r = (tl.program_id(0) // blocks).to(tl.int64)
    b, w = r // width, r % width
    slope, curve = _coefficients(
        r, targets, targets_type, g_logp, g_logp_type, g_entropy, g_entropy_type, logp, entropy,
        number, TARGETS,
    )  # fmt: skip
    v = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(logits + b * z0 + w * z1 + v * z2, v < columns, 0.0).to(tl.float32)
    value = _slopes(
        _clean(z, v < columns), tl.load(top + r), tl.load(log_mass + r), (slope * scale).to(tl.float32),
        (curve * scale).to(tl.float32), scale,
    )  # fmt: skip
    tl.store(gradient + r * columns + v, value.to(gradient.dtype.element_ty), v < columns)


@triton.jit(
    do_not_specialize=[
        *_SAVED, *_ROW, "width", "logits", "logits_type", "gradient", "gradient_type", "node", "node_type",
        "z2", "n0", "n1", "num_nodes", "num_edges",
    ]
)  # fmt: skip
def _legal_gradient(
    logits: tl.int64, logits_type, targets: tl.int64, targets_type, g_logp: tl.int64, g_logp_type,
    g_entropy: tl.int64, g_entropy_type, logp, entropy, top, log_mass, gradient: tl.int64, gradient_type,
    offset, token, node: tl.int64, node_type, width, columns, number, z0, z1, z2, n0, n1, num_nodes,
    num_edges, scale, BLOCK: tl.constexpr, TARGETS: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64)
    b, w = r // width, r % width
    slope, curve = _coefficients(
        r, targets, targets_type, g_logp, g_logp_type, g_entropy, g_entropy_type, logp, entropy,
        number, TARGETS,
    )  # fmt: skip
    best, log_total = tl.load(top + r), tl.load(log_mass + r)
    begin, end = _edges(offset, node, node_type, b * n0 + w * n1, num_nodes, num_edges)
    for start in range(begin, end, BLOCK):
        edge = start + tl.arange(0, BLOCK)
        v = tl.load(token + edge, edge < end, -1).to(tl.int64)
        inside = (v >= 0) & (v < columns)
        z = _clean(load_float(logits, logits_type, b * z0 + w * z1 + v * z2, inside), inside)
        value = _slopes(
            z, best, log_total, (slope * scale).to(tl.float32), (curve * scale).to(tl.float32), scale
        )
        store_float(gradient, gradient_type, r * columns + v, value, inside)


@triton.jit(do_not_specialize=[*_SAVED, "gradient", "gradient_type", "columns"])
def _target_gradient(
    targets: tl.int64, targets_type, g_logp: tl.int64, g_logp_type, g_entropy: tl.int64,
    g_entropy_type, logp, entropy, gradient: tl.int64, gradient_type, columns, number, scale,
    TARGETS: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64)
    slope, curve = _coefficients(
        r, targets, targets_type, g_logp, g_logp_type, g_entropy, g_entropy_type, logp, entropy,
        number, TARGETS,
    )  # fmt: skip
    for start in range(0, number, TARGETS):
        t = start + tl.arange(0, TARGETS).to(tl.int64)
        target, _ = _pull(targets, targets_type, g_logp, g_logp_type, logp, r * number + t, t < number)
        total = tl.zeros((TARGETS,), tl.float64)
        for first in range(0, number, TARGETS):
            u = first + tl.arange(0, TARGETS).to(tl.int64)
            other, g = _pull(targets, targets_type, g_logp, g_logp_type, logp, r * number + u, u < number)
            total += tl.sum(tl.where(target[:, None] == other[None, :], g[None, :], 0.0), 1)
        own = tl.load(logp + r * number + t, target >= 0, 0.0).to(tl.float64)
        value = (tl.exp(own) * (slope + curve * own) + total) * scale
        # Equal targets write the same number.
        store_float(gradient, gradient_type, r * columns + target, value.to(tl.float32), target >= 0)


def specializations() -> Iterator[Specialization]:
    """Everything that is compiled for logits whose last stride is 1."""
    addresses = ("logits", "targets", "g_logp", "g_entropy", "node", "gradient")
    types = dict.fromkeys(addresses, "i64") | {"offset": "*i32", "token": "*i32", "scale": "fp32"}
    types |= dict.fromkeys(("logp", "entropy", "top", "log_mass"), "*fp32")
    wide = {"BLOCK": _BLOCK, "TARGETS": _TARGETS, "z2": 1}
    gradient = wide | {"BLOCK": _GRADIENT_BLOCK}
    for dtype, floats in FLOATS.items():
        given = types | {"logits": floats, "gradient": floats} | dict.fromkeys(_ROW, "i32:16")
        yield Specialization(f"token_logp {dtype}", _vocab_statistics, given, wide, _WARPS)
        yield Specialization(
            f"token_logp gradient {dtype}", _vocab_gradient, given, gradient, _GRADIENT_WARPS
        )
    for most in (32, 64, 128, 256, 512, 1024):
        block, warps = _children(most)
        few = {"BLOCK": block, "TARGETS": _TARGETS}
        yield Specialization(f"token_logp legal {block}", _legal_statistics, types, few, warps)
        yield Specialization(f"token_logp legal gradient {block}", _legal_gradient, types, few, warps)
    yield Specialization("token_logp gradient of targets", _target_gradient, types, {"TARGETS": _TARGETS}, 1)
