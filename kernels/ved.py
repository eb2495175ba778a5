"""The steps of value-guided decoding: one program per tree, whose nodes lie across its threads.

``ved_select`` keeps the nodes' numbers in registers; a step down the tree is a masked maximum over them.
``ved_insert`` copies row after row. ``ved_candidates`` gives every leaf two int64 keys, which order as the op
says, and knows the best leaf of every node, its own or a listed one. It takes the best of those, k times, and
then looks for the next one of that node. One launch each.

=====================  =====
capacity, rounded up   warps
=====================  =====
64                     1
256                    2
1,024                  16
2,048                  16
=====================  =====

``ved_select`` takes no larger trees. The one workspace is that of ``ved_candidates``: keys, 16 bytes per node
and listed leaf, and of each node 20 bytes of its best leaf and 4 of the evaluated leaves' names.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from .._triton import Unsupported
from ._floats import FLOAT32_MAX, LOWEST, ordered
from ._kernel import F32, F64, I32, I64, Specialization, kernel, workspace

_NODES = ((64, 1), (256, 2), (1024, 16), (2048, 16))  # most nodes, warps
_COPY, _KEYS, _KEY_WARPS = 64, 256, 2  # entries of a row copied together; keys made together
_FEW = 64  # keys compared together
_INT32_MAX, _INT64_MAX = tl.constexpr(2**31 - 1), tl.constexpr(2**63 - 1)


def ved_select(
    node, parent, priority, visits, next_child, num_children, child_node, child_logp, size, budget, depth,
    depth_sum, depth_count, levels, exploration, paths, max_idle,
):  # fmt: skip
    """The dispatcher's signature; see :func:`vstar_ops.ved_select`."""
    batch, capacity = node.shape
    most = _NODES[-1][0]
    if capacity > most:
        raise Unsupported(f"ved_select: the Triton backend takes at most {most:,} nodes, got {capacity:,}")
    rows = paths * levels
    row_parent, row_node = (node.new_empty(batch, rows) for _ in range(2))
    row_logp = priority.new_empty(batch, rows)
    if batch:
        block, warps = next(x for x in _NODES if capacity <= x[0])
        _ved_select.launch(
            (batch,), warps,
            node, parent, priority, visits, next_child, num_children, child_node, child_logp, size, budget,
            depth, depth_sum, depth_count, row_parent, row_node, row_logp, capacity=capacity,
            children=child_node.shape[2], levels=levels, exploration=exploration, paths=paths,
            max_idle=max_idle, NODES=block, CHUNK=_chunk(block),
        )  # fmt: skip
    return row_parent, row_node, row_logp


def _chunk(block: int) -> int:
    """How many nodes are looked for among the others at once: as many as the registers hold."""
    return max(1, min(16, 1024 // block))


def ved_insert(*arguments: Any) -> None:
    """The dispatcher's signature; see :func:`vstar_ops.ved_insert`."""
    *arrays, logp_weight, entropy_weight = arguments
    node, child_node, leaf_node, depth_sum, row_node = (arrays[i] for i in (0, 9, 11, 18, 21))
    batch, capacity = node.shape
    if batch and row_node.shape[1]:
        _ved_insert.launch(
            (batch,), 1,
            *arrays, capacity=capacity, rows=row_node.shape[1], children=child_node.shape[2],
            leaves=leaf_node.shape[2], depths=depth_sum.shape[1], logp_weight=logp_weight,
            entropy_weight=entropy_weight, COPY=_COPY,
        )  # fmt: skip


def ved_candidates(
    node, logp, value, size, depth, leaf_node, leaf_logp, leaf_score, num_leaves, length, k, logp_weight,
):  # fmt: skip
    """The dispatcher's signature; see :func:`vstar_ops.ved_candidates`."""
    (batch, capacity), leaves = node.shape, leaf_node.shape[2]
    out_node, count = node.new_empty(batch, k), node.new_empty(batch)
    out_logp, out_score = (logp.new_empty(batch, k) for _ in range(2))
    if batch:
        keys, best, places = workspace(
            node.device, (batch * 2 * capacity * (1 + leaves), torch.int64),
            (batch * 2 * capacity, torch.int64), (batch * 2 * capacity, torch.int32),
        )  # fmt: skip
        _ved_candidates.launch(
            (batch,), _KEY_WARPS,
            node, logp, value, size, depth, leaf_node, leaf_logp, leaf_score, num_leaves, keys, best, places,
            out_node, out_logp, out_score, count, capacity=capacity, leaves=leaves, length=length, k=k,
            logp_weight=logp_weight, KEYS=_KEYS, FEW=_FEW,
        )  # fmt: skip
    return out_node, out_logp, out_score, count


@triton.jit
def _at(x, position, index):
    """One entry of a tensor of integers."""
    return tl.sum(tl.where(position == index, x, 0), 0)


@triton.jit
def _means(depth_sum, depth_count, b, depth, levels, exists):
    """The mean G of each node's depth; infinite where there is none, so that nothing passes."""
    inside = exists & (depth >= 0) & (depth <= levels)
    at = b * (levels + 1) + depth
    number = tl.maximum(tl.load(depth_count + at, inside, 1), 1)
    return tl.where(inside, tl.load(depth_sum + at, inside, 0.0) / number.to(tl.float64), float("inf"))


@triton.jit
def _clear(row_parent, row_node, row_logp, rows, s, NODES: tl.constexpr):
    """No row is taken yet. Ends with a barrier: some are overwritten by other threads."""
    for start in range(0, rows, NODES):
        at = start + s
        tl.store(row_parent + at, tl.full((NODES,), -1, tl.int32), at < rows)
        tl.store(row_node + at, tl.full((NODES,), -1, tl.int32), at < rows)
        tl.store(row_logp + at, tl.full((NODES,), float("-inf"), tl.float32), at < rows)
    tl.debug_barrier()


@triton.jit
def _skip_known(
    node, child_node, s, children, passes, upcoming, listed, nodes, active, NODES: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Move the pointers past children that the initial beam search has put into the tree."""
    moving = active
    while moving > 0:
        more = passes & (upcoming >= 0) & (upcoming < listed)
        child = tl.load(child_node + s.to(tl.int64) * children + upcoming, more, -2)
        found = tl.zeros((NODES,), tl.int32)
        for start in range(0, nodes, CHUNK):
            t = start + tl.arange(0, CHUNK)
            other = tl.load(node + t, t < nodes, -1)
            found += tl.sum((child[:, None] == other[None, :]).to(tl.int32), 1)
        skip = more & (found > 0)
        upcoming += skip.to(tl.int32)
        moving = tl.max(skip.to(tl.int32), 0)
    return upcoming


@triton.jit
def _walk(
    s, names, parents, priority, exists, open_, upcoming, visits, left, active, child_node, child_logp,
    row_parent, row_node, row_logp, row, children, levels, exploration,
):  # fmt: skip
    """One path from the root down to a leaf.

    It takes the next child of every open node on the way. Returns what has changed: pointers, visits,
    nodes left of the budget, and whether to look for another path.
    """
    log_total = tl.log(_at(visits, s, 0).to(tl.float64) + 1.0)
    current, level, walking, looking = active * 0, active * 0, active, active
    while walking > 0:
        take = (_at(open_, s, current) > 0) & (left > 0) & (level < levels)
        at = current.to(tl.int64) * children + _at(upcoming, s, current)
        tl.store(row_parent + row + level, current, take)
        tl.store(row_node + row + level, tl.load(child_node + at, take, -1), take)
        tl.store(row_logp + row + level, tl.load(child_logp + at, take, 0.0), take)
        taken = take.to(tl.int32)
        upcoming += tl.where(s == current, taken, 0)
        visits += (s == current).to(tl.int32)
        left -= taken
        looking = tl.minimum(looking, 1 - taken)
        below = exists & (parents == current) & (s > 0) & (level < levels)
        bound = priority + exploration * tl.sqrt(log_total / (visits + 1).to(tl.float64))
        bound = tl.where(below, bound, float("-inf"))
        tied = below & (bound == tl.max(bound, 0))
        token = tl.min(tl.where(tied, names, _INT32_MAX), 0)
        walking = tl.max(tied.to(tl.int32), 0)
        child = tl.max(tl.where(tied & (names == token), s, 0), 0)
        current = tl.where(walking > 0, child, current)
        level += 1
    return upcoming, visits, left, looking


@kernel
def _ved_select(
    node: I32, parent: I32, priority: F32, visits: I32, next_child: I32, num_children: I32, child_node: I32,
    child_logp: F32, size: I32, budget: I32, depth: I32, depth_sum: F64, depth_count: I32, row_parent: I32,
    row_node: I32, row_logp: F32, capacity, children, levels, exploration: tl.float64, paths, max_idle,
    NODES: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, NODES)
    node += b * capacity
    child_node += b * capacity * children
    child_logp += b * capacity * children
    row_parent += b * paths * levels
    row_node += b * paths * levels
    row_logp += b * paths * levels

    nodes = tl.minimum(tl.maximum(tl.load(size + b), 0), capacity)
    allowed = tl.load(budget + b)
    left = allowed - nodes
    exists = s < nodes
    slot = b * capacity + s
    names = tl.load(node + s, exists, -1)
    parents = tl.load(parent + slot, exists, -1)
    values = tl.load(priority + slot, exists, float("-inf")).to(tl.float64)
    seen = tl.load(visits + slot, exists, 0)
    upcoming = tl.load(next_child + slot, exists, 0)
    listed = tl.minimum(tl.load(num_children + slot, exists, 0), children)
    levels_of = tl.load(depth + slot, exists, -1)
    passes = exists & (values >= _means(depth_sum, depth_count, b, levels_of, levels, exists))
    _clear(row_parent, row_node, row_logp, paths * levels, s, NODES)

    for path in range(0, paths):
        active = ((nodes > 0) & (left > 0)).to(tl.int32)
        upcoming = _skip_known(
            node, child_node, s, children, passes, upcoming, listed, nodes, active, NODES, CHUNK
        )
        open_ = (passes & (upcoming >= 0) & (upcoming < listed)).to(tl.int32)
        looking = ((tl.max(open_, 0) > 0) & (left > 0)).to(tl.int32)
        idle = 0
        while looking > 0:
            if idle > max_idle:
                allowed -= left
                left = left * 0
                looking = looking * 0
            else:
                upcoming, seen, left, looking = _walk(
                    s, names, parents, values, exists, open_, upcoming, seen, left, looking, child_node,
                    child_logp, row_parent, row_node, row_logp, path * levels, children, levels, exploration,
                )  # fmt: skip
                idle += 1

    tl.store(visits + slot, seen, exists)
    tl.store(next_child + slot, upcoming, exists)
    tl.store(budget + b, allowed)


@triton.jit
def _copy(source, target, start, to, width, COPY: tl.constexpr):
    for column in range(0, width, COPY):
        i = column + tl.arange(0, COPY)
        tl.store(target + to * width + i, tl.load(source + start * width + i, i < width), i < width)


@kernel
def _ved_insert(
    node: I32, parent: I32, logp: F32, value: F32, entropy: F32, priority: F32, visits: I32, next_child: I32,
    num_children: I32, child_node: I32, child_logp: F32, leaf_node: I32, leaf_logp: F32, leaf_score: F32,
    num_leaves: I32, slot: I64, size: I32, depth: I32, depth_sum: F64, depth_count: I32, row_parent: I32,
    row_node: I32, row_logp: F32, row_slot: I64, row_value: F32, row_entropy: F32, row_num_children: I32,
    row_child_node: I32, row_child_logp: F32, row_leaf_node: I32, row_leaf_logp: F32, row_leaf_score: F32,
    row_num_leaves: I32, capacity, rows, children, leaves, depths, logp_weight: tl.float64,
    entropy_weight: tl.float64, COPY: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    nodes = tl.load(size + b)
    for r in range(0, rows):
        row = b * rows + r
        name, parent_slot = tl.load(row_node + row), tl.load(row_parent + row)
        known = (parent_slot >= 0) & (parent_slot < nodes)
        level = tl.load(depth + b * capacity + parent_slot, known, -1) + 1
        if (name >= 0) & (nodes >= 0) & (nodes < capacity) & (level < depths):
            to = b * capacity + nodes
            v = tl.load(row_value + row)
            v = tl.where(v != v, -FLOAT32_MAX, tl.minimum(tl.maximum(v, -FLOAT32_MAX), FLOAT32_MAX))
            log_probability, h = tl.load(row_logp + row), tl.load(row_entropy + row)
            gain = v.to(tl.float64) + entropy_weight * h.to(tl.float64)
            if logp_weight != 0:
                gain += logp_weight * log_probability.to(tl.float64)
            gain = tl.where(gain >= -FLOAT32_MAX, gain, -FLOAT32_MAX)  # NaN too
            gain = tl.where(gain > FLOAT32_MAX, FLOAT32_MAX, gain).to(tl.float32)
            tl.store(node + to, name)
            tl.store(parent + to, parent_slot)
            tl.store(logp + to, log_probability)
            tl.store(value + to, v)
            tl.store(entropy + to, h)
            tl.store(priority + to, gain)
            tl.store(visits + to, 0)
            tl.store(next_child + to, 0)
            tl.store(num_children + to, tl.load(row_num_children + row))
            tl.store(num_leaves + to, tl.load(row_num_leaves + row))
            tl.store(slot + to, tl.load(row_slot + row))
            tl.store(depth + to, level)
            _copy(row_child_node, child_node, row, to, children, COPY)
            _copy(row_child_logp, child_logp, row, to, children, COPY)
            _copy(row_leaf_node, leaf_node, row, to, leaves, COPY)
            _copy(row_leaf_logp, leaf_logp, row, to, leaves, COPY)
            _copy(row_leaf_score, leaf_score, row, to, leaves, COPY)
            at = b * depths + level
            total, number = tl.load(depth_sum + at) + gain.to(tl.float64), tl.load(depth_count + at) + 1
            tl.debug_barrier()  # all threads have read
            tl.store(depth_sum + at, total)
            tl.store(depth_count + at, number)
            nodes += 1
        tl.debug_barrier()  # a row may stand below the one before
    tl.store(size + b, nodes)


@triton.jit
def _rank(value, logp, logp_weight: tl.float64):
    """What an evaluated leaf is ranked by."""
    rank = value.to(tl.float64)
    if logp_weight != 0:
        rank += logp_weight * logp.to(tl.float64)
    return rank.to(tl.float32)


@triton.jit
def _pair(valid, tier, score, prefix, logp, name):
    """Two integers that order leaves: tier, score, prefix; then log-probability, node."""
    body = (ordered(score).to(tl.int64) + 0x80000000) << 31
    body += _INT32_MAX - prefix.to(tl.int64)
    first = tl.where(tier == 0, body, body + LOWEST)
    second = (ordered(tl.where(tier == 0, 0.0, logp)).to(tl.int64) << 32) + (_INT32_MAX - name.to(tl.int64))
    return tl.where(valid, first, LOWEST), tl.where(valid, second, LOWEST)


@triton.jit
def _node_keys(
    node, logp, value, depth, first_keys, second_keys, names, nodes, capacity, stride, length, logp_weight,
    KEYS: tl.constexpr,
):  # fmt: skip
    """Write keys and names of the evaluated leaves, and return how many there are."""
    evaluated = 0
    for start in range(0, capacity, KEYS):
        s = start + tl.arange(0, KEYS)
        valid = (s < nodes) & (tl.load(depth + s, s < nodes, -1) == length)
        name, log_probability = tl.load(node + s, valid, 0), tl.load(logp + s, valid, 0.0)
        score = _rank(tl.load(value + s, valid, 0.0), log_probability, logp_weight)
        first, second = _pair(valid, s * 0, score, name, log_probability, name)
        tl.store(first_keys + s * stride, first, s < capacity)
        tl.store(second_keys + s * stride, second, s < capacity)
        tl.store(names + evaluated + tl.cumsum(valid.to(tl.int32), 0) - 1, name, valid)
        evaluated += tl.sum(valid.to(tl.int32), 0)
    tl.debug_barrier()  # all threads read the names
    return evaluated


@triton.jit
def _leaf_keys(
    node, leaf_node, leaf_logp, leaf_score, num_leaves, first_keys, second_keys, names, nodes, evaluated,
    capacity, leaves, KEYS: tl.constexpr,
):  # fmt: skip
    """Write the keys of the listed leaves that are not evaluated, and return how many there are."""
    total = 0
    for start in range(0, capacity * leaves, KEYS):
        i = start + tl.arange(0, KEYS)
        s = i // leaves
        listed = tl.load(num_leaves + s, s < nodes, 0)
        valid = (s < nodes) & (i % leaves < listed)
        name = tl.load(leaf_node + i, valid, -1)
        known = tl.zeros((KEYS,), tl.int32)
        for t in range(0, tl.where(tl.max(valid.to(tl.int32), 0) > 0, evaluated, 0)):
            known |= (name == tl.load(names + t)).to(tl.int32)
        valid &= known == 0
        prefix = tl.load(node + s, valid, 0)
        score, log_probability = tl.load(leaf_score + i, valid, 0.0), tl.load(leaf_logp + i, valid, 0.0)
        first, second = _pair(valid, s * 0 + 1, score, prefix, log_probability, name)
        at = i + s + 1  # behind the node's own key
        tl.store(first_keys + at, first, i < capacity * leaves)
        tl.store(second_keys + at, second, i < capacity * leaves)
        total += tl.sum(valid.to(tl.int32), 0)
    return total


@triton.jit
def _best_of_each(first_keys, second_keys, best, places, nodes, capacity, stride, FEW: tl.constexpr):
    """The largest pair of keys of every node, and where it stands among the node's."""
    for start in range(0, nodes, FEW):
        s = start + tl.arange(0, FEW)
        inside = s < nodes
        first = tl.full((FEW,), LOWEST, tl.int64)
        second = tl.full((FEW,), LOWEST, tl.int64)
        where = tl.zeros((FEW,), tl.int32)
        for e in range(0, stride):
            first_e = tl.load(first_keys + s * stride + e, inside, LOWEST)
            second_e = tl.load(second_keys + s * stride + e, inside, LOWEST)
            better = (first_e > first) | ((first_e == first) & (second_e > second))
            first, second = tl.where(better, first_e, first), tl.where(better, second_e, second)
            where = tl.where(better, e, where)
        tl.store(best + s, first, inside)
        tl.store(best + capacity + s, second, inside)
        tl.store(places + s, where, inside)


@triton.jit
def _best_after(first_keys, second_keys, last_first, last_second, entries, KEYS: tl.constexpr):
    """The largest pair of keys below the last one, and where it stands."""
    best_first = tl.full((), LOWEST, tl.int64)
    best_second = best_first
    where = tl.full((), 0, tl.int32)
    for start in range(0, entries, KEYS):
        i = start + tl.arange(0, KEYS)
        first = tl.load(first_keys + i, i < entries, LOWEST)
        second = tl.load(second_keys + i, i < entries, LOWEST)
        after = (first < last_first) | ((first == last_first) & (second < last_second))
        first = tl.where(after, first, LOWEST)
        block_first = tl.max(first, 0)
        tied = after & (first == block_first)
        block_second = tl.max(tl.where(tied, second, LOWEST), 0)
        at = tl.max(tl.where(tied & (second == block_second), i, 0), 0)
        better = (block_first > best_first) | ((block_first == best_first) & (block_second > best_second))
        best_first = tl.where(better, block_first, best_first)
        best_second = tl.where(better, block_second, best_second)
        where = tl.where(better, at, where)
    return best_first, best_second, where


@kernel
def _ved_candidates(
    node: I32, logp: F32, value: F32, size: I32, depth: I32, leaf_node: I32, leaf_logp: F32, leaf_score: F32,
    num_leaves: I32, keys: I64, best: I64, places: I32, out_node: I32, out_logp: F32, out_score: F32,
    count: I32, capacity, leaves, length, k, logp_weight: tl.float64, KEYS: tl.constexpr, FEW: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    node += b * capacity
    depth += b * capacity
    logp += b * capacity
    value += b * capacity
    num_leaves += b * capacity
    leaf_node += b * capacity * leaves
    leaf_logp += b * capacity * leaves
    leaf_score += b * capacity * leaves
    stride = 1 + leaves  # keys of a node
    first_keys = keys + b * 2 * capacity * stride
    second_keys = first_keys + capacity * stride
    best += b * 2 * capacity
    places += b * 2 * capacity
    nodes = tl.minimum(tl.maximum(tl.load(size + b), 0), capacity)

    evaluated = _node_keys(
        node, logp, value, depth, first_keys, second_keys, places + capacity, nodes, capacity, stride, length,
        logp_weight, KEYS,
    )  # fmt: skip
    total = evaluated + _leaf_keys(
        node, leaf_node, leaf_logp, leaf_score, num_leaves, first_keys, second_keys, places + capacity, nodes,
        evaluated, capacity, leaves, KEYS,
    )  # fmt: skip
    tl.store(count + b, tl.minimum(total, k))
    tl.debug_barrier()  # what other threads have stored is read
    _best_of_each(first_keys, second_keys, best, places, nodes, capacity, stride, FEW)

    highest = tl.full((), _INT64_MAX, tl.int64)
    for rank in range(0, k):
        exists = rank < total
        tl.debug_barrier()  # the best of a node has changed
        first, second, slot = _best_after(
            best, best + capacity, highest, highest, tl.where(exists, nodes, 0), FEW
        )
        place = tl.load(places + slot, exists, 0)
        begin = slot * stride
        next_first, next_second, next_place = _best_after(
            first_keys + begin, second_keys + begin, first, second, tl.where(exists, stride, 0), FEW
        )
        tl.debug_barrier()  # all threads have read what changes now
        tl.store(best + slot, next_first, exists)
        tl.store(best + capacity + slot, next_second, exists)
        tl.store(places + slot, next_place, exists)
        is_node, is_leaf = exists & (place == 0), exists & (place > 0)
        where, leaf = slot, slot * leaves + place - 1
        name = tl.where(is_node, tl.load(node + where, is_node, -1), tl.load(leaf_node + leaf, is_leaf, -1))
        node_logp = tl.load(logp + where, is_node, float("-inf"))
        node_score = _rank(tl.load(value + where, is_node, 0.0), node_logp, logp_weight)
        other_logp = tl.load(leaf_logp + leaf, is_leaf, float("-inf"))
        other_score = tl.load(leaf_score + leaf, is_leaf, float("-inf"))
        tl.store(out_node + b * k + rank, name)
        tl.store(out_logp + b * k + rank, tl.where(is_node, node_logp, other_logp))
        tl.store(out_score + b * k + rank, tl.where(is_node, node_score, other_score))


def specializations() -> Iterator[Specialization]:
    """Everything that is compiled."""
    for nodes, warps in _NODES:
        constants = {"NODES": nodes, "CHUNK": _chunk(nodes)}
        yield Specialization(f"ved_select {nodes} nodes", _ved_select, warps, constants)
    yield Specialization("ved_insert", _ved_insert, 1, {"COPY": _COPY})
    yield Specialization("ved_candidates", _ved_candidates, _KEY_WARPS, {"KEYS": _KEYS, "FEW": _FEW})
