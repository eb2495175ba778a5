"""Random valid calls of the ops of the tree search."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

import vstar_ops
from vstar_ops import (
    NodeEvaluation,
    SearchTrees,
    SelectedRows,
    Trie,
    ved_beams,
    ved_candidates,
    ved_evaluate,
    ved_inputs,
    ved_insert,
    ved_select,
)

from .calls import Call, insert, select
from .generators import half_of, prefixes, seeded


def random_evaluation(
    rng: np.random.Generator, trees: SearchTrees, rows: SelectedRows, fresh: int
) -> NodeEvaluation:
    """What a model may say about rows: children nowhere else in the tree, values with ties and NaN."""
    batch, count = rows.node.shape
    children, leaves = trees.child_node.shape[2], trees.leaf_node.shape[2]

    def floats(*shape: int) -> Tensor:
        return torch.from_numpy(rng.standard_normal((batch, count, *shape))).float()

    def ints(high: int) -> Tensor:
        return torch.from_numpy(rng.integers(0, high + 1, (batch, count))).int()

    value = floats().round()
    value[torch.from_numpy(rng.random((batch, count)) < 0.1)] = math.nan
    name = fresh + torch.arange(batch * count * children, dtype=torch.int32).view(batch, count, children)
    leaf = name[..., :1] + 100_000 * torch.arange(leaves, dtype=torch.int32)
    slot = torch.arange(batch * count).view(batch, count)
    return NodeEvaluation(
        slot, value, floats().abs(), ints(children), name, floats(children), leaf, floats(leaves),
        floats(leaves).round(), ints(leaves),
    )  # fmt: skip


def grown(batch: int, rounds: int) -> tuple[SearchTrees, SelectedRows, NodeEvaluation]:
    """Trees after some rounds, the rows of the next one and what a model says about them."""
    rng, fresh = np.random.default_rng(13), 1
    trees = SearchTrees.empty(batch, 40, 3, children=4, leaves=2)
    root = torch.full((batch, 1), -1, dtype=torch.int32)
    rows = SelectedRows(root, torch.zeros_like(root), torch.zeros(batch, 1))
    with vstar_ops.use_backend("cpu" if vstar_ops.backends()["cpu"].available else "reference"):
        for step in range(rounds + 1):
            evaluation = random_evaluation(rng, trees, rows, fresh)
            fresh += evaluation.child_node.numel()
            if step < rounds:
                ved_insert(trees, rows, evaluation)
                rows = ved_select(trees)
    return trees, rows, evaluation


def selection(batch: int, rounds: int = 4, **options: Any) -> Call:
    return Call(select, {"trees": grown(batch, rounds)[0], **options})


def insertion(batch: int, rounds: int = 4, **options: Any) -> Call:
    trees, rows, evaluation = grown(batch, rounds)
    return Call(insert, {"trees": trees, "rows": rows, "evaluation": evaluation, **options})


def ranking(batch: int, rounds: int = 4, **options: Any) -> Call:
    return Call(ved_candidates, {"trees": grown(batch, rounds)[0], "length": 3, "k": 5, **options})


def listing(batch: int, leaves: int = 70) -> Call:
    """``ved_candidates`` of long lists; leaves tie, and some were evaluated."""
    trees = SearchTrees.empty(batch, 40, 3, children=1, leaves=leaves)
    rng = np.random.default_rng(30)
    trees.size.fill_(40)
    for name, stop in {"node": 200, "depth": 4, "leaf_node": 200, "num_leaves": leaves + 1}.items():
        field = getattr(trees, name)
        field.copy_(torch.from_numpy(rng.integers(0, stop, field.shape)))
    for name in ("logp", "value", "leaf_logp", "leaf_score"):
        field = getattr(trees, name)
        field.copy_(torch.from_numpy(rng.integers(0, 4, field.shape) / 4))
    return Call(ved_candidates, {"trees": trees, "length": 3, "k": 60})


def rows_to_run(
    batch: int, rows: int = 4, seed: int = 0, **sizes: int
) -> tuple[Tensor, Trie, dict[str, Any]]:
    """Logits, a trie of three levels, and trees of one node with rows of any depth below it."""
    logits, trie, _ = prefixes(batch, rows, seed=seed, **sizes)
    rng = np.random.default_rng(14)
    node = torch.from_numpy(rng.integers(-1, trie.level_offset[3], (batch, rows))).int()
    node[:, :1] = 0
    logp = -torch.rand(batch, rows, generator=seeded(15))
    trees = SearchTrees.empty(batch, rows, 2, children=5, leaves=7)
    trees.size.fill_(rows)
    trees.slot.copy_(torch.arange(batch * rows).view(batch, rows))
    return (
        logits,
        trie,
        {"trees": trees, "rows": SelectedRows(torch.where(node < 0, -1, 0).int(), node, logp)},
    )


def inputs(batch: int) -> Call:
    _, trie, given = rows_to_run(batch)
    return Call(ved_inputs, {**given, "trie": trie})


def evaluation(
    batch: int,
    *,
    options: bool = False,
    filters: int | None = None,
    dtype: torch.dtype = torch.float32,
    **sizes: int,
) -> Call:
    """``ved_evaluate``, with every option or none."""
    logits, trie, given = rows_to_run(batch, **sizes)
    random = seeded(16)
    given |= {
        "trie": half_of(trie, filters, batch),
        "logits": logits.to(dtype),
        "slot": torch.zeros(logits.shape[:2], dtype=torch.int64),
    }
    given["seeds"] = torch.arange(batch)
    if options:
        given["value"] = torch.randn(logits.shape[:2], generator=random)
        given["child_value"] = torch.randn(logits.shape, generator=random).half()
        given |= {"value_weight": 0.5, "logp_weight": 0.3, "temperature": 0.7, "normalize": "vocab"}
        given |= {"skip_forced": True, "expand_root": False}
    return Call(ved_evaluate, given)


def beams(batch: int, width: int = 6, *, both: bool = False, **sizes: int) -> Call:
    """``ved_beams`` of one list or of two."""
    logits, trie, given = rows_to_run(batch, **sizes)
    given |= {"trie": trie, "width": width}
    lists = (("first", 0.0), ("others", 0.5)) if both else (("first", 0.0),)
    for name, weight in lists:
        value = torch.randn(logits.shape, generator=seeded(17))
        given[name] = vstar_ops.expand_topk(
            logits, trie, given["rows"].node, 2 * width, child_value=value, value_weight=weight
        )
    if both:
        given |= {"num_first": width // 2, "skip_forced": True}
    return Call(ved_beams, given)
