"""``token_logp`` and its gradient: each pass reads the logits once, and the gradient is written once.

Over the whole vocabulary, one program of the forward pass streams a row through running maximum, mass and
``sum p log p``, one of each for every 16 bytes that a thread reads, so that no thread waits for another; one
program of the backward pass takes some blocks of a row's columns. Over a trie's legal children, one program
takes a row, whose few logits are gathered, and the gradient is zeroed before. The entries of the targets are
written last, over the others, in float64 by one program per row: a target's own gradient and its part of the
row's cancel where it is nearly certain, so they must not be rounded apart.

Two numbers per row, its maximum and the logarithm of its mass, go from one pass to the other. No workspace.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Iterator
from itertools import product

import torch
import triton
import triton.language as tl

from ..reference.token_logp import as_table
from ._array import Array, array, load_float, load_int, store_float, strided
from ._floats import InverseTemperature, cleaned, divided, inverse_of
from ._kernel import (
    ADDRESS,
    ALIGNED,
    ANY,
    BLOCKS,
    F32,
    FLOATS,
    I32,
    NUMBERS,
    Specialization,
    block_for,
    kernel,
)
from ._softmax import LOG2, LOG2E, add, alike, finite, in_octaves, nothing, tile
from ._trie import edges, filter_of, is_alive

_BLOCK, _WARPS = 4096, 8  # columns that are streamed together, and warps
_GRADIENT_BLOCK, _GRADIENT_WARPS = 2048, 4
_TARGETS = 32
_PROGRAMS = 8192  # rows are shared until there are about as many


def token_logp(logits, targets, offset, token, alive, node, temperature, max_children):
    """The dispatcher's signature; see :func:`vstar_ops.token_logp`."""
    rows = logits.shape[:-1]
    logp = torch.empty(targets.shape, device=logits.device)
    entropy = logp.new_empty(rows)
    row_max, log_mass = torch.empty_like(entropy), torch.empty_like(entropy)
    logits, targets, node = as_table(logits, rows), as_table(targets, rows, last=True), as_table(node, rows)
    batch, width, columns = logits.shape
    number = targets.shape[2]
    results = logp, entropy, row_max, log_mass
    if entropy.numel() == 0:
        return results
    inv_temperature = inverse_of(temperature)
    sizes = (*results, width, columns, number, inv_temperature)
    if offset is None or token is None or node is None:
        _vocab_statistics.launch(
            (batch * width,), _WARPS, logits, *logits.stride(), *strided(targets, 3), *sizes,
            _BLOCK, columns % 16 == 0, _TARGETS,
        )  # fmt: skip
    else:
        block, warps = block_for(max_children)
        _legal_statistics.launch(
            (batch * width,), warps,
            *strided(logits, 3), *strided(targets, 3), offset, token, *filter_of(alive, batch, token),
            *strided(node, 2), *sizes, offset.numel() - 1, token.numel(), max_children.bit_length(),
            FILTER=alive is not None, BLOCK=block, TARGETS=_TARGETS,
        )  # fmt: skip
    return results


def token_logp_backward(
    grad_logp, grad_entropy, logits, targets, offset, token, alive, node, logp, entropy, row_max,
    log_mass, temperature, max_children,
):  # fmt: skip
    """The dispatcher's signature; the entropy's gradient is left out where it is None."""
    legal, rows = node is not None, logits.shape[:-1]
    make = torch.zeros if legal else torch.empty
    gradient = make(logits.shape, dtype=logits.dtype, device=logits.device)
    logits, targets, node = as_table(logits, rows), as_table(targets, rows, last=True), as_table(node, rows)
    batch, width, columns = logits.shape
    number = targets.shape[2]
    if gradient.numel() == 0:
        return gradient
    inv_temperature = inverse_of(temperature)
    # All are [B, W] or [B, W, T] and small; contiguous ones need no strides.
    saved = [x.contiguous() for x in (logp, entropy, row_max, log_mass)]
    grad_logp, grad_entropy = as_table(grad_logp, rows, last=True), as_table(grad_entropy, rows)
    given = [None if x is None else x.contiguous() for x in (targets, grad_logp, grad_entropy)]
    arrays = [part for x in given for part in array(x)]
    common = (*arrays, *saved, width, columns, number, inv_temperature)
    if offset is None or token is None or node is None:
        blocks = min(-(-columns // _GRADIENT_BLOCK), max(1, _PROGRAMS // (batch * width)))
        turns = -(-columns // (blocks * _GRADIENT_BLOCK))
        _vocab_gradient.launch(
            (batch * width * blocks,), _GRADIENT_WARPS,
            logits, *logits.stride(), *common, gradient, blocks, turns, _GRADIENT_BLOCK, _TARGETS,
        )  # fmt: skip
    else:
        block, warps = block_for(max_children)
        _legal_gradient.launch(
            (batch * width,), warps,
            *strided(logits, 3), *common, *array(gradient), offset, token, *filter_of(alive, batch, token),
            *strided(node, 2), offset.numel() - 1, token.numel(), FILTER=alive is not None, BLOCK=block,
            TARGETS=_TARGETS,
        )  # fmt: skip
    if number:
        _target_gradient.launch((batch * width,), 1, *common, *array(gradient), TARGETS=_TARGETS)
    return gradient


@triton.jit
def _finish(r, most, mass, weighted, inv_temperature, entropy, row_max, log_mass):
    """Join the running sums and write a row's statistics."""
    largest, mass, weighted = alike(most, mass, weighted, inv_temperature)
    total = tl.sum(mass.to(tl.float64), 0)
    octaves = tl.sum(weighted.to(tl.float64), 0)
    max_value = tl.where(total > 0, largest, float("-inf"))
    total = tl.where(total > 0, total, 1.0)
    log_total = tl.log(total)
    h = tl.maximum(log_total - octaves * LOG2 / total, 0.0)
    tl.store(entropy + r, h.to(tl.float32))
    tl.store(row_max + r, max_value)
    tl.store(log_mass + r, log_total.to(tl.float32))
    return max_value, log_total.to(tl.float32)


@triton.jit
def _write_logp(logp, at, inside, target, found, z, max_value, log_total, inv_temperature):
    """Padding has 0, what is not found or at -inf has -inf."""
    possible = found & (z > float("-inf"))
    value = divided(tl.where(possible, z, 0.0) - max_value, inv_temperature) - log_total
    value = tl.where(possible, value, float("-inf"))
    tl.store(logp + at, tl.where(target < 0, 0.0, value), inside)


@kernel
def _vocab_statistics(
    logits: ANY, z0: ALIGNED, z1: ALIGNED, z2: ALIGNED, targets: ADDRESS, targets_type, t0, t1, t2, logp: F32,
    entropy: F32, row_max: F32, log_mass: F32, width, columns: ALIGNED, number, inv_temperature: NUMBERS,
    BLOCK: tl.constexpr, WIDE: tl.constexpr, TARGETS: tl.constexpr,
):  # fmt: skip
    targets = Array(targets, targets_type, t0, t1, t2)
    r = tl.program_id(0).to(tl.int64)
    b, w = r // width, r % width
    row = logits + b * z0 + w * z1
    LANES: tl.constexpr = 128 // logits.dtype.element_ty.primitive_bitwidth
    most, mass, weighted = nothing(BLOCK // LANES)
    column = tile(BLOCK // LANES, LANES, WIDE).to(tl.int64)
    whole = columns // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        z = tl.load(row + (start + column) * z2).to(tl.float32)
        most, mass, weighted = add(finite(z), most, mass, weighted, inv_temperature)
    if whole < columns:
        v = whole + column
        z = tl.load(row + v * z2, v < columns, float("-inf")).to(tl.float32)
        most, mass, weighted = add(finite(z), most, mass, weighted, inv_temperature)
    max_value, log_total = _finish(r, most, mass, weighted, inv_temperature, entropy, row_max, log_mass)
    for start in range(0, number, TARGETS):
        t = start + tl.arange(0, TARGETS).to(tl.int64)
        target = load_int(targets, b, w, t, t < number, -1)
        found = (target >= 0) & (target < columns)
        z = cleaned(tl.load(row + tl.where(found, target, 0) * z2, found, 0.0).to(tl.float32), found)
        _write_logp(logp, r * number + t, t < number, target, found, z, max_value, log_total, inv_temperature)


@triton.jit
def _load_children(
    logits, b, w, token, alive, start, end, columns, FILTER: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Columns and logits of a block of edges, and which of them are legal."""
    edge = start + tl.arange(0, BLOCK)
    v = tl.load(token + edge, edge < end, -1).to(tl.int64)
    inside = (v >= 0) & (v < columns)
    if FILTER:
        inside &= is_alive(alive, edge + 1, inside)
    return v, cleaned(load_float(logits, b, w, v, inside), inside), inside


@triton.jit
def _find(token, alive, begin, end, target, bits, FILTER: tl.constexpr, TARGETS: tl.constexpr):
    """Whether targets are among a node's legal children, whose tokens rise: a binary search."""
    low = tl.zeros((TARGETS,), tl.int32) + begin
    high = tl.zeros((TARGETS,), tl.int32) + end
    for _ in range(bits):
        middle = (low + high) // 2
        below = (low < high) & (tl.load(token + middle, low < high, 0).to(tl.int64) < target)
        high = tl.where(below | (low >= high), high, middle)
        low = tl.where(below, middle + 1, low)
    inside = (low < end) & (target >= 0)
    if FILTER:
        inside &= is_alive(alive, low + 1, inside)
    return inside & (tl.load(token + low, inside, -1).to(tl.int64) == target)


@kernel
def _legal_statistics(
    logits: ADDRESS, logits_type, z0, z1, z2, targets: ADDRESS, targets_type, t0, t1, t2, offset: I32,
    token: I32, alive: I32, words, shared, node: ADDRESS, node_type, n0, n1, logp: F32, entropy: F32,
    row_max: F32, log_mass: F32, width, columns, number, inv_temperature: NUMBERS, num_nodes, num_edges, bits,
    FILTER: tl.constexpr, BLOCK: tl.constexpr, TARGETS: tl.constexpr,
):  # fmt: skip
    logits, targets = Array(logits, logits_type, z0, z1, z2), Array(targets, targets_type, t0, t1, t2)
    node = Array(node, node_type, n0, n1, 0)
    r = tl.program_id(0).to(tl.int64)
    b, w = r // width, r % width
    begin, end = edges(offset, load_int(node, b, w, 0, True, -1), num_nodes, num_edges)
    alive += b // shared * words
    most, mass, weighted = nothing(BLOCK)
    for start in range(begin, end, BLOCK):
        _, z, _ = _load_children(logits, b, w, token, alive, start, end, columns, FILTER, BLOCK)
        most, mass, weighted = add(z[:, None], most, mass, weighted, inv_temperature)
    max_value, log_total = _finish(r, most, mass, weighted, inv_temperature, entropy, row_max, log_mass)
    for start in range(0, number, TARGETS):
        t = start + tl.arange(0, TARGETS).to(tl.int64)
        target = load_int(targets, b, w, t, t < number, -1)
        found = _find(token, alive, begin, end, target, bits, FILTER, TARGETS) & (target < columns)
        z = cleaned(load_float(logits, b, w, target, found), found)
        _write_logp(logp, r * number + t, t < number, target, found, z, max_value, log_total, inv_temperature)


# Targets and their gradients, [B, W, T], that of the entropy, and results; all contiguous.
Saved = namedtuple(
    "Saved",
    "targets targets_type grad_logp grad_logp_type grad_entropy grad_entropy_type logp entropy number",
)


@triton.jit
def _target_grad(saved, r, t):
    """Targets, -1 for those without a gradient (padding, -inf), and their gradients in float64."""
    at = r * saved.number + t
    targets = Array(saved.targets, saved.targets_type, 1, 0, 0)
    target = load_int(targets, at, 0, 0, t < saved.number, -1)
    possible = tl.load(saved.logp + at, t < saved.number, 0.0) > float("-inf")
    target = tl.where(possible, target, -1)
    grad_logp = Array(saved.grad_logp, saved.grad_logp_type, 1, 0, 0)
    return target, load_float(grad_logp, at, 0, 0, target >= 0).to(tl.float64)


@triton.jit
def _divided_last(inv_temperature):
    """Whether a gradient is divided by the temperature last: terms of it that cancel may be infinite."""
    return (inv_temperature.first > 1e18) | (inv_temperature.second != 1.0)


@triton.jit
def _coefficients(saved, r, inv_temperature, TARGETS: tl.constexpr):
    """``slope`` and ``curve`` of the row's gradient ``p_v (slope + curve log p_v) / tau``, in float64."""
    total = tl.zeros((TARGETS,), tl.float64)
    for start in range(0, saved.number, TARGETS):
        _, grad = _target_grad(saved, r, start + tl.arange(0, TARGETS).to(tl.int64))
        total += grad
    one = tl.zeros((1,), tl.int64)
    grad_entropy = Array(saved.grad_entropy, saved.grad_entropy_type, 1, 0, 0)
    curve = -tl.sum(load_float(grad_entropy, one + r, 0, 0, True).to(tl.float64), 0)
    entropy = tl.load(saved.entropy + r).to(tl.float64)
    # So little is what bounded exponents leave of 0.
    entropy = tl.where(_divided_last(inv_temperature) & (entropy < 1e-30), 0.0, entropy)
    return curve * entropy - tl.sum(total, 0), curve


@triton.jit
def _row_grad(z, max_value, log_total, slope, curve, inv_temperature):
    """The gradient of a block of logits."""
    if not _divided_last(inv_temperature):
        slope, curve = slope * inv_temperature.first, curve * inv_temperature.first
    octaves = in_octaves(z - max_value, inv_temperature) - log_total * LOG2E
    p = tl.exp2(octaves)
    value = p * tl.fma(octaves, (curve * LOG2).to(tl.float32), slope.to(tl.float32))
    if _divided_last(inv_temperature):
        value = divided(value, inv_temperature)
    return tl.where(p > 0, value, 0.0)


@kernel
def _vocab_gradient(
    logits: ANY, z0: ALIGNED, z1: ALIGNED, z2: ALIGNED, targets: ADDRESS, targets_type, grad_logp: ADDRESS,
    grad_logp_type, grad_entropy: ADDRESS, grad_entropy_type, logp: F32, entropy: F32, row_max: F32,
    log_mass: F32, width, columns: ALIGNED, number, inv_temperature: NUMBERS, gradient: ANY, blocks, turns,
    BLOCK: tl.constexpr, TARGETS: tl.constexpr,
):  # fmt: skip
    saved = Saved(
        targets, targets_type, grad_logp, grad_logp_type, grad_entropy, grad_entropy_type, logp, entropy,
        number,
    )  # fmt: skip
    r = (tl.program_id(0) // blocks).to(tl.int64)
    b, w = r // width, r % width
    slope, curve = _coefficients(saved, r, inv_temperature, TARGETS)
    max_value, log_total = tl.load(row_max + r), tl.load(log_mass + r)
    first = (tl.program_id(0) % blocks) * turns
    for turn in range(first, tl.minimum(first + turns, tl.cdiv(columns, BLOCK))):
        v = tl.cast(turn, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        z = tl.load(logits + b * z0 + w * z1 + v * z2, v < columns, 0.0).to(tl.float32)
        value = _row_grad(finite(z), max_value, log_total, slope, curve, inv_temperature)
        tl.store(gradient + r * columns + v, value.to(gradient.dtype.element_ty), v < columns)


@kernel
def _legal_gradient(
    logits: ADDRESS, logits_type, z0, z1, z2, targets: ADDRESS, targets_type, grad_logp: ADDRESS,
    grad_logp_type, grad_entropy: ADDRESS, grad_entropy_type, logp: F32, entropy: F32, row_max: F32,
    log_mass: F32, width, columns, number, inv_temperature: NUMBERS, gradient: ADDRESS, gradient_type,
    offset: I32, token: I32, alive: I32, words, shared, node: ADDRESS, node_type, n0, n1, num_nodes,
    num_edges, FILTER: tl.constexpr, BLOCK: tl.constexpr, TARGETS: tl.constexpr,
):  # fmt: skip
    saved = Saved(
        targets, targets_type, grad_logp, grad_logp_type, grad_entropy, grad_entropy_type, logp, entropy,
        number,
    )  # fmt: skip
    logits, node = Array(logits, logits_type, z0, z1, z2), Array(node, node_type, n0, n1, 0)
    r = tl.program_id(0).to(tl.int64)
    b, w = r // width, r % width
    slope, curve = _coefficients(saved, r, inv_temperature, TARGETS)
    max_value, log_total = tl.load(row_max + r), tl.load(log_mass + r)
    begin, end = edges(offset, load_int(node, b, w, 0, True, -1), num_nodes, num_edges)
    alive += b // shared * words
    for start in range(begin, end, BLOCK):
        v, z, inside = _load_children(logits, b, w, token, alive, start, end, columns, FILTER, BLOCK)
        value = _row_grad(z, max_value, log_total, slope, curve, inv_temperature)
        store_float(gradient, gradient_type, r * columns + v, value, inside)


@kernel
def _target_gradient(
    targets: ADDRESS, targets_type, grad_logp: ADDRESS, grad_logp_type, grad_entropy: ADDRESS,
    grad_entropy_type, logp: F32, entropy: F32, row_max: F32, log_mass: F32, width, columns, number,
    inv_temperature: NUMBERS, gradient: ADDRESS, gradient_type, TARGETS: tl.constexpr,
):  # fmt: skip
    saved = Saved(
        targets, targets_type, grad_logp, grad_logp_type, grad_entropy, grad_entropy_type, logp, entropy,
        number,
    )  # fmt: skip
    r = tl.program_id(0).to(tl.int64)
    slope, curve = _coefficients(saved, r, inv_temperature, TARGETS)
    for start in range(0, number, TARGETS):
        t = start + tl.arange(0, TARGETS).to(tl.int64)
        target, _ = _target_grad(saved, r, t)
        total = tl.zeros((TARGETS,), tl.float64)
        for first in range(0, number, TARGETS):
            other, grad = _target_grad(saved, r, first + tl.arange(0, TARGETS).to(tl.int64))
            total += tl.sum(tl.where(target[:, None] == other[None, :], grad[None, :], 0.0), 1)
        own_logp = tl.load(logp + r * number + t, target >= 0, 0.0).to(tl.float64)
        value = divided(tl.exp(own_logp) * (slope + curve * own_logp) + total, inv_temperature)
        # Equal targets write the same number.
        store_float(gradient, gradient_type, r * columns + target, value.to(tl.float32), target >= 0)


def specializations() -> Iterator[Specialization]:
    """Everything that is compiled for logits whose last stride is 1."""
    inverse = {"inv_temperature": InverseTemperature("fp32", "fp32")}
    targets = {"TARGETS": _TARGETS}
    for dtype, floats in FLOATS.items():
        types = {"logits": floats, "gradient": floats, **inverse}
        for wide in (True, False):
            constants = {"z2": 1, "BLOCK": _BLOCK, "WIDE": wide} | targets
            name = f"token_logp {dtype}{'' if wide else ', odd rows'}"
            yield Specialization(name, _vocab_statistics, _WARPS, constants, types)
        name = f"token_logp gradient {dtype}"
        constants = {"z2": 1, "BLOCK": _GRADIENT_BLOCK} | targets
        yield Specialization(name, _vocab_gradient, _GRADIENT_WARPS, constants, types)
    for (block, warps), filters in product(map(block_for, BLOCKS), (False, True)):
        few, end = {"FILTER": filters, "BLOCK": block} | targets, ", filter" * filters
        yield Specialization(f"token_logp legal {block}{end}", _legal_statistics, warps, few, inverse)
        yield Specialization(f"token_logp legal gradient {block}{end}", _legal_gradient, warps, few, inverse)
    yield Specialization("token_logp gradient of targets", _target_gradient, 1, targets, inverse)
