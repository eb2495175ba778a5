"""Random calls of every op on inputs that kernels get wrong: :func:`draw`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

import vstar_ops
from vstar_ops import ExpandTopK, NodeEvaluation, SearchTrees, SelectedRows, Trie

from . import search
from .calls import Call, filter_bits, insert, loss_and_gradient, select, token_logp_gradient
from .generators import policies, random_filter, random_tokens, restricted
from .trees import random_evaluation

Random = np.random.Generator
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8)
SPECIAL = np.array([-math.inf, math.inf, math.nan, -0.0, 0.0, 1.0])
TEMPERATURES = (1.0, 0.7, 3.0, 1e-3, 1e3, 1e-39, 1e30)


def draw(op: str, rng: Random, dtype: torch.dtype) -> Call:
    """A call of an op, with its floats (of what has only integers: these) of a dtype."""
    return DRAWS[op](rng, dtype)


def dtypes(op: str) -> tuple[torch.dtype, ...]:
    """What :func:`draw` takes."""
    if op == "prefix_tree":
        return INTEGERS
    if op in ("advance_beams", "rows_to_run", "distinct_rows", "filter_items"):
        return INTEGERS[:2]
    if op == "draw_children":
        return torch.float32, torch.float64
    return (torch.float32,) if op.startswith("ved") else FLOATS


def one(rng: Random, *choices: Any) -> Any:
    return choices[rng.integers(len(choices))]


def some(rng: Random, **options: tuple[Any, ...]) -> dict[str, Any]:
    """About half of the options, each with one of its values."""
    return {name: one(rng, *values) for name, values in options.items() if rng.random() < 0.5}


def size(rng: Random, *typical: int) -> int:
    """One of these sizes, or now and then 0, 1 or a larger one."""
    return int(one(rng, *typical) if rng.random() < 0.8 else one(rng, 0, 1, 2 * max(typical) + 1))


def wide(rng: Random, *typical: int) -> int:
    """As :func:`size`, or so many that kernels divide a row."""
    return int(one(rng, 130, 700, 2100)) if rng.random() < 0.03 else size(rng, *typical)


def floats(rng: Random, *shape: int, kinds: tuple[str, ...] = ("normal", "ties", "equal")) -> Tensor:
    """float64 values of one of the kinds."""
    values = rng.normal(size=shape) * 3
    kind = one(rng, *kinds)
    if kind == "ties":
        values = rng.integers(-1, 2, shape).astype(float)
    elif kind == "equal":
        values = np.full(shape, 0.35)
    elif kind == "large":
        values *= 1000
    elif kind == "special":
        values = np.where(rng.random(shape) < 0.5, rng.choice(SPECIAL, shape), values)
    elif kind == "dead":
        values = np.where(rng.random(shape) < 0.7, -math.inf, values)
    return torch.from_numpy(np.asarray(values)).reshape(shape)


LOGITS = ("normal", "normal", "ties", "equal", "large", "special", "dead")


def strided(rng: Random, call: Call) -> Call:
    """Every other call with tensors that lie in memory in other ways."""
    if rng.random() < 0.1:  # one request, several times
        return call.map(lambda x: x[:1].expand(x.shape) if x.dim() and len(x) else x)

    def lay(x: Tensor) -> Tensor:
        way = rng.integers(4)
        if x.dim() == 0 or way == 0:
            return x
        if way == 1:  # every second one
            return torch.stack([x, x], -1)[..., 1]
        if way == 2:
            return x.transpose(0, -1).contiguous().transpose(0, -1)
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)  # an offset

    return call.map(lay) if rng.random() < 0.5 else call


def catalogue(rng: Random, columns: int) -> Trie:
    items, length = size(rng, 3, 20, max(60, 2 * columns)), one(rng, 1, 2, 3)
    return Trie.from_sequences(rng.integers(0, max(columns, 1), (items if columns else 0, length)))


def filtered(rng: Random, trie: Trie, batch: int) -> Trie:
    """Now and then only a part of a catalogue: for all requests or for each, most, few, one or none."""
    shape = int(one(rng, 1, batch)), trie.num_sequences
    if rng.random() < 0.6 or 0 in shape:
        return trie
    allowed = rng.random(shape) < one(rng, 0.0, 0.2, 0.5, 0.9, 1.0)
    if rng.random() < 0.2:
        allowed = np.arange(shape[1]) == rng.integers(0, shape[1], (shape[0], 1))
    return restricted(trie, torch.from_numpy(allowed))


def nodes(rng: Random, trie: Trie, *shape: int) -> Tensor:
    """Mostly inner nodes, but also leaves, dead beams and what is no node."""
    node = rng.integers(0, max(trie.level_offset[-2], 1), shape)
    odd = rng.choice(np.array([-1, -7, trie.num_nodes - 1, trie.num_nodes, 2**31 - 1, -(2**31)]), shape)
    node = np.where(rng.random(shape) < 0.2, odd, node)
    return torch.from_numpy(node).reshape(shape).to(one(rng, torch.int32, torch.int64))


def other(rng: Random, dtype: torch.dtype) -> torch.dtype:
    """A dtype that may stand beside this one."""
    return one(rng, *FLOATS[: 4 if dtype == torch.float64 else 3])


def summable(cum_logp: Tensor) -> Tensor:
    """Without +inf: its sum with a log-probability that exceeds float32 is a winner's only in float64."""
    return cum_logp.masked_fill(cum_logp == math.inf, 0.0)


def expand_topk(rng: Random, dtype: torch.dtype) -> Call:
    batch, width, columns = size(rng, 1, 2, 3), size(rng, 1, 3, 5), wide(rng, 7, 16, 33)
    trie = filtered(rng, catalogue(rng, columns), batch)
    a: dict[str, Any] = {"node": nodes(rng, trie, batch, width), "k": int(one(rng, 1, 2, 5, 16, 100))}
    shape: tuple[int, ...] = (batch, width, columns)
    if rng.random() < 0.2:
        rows = size(rng, 1, 4)
        shape = (rows, columns)
        a["row"] = torch.from_numpy(rng.integers(-2, rows + 1, (batch, width)))
    for name in ("cum_logp", "value", "bonus"):
        if rng.random() < 0.4:
            values = floats(rng, batch, width, kinds=("normal", "ties", "special"))
            a[name] = values.to(other(rng, dtype))
    if rng.random() < 0.3:
        a["child_value"] = floats(rng, *shape).to(other(rng, dtype))
    if rng.random() < 0.3:
        a["gumbel_seed"] = one(rng, 7, torch.from_numpy(rng.integers(-(2**63), 2**63 - 1, batch)))
    a |= some(
        rng, logp_weight=(0.0, 0.5, -1.0), value_weight=(1.0, -0.5), entropy_weight=(0.1, -2.0),
        temperature=TEMPERATURES, normalize=("vocab",),
    )  # fmt: skip
    if "cum_logp" in a:
        a["cum_logp"] = summable(a["cum_logp"])
    a |= {"logits": floats(rng, *shape, kinds=LOGITS).to(dtype), "trie": trie}
    return strided(rng, Call(vstar_ops.expand_topk, a))


def token_logp(rng: Random, dtype: torch.dtype) -> Call:
    rows = tuple(size(rng, 1, 2, 3) for _ in range(rng.integers(1, 3)))
    columns = wide(rng, 7, 16, 33)
    shape = (*rows, size(rng, 1, 3)) if rng.random() < 0.5 else rows
    targets = torch.from_numpy(rng.integers(-2, max(columns, 1), shape)).reshape(shape)
    kinds = tuple(x for x in LOGITS if x != "large" or dtype != torch.float16)
    a: dict[str, Any] = {"logits": floats(rng, *rows, columns, kinds=kinds).to(dtype), "targets": targets}
    if rng.random() < 0.5:
        a["trie"] = filtered(rng, catalogue(rng, columns), rows[0])
        a["node"] = nodes(rng, a["trie"], *rows)
    return strided(rng, Call(vstar_ops.token_logp, a | some(rng, temperature=TEMPERATURES)))


def token_logp_backward(rng: Random, dtype: torch.dtype) -> Call:
    a = token_logp(rng, dtype).arguments
    if a.get("temperature", 1.0) not in (1.0, 0.7, 3.0):
        del a["temperature"]  # where the gradient is 0 or infinite
    result = torch.float64 if dtype == torch.float64 else torch.float32
    of = one(rng, "both", "logp", "entropy")
    pull = floats(rng, *a["targets"].shape, kinds=("normal", "ties")).to(result)
    slope = floats(rng, *a["logits"].shape[:-1], kinds=("normal", "ties")).to(result)
    a["grad_logp"], a["grad_entropy"] = (None if of == "entropy" else pull, None if of == "logp" else slope)
    return Call(token_logp_gradient, a)


def group(rng: Random) -> tuple[int, int]:
    """Requests and candidates."""
    if rng.random() < 0.02:
        return 1, one(rng, 70, 160)
    return size(rng, 1, 2, 3), size(rng, 2, 5, 9)


def masks(rng: Random, batch: int, group: int, length: int) -> Tensor | None:
    """None, or a mask of candidates, or of tokens: with holes, or of what ends early."""
    kind = one(rng, "none", "candidates", "holes", "ends") if length else one(rng, "none", "candidates")
    if kind == "none":
        return None
    shape = (batch, group) if kind == "candidates" else (batch, group, length)
    if kind == "ends":
        return torch.from_numpy(rng.integers(0, length + 1, (batch, group, 1)) > np.arange(length))
    return torch.from_numpy(rng.random(shape) < rng.random())


def rewards(rng: Random, dtype: torch.dtype, mask: Tensor | None, *shape: int) -> Tensor:
    """Ties, no spread, now and then NaN or infinity, which also stand where nobody is."""
    kinds = ("normal", "ties", "equal", "ties", "special")
    values = floats(rng, *shape, kinds=kinds)
    if mask is not None:
        there = mask.any(2) if mask.dim() == 3 else mask
        values = values.masked_fill(~there, one(rng, math.nan, math.inf, 0.0))
    return values.to(dtype)


def standardized(rng: Random) -> dict[str, Any]:
    return some(rng, eps=(1e-6, 0.5), ddof=(0, 1), std_floor=(0.2,))


def group_advantage(rng: Random, dtype: torch.dtype) -> Call:
    shape = group(rng)
    mask = masks(rng, *shape, 0)
    a = {"rewards": rewards(rng, dtype, mask, *shape), "mask": mask}
    options = standardized(rng) | some(rng, scale=("none",))
    return strided(rng, Call(vstar_ops.group_advantage, a | options))


def sids(rng: Random, batch: int, group: int, length: int) -> Tensor:
    """Tokens of any size, in which prefixes repeat."""
    most = one(rng, 1, 2, 3, 8, "huge")
    tokens = random_tokens(int(rng.integers(2**31)), batch, group, length, most)
    return tokens if most == "huge" else tokens.to(one(rng, *INTEGERS))


def sibling_advantage(rng: Random, dtype: torch.dtype) -> Call:
    shape = (*group(rng), size(rng, 1, 3))
    mask = masks(rng, *shape)
    a = {"tokens": sids(rng, *shape), "rewards": rewards(rng, dtype, mask, *shape[:2]), "mask": mask}
    options = standardized(rng) | some(
        rng, min_siblings=(3,), baseline=("parent", "leave_one_out"), scale=("group", "none")
    )
    return strided(rng, Call(vstar_ops.sibling_advantage, a | options))


def prefix_returns(rng: Random, dtype: torch.dtype) -> Call:
    batch, candidates, length = (*group(rng), size(rng, 1, 3))
    tokens, width = sids(rng, batch, candidates + 1, length), size(rng, 3, 8, 20)
    item = floats(rng, batch, candidates + 1, width, kinds=("normal", "normal", "ties"))
    item[:, 5::7] = 0  # zero vectors, and the same item several times
    item[:, 2::3] = item[:, :1].clone()
    item = item.to(dtype)
    a: dict[str, Any] = {"tokens": tokens[:, 1:], "embedding": item[:, 1:]}
    a |= {"target": tokens[:, 0], "target_embedding": item[:, 0]}
    if rng.random() < 0.5:
        a["weights"] = tuple(rng.normal(size=length).tolist())
    a["mask"] = masks(rng, batch, candidates, length)
    return strided(rng, Call(vstar_ops.prefix_returns, a))


def prefix_tree(rng: Random, dtype: torch.dtype) -> Call:
    shape = (*group(rng), size(rng, 1, 3))
    tokens = sids(rng, *shape).to(dtype)
    return strided(rng, Call(vstar_ops.prefix_tree, {"tokens": tokens, "mask": masks(rng, *shape)}))


def integers(rng: Random, dtype: torch.dtype, low: int, end: int, *shape: int) -> Tensor:
    """Integers from ``low`` to ``end``, now and then far outside."""
    values = rng.integers(low, max(end, low) + 1, shape)
    odd = rng.choice(np.array([-(2**31), 2**31 - 1]), shape)
    return torch.from_numpy(np.where(rng.random(shape) < 0.05, odd, values)).reshape(shape).to(dtype)


def advance_beams(rng: Random, dtype: torch.dtype) -> Call:
    batch, width, winners, length = (
        size(rng, 1, 2, 3),
        size(rng, 1, 3, 5),
        wide(rng, 1, 4, 9),
        size(rng, 0, 1, 3),
    )
    winner, beams = (batch, winners), (batch, width)
    a: dict[str, Any] = {name: integers(rng, dtype, -1, 9, *winner) for name in ("token", "node")}
    a["parent"] = integers(rng, dtype, -1, width, *winner)
    a["sequence"], a["slot"] = integers(rng, dtype, 0, 9, *beams, length), integers(rng, dtype, 0, 99, *beams)
    if rng.random() < 0.6:
        a["evaluated"] = integers(rng, dtype, 0, length, *beams)
    if rng.random() < 0.6:
        rows = size(rng, 1, 4)
        a |= {"row": integers(rng, dtype, -1, rows, *beams), "row_slot": integers(rng, dtype, 0, 99, rows)}
    return strided(rng, Call(vstar_ops.advance_beams, a))


def rows_to_run(rng: Random, dtype: torch.dtype) -> Call:
    batch, width, length = size(rng, 1, 2, 3), wide(rng, 1, 4, 9), size(rng, 1, 3)
    beams, trie = (batch, width), catalogue(rng, 7)
    a = {"sequence": integers(rng, dtype, 0, 9, *beams, length), "slot": integers(rng, dtype, 0, 99, *beams)}
    a["evaluated"] = integers(rng, dtype, 0, length, *beams)
    node = nodes(rng, trie, *beams)
    return strided(rng, Call(vstar_ops.rows_to_run, {"trie": trie, "node": node, **a}))


def filter_items(rng: Random, dtype: torch.dtype) -> Call:
    """Items that collide, in levels that begin within a word; lists with repetitions and what is no item."""
    batch, columns = size(rng, 1, 2, 3), one(rng, 2, 5, 40)
    rows = rng.integers(0, columns, (size(rng, 1, 8, 40, 90), one(rng, 1, 2, 3, 4)))
    trie, share = Trie.from_sequences(rows), one(rng, 0.0, 0.05, 0.5, 1.0)
    a: dict[str, Any] = {"bits": random_filter(rng, trie, batch, share), "trie": trie, "row": None}
    if rng.random() < 0.7:
        a["row"] = integers(rng, dtype, -2, len(rows) + 2, batch, size(rng, 1, 5, 40))
    if rng.random() < 0.4:
        a["within"] = random_filter(rng, trie, batch, 0.5).allowed
    call = Call(filter_bits, {**a, "allow": one(rng, True, False)})
    laid = strided(rng, call).arguments  # the bits themselves are contiguous
    return call._replace(arguments={**call.arguments, "row": laid["row"]})


def draw_children(rng: Random, dtype: torch.dtype) -> Call:
    batch, number, length = size(rng, 1, 2, 3), size(rng, 1, 4, 9), size(rng, 0, 1, 3)
    rows, candidates = size(rng, 1, 2, 5), (batch, number)
    lists, ints = (rows, wide(rng, 1, 7, 16)), one(rng, *INTEGERS[:2])
    if rng.random() < 0.3:
        lists = (batch, lists[1])
    a: dict[str, Any] = {"logp": floats(rng, *lists, kinds=LOGITS).to(dtype)}
    a["token"] = torch.from_numpy(rng.permuted(np.tile(np.arange(lists[1]), (rows, 1)), axis=1))
    if lists[0] != rows:
        a["token"] = torch.arange(lists[1]).repeat(lists[0], 1)
    a["token"], a["node"] = a["token"].to(ints), integers(rng, ints, -1, 9, *lists)
    a["sequence"] = integers(rng, ints, 0, 9, *candidates, length)
    if lists[0] == rows:
        a["row"] = integers(rng, ints, -1, rows, *candidates)
    if rng.random() < 0.6:
        a["prefix"] = integers(rng, ints, 0, 99, *candidates)
        a["cum_logp"] = floats(rng, *candidates, kinds=("normal", "ties")).float()
    a["seed"] = one(rng, 7, -(2**63), torch.from_numpy(rng.integers(-(2**63), 2**63 - 1, batch)))
    return strided(rng, Call(vstar_ops.draw_children, a | some(rng, pack=(True,))))


def distinct_rows(rng: Random, dtype: torch.dtype) -> Call:
    shape, rows = (size(rng, 1, 2, 3), wide(rng, 1, 4, 9)), size(rng, 1, 2, 5)
    a = {"node": integers(rng, dtype, -1, int(one(rng, 1, 4, 99)), *shape)}
    a |= {"token": integers(rng, dtype, 0, 9, *shape), "slot": integers(rng, dtype, 0, 99, rows)}
    if rng.random() < 0.7:
        a["row"] = integers(rng, dtype, -1, rows, *shape)
    return strided(rng, Call(vstar_ops.distinct_rows, a))


def sibling_grpo_loss(rng: Random, dtype: torch.dtype) -> Call:
    batch, candidates, length = (*group(rng), size(rng, 1, 3))
    mask = masks(rng, batch, candidates, length)
    a: dict[str, Any] = dict(policies(int(rng.integers(2**31)), batch, candidates, length))
    if rng.random() < 0.2:  # log-ratios of up to 84
        a["old_logp"] = a["old_logp"] * one(rng, 28, 1 / 28)
    for name in ("old_logp", "ref_logp"):
        a[name] = one(rng, None, a[name], a[name])
    there = torch.ones(batch, candidates, length, dtype=torch.bool)
    if mask is not None:
        there = mask if mask.dim() == 3 else mask[:, :, None].expand(there.shape)
    for name in ("logp", "old_logp", "ref_logp"):
        if a[name] is not None:  # padding may hold anything
            a[name] = a[name].masked_fill(~there, math.nan).to(dtype)
    a["rewards"] = a["rewards"].masked_fill(~there.any(2), math.nan).to(other(rng, dtype))
    a["mask"] = mask
    if rng.random() < 0.4:
        a["depth_weights"] = tuple(float(one(rng, 0.0, 0.5, 1.0, 2.0)) for _ in range(length))
    if rng.random() < 0.4:
        a["normalizer"] = torch.tensor([1000, 9000, 8000, 20_000])
    options = some(
        rng, global_weight=(0.7, 0.0), sibling_weight=(1.3, 0.0), kl_weight=(0.3, 0.0),
        clip=((0.2, 0.3), (math.inf, 0.1), (0.0, 0.0)), dual_clip=(1.1, 3.0), clip_terms=("joint",),
        importance_sampling_level=("sequence",), log_ratio_bound=(0.5, 20.0), kl=("k1", "k2"),
        form=("paper",), weighting=("node", "candidate"), loss_type=("bnpo", "dr_grpo"), scale=("none",),
    )  # fmt: skip
    if "clip_terms" in options and options.get("sibling_weight") != 0:
        # Where both terms cancel but for rounding, rounding would say which clip cuts their sum.
        options["sibling_weight"] = float(rng.uniform(0.5, 1.5))
    return strided(rng, Call(loss_and_gradient, a | options))


def grown(rng: Random) -> tuple[SearchTrees, SelectedRows, NodeEvaluation]:
    """Trees after some rounds of the oracle, the next rows and what a model says about them."""
    batch, capacity, levels = size(rng, 1, 2, 3), one(rng, 4, 12, 24), one(rng, 1, 2, 3)
    budget = torch.from_numpy(rng.integers(one(rng, 0, capacity), capacity + 1, batch))
    trees = SearchTrees.empty(batch, capacity, levels, children=4, leaves=2, budget=budget)
    arrays = {name: x.numpy() for name, x in vars(trees).items()}
    root = torch.full((batch, 1), -1, dtype=torch.int32)
    rows, fresh = SelectedRows(root, torch.zeros_like(root), torch.zeros(batch, 1)), 1
    for step in range(rounds := int(rng.integers(1, 9))):
        evaluation = random_evaluation(rng, trees, rows, fresh)
        fresh += evaluation.child_node.numel()
        if step == 0:
            evaluation.num_children.fill_(4)
        if step + 1 < rounds:
            given = ({k: x.numpy() for k, x in part._asdict().items()} for part in (rows, evaluation))
            search.insert(arrays, *given, entropy_weight=0.1, logp_weight=0.0)
            options = {"exploration": 1.0, "traversals": one(rng, 1, 2), "max_idle": 9}
            rows = SelectedRows(
                **{k: torch.from_numpy(x) for k, x in search.select(arrays, **options).items()}
            )
    return trees, rows, evaluation


def ved_select(rng: Random, _: torch.dtype) -> Call:
    options = some(rng, exploration=(0.0, 0.5, 5.0), traversals=(2, 3), max_idle=(0, 3))
    return Call(select, {"trees": grown(rng)[0], **options})


def ved_insert(rng: Random, _: torch.dtype) -> Call:
    trees, rows, evaluation = grown(rng)
    options = some(rng, entropy_weight=(0.0, 0.5, -1.0), logp_weight=(0.3,))
    return Call(insert, {"trees": trees, "rows": rows, "evaluation": evaluation, **options})


def ved_candidates(rng: Random, _: torch.dtype) -> Call:
    a = {"trees": grown(rng)[0], "length": int(rng.integers(1, 4)), "k": int(one(rng, 1, 3, 30))}
    return Call(vstar_ops.ved_candidates, a | some(rng, logp_weight=(0.5, -1.0)))


def rows_of(rng: Random, trie: Trie) -> tuple[SearchTrees, SelectedRows]:
    """Trees of one node and any rows, empty ones too."""
    batch, count, capacity = size(rng, 1, 2, 3), size(rng, 1, 3, 5), one(rng, 1, 3)
    lists = {"children": one(rng, 1, 3, 40), "leaves": one(rng, 1, 2, 40)}
    trees = SearchTrees.empty(batch, capacity, int(rng.integers(0, trie.length + 1)), **lists)
    trees.slot.copy_(torch.from_numpy(rng.integers(0, 9, (batch, capacity))))
    trees.size.copy_(torch.from_numpy(rng.integers(0, 9, batch)))
    parent = torch.from_numpy(rng.integers(-2, capacity + 2, (batch, count))).int()
    logp = floats(rng, batch, count, kinds=("normal", "ties", "special")).float()
    return trees, SelectedRows(parent, nodes(rng, trie, batch, count).int(), logp)


def ved_inputs(rng: Random, _: torch.dtype) -> Call:
    trie = catalogue(rng, wide(rng, 7, 16))
    trees, rows = rows_of(rng, trie)
    return Call(vstar_ops.ved_inputs, {"trees": trees, "trie": trie, "rows": rows})


def ved_evaluate(rng: Random, dtype: torch.dtype) -> Call:
    columns = wide(rng, 7, 16, 33)
    trie = catalogue(rng, columns)
    trees, rows = rows_of(rng, trie)
    shape = rows.node.shape
    trie = filtered(rng, trie, shape[0])
    a: dict[str, Any] = {"trees": trees, "trie": trie, "rows": rows._replace(logp=summable(rows.logp))}
    logits = floats(rng, *shape, columns, kinds=LOGITS).to(other(rng, dtype))
    a["logits"] = one(rng, logits, torch.stack([logits, logits], -1)[..., 1])
    a["slot"] = torch.from_numpy(rng.integers(-1, 9, shape)).reshape(shape)
    a["seeds"] = torch.from_numpy(rng.integers(-(2**63), 2**63 - 1, shape[0]))
    if rng.random() < 0.5:
        a["value"] = floats(rng, *shape, kinds=("normal", "ties")).to(other(rng, dtype))
    if rng.random() < 0.5:
        a["child_value"] = floats(rng, *shape, columns, kinds=("normal", "ties", "special")).to(
            other(rng, dtype)
        )
    a |= some(
        rng, value_weight=(0.0, 0.5, -1.0), logp_weight=(0.5, 1.0), temperature=TEMPERATURES,
        normalize=("vocab",), skip_forced=(True,), expand_root=(False,),
    )  # fmt: skip
    return Call(vstar_ops.ved_evaluate, a)


def ved_beams(rng: Random, _: torch.dtype) -> Call:
    trie = catalogue(rng, wide(rng, 7, 16))
    trees, rows = rows_of(rng, trie)
    batch, count = rows.node.shape

    def extensions() -> ExpandTopK:
        """Distinct nodes, and what is no node."""
        k = size(rng, 3, 9, 40)
        order = rng.random((batch, trie.num_nodes + k)).argsort(1)[:, :k]
        node = torch.from_numpy(np.where(order < trie.num_nodes, order, -1)).int()
        parent = torch.from_numpy(rng.integers(0, count + 1, (batch, k))).reshape(batch, k).int()
        logp = floats(rng, *node.shape).float()
        return ExpandTopK(logp, logp, parent, parent, node, trees.size, rows.logp)

    a = {"trees": trees, "trie": trie, "rows": rows, "first": extensions(), "width": one(rng, 1, 4, 30)}
    a |= {"others": extensions()} if rng.random() < 0.7 else {}
    return Call(vstar_ops.ved_beams, a | some(rng, num_first=(0, 1, 3, 50), skip_forced=(True,)))


DRAWS: dict[str, Callable[[Random, torch.dtype], Call]] = {
    f.__name__: f
    for f in (
        expand_topk, token_logp, token_logp_backward, group_advantage, sibling_advantage, prefix_returns,
        prefix_tree, advance_beams, rows_to_run, filter_items, draw_children, distinct_rows,
        sibling_grpo_loss, ved_select, ved_insert, ved_candidates, ved_inputs, ved_evaluate, ved_beams,
    )
}  # fmt: skip
