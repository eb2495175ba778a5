"""Tree search, without the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import vstar_ops
from vstar_ops import NodeEvaluation, SearchTrees, SelectedRows, ved_candidates, ved_insert, ved_select

from .. import baselines
from .case import Case, beams, nbytes, random_logits, short


def _search(batch: int, budget: int, device: torch.device) -> tuple[SearchTrees, Callable[[], Any]]:
    """Trees that have spent half of their budget, and a round without the model. A node has 32 children."""

    def evaluation(node: Tensor) -> NodeEvaluation:
        child = 32 * node.clamp(min=0)[..., None] + torch.arange(1, 33, dtype=torch.int32)
        children, zero = torch.where(node < 1 + 32 + 32**2, 32, 0).int(), torch.zeros_like(node)
        expected, value = torch.rand(2, *node.shape)
        logp, leaf_logp, child_value = torch.rand(3, *child.shape)
        lists = children, child, -logp, child, -leaf_logp, child_value
        return NodeEvaluation(zero.long(), expected, value, *lists, zero)

    trees = SearchTrees.empty(batch, budget, 3, children=32, leaves=32, device=device)
    root = torch.zeros(batch, 1, dtype=torch.int32)
    rows = SelectedRows(root - 1, root, torch.zeros(batch, 1))
    ved_insert(trees, rows, evaluation(rows.node))
    for _ in range(budget // 6):
        rows = ved_select(trees)
        ved_insert(trees, rows, evaluation(rows.node))
    said = evaluation(rows.node)

    def round_() -> SelectedRows:
        chosen = ved_select(trees)
        ved_insert(trees, chosen, said)
        return chosen

    return trees, round_


def ved_round(items: Tensor, batch: int, budget: int) -> Case:
    """A round of tree search without the model: select, insert what a made-up model says.

    Every sample starts with the same trees.
    """
    trees, round_ = _search(batch, budget, items.device)
    planted = {name: value.clone() for name, value in vars(trees).items()}

    def ours() -> tuple[Tensor, ...]:
        return (*round_(), trees.visits, trees.size)

    def reset() -> None:
        for name, value in planted.items():
            getattr(trees, name).copy_(value)

    fields = trees.node, trees.parent, trees.priority, trees.next_child, trees.num_children, trees.depth
    name = f"ved_select, ved_insert B={batch} budget={budget}"
    return Case(name, {"ours": ours}, [()], nbytes(fields), rtol=1.3e-6, atol=1e-5, reset=reset, calls=10)


def ved_rows(items: Tensor, batch: int, width: int, dtype: torch.dtype) -> Case:
    """Both lists of the first level's beams, of which half the children stand for a leaf.

    Child values, which alone rank the leaves, are well apart: no two of a row nearly tie.
    """
    trie, columns, node, logp = beams(items, batch, width, 1)
    children, seeds = trie.max_children, torch.arange(batch)
    trees = SearchTrees.empty(batch, 1, 2, children=children, leaves=children, device=items.device)
    rows, value = SelectedRows(node, node, logp), torch.randint(9, node.shape).float()
    tables, index, slot = baselines.child_tables(trie, 1), node.long(), torch.zeros(node.shape).long()
    logits, others = (random_logits(*node.shape, columns, dtype=dtype) for _ in range(2))

    def ours(z: Tensor, child_value: Tensor) -> tuple[Tensor, ...]:
        given = {"value": value, "child_value": child_value, "skip_forced": True}
        return vstar_ops.ved_evaluate(trees, trie, rows, z, slot, seeds, **given)[1:]

    def composed(z: Tensor, child_value: Tensor) -> tuple[Tensor | None, ...]:
        given = tables, index, logp, value, seeds, trie.only_leaf, children
        return baselines.ved_rows(z, child_value, *given)

    edges = int(trie.num_children(node).sum())
    return Case(
        f"ved_evaluate {short(dtype)} B={batch} P={width} V={columns}",
        {"ours": ours, "gather, log_softmax, noise, top-k": composed},
        [(z, x.argsort(2).float()) for z, x in zip(logits, others)],
        (dtype.itemsize + 4 + 4 + 4) * edges + nbytes((node, logp, value)),
    )


def ved_level(items: Tensor, batch: int, width: int) -> Case:
    """The beams of a level from two lists, and what the model extends."""
    trie, columns, node, logp = beams(items, batch, width, 1)
    trees = SearchTrees.empty(batch, 1 + width, 2, children=1, leaves=1, device=items.device)
    trees.size.fill_(1 + width)
    rows, value = SelectedRows(node, node, logp), torch.randn(*node.shape, columns)
    lists = [
        vstar_ops.expand_topk(value, trie, node, 2 * width, cum_logp=logp, temperature=x) for x in (1.0, 2.0)
    ]

    def ours() -> tuple[Tensor, ...]:
        options: dict[str, Any] = {"num_first": width // 2, "others": lists[1], "skip_forced": True}
        chosen = vstar_ops.ved_beams(trees, trie, rows, lists[0], width, **options)
        return *chosen, *vstar_ops.ved_inputs(trees, trie, chosen)

    read = [getattr(x, name) for x in lists for name in ("node", "parent", "logp")]
    return Case(f"ved_beams, ved_inputs B={batch} P={width}", {"ours": ours}, [()], nbytes(read))


def ved_candidates_of(items: Tensor, batch: int, budget: int) -> Case:
    """The best leaves of the same trees."""
    trees, _ = _search(batch, budget, items.device)

    def ours() -> tuple[Tensor, ...]:
        return tuple(ved_candidates(trees, 3, 16))

    read = nbytes((trees.node, trees.num_leaves)) + 12 * int(trees.num_leaves.sum())
    name = f"ved_candidates B={batch} budget={budget} K=16"
    return Case(name, {"ours": ours}, [()], read, rtol=1.3e-6, atol=1e-5)
