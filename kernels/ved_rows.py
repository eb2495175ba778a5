"""What surrounds the model's forward in a round of value-guided decoding.

``ved_inputs``: rows side by side. ``ved_evaluate``: every row is a request of ``expand_topk`` with one
prefix, once with noise and once in the order of the leaves; one program per row then keeps what belongs to
each list. Five launches, and of ``expand_topk`` the limits and workspaces. ``ved_beams``: one program per
request. What was kept of the first list is read again, to leave it out of the other.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton.language as tl
from torch import Tensor
from triton import jit

from ._array import Array, load_float, load_int, strided
from ._kernel import ADDRESS, BOOL, F32, I32, I64, Specialization, kernel
from .expand_topk import expand_topk

_BLOCK = 128  # rows, or entries of a list, that are looked at together
_BEAMS = 32  # entries of a list of beams


def ved_inputs(
    tree_slot: Tensor, token: Tensor, parent: Tensor, node: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The dispatcher's signature; see :func:`vstar_ops.ved_inputs`."""
    (batch, rows), device = node.shape, node.device
    slot, chosen = (torch.empty(batch, rows, dtype=torch.int64, device=device) for _ in range(2))
    unused = torch.empty(batch, rows, dtype=torch.bool, device=device)
    if batch * rows:
        _ved_inputs.launch(
            (-(-batch * rows // _BLOCK),), 1,
            tree_slot, token, *strided(parent, 2), *strided(node, 2), slot, chosen, unused,
            capacity=tree_slot.shape[1], num_edges=token.numel(), rows=rows, total=batch * rows, BLOCK=_BLOCK,
        )  # fmt: skip
    return slot, chosen, unused


@kernel
def _ved_inputs(
    tree_slot: I64, token: I32, parent: ADDRESS, parent_type, p0, p1, node: ADDRESS, node_type, n0, n1,
    out_slot: I64, out_token: I64, out_unused: BOOL, capacity, num_edges, rows, total, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < total
    b, p = i // rows, i % rows
    name = load_int(Array(node, node_type, n0, n1, 0), b, p, 0, inside, -1)
    above = load_int(Array(parent, parent_type, p0, p1, 0), b, p, 0, inside, -1)
    used = name >= 0
    known = used & (above >= 0) & (above < capacity)
    there = used & (name >= 1) & (name <= num_edges)
    tl.store(out_slot + i, tl.load(tree_slot + b * capacity + above, known, -1), inside)
    tl.store(out_token + i, tl.load(token + name - 1, there, 0).to(tl.int64), inside)
    tl.store(out_unused + i, name < 0, inside)


def ved_evaluate(
    logits, offset, token, alive, only_leaf, node, logp, value, child_value, seed, children, leaves,
    value_weight, child_weight, logp_weight, temperature, vocab, max_children, first_closed, first_leaf,
    expand_root,
):  # fmt: skip
    """The dispatcher's signature; see :func:`vstar_ops.ved_evaluate`."""
    (batch, rows), device = node.shape, logits.device
    every, all_children = (batch * rows, 1), max(1, max_children)

    def ranked(x, seeds, by_logp):
        return expand_topk(
            logits.reshape(*every, logits.shape[2]), offset, token, alive, node.reshape(every), None,
            all_children, logp.reshape(every), None, None, x, seeds, by_logp, child_weight, 0.0, temperature,
            vocab, max_children,
        )  # fmt: skip

    _, drawn_logp, _, _, drawn, _, entropy = ranked(None, seed.repeat_interleave(rows), 1.0)
    x = None if child_value is None else child_value.reshape(*every, logits.shape[2])
    rank, ranked_logp, _, _, ranked_node, _, _ = ranked(x, None, 1.0 if x is None else logp_weight)

    def empty(dtype, *width):
        return torch.empty(batch, rows, *width, dtype=dtype, device=device)

    own = empty(torch.float32)
    num_children, child_node = empty(torch.int32), empty(torch.int32, children)
    child_logp, leaf_node = empty(torch.float32, children), empty(torch.int32, leaves)
    leaf_logp, leaf_score = (empty(torch.float32, leaves) for _ in range(2))
    num_leaves = empty(torch.int32)
    if batch * rows:
        _ved_lists.launch(
            (batch * rows,), 1,
            *strided(node, 2), *strided(value, 2), drawn, drawn_logp, ranked_node, ranked_logp, rank,
            offset if only_leaf is None else only_leaf, own, num_children, child_node, child_logp, leaf_node,
            leaf_logp, leaf_score, num_leaves, rows=rows, listed=all_children, children=children,
            leaves=leaves, num_nodes=0 if only_leaf is None else only_leaf.numel(),
            valued=int(child_value is not None), first_closed=first_closed, first_leaf=first_leaf,
            expand_root=int(expand_root), value_weight=value_weight, logp_weight=logp_weight, BLOCK=_BLOCK,
        )  # fmt: skip
    return (
        own, entropy.view(batch, rows), num_children, child_node, child_logp, leaf_node, leaf_logp,
        leaf_score, num_leaves,
    )  # fmt: skip


@jit
def _leaf_of(child, only_leaf, num_nodes, first_leaf):
    """The leaf that a child stands for; -1: none."""
    other = tl.load(only_leaf + child, (child >= 0) & (child < num_nodes), -1)
    return tl.where(child >= first_leaf, child, other)


@jit
def _clear(node, number, found, size, BLOCK: tl.constexpr):
    """Fill the end of a list that is not used."""
    for start in range(found, size, BLOCK):
        i = start + tl.arange(0, BLOCK)
        tl.store(node + i, tl.full((BLOCK,), -1, tl.int32), i < size)
        tl.store(number + i, tl.full((BLOCK,), float("-inf"), tl.float32), i < size)


@kernel
def _ved_lists(
    node: ADDRESS, node_type, n0, n1, value: ADDRESS, value_type, v0, v1, drawn: I32, drawn_logp: F32,
    ranked: I32, ranked_logp: F32, rank: F32, only_leaf: I32, own: F32, num_children: I32, child_node: I32,
    child_logp: F32, leaf_node: I32, leaf_logp: F32, leaf_score: F32, num_leaves: I32, rows, listed, children,
    leaves, num_nodes, valued, first_closed, first_leaf, expand_root, value_weight: tl.float32,
    logp_weight: tl.float32, BLOCK: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64)
    b, p = r // rows, r % rows
    name = load_int(Array(node, node_type, n0, n1, 0), b, p, 0, True, -1)
    worth = load_float(Array(value, value_type, v0, v1, 0), b, p, 0, r >= 0) * value_weight
    tl.store(own + r, worth)
    is_open = (name < first_closed) & ((name != 0) | (expand_root != 0))
    step = tl.arange(0, BLOCK)

    found = 0
    for start in range(0, tl.where(is_open, listed, 0), BLOCK):
        i = start + step
        child = tl.load(drawn + r * listed + i, i < listed, -1)
        kept = child >= 0
        if num_nodes > 0:
            kept &= _leaf_of(child, only_leaf, num_nodes, first_leaf) < 0
        at = found + tl.cumsum(kept.to(tl.int32), 0) - 1
        kept &= at < children
        tl.store(child_node + r * children + at, child, kept)
        its_logp = tl.load(drawn_logp + r * listed + i, kept, 0.0)
        tl.store(child_logp + r * children + at, its_logp, kept)
        found += tl.sum(kept.to(tl.int32), 0)
    tl.store(num_children + r, found)
    _clear(child_node + r * children, child_logp + r * children, found, children, BLOCK)

    found = 0
    for start in range(0, listed, BLOCK):
        i = start + step
        child = tl.load(ranked + r * listed + i, i < listed, -1)
        leaf = _leaf_of(child, only_leaf, num_nodes, first_leaf)
        at = found + tl.cumsum((leaf >= 0).to(tl.int32), 0) - 1
        kept = (leaf >= 0) & (at < leaves)
        its_logp = tl.load(ranked_logp + r * listed + i, kept, 0.0)
        score = tl.where(logp_weight == 0, 0.0, logp_weight * its_logp)
        if valued != 0:
            score = tl.load(rank + r * listed + i, kept, 0.0)
        tl.store(leaf_node + r * leaves + at, leaf, kept)
        tl.store(leaf_logp + r * leaves + at, its_logp, kept)
        tl.store(leaf_score + r * leaves + at, worth + score, kept)
        found += tl.sum(kept.to(tl.int32), 0)
    tl.store(num_leaves + r, found)
    _clear(leaf_node + r * leaves, leaf_logp + r * leaves, found, leaves, BLOCK)
    _clear(leaf_node + r * leaves, leaf_score + r * leaves, found, leaves, BLOCK)


def ved_beams(
    node, parent, logp, num_first, other_node, other_parent, other_logp, only_leaf, above, size, width,
):  # fmt: skip
    """The dispatcher's signature; see :func:`vstar_ops.ved_beams`."""
    batch, device = len(size), size.device
    other_size = 0 if other_node is None else other_node.shape[1]
    if other_node is None:  # something to point to, which is not read
        other_node, other_parent, other_logp = node, parent, logp
    out_node, out_parent = (torch.empty(batch, width, dtype=torch.int32, device=device) for _ in range(2))
    out_logp = torch.empty(batch, width, device=device)
    if batch:
        _ved_beams.launch(
            (batch,), 1,
            *strided(node, 2), *strided(parent, 2), *strided(logp, 2), *strided(other_node, 2),
            *strided(other_parent, 2), *strided(other_logp, 2), *strided(above, 2),
            size if only_leaf is None else only_leaf, size, out_node, out_parent, out_logp,
            num_nodes=0 if only_leaf is None else only_leaf.numel(), rows=above.shape[1],
            first_size=node.shape[1], other_size=other_size, num_first=min(num_first, width),
            width=width, BLOCK=_BEAMS,
        )  # fmt: skip
    return out_node, out_parent, out_logp


@jit
def _take(
    node, parent, logp, entries, only_leaf, num_nodes, out_node, out_parent, out_logp, b, start, found,
    known, most, BLOCK: tl.constexpr,
):  # fmt: skip
    """Append beams of a list that are not among the first ``known``, up to ``most``; returns their number."""
    for begin in range(0, entries, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        name = load_int(node, b, i, 0, i < entries, -1)
        leaf = tl.load(only_leaf + name, (name >= 0) & (name < num_nodes), -1)
        kept = (name >= 0) & (leaf < 0)
        for j in range(0, known):
            kept &= name != tl.load(out_node + j)
        at = found + tl.cumsum(kept.to(tl.int32), 0) - 1
        kept &= at < most
        tl.store(out_node + at, name.to(tl.int32), kept)
        tl.store(out_parent + at, (start + load_int(parent, b, i, 0, kept, 0)).to(tl.int32), kept)
        tl.store(out_logp + at, load_float(logp, b, i, 0, kept), kept)
        found += tl.sum(kept.to(tl.int32), 0)
    return found


@kernel
def _ved_beams(
    node: ADDRESS, node_type, n0, n1, parent: ADDRESS, parent_type, p0, p1, logp: ADDRESS, logp_type, l0, l1,
    other_node: ADDRESS, other_node_type, m0, m1, other_parent: ADDRESS, other_parent_type, q0, q1,
    other_logp: ADDRESS, other_logp_type, k0, k1, above: ADDRESS, above_type, a0, a1, only_leaf: I32,
    size: I32, out_node: I32, out_parent: I32, out_logp: F32, num_nodes, rows, first_size, other_size,
    num_first, width, BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    out_node += b * width
    out_parent += b * width
    out_logp += b * width
    step = tl.arange(0, BLOCK)
    start = tl.load(size + b)
    for begin in range(0, rows, BLOCK):
        last = load_int(Array(above, above_type, a0, a1, 0), b, begin + step, 0, begin + step < rows, -1)
        start -= tl.sum((last >= 0).to(tl.int32), 0)
    found = _take(
        Array(node, node_type, n0, n1, 0), Array(parent, parent_type, p0, p1, 0),
        Array(logp, logp_type, l0, l1, 0), first_size, only_leaf, num_nodes, out_node, out_parent, out_logp,
        b, start, start * 0, start * 0, num_first, BLOCK,
    )  # fmt: skip
    tl.debug_barrier()  # what was stored is read
    found = _take(
        Array(other_node, other_node_type, m0, m1, 0), Array(other_parent, other_parent_type, q0, q1, 0),
        Array(other_logp, other_logp_type, k0, k1, 0), other_size, only_leaf, num_nodes, out_node, out_parent,
        out_logp, b, start, found, found, width, BLOCK,
    )  # fmt: skip
    _clear(out_node, out_logp, found, width, BLOCK)
    _clear(out_parent, out_logp, found, width, BLOCK)


def specializations() -> Iterator[Specialization]:
    """Everything that is compiled, besides ``expand_topk``."""
    yield Specialization("ved_inputs", _ved_inputs, 1, {"BLOCK": _BLOCK})
    yield Specialization("ved_lists", _ved_lists, 1, {"BLOCK": _BLOCK})
    yield Specialization("ved_beams", _ved_beams, 1, {"BLOCK": _BEAMS})
