"""Valid random inputs of every op, by the op's name: what the tests of all ops run on.

``CASES[op][label](batch)`` makes a call of the public function that runs the op. The first dimension of every
tensor among its arguments is the request.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

import vstar_ops
from vstar_ops import (
    ItemFilter,
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
from vstar_ops.reference.filters import num_words, pack_bits

from .calls import Call, filter_bits, insert, select, token_logp_gradient, with_alive

HUGE = [-(2**62), -(2**62) + 1, -(2**31) - 1, -1, 0, 2**31, 2**32, 2**62 - 1, 2**62]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_tokens(
    seed: int, batch: int, group: int, length: int, tokens: int | str, dtype: torch.dtype = torch.int64
) -> Tensor:
    """Candidates ``[B, G, L]`` of so many tokens, or of ``"huge"`` ones."""
    rng, shape = np.random.default_rng(seed), (batch, group, length)
    if tokens == "huge":
        return torch.from_numpy(rng.choice(np.array(HUGE), shape)).reshape(shape)
    return torch.from_numpy(rng.integers(0, int(tokens), shape)).to(dtype)


def random_mask(seed: int, *shape: int) -> Tensor:
    return torch.rand(shape, generator=seeded(seed)) < 0.8


# ---------------------------------------------------------------- expand_topk


def restricted(trie: Trie, allowed: Tensor) -> Trie:
    """A trie of which some sequences are allowed, bool ``[R, num_sequences]``, where ``R`` is 1 or ``B``."""
    nodes, words = trie.num_nodes, (trie.num_nodes + 31) // 32 + 1
    alive = torch.zeros(len(allowed), 32 * words, dtype=torch.int64, device=trie.device)
    alive[:, nodes - trie.num_sequences : nodes] = allowed.long()
    parent = trie.parent(torch.arange(nodes, device=trie.device)).long()
    for first, end in zip(trie.level_offset[-2:0:-1], trie.level_offset[:0:-1]):
        above = parent[first:end].expand(len(allowed), end - first)
        alive.scatter_reduce_(1, above, alive[:, first:end].clone(), "amax")
    bits = (alive.view(len(allowed), words, 32) << torch.arange(32, device=trie.device)).sum(2)
    return with_alive(trie, bits.to(torch.int32))


def half_of(trie: Trie, filters: int | None, batch: int) -> Trie:
    """A trie as it is, or half of its sequences: the same for all requests (1), or others for each (0)."""
    if filters is None:
        return trie
    return restricted(trie, torch.rand(filters or batch, trie.num_sequences, generator=seeded(18)) < 0.5)


def prefixes(
    batch: int = 6, width: int = 3, columns: int = 50, items: int = 400, seed: int = 0
) -> tuple[Tensor, Trie, Tensor]:
    """Logits ``[B, W, V]``, a trie of three levels, and inner nodes of it ``[B, W]``."""
    rng = np.random.default_rng(seed)
    trie = Trie.from_sequences(rng.integers(0, columns, (items, 3)))
    logits = torch.from_numpy(rng.normal(size=(batch, width, columns))).float()
    node = torch.from_numpy(rng.integers(0, trie.level_offset[2], (batch, width)))
    return logits, trie, node


def expansion(
    batch: int,
    k: int = 9,
    *,
    options: bool = False,
    root: bool = False,
    tied: bool = False,
    filters: int | None = None,
    dtype: torch.dtype = torch.float32,
    **sizes: int,
) -> Call:
    """``expand_topk``, with every option or none, and all logits equal if ``tied``."""
    logits, trie, node = prefixes(batch, **sizes)
    trie = half_of(trie, filters, batch)
    logits = (logits * (not tied)).to(dtype)
    arguments: dict[str, Any] = {"logits": logits, "trie": trie, "node": node * (not root), "k": k}
    if options:
        random = seeded(1)
        for name in ("cum_logp", "value", "bonus"):
            arguments[name] = torch.randn(node.shape, generator=random)
        arguments["child_value"] = torch.randn(logits.shape, generator=random).half()
        arguments["gumbel_seed"] = torch.arange(batch)
        arguments |= {"value_weight": 0.5, "entropy_weight": 0.1, "temperature": 0.7, "normalize": "vocab"}
    return Call(vstar_ops.expand_topk, arguments)


# ---------------------------------------------------------------- filters


def random_filter(rng: np.random.Generator, trie: Trie, batch: int, share: float) -> ItemFilter:
    """So many of the items are allowed, for each request others; the nodes follow."""
    allowed = torch.from_numpy(rng.random((batch, trie.num_items)) < share)
    nodes = torch.full((batch, num_words(trie.num_nodes)), -1, dtype=torch.int32)
    with vstar_ops.use_backend("reference"):
        return filter_bits(ItemFilter(nodes, pack_bits(allowed)), trie, None, allow=True)


def filtering(
    batch: int,
    listed: int | None = 9,
    *,
    allow: bool = False,
    within: int | None = None,
    columns: int = 8,
    items: int = 300,
    share: float = 0.4,
) -> Call:
    """``filter_items`` with so many items in the list, or of all nodes; ``within`` one filter or ``B``."""
    rng = np.random.default_rng(batch)
    trie = Trie.from_sequences(rng.integers(0, columns, (items, 3)))
    a: dict[str, Any] = {"bits": random_filter(rng, trie, batch, share), "trie": trie, "row": None}
    if listed is not None:
        a["row"] = torch.from_numpy(rng.integers(-2, items + 2, (batch, listed)))
    else:
        a["bits"].alive = torch.full_like(a["bits"].alive, 0x5A5A5A5A)
    if within is not None:
        a["within"] = random_filter(rng, trie, batch if within != 1 else 1, 0.5).allowed
    return Call(filter_bits, {**a, "allow": allow})


# ---------------------------------------------------------------- candidates


def rewarded(batch: int, group: int = 12, *, masked: bool = False, **options: Any) -> Call:
    """``group_advantage``."""
    rewards = torch.randn(batch, group, generator=seeded(2))
    mask = random_mask(3, batch, group) if masked else None
    return Call(vstar_ops.group_advantage, {"rewards": rewards, "mask": mask, **options})


def siblings(
    batch: int,
    group: int = 12,
    tokens: int = 4,
    *,
    masked: bool = False,
    by_token: bool = False,
    **options: Any,
) -> Call:
    """``sibling_advantage``."""
    given = rewarded(batch, group, masked=masked).arguments
    if by_token:
        given["mask"] = random_mask(3, batch, group, 3)
    sids = random_tokens(4, batch, group, 3, tokens)
    return Call(vstar_ops.sibling_advantage, {"tokens": sids, **given, **options})


def embedded(
    batch: int,
    group: int = 12,
    width: int = 7,
    tokens: int = 4,
    *,
    masked: bool = False,
    by_token: bool = False,
    **options: Any,
) -> Call:
    """``prefix_returns``."""
    sids = random_tokens(5, batch, group + 1, 3, tokens)
    item = torch.randn(batch, group + 1, width, generator=seeded(6))
    arguments: dict[str, Any] = {"tokens": sids[:, 1:], "embedding": item[:, 1:]}
    arguments |= {"target": sids[:, 0], "target_embedding": item[:, 0]}
    arguments["mask"] = random_mask(7, batch, group) if masked else None
    if by_token:
        arguments["mask"] = random_mask(7, batch, group, 3)
    return Call(vstar_ops.prefix_returns, arguments | options)


def tree(batch: int, group: int = 12, tokens: int = 4, **masks: bool) -> Call:
    """``prefix_tree``."""
    arguments = siblings(batch, group, tokens, **masks).arguments
    del arguments["rewards"]
    return Call(vstar_ops.prefix_tree, arguments)


def winners(batch: int, width: int = 5, k: int = 7, length: int = 3, *, options: bool = False) -> Call:
    """``advance_beams``."""
    random = seeded(14)

    def ints(low: int, end: int, *shape: int) -> Tensor:
        return torch.randint(low, end, shape, generator=random)

    arguments = {name: ints(-1, width, batch, k).int() for name in ("parent", "token", "node")}
    arguments |= {"sequence": ints(0, 9, batch, width, length).int(), "slot": ints(0, 99, batch, width)}
    if options:
        arguments |= {"evaluated": ints(0, length, batch, width).int(), "row_slot": ints(0, 99, 6)}
        arguments["row"] = ints(-1, 6, batch, width).int()
    return Call(vstar_ops.advance_beams, arguments)


def pending(batch: int, width: int = 6, length: int = 3) -> Call:
    """``rows_to_run``."""
    given = winners(batch, width, 1, length, options=True).arguments
    trie = prefixes(1)[1]
    node = torch.randint(-1, trie.num_nodes, (batch, width), generator=seeded(15))
    arguments = {name: given[name] for name in ("sequence", "slot", "evaluated")}
    return Call(vstar_ops.rows_to_run, {"trie": trie, "node": node, **arguments})


def draws(
    batch: int,
    candidates: int = 9,
    children: int = 8,
    length: int = 2,
    *,
    options: bool = False,
    **given: Any,
) -> Call:
    """``draw_children``, out of five lists or of one per request."""
    random, shape = seeded(16), (batch, candidates)
    lists = (5, children) if options else (batch, children)
    logp = torch.randn(lists, generator=random).log_softmax(1)
    token = torch.arange(children, dtype=torch.int32).expand(lists)
    node = torch.randint(-1, 99, lists, generator=random).int()
    arguments: dict[str, Any] = {"logp": logp, "token": token, "node": node}
    arguments["sequence"] = torch.randint(9, (*shape, length), generator=random)
    arguments["seed"] = torch.arange(batch)
    if options:
        arguments |= {"row": torch.randint(-1, 5, shape, generator=random).int(), "pack": True}
        arguments |= {"prefix": torch.randint(99, shape, generator=random), "cum_logp": torch.zeros(shape)}
    return Call(vstar_ops.draw_children, arguments | given)


def distinct(batch: int, candidates: int = 9, nodes: int = 6, *, options: bool = False) -> Call:
    """``distinct_rows``."""
    random, shape = seeded(17), (batch, candidates)
    node = torch.randint(-1, nodes, shape, generator=random)
    arguments = {"node": node, "token": node % 4, "slot": torch.arange(10, 10 + batch)}
    if options:
        arguments |= {
            "slot": torch.arange(10, 15),
            "row": torch.randint(-1, 5, shape, generator=random).int(),
        }
    return Call(vstar_ops.distinct_rows, arguments)


def policies(seed: int, batch: int, group: int, length: int) -> dict[str, Tensor]:
    """Log-probabilities, tokens and rewards as the loss takes them."""
    random, shape = seeded(seed), (batch, group, length)
    return {
        "logp": -torch.rand(shape, generator=random) * 3,
        "tokens": torch.randint(0, 3, shape, generator=random),
        "rewards": torch.randint(0, 3, shape[:2], generator=random).float(),
        "old_logp": -torch.rand(shape, generator=random) * 3,
        "ref_logp": -torch.rand(shape, generator=random) * 3,
    }


def loss(batch: int, group: int = 6, *, options: bool = False, sequences: bool = False) -> Call:
    """``sibling_grpo_loss``, with every option, with ratios of sequences, or on-policy with none."""
    arguments: dict[str, Any] = dict(policies(8, batch, group, 3))
    if options:
        arguments |= {"mask": random_mask(9, batch, group, 3), "depth_weights": (0.5, 1.0, 2.0)}
        arguments |= {"clip": (0.2, 0.3), "kl": "k2", "form": "paper", "loss_type": "bnpo"}
        arguments |= {"dual_clip": 3.0, "log_ratio_bound": 2.0, "scale": "none"}
        arguments["normalizer"] = torch.tensor([1000, 9000, 8000, 20_000])
    elif sequences:
        arguments |= {"importance_sampling_level": "sequence", "clip_terms": "joint", "clip": (0.2, 0.3)}
        arguments |= {"loss_type": "dr_grpo", "horizon": 5, "form": "paper"}
    else:
        del arguments["old_logp"], arguments["ref_logp"]
    return Call(vstar_ops.sibling_grpo_loss, arguments)


# ---------------------------------------------------------------- token_logp


def scored(
    batch: int,
    columns: int = 30,
    targets: int = 2,
    *,
    legal: bool = False,
    filters: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Call:
    """``token_logp`` of rows ``[B, V]``, with or without a trie."""
    random = seeded(10)
    logits = (torch.randn(batch, columns, generator=random) * 3).to(dtype)
    arguments: dict[str, Any] = {
        "logits": logits, "targets": torch.randint(-1, min(columns, 9), (batch, targets), generator=random),
    }  # fmt: skip
    if legal:
        trie = Trie.from_sequences(torch.randint(0, columns, (4 * columns, 2), generator=random))
        node = torch.randint(-1, trie.level_offset[2], (batch,), generator=random)
        arguments |= {"trie": half_of(trie, filters, batch), "node": node}
    return Call(vstar_ops.token_logp, arguments | {"temperature": 0.7})


def differentiated(batch: int, *, of: str = "both", **sizes: Any) -> Call:
    """``token_logp_backward``."""
    arguments = scored(batch, **sizes).arguments
    grad_logp = torch.randn(arguments["targets"].shape, generator=seeded(11))
    grad_entropy = torch.randn(batch, generator=seeded(12))
    given = {
        "grad_logp": None if of == "entropy" else grad_logp,
        "grad_entropy": None if of == "logp" else grad_entropy,
    }
    return Call(token_logp_gradient, arguments | given)


# ---------------------------------------------------------------- tree search


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


# ---------------------------------------------------------------- by name

BFLOAT16: dict[str, Any] = {"dtype": torch.bfloat16}
HALVES = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *HALVES]
LONG: dict[str, Any] = {"columns": 1300, "root": True, "items": 4000}
CASES: dict[str, dict[str, Callable[[int], Call]]] = {
    "expand_topk": {
        "plain": expansion,
        "filters": partial(expansion, filters=0),
        "options": partial(expansion, options=True, filters=1),
    },
    "filter_items": {
        "plain": filtering,
        "options": partial(filtering, listed=40, allow=True, within=2),
        "all nodes": partial(filtering, listed=None),
    },
    "group_advantage": {
        "plain": rewarded,
        "options": partial(rewarded, masked=True, ddof=0, std_floor=0.1),
        "not scaled": partial(rewarded, scale="none"),
    },
    "sibling_advantage": {
        "plain": siblings,
        "options": partial(siblings, masked=True, ddof=1, min_siblings=3, baseline="parent"),
        "tokens": partial(siblings, by_token=True, scale="group"),
    },
    "prefix_returns": {
        "plain": embedded,
        "options": partial(embedded, masked=True, weights=(0.1, 0.2, 0.3)),
        "tokens": partial(embedded, by_token=True),
    },
    "prefix_tree": {
        "plain": tree,
        "options": partial(tree, masked=True),
        "tokens": partial(tree, by_token=True),
    },
    "advance_beams": {"plain": winners, "options": partial(winners, options=True)},
    "rows_to_run": {"plain": pending},
    "draw_children": {"plain": draws, "options": partial(draws, options=True)},
    "distinct_rows": {"plain": distinct, "options": partial(distinct, options=True)},
    "token_logp": {
        "plain": partial(scored, targets=1, **BFLOAT16),
        "filters": partial(scored, legal=True, filters=0),
        "legal": partial(scored, legal=True),
    },
    "token_logp_backward": {
        "plain": partial(differentiated, **BFLOAT16),
        "logp": partial(differentiated, of="logp"),
        "entropy": partial(differentiated, of="entropy"),
        "filters": partial(differentiated, legal=True, filters=0),
        "legal": partial(differentiated, legal=True),
    },
    "sibling_grpo_loss": {
        "plain": loss,
        "options": partial(loss, options=True),
        "sequences": partial(loss, sequences=True),
    },
    "ved_select": {
        "plain": selection,
        "options": partial(selection, exploration=0.5, traversals=2, max_idle=3),
    },
    "ved_insert": {"plain": insertion, "options": partial(insertion, entropy_weight=0.5, logp_weight=0.3)},
    "ved_candidates": {"plain": ranking, "options": partial(ranking, logp_weight=0.5)},
    "ved_inputs": {"plain": inputs},
    "ved_evaluate": {
        "plain": evaluation,
        "filters": partial(evaluation, filters=0),
        "options": partial(evaluation, options=True),
    },
    "ved_beams": {"plain": beams, "options": partial(beams, both=True)},
}

# Further ways in which CUDA C++ kernels are launched: sizes and dtypes that decide on a kernel, a loop, or
# where scratch lies.
PATHS: dict[str, list[Callable[[int], Call]]] = {
    "expand_topk": [
        partial(expansion, k=150, options=True, columns=30, items=200),
        partial(expansion, k=100, tied=True, columns=40, root=True, width=30),
        *(partial(expansion, options=options, dtype=dtype) for dtype in HALVES for options in (False, True)),
        partial(expansion, **LONG),
        *(
            partial(expansion, options=options, filters=1, **sizes, dtype=dtype)
            for options in (False, True)
            for sizes in ({}, LONG)
            for dtype in DTYPES
        ),
        *(partial(expansion, k=6000, width=5, options=x, filters=1, **LONG) for x in (False, True)),
        *(
            partial(expansion, options=options, **LONG, dtype=dtype)
            for dtype in HALVES
            for options in (False, True)
        ),
        *(partial(expansion, k=k, tied=True, **LONG) for k in (9, 2500)),
        *(partial(expansion, k=6000, width=5, options=options, **LONG) for options in (False, True)),
        partial(expansion, k=40, columns=5001, root=True, items=20_000, width=2, options=True),
        partial(expansion, columns=1000, root=True, items=6000, width=95),
    ],
    "filter_items": [
        partial(filtering, listed=300, share=0.02, items=2000, columns=30),
        partial(filtering, listed=0),
        partial(filtering, listed=None, columns=300, items=3000, share=0.01),
    ],
    "group_advantage": [partial(rewarded, group=1100, masked=True)],
    "sibling_advantage": [
        partial(siblings, group=40),
        partial(siblings, group=160),
        partial(siblings, group=300, masked=True, baseline="parent"),
        partial(siblings, group=140, by_token=True),
        partial(siblings, group=1100),
    ],
    "prefix_returns": [
        partial(embedded, group=40),
        partial(embedded, group=140, by_token=True),
        partial(embedded, group=2200, tokens=5, masked=True),
    ],
    "prefix_tree": [
        partial(tree, group=40, masked=True),
        partial(tree, group=300, by_token=True),
        partial(tree, group=2200),
    ],
    "advance_beams": [partial(winners, k=100)],
    "rows_to_run": [partial(pending, width=700)],
    "draw_children": [
        partial(draws, candidates=300, children=70, options=True),
        partial(draws, candidates=0),
    ],
    "distinct_rows": [partial(distinct, candidates=300)],
    "token_logp": [
        partial(scored, columns=2100, targets=300, dtype=torch.bfloat16),
        *(partial(scored, dtype=dtype) for dtype in DTYPES),
        *(partial(scored, legal=True, dtype=dtype) for dtype in DTYPES),
        *(partial(scored, columns=2100, legal=True, dtype=dtype) for dtype in DTYPES),
        *(
            partial(scored, columns=n, legal=True, filters=1, dtype=dtype)
            for n in (30, 2100)
            for dtype in DTYPES
        ),
    ],
    "token_logp_backward": [
        partial(differentiated, columns=2100, targets=300, dtype=torch.bfloat16),
        *(partial(differentiated, columns=2100, legal=True, dtype=dtype) for dtype in DTYPES),
        *(partial(differentiated, legal=True, filters=1, dtype=dtype) for dtype in DTYPES),
    ],
    "sibling_grpo_loss": [
        partial(loss, group=40, options=True),
        partial(loss, group=40, sequences=True),
    ],
    "ved_select": [partial(selection, rounds=8, traversals=3)],
    "ved_insert": [partial(insertion, rounds=8)],
    "ved_candidates": [partial(ranking, rounds=8)],
    "ved_inputs": [],
    "ved_evaluate": [
        *(partial(evaluation, options=True, dtype=dtype) for dtype in HALVES),
        *(partial(evaluation, columns=1300, items=4000, rows=2, dtype=dtype) for dtype in DTYPES),
        *(
            partial(evaluation, rows=2, filters=1, columns=n, items=4000, dtype=dtype)
            for n in (50, 1300)
            for dtype in DTYPES
        ),
        partial(evaluation, columns=1300, items=4000, rows=2, options=True),
    ],
    "ved_beams": [partial(beams, width=40, both=True)],
}

# Enough work for several threads: many requests, or a single one that is divided.
LARGE: dict[str, dict[str, Callable[[], Call]]] = {
    "expand_topk": {
        "many": partial(expansion, 300, 40, width=4, columns=200, items=1000),
        "noise": partial(expansion, 300, 40, width=4, columns=200, items=1000, options=True),
        "wide": partial(expansion, 1, 40, width=64, columns=2000, items=10_000, root=True),
        "wide, noise": partial(expansion, 1, 40, width=64, columns=2000, items=10_000, options=True),
        "one row": partial(expansion, 1, 40, width=1, columns=20_000, items=100_000, root=True),
        "one row, noise": partial(
            expansion, 1, 40, width=1, columns=20_000, items=100_000, root=True, options=True
        ),
    },
    "filter_items": {
        "many": partial(filtering, 300, 30, allow=True, within=2),
        "one list": partial(filtering, 1, 3000, items=30_000, columns=60),
        "all nodes": partial(filtering, 40, None, items=3000, columns=60),
    },
    "group_advantage": {"many": partial(rewarded, 3000, 16)},
    "sibling_advantage": {
        "many": partial(siblings, 500, 32, 5),
        "one group": partial(siblings, 1, 2000, 9),
    },
    "prefix_returns": {"many": partial(embedded, 70, 40, 24, masked=True)},
    "prefix_tree": {"many": partial(tree, 400, 16, 5, masked=True)},
    "advance_beams": {"many": partial(winners, 500, k=40, options=True)},
    "rows_to_run": {"many": partial(pending, 500)},
    "draw_children": {"many": partial(draws, 300, 16, 50, options=True)},
    "distinct_rows": {"many": partial(distinct, 500)},
    "token_logp": {
        f"{rows} rows{', legal' * legal}": partial(scored, rows, 20_000, legal=legal)
        for rows in (1, 3, 200)
        for legal in (False, True)
    },
    "token_logp_backward": {
        f"{rows} rows{', legal' * legal}": partial(differentiated, rows, columns=20_000, legal=legal)
        for rows in (1, 3, 200)
        for legal in (False, True)
    },
    "sibling_grpo_loss": {
        "many": partial(loss, 700, 8, options=True),
        "sequences": partial(loss, 700, 8, sequences=True),
    },
    "ved_select": {"many": partial(selection, 500, traversals=2)},
    "ved_insert": {"many": partial(insertion, 500)},
    "ved_candidates": {"many": partial(ranking, 500)},
    "ved_inputs": {"many": partial(inputs, 500)},
    "ved_evaluate": {"many": partial(evaluation, 500, options=True)},
    "ved_beams": {"many": partial(beams, 500, both=True)},
}
