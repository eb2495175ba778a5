"""Value-guided decoding: its steps by hand, the batched search against the sequential reference.

The tables below teach the steps; read them first.
"""

from __future__ import annotations

import contextlib
import copy
import math
import pickle
from dataclasses import fields, replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from helpers import assert_same

import vstar_ops
from vstar_ops import (
    NodeEvaluation,
    SearchTrees,
    SelectedRows,
    Trie,
    ved_candidates,
    ved_insert,
    ved_select,
)
from vstar_ops.decoding import VEDConfig, ved
from vstar_ops.reference.ved_search import ved_search
from vstar_ops.verify.trees import random_evaluation

INTERPRETING = vstar_ops._backends.interpreting()  # a search then takes seconds, not milliseconds


# ---------------------------------------------------------------- the steps by hand

# The catalogue of the tables: node 0 is the root; its children are 1, 2 and 9; those of 1 are 3 and 4, those
# of 2 are 5 and 6.


class Node(NamedTuple):
    """An evaluated node of a search tree; its position is its place in the list.

    Attributes:
        children: in the order in which they will be expanded; those that are in the tree are passed over.
        leaves: children that may complete a candidate without being evaluated, and their scores.
    """

    node: int
    parent: int
    value: float
    children: tuple[int, ...] = ()
    visits: int = 0
    leaves: tuple[tuple[int, float], ...] = ()


def planted(nodes: list[Node], budget: int = 8) -> SearchTrees:
    """One tree of two levels that holds the nodes, with G = V."""
    trees = SearchTrees.empty(1, 8, 2, children=3, leaves=2, budget=budget)
    for x in nodes:
        children = [*x.children, -1, -1, -1][:3]
        leaves = [*x.leaves, (-1, 0.0), (-1, 0.0)][:2]
        insert_one(
            trees, parent=x.parent, node=x.node, value=x.value, num_children=len(x.children),
            child_node=children, num_leaves=len(x.leaves), leaf_node=[n for n, _ in leaves],
            leaf_score=[score for _, score in leaves],
        )  # fmt: skip
    trees.visits[0, : len(nodes)] = torch.tensor([x.visits for x in nodes])
    return trees


def insert_one(trees: SearchTrees, options: dict[str, Any] | None = None, **given: Any) -> None:
    """``ved_insert`` of one row."""
    row: dict[str, Any] = {
        "parent": 0, "node": 0, "logp": 0.0, "slot": 0, "value": 0.0, "entropy": 0.0, "num_children": 0,
        "child_node": [-1] * 3, "child_logp": [0.0] * 3, "leaf_node": [-1] * 2, "leaf_logp": [0.0] * 2,
        "leaf_score": [0.0] * 2, "num_leaves": 0, **given,
    }  # fmt: skip
    arrays = {name: torch.tensor([[x]], dtype=getattr(trees, name).dtype) for name, x in row.items()}
    rows, evaluation = (
        kind(**{name: arrays[name] for name in kind._fields}) for kind in (SelectedRows, NodeEvaluation)
    )
    ved_insert(trees, rows, evaluation, **(options or {"entropy_weight": 0.0}))


class Selection(NamedTuple):
    """``ved_select``: the rows that are not empty, ``(parent, node)``, and visits after it."""

    lesson: str
    nodes: list[Node]
    rows: list[tuple[int, int]]
    visits: list[int]
    options: dict[str, Any] | None = None
    budget: int = 8
    budget_after: int = 8


ROOT = Node(0, -1, 0.0, (1, 2))
SELECTIONS = [
    Selection(
        "A traversal goes down to a node without children in the tree. Each node on its way gives the next of"
        " its list: the root 2, as 1 is there already, and node 1 gives 4.",
        [ROOT, Node(1, 0, 0.5, (4, 3))], [(0, 2), (1, 4)], [1, 1],
    ),
    Selection(
        "It goes to the child of the largest G.",
        [ROOT, Node(1, 0, 0.5, (3, 4)), Node(2, 0, 1.0, (5, 6))], [(2, 5)], [1, 0, 1],
    ),
    Selection(
        "Equal G: the lower token.",
        [ROOT, Node(1, 0, 1.0, (3, 4)), Node(2, 0, 1.0, (5, 6))], [(1, 3)], [1, 1, 0], {"exploration": 0.0},
    ),
    Selection(
        "exploration: of two children of equal G, the one that was visited less.",
        [ROOT._replace(visits=10), Node(1, 0, 1.0, (3, 4), 10), Node(2, 0, 1.0, (5, 6))],
        [(2, 5)], [11, 10, 1],
    ),
    Selection(
        "The gate: a node below the mean G of its depth gives nothing. Where no other node has an unexpanded"
        " child the search is over, without another traversal.",
        [ROOT, Node(1, 0, 2.0), Node(2, 0, 1.0, (5, 6))], [], [0, 0, 0],
    ),
    Selection(
        "max_idle: traversals in a row that give nothing. Without exploration all go to node 1, so node 2 is"
        " never reached; the second ends the search, and the budget says so: it becomes the size.",
        [Node(0, -1, 0.0, (1, 2, 9)), Node(1, 0, 2.0), Node(2, 0, 1.5, (5, 6)), Node(9, 0, 0.0)],
        [], [2, 2, 0, 0], {"exploration": 0.0, "max_idle": 1}, budget_after=4,
    ),
    Selection(
        "budget: the number of evaluated nodes. With room for one more, the root comes first.",
        [ROOT, Node(1, 0, 0.5, (4, 3))], [(0, 2)], [1, 1], budget=3, budget_after=3,
    ),
    Selection(
        "traversals=2: the second sees the visits of the first, and so goes to the other child.",
        [ROOT, Node(1, 0, 1.0, (3, 4)), Node(2, 0, 1.0, (5, 6))], [(1, 3), (2, 5)], [2, 1, 1],
        {"traversals": 2},
    ),
]  # fmt: skip


@pytest.mark.parametrize("example", SELECTIONS, ids=[x.lesson.partition(":")[0][:60] for x in SELECTIONS])
def test_select_by_hand(backend, example):
    trees = planted(example.nodes, example.budget)
    rows = ved_select(trees, **(example.options or {}))
    found = list(zip(rows.parent[0].tolist(), rows.node[0].tolist()))
    assert [row for row in found if row != (-1, -1)] == example.rows
    assert trees.visits[0, : len(example.nodes)].tolist() == example.visits
    assert trees.budget.tolist() == [example.budget_after]


@pytest.mark.parametrize(
    ("lesson", "row", "options", "priority"),
    [
        ("G is the value", {"value": 1.0}, {"entropy_weight": 0.0}, 1.0),
        ("and lambda H", {"value": 1.0, "entropy": 2.0}, {"entropy_weight": 0.5}, 2.0),
        ("and w log pi", {"value": 1.0, "logp": -3.0}, {"logp_weight": 0.1}, 0.7),
        ("a value that is NaN counts as the smallest", {"value": math.nan}, {}, -torch.finfo().max),
    ],
)
def test_insert_by_hand(backend, lesson, row, options, priority):
    trees = planted([ROOT])
    insert_one(
        trees, {"entropy_weight": 0.1, **options}, node=2, num_children=2, child_node=[5, 6, -1], **row
    )
    assert trees.size.tolist() == [2]
    assert trees.priority[0, 1].item() == pytest.approx(priority)
    assert (trees.node[0, 1], trees.parent[0, 1], trees.depth[0, 1]) == (2, 0, 1)
    assert trees.depth_count[0].tolist() == [1, 1, 0]
    assert trees.depth_sum[0, 1].item() == pytest.approx(priority)


def test_insert_leaves_out_empty_rows_and_what_does_not_fit(backend):
    trees = planted([ROOT])
    insert_one(trees, parent=-1, node=-1, value=9.0)
    assert trees.size.tolist() == [1] and trees.depth_count[0].tolist() == [1, 0, 0]
    for node in range(1, 10):  # the capacity is 8
        insert_one(trees, node=node)
    assert trees.node.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]] and trees.depth_count[0].tolist() == [1, 7, 0]


@pytest.mark.parametrize(
    ("lesson", "options", "leaves"),
    [
        (
            "evaluated leaves by value, then completions by score",
            {},
            [(4, 0.9), (3, 0.2), (6, 2.0), (5, 1.0)],
        ),
        ("k=2", {"k": 2}, [(4, 0.9), (3, 0.2)]),
        ("length=1: leaves are the nodes of that depth", {"length": 1, "k": 2}, [(2, 0.6), (1, 0.5)]),
    ],
)
def test_candidates_by_hand(backend, lesson, options, leaves):
    trees = planted(
        [
            ROOT,
            Node(1, 0, 0.5, leaves=((3, 7.0), (4, 8.0))),  # both are evaluated, so neither is a completion
            Node(2, 0, 0.6, leaves=((5, 1.0), (6, 2.0))),
            Node(3, 1, 0.2),
            Node(4, 1, 0.9),
        ]
    )
    out = ved_candidates(trees, **{"length": 2, "k": 5, **options})
    n = int(out.num_valid)
    assert n == len(leaves)
    assert out.node[0, :n].tolist() == [node for node, _ in leaves]
    assert out.score[0, :n].tolist() == pytest.approx([score for _, score in leaves])
    assert (out.node[0, n:] == -1).all() and (out.score[0, n:] == -math.inf).all()


# ---------------------------------------------------------------- the search


class TableModel:
    """A ValueModel whose outputs are a pure function of (request, prefix): rows of a random table."""

    finite_logits = True

    def __init__(self, trie: Trie, seed: int, *, spread: float = 2.0, values: float = 1.0) -> None:
        self.trie, self.columns = trie, trie.max_token + 1 + 2
        random = torch.Generator().manual_seed(seed)
        self.table = torch.randn(4096, 2 * self.columns + 1, generator=random)
        self.table[:, : self.columns] *= spread
        self.table[:, -1] *= values
        self.rows_evaluated = 0

    def rows(self, state, slot):
        context, node = (part[slot.clamp(min=0)] for part in state)
        return self.table[(context * 40503 + node * 9973) % 4096]

    def prefill(self, context):
        context = torch.as_tensor(context)
        state = [context, torch.zeros_like(context)]
        return self.rows(state, torch.arange(len(context)))[:, : self.columns], state

    def extend(self, state, parent, token):
        live = parent >= 0
        children = self.trie.children(state[1][parent[live]].int())
        match = children.token == token[live, None]
        assert (match.sum(1) == 1).all(), "an illegal token was evaluated"
        first = len(state[0])
        state[0] = torch.cat([state[0], state[0][parent[live]]])
        state[1] = torch.cat([state[1], children.node[match].long()])
        self.rows_evaluated += int(live.sum())
        slot = torch.full_like(parent, -(2**40))  # unused rows must not be read
        slot[live] = torch.arange(first, len(state[0]))
        logits = torch.full((len(parent), self.columns), float("nan"))
        logits[live] = self.rows(state, slot[live])[:, : self.columns]
        return logits, slot

    def value(self, state, slot):
        return self.rows(state, slot)[:, -1].masked_fill(slot < 0, float("nan"))

    def child_value(self, state, slot):
        rows = self.rows(state, slot)[:, self.columns : 2 * self.columns]
        return rows.masked_fill(slot[:, None] < 0, float("nan"))


def random_trie(rng: np.random.Generator, length: int, items: int, codes: int, single: float = 0.0) -> Trie:
    """Random sequences; a level has one code only with the probability ``single``, given the level above."""
    rows = rng.integers(0, codes, size=(items, length))
    for level in range(1, length):
        alone = rng.random(codes**2) < single  # by the last two codes
        above = rows[:, level - 1] + codes * rows[:, max(level - 2, 0)]
        rows[alone[above], level] = (above % codes)[alone[above]]
    return Trie.from_sequences(rows)


def random_search(rng: np.random.Generator, length: int) -> tuple[int, VEDConfig]:
    """A number of candidates, and a config."""
    num_candidates = int(rng.integers(1, 20))
    child_values = bool(rng.integers(2))
    return num_candidates, VEDConfig(
        budget=int(rng.integers(length, 60)),
        beam_width=int(rng.integers(1, 10)),
        entropy_weight=float(rng.choice([0.0, 0.1, 1.0])),
        exploration=float(rng.choice([0.0, 0.3, 1.0, 3.0])),
        logp_weight=float(rng.choice([0.0, 0.0, 0.3, 1.0])),
        value_weight=float(rng.choice([1.0, 1.0, 0.5, 0.0])),
        evaluate_leaves=bool(rng.integers(3) == 0),
        child_values=child_values,
        num_value_beams=int(rng.choice([0, 1, 4, 20])) if child_values else 0,
        num_policy_candidates=int(rng.choice([0, 0, 2, 8])),
        max_leaves_per_prefix=[None, 1, 3][int(rng.integers(3))],
        traversals_per_round=int(rng.choice([1, 1, 2, 5])),
        max_idle=int(rng.choice([0, 3, 200])),
        expand_root=bool(rng.integers(2)),
        normalize=str(rng.choice(["legal", "legal", "vocab"])),
        temperature=float(rng.choice([1.0, 1.0, 0.7, 2.0])),
        skip_forced=bool(rng.integers(4)),
    )


def compare(case: int, **changes: Any) -> None:
    """One random case, all requests of a batch against the sequential search, node by node.

    The ``changes`` are those of the config; tries then have at least three levels.
    """
    rng = np.random.default_rng(case)
    length = int(rng.integers(3 if changes else 1, 5))
    items, codes, single = int(rng.integers(1, 200)), int(rng.integers(2, 12)), rng.choice([0.0, 0.7, 0.95])
    trie = random_trie(rng, length, items, codes, single)
    k, config = random_search(rng, length)
    config = config.replace(**changes)
    contexts = rng.integers(0, 1000, size=int(rng.integers(1, 4)))
    seeds = torch.from_numpy(rng.integers(-(2**62), 2**62, size=len(contexts)))
    model = TableModel(trie, case, values=float(rng.choice([0.0, 0.3, 1.0])))
    out = ved(model, contexts, trie, k, config, seed=seeds)
    trees = out.trees
    assert (out.forward_tokens <= config.budget).all()
    for b, context in enumerate(contexts):
        leaves, tree = ved_search(model, [context], trie, k, config, seed=int(seeds[b]))
        n = int(trees.size[b])
        position = {id(s): i for i, s in enumerate(tree)}
        assert trees.node[b, :n].tolist() == [s.node for s in tree]
        assert trees.parent[b, :n].tolist() == [position[id(s.parent)] if s.parent else -1 for s in tree]
        assert trees.depth[b, :n].tolist() == [s.depth for s in tree]
        assert trees.visits[b, :n].tolist() == [s.visits for s in tree]
        for name in ("logp", "value", "entropy", "priority"):
            want = torch.tensor([getattr(s, name) for s in tree])
            torch.testing.assert_close(getattr(trees, name)[b, :n], want, rtol=1e-4, atol=1e-5)
        count = int(out.num_valid[b])
        assert out.node[b, :count].tolist() == [leaf.node for leaf in leaves]
        assert (out.node[b, count:] == -1).all() and (out.score[b, count:] == -torch.inf).all()
        for got, name in ((out.logp, "logp"), (out.score, "score")):
            want = torch.tensor([getattr(leaf, name) for leaf in leaves])
            torch.testing.assert_close(got[b, :count], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("block", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in (1, 2, 3))])
def test_same_decisions_as_the_sequential_search(block, backend):
    if INTERPRETING and block > 0:
        pytest.skip("takes minutes")
    number = {"cpu": 100, "emulated": 8}.get(backend, 20)
    for case in (1, 2) if INTERPRETING else range(number):  # small ones
        compare(1000 * block + case)


def test_beams_pass_over_what_stands_for_a_leaf(backend):
    """In the order of probability and in that of value, level after level."""
    beams = {"beam_width": 6, "num_value_beams": 3, "value_weight": 1.0, "budget": 40}
    for case in (3,) if INTERPRETING else (3, 173):
        compare(case, **beams, child_values=True, evaluate_leaves=False, normalize="legal", skip_forced=True)


@pytest.mark.slow
def test_ten_thousand_searches(cpu):
    """Budget, legality, distinctness and counts, whatever the trie, the model and the options."""
    for case in range(250):
        rng = np.random.default_rng([7, case])
        length = int(rng.integers(1, 6))
        items, codes = int(rng.integers(1, 400)), int(rng.integers(1, 14))
        trie = random_trie(rng, length, items, codes, rng.choice([0.0, 0.7, 0.95]))
        k, config = random_search(rng, length)
        model = TableModel(trie, case)
        out = ved(model, rng.integers(0, 1000, 40), trie, k, config, seed=case)
        assert (out.forward_tokens <= config.budget).all()
        assert model.rows_evaluated + 40 == out.forward_tokens.sum()
        there = torch.arange(k) < out.num_valid[:, None]
        assert torch.equal(out.node >= 0, there)
        assert torch.equal(trie.lookup(out.sequence)[there], out.node[there])
        assert (out.node[there] >= trie.level_offset[length]).all()
        leaf, first = out.node.sort(1).values, trie.level_offset[length]
        assert not ((leaf[:, 1:] == leaf[:, :-1]) & (leaf[:, 1:] >= first)).any(), "a leaf came twice"
        evaluated = out.trees.node.sort(1).values
        assert not ((evaluated[:, 1:] == evaluated[:, :-1]) & (evaluated[:, 1:] >= 0)).any()


def test_steps_change_the_same_bits(backend):
    """Each op on its own against the reference, round after round, on trees that no model has made."""
    for case in range(3 if INTERPRETING else 15 if backend == "emulated" else 60):
        rng = np.random.default_rng(case)
        batch, capacity, levels = (
            int(rng.integers(1, 4)),
            int(rng.choice([1, 5, 33, 70])),
            int(rng.integers(1, 4)),
        )
        trees = SearchTrees.empty(
            batch, capacity, levels, children=int(rng.integers(1, 6)), leaves=int(rng.integers(1, 5)),
            budget=torch.from_numpy(rng.integers(0, capacity + 3, batch)),
        )  # fmt: skip
        root = torch.full((batch, 1), -1, dtype=torch.int32)
        rows, fresh = SelectedRows(root, torch.zeros_like(root), torch.zeros(batch, 1)), 1
        logp_weight, traversals = float(rng.choice([0.0, 0.5])), int(rng.choice([1, 3]))
        for _round in range(5):
            evaluation = random_evaluation(rng, trees, rows, fresh)
            fresh += evaluation.child_node.numel()
            walk = {
                "exploration": float(rng.choice([0.0, 1.0, 3.0])), "traversals": traversals,
                "max_idle": int(rng.choice([0, 3, 50])),
            }  # fmt: skip
            length, k = int(rng.integers(1, levels + 1)), int(rng.integers(1, 9))
            results = []
            for name in ("reference", backend):
                copy = SearchTrees(**{f.name: getattr(trees, f.name).clone() for f in fields(trees)})
                with contextlib.nullcontext() if name == backend else vstar_ops.use_backend(name):
                    ved_insert(copy, rows, evaluation, logp_weight=logp_weight)
                    chosen = ved_select(copy, **walk)
                    results.append((copy, chosen, ved_candidates(copy, length, k, logp_weight=logp_weight)))
            (want_trees, want_rows, want_leaves), (trees, rows, leaves) = results
            for got, want in zip((*rows, *leaves), (*want_rows, *want_leaves)):
                torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
            for field in fields(trees):
                # A pointer past children that are in the tree may be moved at any time.
                if field.name != "next_child":
                    got, want = getattr(trees, field.name), getattr(want_trees, field.name)
                    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def industrial_size(seed=0, batch=24):
    rng = np.random.default_rng(seed)
    trie = random_trie(rng, 3, 3000, 20, single=0.7)
    return TableModel(trie, seed), torch.from_numpy(rng.integers(0, 10**6, batch)), trie


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        VEDConfig.paper(),
        VEDConfig.paper(evaluate_leaves=False),
        VEDConfig.paper(logp_weight=1.0, traversals_per_round=3),
        VEDConfig.training(),
        VEDConfig(num_value_beams=4),
    ],
)
def test_alone_in_a_batch_and_on_two_threads(backend, restore_threads, config):
    model, context, trie = industrial_size()
    seeds = torch.arange(len(context)) * 77
    torch.set_num_threads(1)
    whole = ved(model, context, trie, config=config, seed=seeds)
    torch.set_num_threads(2)
    for got, want in zip(ved(model, context, trie, config=config, seed=seeds)[:-1], whole):
        assert torch.equal(got, want)
    for b in (0, 11, 23):
        alone = ved(model, context[b : b + 1], trie, config=config, seed=seeds[b : b + 1])
        for got, want in zip(alone[:-1], whole):
            assert torch.equal(got[0], want[b])


def test_backends_agree():
    model, context, trie = industrial_size(1)
    for config in (VEDConfig.paper(), VEDConfig()):
        with vstar_ops.use_backend("reference"):
            want = ved(model, context, trie, config=config, seed=3)
        got = ved(model, context, trie, config=config, seed=3)
        assert torch.equal(got.node, want.node)
        assert torch.equal(got.trees.node, want.trees.node)


@pytest.mark.slow
def test_seeds_decide_what_is_drawn(backend):
    model, context, trie = industrial_size(2)
    config = VEDConfig.paper(entropy_weight=0.0)
    one, two = (ved(model, context, trie, config=config, seed=s) for s in (1, 2))
    assert not torch.equal(one.trees.node, two.trees.node)
    assert torch.equal(one.trees.node[:, :17], two.trees.node[:, :17])  # the initial beam search
    again = ved(model, context, trie, config=config, seed=vstar_ops.derive_seeds(1, len(context)))
    assert torch.equal(one.trees.node, again.trees.node)


@pytest.mark.slow
def test_a_fixed_number_of_rounds(backend):
    model, context, trie = industrial_size(3)
    for config in (VEDConfig.paper(), VEDConfig()):
        free, fixed = (ved(model, context, trie, config=config, num_rounds=rounds) for rounds in (None, 40))
        assert torch.equal(free.node, fixed.node)
        none = ved(model, context, trie, config=config, num_rounds=0)
        beams = 1 + 3 * 8 if config.evaluate_leaves else 1 + 2 * 12
        assert (none.forward_tokens == beams).all() or config.skip_forced
        assert (none.forward_tokens <= beams).all() and (none.forward_tokens <= free.forward_tokens).all()
        assert (none.forward_tokens < free.forward_tokens).any()


VALUES = {(): 0.0, (0,): 0.0, (1,): 1.0, (0, 2): 0.1, (0, 3): 0.7}


class ByName:
    """Uniform policy over two levels of two tokens; V of (0,) is 0, of (1,) is 1, of leaves by hand."""

    def prefill(self, context):
        return torch.zeros(len(context), 4), [()] * len(context)

    def extend(self, state, parent, token):
        slot = torch.full_like(parent, -1)
        for row, (p, t) in enumerate(zip(parent.tolist(), token.tolist())):
            if p >= 0:
                state.append((*state[p], t))
                slot[row] = len(state) - 1
        return torch.zeros(len(parent), 4), slot

    def value(self, state, slot):
        return torch.tensor([VALUES[state[s]] if s >= 0 else 0.0 for s in slot.tolist()])


def test_by_hand(backend):
    """Budget 4: the root, (0,), (0, 2), and one child more."""
    trie = Trie.from_sequences([[0, 2], [0, 3], [1, 2], [1, 3]])
    config = VEDConfig.paper(budget=4, beam_width=1, entropy_weight=0.0, exploration=0.0)
    out = ved(ByName(), [0], trie, 4, config)  # the root gives (1,)
    assert out.trees.node.tolist() == [[0, 1, 3, 2]]
    assert out.sequence.tolist() == [[[0, 2], [1, 2], [1, 3], [0, 3]]]
    assert out.score[0].tolist() == pytest.approx([0.1, 1.0, 1.0, 0.0])
    out = ved(ByName(), [0], trie, 4, config.replace(expand_root=False))  # (0,) gives (0, 3)
    assert out.trees.node.tolist() == [[0, 1, 3, 4]]
    assert out.sequence.tolist() == [[[0, 3], [0, 2], [-1, -1], [-1, -1]]]
    assert out.num_valid.tolist() == [2]


def test_a_config_needs_no_more_of_a_model_than_it_asks(backend):
    class Plain(ByName):
        value = property()  # hasattr is False

    trie = Trie.from_sequences([[0, 2], [0, 3], [1, 2], [1, 3]])
    best_first = VEDConfig.paper(value_weight=0.0, logp_weight=1.0, budget=7)
    assert ved(Plain(), [0], trie, 4, best_first).num_valid.tolist() == [4]
    assert ved(ByName(), [0], trie, 4, VEDConfig.paper()).num_valid.tolist() == [4]
    with pytest.raises(TypeError, match=r"must have value\(state, slot\), got Plain; .* value_weight=0"):
        ved(Plain(), [0], trie, 4)
    without = (
        r"must have child_value\(state, slot\), got ByName; .* VEDConfig.paper\(\), .* child_values=False"
    )
    with pytest.raises(TypeError, match=without):
        ved(ByName(), [0], trie, 4)


BEST_FIRST = {"value_weight": 0.0, "child_values": False, "num_value_beams": 0}


def test_skip_forced_by_hand(backend):
    """[1, 3, 6] and [0, 3, 4] are certain from (1,) and (0, 3) on; the policy is uniform.

    Only (0,) and (0, 2) are beams. So 3 tokens find the whole catalogue, where all 5 of the budget miss
    [0, 3, 4] otherwise.
    """
    trie = Trie.from_sequences([[0, 2, 4], [0, 2, 5], [0, 3, 4], [1, 3, 6]])
    config = VEDConfig(**BEST_FIRST, budget=5, beam_width=2)
    model = TableModel(trie, 0, spread=0.0)
    out = ved(model, [0], trie, 5, config)
    assert trie.sequences(out.trees.node[0, :3]).tolist() == [[-1, -1, -1], [0, -1, -1], [0, 2, -1]]
    assert out.forward_tokens.tolist() == [3] == [model.rows_evaluated + 1]
    assert out.sequence[0].tolist() == [[1, 3, 6], [0, 3, 4], [0, 2, 4], [0, 2, 5], [-1, -1, -1]]
    assert out.logp[0, :4].exp().tolist() == pytest.approx([1 / 2, 1 / 4, 1 / 8, 1 / 8])
    all_ = ved(model, [0], trie, 5, config.replace(skip_forced=False))
    assert all_.forward_tokens.tolist() == [5] and all_.sequence[0, 0].tolist() == [1, 3, 6]
    assert all_.num_valid.tolist() == [3]


@pytest.mark.parametrize("by_beams", [True, False])
@pytest.mark.parametrize(("length", "single"), [(3, 0.7), (3, 0.98), (4, 0.7), (4, 0.98)])
def test_skip_forced_saves_tokens_and_nothing_else(backend, length, single, by_beams):
    """Where the whole tree is searched and V says nothing, the candidates are the same, bit by bit.

    A beam search of all prefixes reaches the whole tree at once, traversals one by one if no gate stops them.
    """
    if INTERPRETING:
        pytest.skip("takes minutes")
    rng = np.random.default_rng([length, int(100 * single)])
    trie = random_trie(rng, length, 30, 6, single)
    model = TableModel(trie, 1)
    wide = {"budget": 30 * length, "beam_width": 30}
    narrow = {"budget": 120, "beam_width": 2, "logp_weight": 0.0, "entropy_weight": 0.0}
    config = VEDConfig(**BEST_FIRST, num_policy_candidates=12, **(wide if by_beams else narrow))
    fast, slow = (ved(model, [3, 4], trie, 12, config.replace(skip_forced=skip)) for skip in (True, False))
    for name in ("sequence", "node", "logp", "score", "num_valid"):
        assert torch.equal(getattr(fast, name), getattr(slow, name)), name
    inner = trie.level_offset[-2]
    assert slow.forward_tokens.tolist() == [inner] * 2
    branching = 1 + int((trie.only_leaf[1:inner] < 0).sum())
    assert fast.forward_tokens.tolist() == [branching] * 2 and branching < 0.8 * inner


@pytest.mark.parametrize(
    ("promise", "changes"), [(False, {}), (True, {"normalize": "vocab"}), (True, {"evaluate_leaves": True})]
)
def test_when_skip_forced_has_no_effect(backend, promise, changes):
    if INTERPRETING:
        pytest.skip("takes minutes")
    model, context, trie = industrial_size(4, batch=4)
    model.finite_logits = promise
    config = VEDConfig(**BEST_FIRST, **changes)
    skip, all_ = (ved(model, context, trie, config=config.replace(skip_forced=x)) for x in (True, False))
    for field in fields(skip.trees):
        assert torch.equal(getattr(skip.trees, field.name), getattr(all_.trees, field.name)), field.name


def test_skip_forced_and_a_broken_promise_of_finite_logits(backend):
    if INTERPRETING:
        pytest.skip("takes minutes")
    model, context, trie = industrial_size(5, batch=4)
    model.table[:, 3] = -torch.inf
    ved(model, context, trie, num_rounds=0)
    with vstar_ops.validation(), pytest.raises(ValueError, match="model must have finite_logits False"):
        ved(model, context, trie, num_rounds=0)


@pytest.mark.parametrize("batch", [0, 1])
@pytest.mark.parametrize("config", [VEDConfig.paper(budget=1), VEDConfig()])
def test_small_things(backend, batch, config):
    trie = Trie.from_sequences([[5]])
    out = ved(TableModel(trie, 0), torch.zeros(batch, dtype=torch.int64), trie, 3, config)
    assert out.sequence.tolist() == [[[5], [-1], [-1]]] * batch
    assert out.forward_tokens.tolist() == [1] * batch


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"num_candidates": 0}, ValueError, "num_candidates must be at least 1, got 0"),
        ({"config": VEDConfig(budget=2)}, ValueError, "budget must be at least 3, got 2"),
        ({"config": {"budget": 33}}, TypeError, "config must be a VEDConfig, got dict"),
        ({"num_rounds": -1}, ValueError, "num_rounds must be at least 0, got -1"),
        ({"num_rounds": 2.0}, TypeError, "num_rounds must be an int, got float"),
        ({"seed": torch.zeros(3, dtype=torch.int64)}, ValueError, r"seed must have the shape \[B\]"),
        ({"seed": torch.zeros(24)}, TypeError, "seed must be int64, got float32"),
        ({"seed": 1.5}, TypeError, r"seed must be an int or int64 seeds \[B\], got float"),
        ({"seed": 2**63}, ValueError, "seed must fit in int64"),
    ],
)
def test_errors(change, error, message):
    model, context, trie = industrial_size()
    with pytest.raises(error, match=f"^{message}"):
        ved(model, context, trie, **change)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"budget": 0}, ValueError, "budget must be at least 1, got 0"),
        ({"budget": 33.0}, TypeError, "budget must be an int, got float"),
        ({"beam_width": True}, TypeError, "beam_width must be an int, got bool"),
        ({"traversals_per_round": 0}, ValueError, "traversals_per_round must be at least 1, got 0"),
        ({"max_leaves_per_prefix": 0}, ValueError, "max_leaves_per_prefix must be at least 1, got 0"),
        ({"num_policy_candidates": 2.0}, TypeError, "num_policy_candidates must be an int, got float"),
        ({"num_value_beams": -1}, ValueError, "num_value_beams must be at least 0, got -1"),
        ({"child_values": False}, ValueError, "num_value_beams must be 0 with child_values=False, got 6"),
        ({"max_idle": -1}, ValueError, "max_idle must be at least 0, got -1"),
        ({"exploration": -0.5}, ValueError, "exploration must be >= 0, got -0.5"),
        ({"entropy_weight": float("nan")}, ValueError, "entropy_weight must be finite, got nan"),
        ({"logp_weight": None}, TypeError, "logp_weight must be a number, got NoneType"),
        ({"expand_root": 1}, TypeError, "expand_root must be a bool, got int"),
        ({"skip_forced": None}, TypeError, "skip_forced must be a bool, got NoneType"),
        ({"normalize": "all"}, ValueError, "normalize must be 'legal' or 'vocab', got 'all'"),
        ({"temperature": 0}, ValueError, "temperature must be > 0, got 0.0"),
    ],
)
def test_a_bad_config_fails_when_it_is_made(change, error, message):
    with pytest.raises(error, match=f"^{message}$"):
        VEDConfig(**change)


def test_presets():
    paper, training = VEDConfig.paper(budget=40), VEDConfig.training(value_weight=30.0)
    assert (paper.budget, paper.beam_width, paper.evaluate_leaves, paper.logp_weight) == (40, 8, True, 0.0)
    assert training.skip_forced and not paper.skip_forced
    assert (training.num_policy_candidates, training.max_leaves_per_prefix) == (8, 1)
    assert training.for_evaluation() == VEDConfig(value_weight=30.0) == VEDConfig().replace(value_weight=30.0)
    assert VEDConfig().forward_budget(3, 16) == 33 and paper.forward_budget(3, 16) == 40
    with pytest.raises(AttributeError):
        paper.budget = 3


def test_arguments_in_another_order_are_named():
    trie = Trie.from_sequences([[3, 7], [4, 7]])
    trees, none = SearchTrees.empty(1, 3, 1, children=2, leaves=2), torch.full((1, 1), -1, dtype=torch.int32)
    rows, logits = SelectedRows(none, none, torch.zeros(1, 1)), torch.zeros(1, 1, 8)
    for name, call in (
        ("trees", lambda: ved_select([1])),
        ("trees", lambda: ved_insert(rows, trees, None)),
        ("rows", lambda: ved_insert(trees, (1, 2, 3), None)),
        ("evaluation", lambda: ved_insert(trees, rows, None)),
        ("trees", lambda: ved_candidates(trie, 2, 3)),
        ("trie", lambda: vstar_ops.ved_inputs(trees, rows, rows)),
        ("rows", lambda: vstar_ops.ved_inputs(trees, trie, trie)),
        ("rows", lambda: vstar_ops.ved_evaluate(trees, trie, trie, logits, none.long(), none[0].long())),
        ("first", lambda: vstar_ops.ved_beams(trees, trie, rows, logits, 2)),
    ):
        with pytest.raises(TypeError, match=rf"^{name} must be a vstar_ops\.\w+, got "):
            call()


def test_errors_of_the_ops():
    trees = SearchTrees.empty(2, 5, 3, children=2, leaves=2)
    with pytest.raises(ValueError, match="trees.value must have the shape"):
        ved_select(replace(trees, value=torch.zeros(2, 4)))
    with pytest.raises(TypeError, match=r"trees.node must be a tensor \[B, T\], got list"):
        ved_select(replace(trees, node=[0]))
    with pytest.raises(TypeError, match="trees.slot must be int64, got int32"):
        ved_candidates(replace(trees, slot=trees.slot.int()), 3, 4)
    with pytest.raises(ValueError, match="trees.node must be contiguous"):
        ved_select(replace(trees, node=trees.node.t().contiguous().t()))
    rows = ved_select(trees)
    assert (rows.node == -1).all()
    with pytest.raises(ValueError, match="capacity must be at least 1, got 0"):
        SearchTrees.empty(2, 0, 3, children=2, leaves=2)
    evaluation = NodeEvaluation(*(getattr(trees, name)[:, :1] for name in NodeEvaluation._fields))
    with pytest.raises(ValueError, match="slot must have the shape"):
        ved_insert(trees, rows, evaluation)


@pytest.mark.parametrize("name", ["auto", "reference"])
def test_trees_that_changed_are_checked_again(name):
    """What was found right is not looked at again, unless it is another tensor or has another shape."""
    with vstar_ops.use_backend(name):
        _change_trees()


def _change_trees():
    trees = SearchTrees.empty(2, 5, 3, children=2, leaves=2)
    for other in (torch.zeros(2, 4), torch.zeros(2, 5).double(), torch.zeros(5, 2).t(), [0.0]):
        value = trees.value
        ved_select(trees)
        trees.value = other
        with pytest.raises((TypeError, ValueError), match="trees.value must"):
            ved_candidates(trees, 3, 4)
        trees.value = value
    ved_select(trees)
    assert all(isinstance(x, torch.Tensor) for x in vars(trees).values())
    assert_same(copy.deepcopy(trees), pickle.loads(pickle.dumps(trees)))
    trees.leaf_score.resize_(2, 5, 1)
    with pytest.raises(ValueError, match="trees.leaf_score must have the shape"):
        ved_candidates(trees, 3, 4)


def test_devices_other_than_the_trees_are_refused():
    trees = SearchTrees.empty(2, 5, 3, children=2, leaves=2)
    with pytest.raises(ValueError, match="trees.value must be on cpu like the other tensors, got meta"):
        ved_select(replace(trees, value=trees.value.to("meta")))
