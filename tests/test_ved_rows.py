"""What surrounds the forward of a round of value-guided decoding: by hand, and against the oracles.

The tables below teach the ops; read them first.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from helpers import LONG, SHORT, assert_as_expected, assert_same, restricted_tries
from torch import Tensor

import vstar_ops
from vstar_ops import ExpandTopK, SearchTrees, SelectedRows, Trie, ved_beams, ved_evaluate, ved_inputs
from vstar_ops.verify import sampling
from vstar_ops.verify.calls import Call
from vstar_ops.verify.wants import expectation

# The catalogue of the tables: node 0 is the root; its children are 1 and 2, by the tokens 0 and 1; those of 1
# are the leaves 3 and 4, by the tokens 2 and 3. Below 2 is the leaf 5 alone, by the token 2.
CATALOGUE = Trie.from_sequences([[0, 2], [0, 3], [1, 2]])
# exp of the logits, which are the same for all rows.
WEIGHTS = [3.0, 1.0, 1.0, 4.0]


def rows_of(*nodes: int, parents: tuple[int, ...] | None = None) -> SelectedRows:
    node = torch.tensor([nodes], dtype=torch.int32)
    parent = torch.tensor([parents or (0,) * len(nodes)], dtype=torch.int32)
    return SelectedRows(parent, node, torch.full(node.shape, -1.0))


def empty_trees(levels: int = 1, children: int = 3, leaves: int = 3) -> SearchTrees:
    return SearchTrees.empty(1, 4, levels, children=children, leaves=leaves)


def test_inputs_by_hand(backend):
    """The slot of the parent and the token of the node; a row with node -1 is unused."""
    trees = empty_trees()
    trees.slot[0] = torch.tensor([70, 71, 72, 73])
    out = ved_inputs(trees, CATALOGUE, rows_of(1, 5, -1, 4, parents=(0, 2, 1, 9)))
    assert out.slot.tolist() == [[70, 72, -1, -1]]  # position 9 is outside of the trees
    assert out.token.tolist() == [[0, 2, 0, 3]]
    assert out.unused.tolist() == [[False, False, True, False]]
    assert out.slot.dtype == out.token.dtype == torch.int64


class Lists(NamedTuple):
    """``ved_evaluate`` of one node: the children in any order, the leaves with their scores, best first."""

    lesson: str
    node: int
    children: set[int]
    leaves: list[tuple[int, float]]
    options: dict[str, Any] | None = None
    levels: int = 1


THIRD = math.log(1 / 5) - 1, math.log(4 / 5) - 1  # log pi of the leaves 3 and 4, with that of their prefix
VALUES = {"value": 5.0, "child_value": [0.0, 0.0, 3.5, 0.5]}
LISTS = [
    Lists("The root lists its children.", 0, {1, 2}, []),
    Lists("A node of the last level lists its leaves, in the order of pi.", 1, set(), [(4, 0.0), (3, 0.0)]),
    Lists("levels=2: leaves are expanded too.", 1, {3, 4}, [(4, 0.0), (3, 0.0)], levels=2),
    Lists("A leaf has no children, and what is no node lists nothing.", 3, set(), []),
    Lists("-1", -1, set(), []),
    Lists(
        "logp_weight: leaves are scored by log pi.", 1, set(), [(4, THIRD[1] / 2), (3, THIRD[0] / 2)],
        {"logp_weight": 0.5},
    ),
    Lists(
        "value and child_value: V of the node and what a token adds to it; the order is theirs.",
        1, set(), [(3, 10 + 7), (4, 10 + 1)], {**VALUES, "value_weight": 2.0},
    ),
    Lists(
        "value_weight=0: V counts nothing, and child values count once.",
        1, set(), [(3, 3.5), (4, 0.5)], {**VALUES, "value_weight": 0.0},
    ),
    Lists("skip_forced: node 2 stands for the leaf 5.", 0, {1}, [(5, 0.0)], {"skip_forced": True}),
    Lists("expand_root=False", 0, set(), [], {"expand_root": False}),
]  # fmt: skip


def evaluated(trees: SearchTrees, rows: SelectedRows, seeds: Tensor, **options: Any) -> Any:
    shape = rows.node.shape
    logits = torch.tensor(WEIGHTS).log().expand(*shape, 4)
    given = dict(options)
    if "value" in given:
        given["value"] = torch.full(shape, given["value"])
    if "child_value" in given:
        given["child_value"] = torch.tensor(given["child_value"]).expand(*shape, 4)
    return ved_evaluate(trees, CATALOGUE, rows, logits, torch.zeros(shape, dtype=torch.int64), seeds, **given)


@pytest.mark.parametrize("example", LISTS, ids=[x.lesson.partition(":")[0][:60] for x in LISTS])
def test_evaluate_by_hand(backend, example):
    options = example.options or {}
    out = evaluated(empty_trees(example.levels), rows_of(example.node), torch.tensor([7]), **options)
    n, d = int(out.num_children), int(out.num_leaves)
    assert set(out.child_node[0, 0, :n].tolist()) == example.children and n == len(example.children)
    assert (out.child_node[0, 0, n:] == -1).all() and (out.child_logp[0, 0, n:] == -math.inf).all()
    assert out.leaf_node[0, 0, :d].tolist() == [leaf for leaf, _ in example.leaves]
    assert out.leaf_score[0, 0, :d].tolist() == pytest.approx([score for _, score in example.leaves])
    assert (out.leaf_node[0, 0, d:] == -1).all() and (out.leaf_score[0, 0, d:] == -math.inf).all()
    entropy = {
        0: -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)),
        1: -(0.2 * math.log(0.2) + 0.8 * math.log(0.8)),
    }
    assert out.entropy.item() == pytest.approx(entropy.get(example.node, 0.0))
    assert out.value.item() == options.get("value_weight", 1.0) * options.get("value", 0.0)


def test_lists_are_cut_where_the_trees_have_no_more_room(backend):
    out = evaluated(empty_trees(2, children=1, leaves=1), rows_of(0, 1), torch.tensor([7]))
    assert out.num_children.tolist() == [[1, 1]] and out.num_leaves.tolist() == [[0, 1]]
    assert out.leaf_node.tolist() == [[[-1], [4]]]


def test_the_first_child_is_drawn_in_proportion_to_pi(backend):
    """Of 800 seeds three quarters draw node 1 first, within four standard deviations."""
    many = 800 if backend not in ("triton", "emulated") else 80
    trees = SearchTrees.empty(many, 1, 1, children=2, leaves=1)
    rows = SelectedRows(*(x.expand(many, 1) for x in rows_of(0)))
    first = evaluated(trees, rows, torch.arange(many)).child_node[:, 0, 0]
    assert abs((first == 1).float().mean().item() - 0.75) < 4 * math.sqrt(0.75 * 0.25 / many)


def test_the_lists_are_those_of_expand_topk(backend):
    """The same log-probabilities and the same noise: bit for bit."""
    rng = torch.Generator().manual_seed(0)
    for columns, normalize in ((40, "legal"), (40, "vocab"), (1500, "legal")):
        trie = Trie.from_sequences(torch.randint(columns, (3 * columns, 2), generator=rng))
        logits = torch.randn(3, 1, columns, generator=rng)
        root, logp, seeds = (
            torch.zeros(3, 1, dtype=torch.int32),
            torch.randn(3, 1, generator=rng),
            torch.arange(3),
        )
        k = 20
        trees = SearchTrees.empty(3, 1, 1, children=k, leaves=1)
        rows = SelectedRows(root - 1, root, logp)
        options = {"normalize": normalize, "temperature": 0.7}
        out = ved_evaluate(trees, trie, rows, logits, root.long(), seeds, **options)
        want = vstar_ops.expand_topk(logits, trie, root, k, cum_logp=logp, gumbel_seed=seeds, **options)
        assert_same(
            (out.child_node[:, 0], out.child_logp[:, 0], out.num_children[:, 0], out.entropy),
            (want.node, want.logp, want.num_valid, want.entropy),
        )


def extensions(*beams: tuple[int, int]) -> ExpandTopK:
    """A list of ``(node, parent)``; what is not read is none."""
    node, parent = (torch.tensor([[x[i] for x in beams]], dtype=torch.int32) for i in range(2))
    none: Any = None
    return ExpandTopK(none, -node.float(), parent, none, node, none, none)


@pytest.mark.parametrize(
    ("lesson", "options", "want"),
    [
        ("the first of one list", {}, [(3, 4), (5, 5), (-1, -1)]),
        (
            "then the first of another that are not among them", {"others": 1, "num_first": 1},
            [(3, 4), (4, 4), (5, 5)],
        ),
        ("num_first=0", {"others": 1, "num_first": 0}, [(4, 4), (3, 4), (5, 5)]),
        ("skip_forced leaves out what stands for a leaf", {"skip_forced": True}, [(-1, -1)] * 3),
        ("width", {"width": 1}, [(3, 4)]),
    ],
)  # fmt: skip
def test_beams_by_hand(backend, lesson, options, want):
    """``(node, position of the parent)``; the last beams are the two last nodes of a tree of six."""
    trees = empty_trees()
    trees.size.fill_(6)
    given = {"width": 3, **options}
    if "others" in given:
        given["others"] = extensions((4, 0), (3, 0), (-1, -1), (5, 1))
    rows = ved_beams(trees, CATALOGUE, rows_of(1, 2, -1), extensions((3, 0), (-1, -1), (5, 1)), **given)
    assert list(zip(rows.node[0].tolist(), rows.parent[0].tolist())) == want
    assert rows.logp[0].tolist() == [-float(node) if node >= 0 else -math.inf for node, _ in want]


@pytest.mark.parametrize("sizes", [SHORT, LONG])
@pytest.mark.parametrize("options", [{}, {"normalize": "vocab", "skip_forced": True}], ids=["legal", "vocab"])
def test_a_restricted_trie(backend, sizes, options):
    """Rows of which no child is alive, one, all but one, or some, against the brute force."""
    random = torch.Generator().manual_seed(0)
    for trie in restricted_tries(sizes, backend):
        inner, columns = trie.level_offset[2], trie.max_token + 3
        node = torch.stack([torch.arange(9) % inner, torch.randint(-1, inner, (9,), generator=random)]).int()
        trees = SearchTrees.empty(2, 1, 2, children=20, leaves=20)
        a = {"trees": trees, "trie": trie, "rows": SelectedRows(node, node, torch.zeros(2, 9)), **options}
        a |= {
            "logits": torch.randn(2, 9, columns, generator=random),
            "slot": node.long(),
            "seeds": torch.arange(2),
        }
        assert_as_expected("ved_evaluate", Call(ved_evaluate, a))


@pytest.mark.parametrize("op", ["ved_inputs", "ved_evaluate", "ved_beams"])
def test_against_the_oracle(backend, op):
    """On inputs that kernels get wrong: ties, NaN, rows that are no nodes, lists of any length."""
    rng = np.random.default_rng(3)
    for _ in range({"cpu": 80, "reference": 40, "emulated": 25}.get(backend, 8)):
        call = sampling.draw(op, rng, torch.float32)
        verdict = expectation(op, call)(call())
        assert not verdict.problems, verdict.problems[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(1, 4)}, r"logits must have the shape \[B, P, V\]"),
        ({"logits": torch.zeros(1, 1, 2)}, r"logits must have a column for every token of the trie"),
        (
            {"logits": torch.zeros(1, 1, 4, dtype=torch.float64)},
            "logits must be float32 or bfloat16 or float16",
        ),
        ({"slot": torch.zeros(1, 1)}, "slot must be int64"),
        ({"seeds": torch.zeros(2, dtype=torch.int64)}, r"seeds must have the shape \[B\]"),
        ({"value": torch.zeros(1, 2)}, r"value must have the shape \[B, P\]"),
        ({"child_value": torch.zeros(1, 1, 3)}, r"child_value must have the shape \[B, P, V\]"),
        ({"normalize": "all"}, "normalize must be 'legal' or 'vocab', got 'all'"),
        ({"temperature": 0.0}, "temperature must be > 0"),
        ({"value_weight": math.nan}, "value_weight must be finite"),
        ({"trees": empty_trees(levels=3)}, "trees must have at most the trie's 2 levels, got 3"),
        *(
            (
                {
                    "trees": dataclasses.replace(
                        empty_trees(), **{name: torch.zeros(1, 4, 0, dtype=torch.int32)}
                    )
                },
                f"trees.{name} must have at least one place",
            )
            for name in ("child_node", "leaf_node")
        ),
        (
            {"trees": dataclasses.replace(empty_trees(), size=torch.zeros((), dtype=torch.int32))},
            r"trees.size must have the shape \[B\]",
        ),
    ],
)
def test_bad_arguments_are_named(change, message):
    given = {
        "trees": empty_trees(), "trie": CATALOGUE, "rows": rows_of(0), "logits": torch.zeros(1, 1, 4),
        "slot": torch.zeros(1, 1, dtype=torch.int64), "seeds": torch.zeros(1, dtype=torch.int64),
    }  # fmt: skip
    with pytest.raises((TypeError, ValueError), match=message):
        ved_evaluate(**{**given, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parent": torch.zeros(1, 0, dtype=torch.int32)}, r"first.parent must have the shape \[B, K\]"),
        ({"logp": torch.zeros(1, 1)}, r"first.logp must have the shape \[B, K\]"),
        ({"node": torch.zeros(2, dtype=torch.int32)}, r"first.node must have the shape \[B, K\]"),
        ({"node": torch.zeros(1, 2)}, "first.node must be int32"),
    ],
)
def test_parts_of_a_list_that_differ_are_named(backend, change, message):
    """They would be read outside."""
    found = extensions((3, 0), (4, 0))._replace(**change)
    for lists in ({"first": found}, {"first": extensions((3, 0)), "others": found}):
        named = message if "others" not in lists else message.replace("first", "others")
        with pytest.raises((TypeError, ValueError), match=named):
            ved_beams(empty_trees(), CATALOGUE, rows_of(1, 2), width=2, **lists)
    trees = empty_trees()
    trees.size = trees.size[0]
    with pytest.raises(ValueError, match=r"trees.size must have the shape \[B\]"):
        ved_beams(trees, CATALOGUE, rows_of(1, 2), extensions((3, 0)), 2)


def test_trees_that_lie_in_memory_in_other_ways(backend):
    """Slots and sizes may have any strides."""
    trees, apart = empty_trees(), empty_trees()
    trees.slot[0], trees.size[:] = torch.arange(70, 74), 3
    for name in ("slot", "size"):
        value = getattr(trees, name)
        setattr(apart, name, torch.stack([value - 1, value], -1)[..., 1])
    rows = rows_of(1, 5, parents=(0, 2))
    assert_same(ved_inputs(apart, CATALOGUE, rows), ved_inputs(trees, CATALOGUE, rows))
    given = CATALOGUE, rows_of(1, 2), extensions((3, 0), (5, 1)), 2
    assert_same(ved_beams(apart, *given), ved_beams(trees, *given))


def test_values_are_checked_under_validation():
    with vstar_ops.validation(), pytest.raises(ValueError, match=r"node must lie in \[-1, 6\)"):
        evaluated(empty_trees(), rows_of(6), torch.tensor([7]))
