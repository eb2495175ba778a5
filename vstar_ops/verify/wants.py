"""What a call of an op should return, by its oracle: :func:`expectation`."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

import vstar_ops
from vstar_ops import SiblingAdvantage

from . import oracles, search
from .calls import Call, map_tensors
from .judge import Verdict, Want, limit_of, results
from .loss import whole_loss
from .winners import Children, expand_topk, ved_evaluate


def expectation(op: str, call: Call) -> Callable[[Any], Verdict]:
    """What compares the result of a call of an op with the op's oracle, which runs once."""
    public = getattr(vstar_ops, op.removesuffix("_backward"))
    defaults = inspect.signature(public).parameters.values()
    arguments = {x.name: x.default for x in defaults if x.default is not x.empty}
    arguments |= {k: map_tensors(_array, x) for k, x in call.arguments.items()}
    if op in RANKED:
        compare_winners = RANKED[op](call, arguments)
        return lambda out: compare_winners(results(out))
    want = dict(ORACLES[op](call, arguments))

    def compare(out: Any) -> Verdict:
        got, verdict = results(out), Verdict()
        if set(want) != set(got):
            raise AssertionError(f"{op} must return {sorted(want)}, got {sorted(got)}")
        for name, x in want.items():
            if x.scale is None:
                verdict.exactly(name, got[name], x.value)
            else:
                verdict.floats(name, got[name], x)
        return verdict

    return compare


def _array(x: Tensor) -> Any:
    x = x.detach().cpu()
    return (x.double() if x.is_floating_point() else x).numpy()


Wants = Iterator[tuple[str, Want]]


def _token_logp(call: Call, a: dict[str, Any]) -> tuple[list[Any], list[Any], np.ndarray, np.ndarray]:
    """log-probabilities, entropies and gradients, row by row, and which of these are exactly 0."""
    columns = a["logits"].shape[-1]
    rows, targets = math.prod(a["logits"].shape[:-1]), a["targets"]
    z, many = a["logits"].reshape(rows, columns), targets.ndim == a["logits"].ndim
    targets = targets.reshape(rows, targets.shape[-1] if many else 1)
    grad_logp, grad_entropy = a.get("grad_logp"), a.get("grad_entropy")
    pull = np.zeros(targets.shape) if grad_logp is None else grad_logp.reshape(targets.shape)
    slope = np.zeros(rows) if grad_entropy is None else grad_entropy.reshape(rows)
    batch = a["logits"].shape[0] if a["logits"].ndim > 1 else 1
    tries = None if a["trie"] is None else Children.of_requests(a["trie"], batch)
    logp, entropy, gradient, none = [], [], np.zeros(z.shape), np.ones(z.shape, bool)
    rounded = float if call.arguments["logits"].dtype == torch.float64 else oracles.float32
    for r in range(rows):
        domain = (
            range(columns)
            if tries is None
            else tries[r * batch // rows].columns(int(a["node"].reshape(-1)[r]))
        )
        given = z[r].tolist(), domain, targets[r].tolist(), pull[r].tolist(), float(slope[r])
        chosen, h, by_column = oracles.token_logp(*given, a["temperature"], rounded)
        logp.append(chosen)
        entropy.append(h)
        for v, g in by_column.items():
            gradient[r, v], none[r, v] = g, tries is not None and len(domain) == 1
    return logp, entropy, gradient, none


def token_logp(call: Call, a: dict[str, Any]) -> Wants:
    logp, entropy, *_ = _token_logp(call, a)
    value = np.array(logp, np.float64).reshape(a["targets"].shape)
    limit = limit_of(call.arguments["logits"], 2e-6)
    with np.errstate(all="ignore"):
        yield ".logp", Want(value, np.maximum(np.nan_to_num(np.abs(value), posinf=1.0), 1.0), 2 * limit)
    yield ".entropy", Want(np.array(entropy).reshape(a["logits"].shape[:-1]), 1.0, 4 * limit)


def token_logp_backward(call: Call, a: dict[str, Any]) -> Wants:
    *_, gradient, none = _token_logp(call, a)
    logits = call.arguments["logits"]
    limit = limit_of(logits, 1e-5 + 2 * ROUNDING.get(logits.dtype, 0))
    scale = np.maximum(np.abs(gradient), max(1.0, 1 / a["temperature"]))
    scale = np.where(none, 1e-30, scale)
    yield "", Want(gradient.reshape(logits.shape), scale.reshape(logits.shape), limit)


ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def _flat(rewards: np.ndarray, there: Any) -> Any:
    """Requests ``[B, 1]`` in which all rewards that count are equal: their advantages are exactly 0."""
    high = np.where(there, rewards, -np.inf).max(1, initial=-np.inf, keepdims=True)
    with np.errstate(all="ignore"):
        return np.isfinite(high) & ((rewards == high) | ~there).all(1, keepdims=True)


def group_advantage(call: Call, a: dict[str, Any]) -> Wants:
    names = ("rewards", "mask", "eps", "ddof", "std_floor", "scale")
    value = oracles.group_advantage(*(a[name] for name in names))
    there = np.ones(value.shape, bool) if a["mask"] is None else a["mask"]
    scale = np.where(_flat(a["rewards"], there) | ~there, 1e-30, np.maximum(np.abs(value), 0.1))
    yield "", Want(value, scale, limit_of(call.arguments["rewards"], 1e-5))


def sibling_advantage(call: Call, a: dict[str, Any]) -> Wants:
    value, valid, node, count = oracles.sibling_advantage(**a)
    there = oracles.tokens_there(a["tokens"].shape, a["mask"]).any(2)
    double = call.arguments["rewards"].dtype == torch.float64  # whose sums are not exact
    flat = (_flat(a["rewards"], there) & (not double))[:, :, None] | ~valid
    scale = np.where(flat, 1e-30, np.maximum(np.abs(value), 1.0))
    yield ".advantage", Want(value, scale, 1e-9 if double else 1e-5)
    for name, x in ((".valid", valid), (".node", node), (".num_candidates", count)):
        yield name, Want(x)


def prefix_returns(call: Call, a: dict[str, Any]) -> Wants:
    shape = a["tokens"].shape
    weights = a.pop("weights")
    if weights is None:
        weights = (
            np.interp(np.linspace(0, 2, shape[2]), [0, 1, 2], [0.3, 0.5, 1.0]) if shape[2] > 1 else [1.0]
        )
    returns, similarity = oracles.prefix_returns(**a, weights=weights)
    limit = limit_of(call.arguments["embedding"], 1e-5)
    yield ".returns", Want(returns, np.maximum(np.abs(returns), 1.0), limit)
    yield ".similarity", Want(similarity, 1.0, limit)
    there = oracles.tokens_there(shape, a["mask"], ended=True)
    zeros = np.zeros(shape[:2])
    *_, node, count = oracles.sibling_advantage(a["tokens"], zeros, there, 1.0, 0, 0.0, 2, "sibling")
    yield ".node", Want(node)
    yield ".num_candidates", Want(count)


def prefix_tree(call: Call, a: dict[str, Any]) -> Wants:
    for name, x in oracles.prefix_tree(a["tokens"], a["mask"]).items():
        yield "." + name, Want(x)


def advance_beams(call: Call, a: dict[str, Any]) -> Wants:
    for name, x in oracles.advance_beams(**a).items():
        yield "." + name, Want(x)


def rows_to_run(call: Call, a: dict[str, Any]) -> Wants:
    for name, x in oracles.rows_to_run(Children.of(a.pop("trie")).children, **a).items():
        yield "." + name, Want(x)


def filter_items(call: Call, a: dict[str, Any]) -> Wants:
    trie, bits = a.pop("trie"), a.pop("bits")
    children, leaves = Children.of(trie).children, trie.item_offset.tolist()
    for name, x in oracles.filter_items(children, leaves, bits.alive, bits.allowed, **a).items():
        yield "." + name, Want(x)


def draw_children(call: Call, a: dict[str, Any]) -> Wants:
    seed = a.pop("seed")
    seeds = oracles.splitmix64(seed, len(a["sequence"])) if isinstance(seed, int) else seed.tolist()
    want, _ = oracles.draw_children(**a, seeds=seeds)
    for name, x in want.items():
        floats = name == "logp"
        yield "." + name, Want(x, np.maximum(np.nan_to_num(np.abs(x)), 1.0) if floats else None, 1e-6)


def distinct_rows(call: Call, a: dict[str, Any]) -> Wants:
    for name, x in oracles.distinct_rows(**a).items():
        yield "." + name, Want(x)


FORMS = {
    "centered": {"baseline": "parent", "scale": "group", "ddof": 1},
    "paper": {"baseline": "sibling", "scale": "siblings", "ddof": 0},
}


def sibling_grpo_loss(call: Call, a: dict[str, Any]) -> Wants:
    tokens, rewards, mask = (a.pop(name) for name in ("tokens", "rewards", "mask"))
    form, scale = a.pop("form"), a.pop("scale")
    there: Any = oracles.tokens_there(tokens.shape, mask)
    options: dict[str, Any] = {"eps": 1e-4, "std_floor": 0.0, "min_siblings": 2} | FORMS[form]
    if scale == "none":
        options["scale"] = scale
    siblings = SiblingAdvantage(
        *map(torch.from_numpy, oracles.sibling_advantage(tokens, rewards, mask, **options))
    )
    group = oracles.group_advantage(
        rewards, there.any(2), 1e-4, 1, 0.0, "none" if scale == "none" else "group"
    )
    if a["normalizer"] is not None:
        a["normalizer"] = a["normalizer"].tolist()
    for name in ("sibling_advantage", "group_advantage"):
        del a[name]
    policies = {name: a.pop(name) for name in ("logp", "old_logp", "ref_logp")}
    x, *others = (None if p is None else torch.from_numpy(np.where(there, p, 0.0)) for p in policies.values())
    assert x is not None
    weighting = a["weighting"] or {"centered": "candidate", "paper": "node"}[form]
    a |= {"weighting": weighting, "old_logp": others[0], "ref_logp": others[1]}
    x.requires_grad_()
    want, sizes = whole_loss(x, siblings, torch.from_numpy(group), mask=torch.from_numpy(there), **a)
    limit = max(limit_of(call.arguments[name], 1e-5) for name in ("logp", "rewards"))
    for name, value in want.items():
        yield f"[0].{name}", Want(value.item(), max(1.0, sizes.get(name, 0.0)), limit)
    (gradient,) = torch.autograd.grad(want["loss"], x)
    slopes = gradient.numpy()
    least = max(0.01 * np.abs(slopes).max(initial=0), 1e-9)
    limit += 2 * ROUNDING.get(call.arguments["logp"].dtype, 0)
    yield "[1]", Want(slopes, np.maximum(np.abs(slopes), least), limit)


def _searches(arrays: Any) -> dict[str, np.ndarray]:
    return {f.name: getattr(arrays, f.name).copy() for f in fields(arrays)}


def _trees(trees: search.Arrays, prefix: str) -> Wants:
    for name, x in trees.items():
        floats = x.dtype.kind == "f"
        yield prefix + name, Want(x, np.maximum(np.abs(np.nan_to_num(x)), 1.0) if floats else None, 1e-6)


def ved_select(call: Call, a: dict[str, Any]) -> Wants:
    trees = _searches(a.pop("trees"))
    yield from _trees(search.select(trees, **a), "[0].")
    yield from _trees(trees, "[1].")


def ved_insert(call: Call, a: dict[str, Any]) -> Wants:
    trees = _searches(a.pop("trees"))
    rows, evaluation = a.pop("rows")._asdict(), a.pop("evaluation")._asdict()
    search.insert(trees, rows, evaluation, **a)
    yield from _trees(trees, ".")


def ved_candidates(call: Call, a: dict[str, Any]) -> Wants:
    yield from _trees(search.candidates(_searches(a.pop("trees")), **a), ".")


def ved_inputs(call: Call, a: dict[str, Any]) -> Wants:
    yield from _trees(search.inputs(_searches(a["trees"]), a["trie"].token.numpy(), a["rows"]._asdict()), ".")


def ved_beams(call: Call, a: dict[str, Any]) -> Wants:
    leaf = None
    if a["skip_forced"]:
        leaf = a["trie"].only_leaf.numpy()
    lists = [x._asdict() for x in (a["first"], a["others"]) if x is not None]
    num_first = a["width"] if a["num_first"] is None else a["num_first"]
    trees, rows = _searches(a["trees"]), a["rows"]._asdict()
    yield from _trees(search.beams(trees, rows, lists, num_first, a["width"], leaf), ".")


RANKED = {"expand_topk": expand_topk, "ved_evaluate": ved_evaluate}
ORACLES: dict[str, Callable[[Call, dict[str, Any]], Wants]] = {
    f.__name__: f
    for f in (
        token_logp, token_logp_backward, group_advantage, sibling_advantage, prefix_returns, prefix_tree,
        advance_beams, rows_to_run, filter_items, draw_children, distinct_rows, sibling_grpo_loss,
        ved_select, ved_insert, ved_candidates, ved_inputs, ved_beams,
    )
}  # fmt: skip
