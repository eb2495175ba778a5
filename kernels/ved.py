"""The steps of value-guided decoding: a program a tree, whose nodes lie across its threads.

``ved_select`` keeps the nodes' numbers in registers; a step down the tree is a masked maximum over them.
``ved_insert`` copies row after row. ``ved_candidates`` gives every leaf two int64 keys, which order as the op
says, and then takes the best of those after the last, k times. One launch each.

=====================  =====
capacity, rounded up   warps
=====================  =====
64                     1
256                    2
1,024                  8
4,096                  16
=====================  =====

Trees of more than 2,048 nodes are searched by the reference. The one workspace holds the keys of
``ved_candidates``, 16 bytes a node and listed leaf.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import ved_select as _select_reference
from ._order import ordered
from ._specialization import OPTIONS, Specialization

_NODES = ((64, 1), (256, 8), (1024, 16), (2048, 16))  # most nodes, warps
_COPY, _KEYS = 64, 1024  # entries of a row copied together; keys looked at together
_LOWEST = tl.constexpr(-(2**63))
_FLOAT32_MAX = tl.constexpr(3.4028234663852886e38)


def ved_select(
    node: Tensor,
    parent: Tensor,
    priority: Tensor,
    visits: Tensor,
    next_child: Tensor,
    num_children: Tensor,
    child_node: Tensor,
    child_logp: Tensor,
    size: Tensor,
    budget: Tensor,
    depth: Tensor,
    depth_sum: Tensor,
    depth_count: Tensor,
    levels: int,
    exploration: float,
    paths: int,
    max_idle: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The dispatcher's signature; see :func:`vstar_ops.ved_select`."""
    batch, capacity = node.shape
    if capacity > _NODES[-1][0]:
        return _select_reference(
            node, parent, priority, visits, next_child, num_children, child_node, child_logp, size, budget,
            depth, depth_sum, depth_count, levels, exploration, paths, max_idle,
        )  # fmt: skip
    rows = paths * levels
    row_parent, row_node = (node.new_empty(batch, rows) for _ in range(2))
    row_logp = priority.new_empty(batch, rows)
    if batch:
        block, warps = next(x for x in _NODES if capacity <= x[0])
        _ved_select[(batch,)](
            node, parent, priority, visits, next_child, num_children, child_node, child_logp, size, budget,
            depth, depth_sum, depth_count, row_parent, row_node, row_logp, capacity, child_node.shape[2],
            levels, exploration, paths, max_idle,
            NODES=block, OTHERS=_others(block), num_warps=warps, **OPTIONS,
        )  # fmt: skip
    return row_parent, row_node, row_logp


def _others(block: int) -> int:
    """How many nodes are looked for among the others at once: as many as the registers hold."""
    return max(1, min(16, 1024 // block))


def ved_insert(*arguments: Any) -> None:
    """The dispatcher's signature; see :func:`vstar_ops.ved_insert`."""
    *arrays, logp_weight, entropy_weight = arguments
    node, child_node, leaf_node, depth_sum, row_node = (arrays[i] for i in (0, 9, 11, 18, 21))
    batch, capacity = node.shape
    if batch and row_node.shape[1]:
        _ved_insert[(batch,)](
            *arrays, capacity, row_node.shape[1], child_node.shape[2], leaf_node.shape[2], depth_sum.shape[1],
            logp_weight, entropy_weight, COPY=_COPY, num_warps=1, **OPTIONS,
        )  # fmt: skip


def ved_candidates(
    node: Tensor,
    logp: Tensor,
    value: Tensor,
    size: Tensor,
    depth: Tensor,
    leaf_node: Tensor,
    leaf_logp: Tensor,
    leaf_score: Tensor,
    num_leaves: Tensor,
    length: int,
    k: int,
    logp_weight: float,
    forced_first: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The dispatcher's signature; see :func:`vstar_ops.ved_candidates`."""
    (batch, capacity), slots = node.shape, leaf_node.shape[2]
    out_node, count = node.new_empty(batch, k), node.new_empty(batch)
    out_logp, out_score = (logp.new_empty(batch, k) for _ in range(2))
    if batch:
        keys = torch.empty(batch, 2, capacity * (1 + slots), dtype=torch.int64, device=node.device)
        _ved_candidates[(batch,)](
            node, logp, value, size, depth, leaf_node, leaf_logp, leaf_score, num_leaves, keys, out_node,
            out_logp, out_score, count, capacity, slots, length, k, logp_weight, int(forced_first),
            KEYS=_KEYS, num_warps=4, **OPTIONS,
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


@triton.jit(do_not_specialize=["capacity", "children", "levels", "paths", "max_idle"])
def _ved_select(
    node, parent, priority, visits, next_child, num_children, child_node, child_logp, size, budget, depth,
    depth_sum, depth_count, row_parent, row_node, row_logp, capacity, children, levels,
    exploration: tl.float64, paths, max_idle, NODES: tl.constexpr, OTHERS: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, NODES)
    node += b * capacity
    child_node += b * capacity * children
    child_logp += b * capacity * children
    row_parent += b * paths * levels
    row_node += b * paths * levels
    row_logp += b * paths * levels

    here = tl.minimum(tl.maximum(tl.load(size + b), 0), capacity)
    allowed = tl.load(budget + b)
    left = allowed - here
    exists = s < here
    names = tl.load(node + s, exists, -1)
    above = tl.load(parent + b * capacity + s, exists, -1)
    worth = tl.load(priority + b * capacity + s, exists, float("-inf")).to(tl.float64)
    seen = tl.load(visits + b * capacity + s, exists, 0)
    upcoming = tl.load(next_child + b * capacity + s, exists, 0)
    listed = tl.minimum(tl.load(num_children + b * capacity + s, exists, 0), children)
    level_of = tl.load(depth + b * capacity + s, exists, -1)
    passes = exists & (worth >= _means(depth_sum, depth_count, b, level_of, levels, exists))

    for start in range(0, paths * levels, NODES):
        tl.store(row_parent + start + s, tl.full((NODES,), -1, tl.int32), start + s < paths * levels)
        tl.store(row_node + start + s, tl.full((NODES,), -1, tl.int32), start + s < paths * levels)
        tl.store(
            row_logp + start + s, tl.full((NODES,), float("-inf"), tl.float32), start + s < paths * levels
        )
    tl.debug_barrier()  # some of them are overwritten below, by other threads

    for path in range(0, paths):
        # Move the pointers past children that the initial beam search has put into the tree.
        moving = ((here > 0) & (left > 0)).to(tl.int32)
        while moving > 0:
            more = passes & (upcoming >= 0) & (upcoming < listed)
            wanted = tl.load(child_node + s.to(tl.int64) * children + upcoming, more, -2)
            found = tl.zeros((NODES,), tl.int32)
            for start in range(0, here, OTHERS):
                t = start + tl.arange(0, OTHERS)
                other = tl.load(node + t, t < here, -1)
                found += tl.sum((wanted[:, None] == other[None, :]).to(tl.int32), 1)
            skip = more & (found > 0)
            upcoming += skip.to(tl.int32)
            moving = tl.max(skip.to(tl.int32), 0)

        open_ = (passes & (upcoming >= 0) & (upcoming < listed)).to(tl.int32)
        looking = ((tl.max(open_, 0) > 0) & (left > 0)).to(tl.int32)
        idle = 0
        while looking > 0:
            if idle > max_idle:
                allowed -= left
                left = left * 0
                looking = looking * 0
            else:
                log_total = tl.log(_at(seen, s, 0).to(tl.float64) + 1.0)
                current, level, walking = idle * 0, idle * 0, looking
                while walking > 0:
                    take = (_at(open_, s, current) > 0) & (left > 0) & (level < levels)
                    at = current.to(tl.int64) * children + _at(upcoming, s, current)
                    row = path * levels + level
                    tl.store(row_parent + row, current, take)
                    tl.store(row_node + row, tl.load(child_node + at, take, -1), take)
                    tl.store(row_logp + row, tl.load(child_logp + at, take, 0.0), take)
                    taken = take.to(tl.int32)
                    upcoming += tl.where(s == current, taken, 0)
                    seen += (s == current).to(tl.int32)
                    left -= taken
                    looking = tl.minimum(looking, 1 - taken)
                    below = exists & (above == current) & (s > 0) & (level < levels)
                    bound = worth + exploration * tl.sqrt(log_total / (seen + 1).to(tl.float64))
                    bound = tl.where(below, bound, float("-inf"))
                    tied = below & (bound == tl.max(bound, 0))
                    token = tl.min(tl.where(tied, names, 0x7FFFFFFF), 0)
                    walking = tl.max(tied.to(tl.int32), 0)
                    child = tl.max(tl.where(tied & (names == token), s, 0), 0)
                    current = tl.where(walking > 0, child, current)
                    level += 1
                idle += 1

    tl.store(visits + b * capacity + s, seen, exists)
    tl.store(next_child + b * capacity + s, upcoming, exists)
    tl.store(budget + b, allowed)


@triton.jit
def _copy(source, target, start, to, width, COPY: tl.constexpr):
    for column in range(0, width, COPY):
        i = column + tl.arange(0, COPY)
        tl.store(target + to * width + i, tl.load(source + start * width + i, i < width), i < width)


@triton.jit(do_not_specialize=["capacity", "rows", "children", "leaves", "depths"])
def _ved_insert(
    node, parent, logp, value, entropy, priority, visits, next_child, num_children, child_node, child_logp,
    leaf_node, leaf_logp, leaf_score, num_leaves, slot, size, depth, depth_sum, depth_count, row_parent,
    row_node, row_logp, row_slot, row_value, row_entropy, row_num_children, row_child_node, row_child_logp,
    row_leaf_node, row_leaf_logp, row_leaf_score, row_num_leaves, capacity, rows, children, leaves, depths,
    logp_weight: tl.float64, entropy_weight: tl.float64, COPY: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    here = tl.load(size + b)
    for r in range(0, rows):
        row = b * rows + r
        name, above = tl.load(row_node + row), tl.load(row_parent + row)
        known = (above >= 0) & (above < here)
        level = tl.load(depth + b * capacity + above, known, -1) + 1
        if (name >= 0) & (here >= 0) & (here < capacity) & (level < depths):
            to = b * capacity + here
            v = tl.load(row_value + row)
            v = tl.where(v != v, -_FLOAT32_MAX, tl.minimum(tl.maximum(v, -_FLOAT32_MAX), _FLOAT32_MAX))
            log_probability, h = tl.load(row_logp + row), tl.load(row_entropy + row)
            gain = v.to(tl.float64) + entropy_weight * h.to(tl.float64)
            if logp_weight != 0:
                gain += logp_weight * log_probability.to(tl.float64)
            gain = tl.where(gain >= -_FLOAT32_MAX, gain, -_FLOAT32_MAX)  # NaN too
            worth = tl.where(gain > _FLOAT32_MAX, _FLOAT32_MAX, gain).to(tl.float32)
            tl.store(node + to, name)
            tl.store(parent + to, above)
            tl.store(logp + to, log_probability)
            tl.store(value + to, v)
            tl.store(entropy + to, h)
            tl.store(priority + to, worth)
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
            total, number = tl.load(depth_sum + at) + worth.to(tl.float64), tl.load(depth_count + at) + 1
            tl.debug_barrier()  # all threads have read
            tl.store(depth_sum + at, total)
            tl.store(depth_count + at, number)
            here += 1
        tl.debug_barrier()  # a row may stand below the one before
    tl.store(size + b, here)


@triton.jit
def _rank(value, logp, logp_weight: tl.float64):
    """What an evaluated leaf is ranked by."""
    rank = value.to(tl.float64)
    if logp_weight != 0:
        rank += logp_weight * logp.to(tl.float64)
    return rank.to(tl.float32)


@triton.jit
def _pair(there, tier, score, prefix, logp, name):
    """Two integers that order leaves: tier, score, prefix; then log-probability, node."""
    body = (ordered(score).to(tl.int64) + 0x80000000) << 31
    body += 0x7FFFFFFF - prefix.to(tl.int64)
    first = tl.where(tier == 0, body, body + _LOWEST)
    second = (ordered(tl.where(tier == 0, 0.0, logp)).to(tl.int64) << 32) + (0x7FFFFFFF - name.to(tl.int64))
    return tl.where(there, first, _LOWEST), tl.where(there, second, _LOWEST)


@triton.jit(do_not_specialize=["capacity", "slots", "length", "k", "forced_first"])
def _ved_candidates(
    node, logp, value, size, depth, leaf_node, leaf_logp, leaf_score, num_leaves, keys, out_node, out_logp,
    out_score, count, capacity, slots, length, k, logp_weight: tl.float64, forced_first, KEYS: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    step = tl.arange(0, KEYS)
    node += b * capacity
    depth += b * capacity
    logp += b * capacity
    value += b * capacity
    num_leaves += b * capacity
    leaf_node += b * capacity * slots
    leaf_logp += b * capacity * slots
    leaf_score += b * capacity * slots
    entries = capacity * (1 + slots)
    first_keys = keys + b * 2 * entries
    second_keys = first_keys + entries
    here = tl.minimum(tl.maximum(tl.load(size + b), 0), capacity)

    total, evaluated = 0, 0
    for start in range(0, capacity, KEYS):
        s = start + step
        there = (s < here) & (tl.load(depth + s, s < here, -1) == length)
        name, log_probability = tl.load(node + s, there, 0), tl.load(logp + s, there, 0.0)
        score = _rank(tl.load(value + s, there, 0.0), log_probability, logp_weight)
        first, second = _pair(there, s * 0, score, name, log_probability, name)
        tl.store(first_keys + s, first, s < capacity)
        tl.store(second_keys + s, second, s < capacity)
        evaluated += tl.sum(there.to(tl.int32), 0)
    total += evaluated
    for start in range(0, capacity * slots, KEYS):
        i = start + step
        s = i // slots
        listed = tl.load(num_leaves + s, s < here, 0)
        there = (s < here) & (i % slots < listed)
        name = tl.load(leaf_node + i, there, -1)
        present = tl.zeros((KEYS,), tl.int32)
        for t in range(0, tl.where(evaluated > 0, here, 0)):
            other = tl.where(tl.load(depth + t) == length, tl.load(node + t), -1)
            present |= (name == other).to(tl.int32)
        there &= present == 0
        forced = (forced_first != 0) & (listed == 1)
        prefix = tl.where(forced, name, tl.load(node + s, there, 0))
        score, log_probability = tl.load(leaf_score + i, there, 0.0), tl.load(leaf_logp + i, there, 0.0)
        first, second = _pair(there, tl.where(forced, 0, 1), score, prefix, log_probability, name)
        tl.store(first_keys + capacity + i, first, i < capacity * slots)
        tl.store(second_keys + capacity + i, second, i < capacity * slots)
        total += tl.sum(there.to(tl.int32), 0)
    tl.store(count + b, tl.minimum(total, k))
    tl.debug_barrier()  # what other threads have stored is read

    last_first = tl.full((), 0x7FFFFFFFFFFFFFFF, tl.int64)
    last_second = last_first
    for rank in range(0, k):
        best_first = tl.full((), _LOWEST, tl.int64)
        best_second = best_first
        where = tl.full((), 0, tl.int32)
        for start in range(0, tl.where(rank < total, entries, 0), KEYS):
            i = start + step
            first = tl.load(first_keys + i, i < entries, _LOWEST)
            second = tl.load(second_keys + i, i < entries, _LOWEST)
            after = (first < last_first) | ((first == last_first) & (second < last_second))
            first = tl.where(after, first, _LOWEST)
            top = tl.max(first, 0)
            tied = after & (first == top)
            top_second = tl.max(tl.where(tied, second, _LOWEST), 0)
            at = tl.max(tl.where(tied & (second == top_second), i, 0), 0)
            better = (top > best_first) | ((top == best_first) & (top_second > best_second))
            best_first = tl.where(better, top, best_first)
            best_second = tl.where(better, top_second, best_second)
            where = tl.where(better, at, where)
        last_first, last_second = best_first, best_second

        exists = rank < total
        leaf = where - capacity
        own, completed = exists & (leaf < 0), exists & (leaf >= 0)
        name = tl.where(own, tl.load(node + where, own, -1), tl.load(leaf_node + leaf, completed, -1))
        log_probability = tl.load(logp + where, own, float("-inf"))
        score = _rank(tl.load(value + where, own, 0.0), log_probability, logp_weight)
        other = tl.load(leaf_logp + leaf, completed, float("-inf"))
        other_score = tl.load(leaf_score + leaf, completed, float("-inf"))
        tl.store(out_node + b * k + rank, name)
        tl.store(out_logp + b * k + rank, tl.where(own, log_probability, other))
        tl.store(out_score + b * k + rank, tl.where(own, score, other_score))


def specializations() -> Iterator[Specialization]:
    """Everything that is compiled."""
    floats = ("logp", "value", "entropy", "priority", "child_logp", "leaf_logp", "leaf_score")
    ints = (
        "node", "parent", "visits", "next_child", "num_children", "child_node", "leaf_node", "num_leaves",
        "size", "budget", "depth", "depth_count",
    )  # fmt: skip
    types = dict.fromkeys(floats, "*fp32") | dict.fromkeys(ints, "*i32")
    types |= {f"row_{name}": pointer for name, pointer in types.items()}
    types |= {"slot": "*i64", "row_slot": "*i64", "keys": "*i64", "depth_sum": "*fp64", "out_node": "*i32"}
    types |= {"count": "*i32", "out_logp": "*fp32", "out_score": "*fp32"}
    types |= dict.fromkeys(("exploration", "logp_weight", "entropy_weight"), "fp64")
    for nodes, warps in _NODES:
        constants = {"NODES": nodes, "OTHERS": _others(nodes)}
        yield Specialization(f"ved_select {nodes} nodes", _ved_select, types, constants, warps)
    yield Specialization("ved_insert", _ved_insert, types, {"COPY": _COPY}, 1)
    yield Specialization("ved_candidates", _ved_candidates, types, {"KEYS": _KEYS}, 4)
