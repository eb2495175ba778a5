"""``advance_beams`` and ``rows_to_run``: by hand, against their oracles, at their edges.

The tables below teach the ops; read them first. What a search makes of them is tested in ``test_beam.py``.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import vstar_ops
from vstar_ops import Trie, advance_beams, rows_to_run
from vstar_ops.verify import oracles, sampling
from vstar_ops.verify.winners import Children

# ---------------------------------------------------------------- by hand


class Step(NamedTuple):
    """A request's winners, and the beams that they make: ``(sequence, slot, token, evaluated)``."""

    lesson: str
    winners: list[tuple[int, int, int]]  # parent, token, node
    beams: list[tuple[tuple[int, ...], int, int, int]]
    options: dict[str, list[int]] = {}  # noqa: RUF012


# Beams (3, 4) and (3, 7), which the model keeps in the slots 10 and 11.
STEPS = [
    Step(
        "A winner is its beam and one token more; the model appends the token to the beam's slot.",
        [(1, 5, 20), (0, 6, 21)], [((3, 7, 5), 11, 5, 2), ((3, 4, 6), 10, 6, 2)],
    ),
    Step(
        "A beam may have several winners, or none.",
        [(0, 5, 20), (0, 6, 21)], [((3, 4, 5), 10, 5, 2), ((3, 4, 6), 10, 6, 2)],
    ),
    Step("Slots past the last winner are dead.", [(-1, -1, -1)], [((-1, -1, -1), -1, 0, 0)]),
    Step("What is no beam is dead too.", [(2, 5, 20)], [((-1, -1, -1), -1, 0, 0)]),
    Step(
        "evaluated: how much of a beam the model has seen; it stays so until a forward catches up.",
        [(1, 5, 20), (0, 6, 21)], [((3, 7, 5), 11, 5, 1), ((3, 4, 6), 10, 6, 0)], {"evaluated": [0, 1]},
    ),
    Step(
        "row: a beam that was run since then is in the slot of its row, and evaluated to its end.",
        [(1, 5, 20), (0, 6, 21)], [((3, 7, 5), 31, 5, 2), ((3, 4, 6), 10, 6, 0)],
        {"evaluated": [0, 1], "row": [-1, 1], "row_slot": [30, 31]},
    ),
    Step(
        "row: out of range is none.",
        [(1, 5, 20), (0, 6, 21)], [((3, 7, 5), 11, 5, 2), ((3, 4, 6), 10, 6, 2)],
        {"row": [9, -7], "row_slot": [30]},
    ),
]  # fmt: skip


@pytest.mark.parametrize("step", STEPS, ids=[x.lesson[:50] for x in STEPS])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_step_by_hand(backend, step, dtype):
    parent, token, node = torch.tensor([step.winners], dtype=dtype).unbind(2)
    sequence, slot = torch.tensor([[[3, 4], [3, 7]]], dtype=dtype), torch.tensor([[10, 11]], dtype=dtype)
    options = {k: torch.tensor(x if k == "row_slot" else [x], dtype=dtype) for k, x in step.options.items()}
    out = advance_beams(parent, token, node, sequence, slot, **options)
    assert [x.dtype for x in out] == [torch.int32, torch.int64, torch.int64, torch.int32]
    assert [(tuple(s), *rest) for s, *rest in zip(*(x[0].tolist() for x in out))] == step.beams


def test_the_first_step(backend):
    """Of the empty prefix of each request."""
    node = torch.tensor([[4, 5], [6, -1]])
    token = torch.tensor([[7, 8], [9, -1]])
    out = advance_beams(node.clamp(max=0), token, node, torch.empty(2, 1, 0).int(), torch.tensor([[0], [1]]))
    assert out.sequence.tolist() == [[[7], [8]], [[9], [-1]]]
    assert out.slot.tolist() == [[0, 0], [1, -1]]
    assert out.evaluated.tolist() == [[0, 0], [0, 0]]


class Level(NamedTuple):
    """A request's beams, ``(sequence, slot, evaluated)``, and the rows that a model runs."""

    lesson: str
    beams: list[tuple[tuple[int, ...], int, int]]
    row: list[int]
    parent: list[int]
    stages: list[list[tuple[int, int]]]  # (token, place in the list of rows)


# After (0, 1) and (2, 1) two tokens are legal, after (3, 1) one.
CATALOGUE = [[0, 1, 5], [0, 1, 6], [2, 1, 5], [2, 1, 6], [3, 1, 5]]
LEVELS = [
    Level(
        "A beam with several children is run: its last token, after the prefix that was evaluated.",
        [((0, 1), 10, 1), ((2, 1), 11, 1)], [0, 1], [10, 11], [[], [(1, 0), (1, 1)]],
    ),
    Level("One with a single child needs no forward.", [((3, 1), 10, 1)], [-1], [], [[], []]),
    Level("Nor does what is no prefix.", [((3, 3), 10, 1)], [-1], [], [[], []]),
    Level("Nor does what has been evaluated.", [((0, 1), 10, 2)], [-1], [], [[], []]),
    Level(
        "A prefix that was skipped is caught up, a token in each stage.",
        [((0, 1), 10, 0)], [0], [10], [[(0, 0)], [(1, 0)]],
    ),
    Level(
        "Rows are numbered in the order of the beams; only those that lack a token take part in its stage.",
        [((0, 1), 10, 1), ((3, 1), 12, 1), ((2, 1), 11, 0)], [0, -1, 1], [10, 11],
        [[(2, 1)], [(1, 0), (1, 1)]],
    ),
]  # fmt: skip


@pytest.mark.parametrize("level", LEVELS, ids=[x.lesson[:50] for x in LEVELS])
def test_rows_by_hand(backend, level):
    trie, beams = Trie.from_sequences(CATALOGUE), len(level.beams)
    sequence, slot, evaluated = (torch.tensor([list(x)]) for x in zip(*level.beams))
    out = rows_to_run(trie, trie.lookup(sequence), sequence, slot, evaluated)
    assert [x.dtype for x in out] == [torch.int32, *[torch.int64] * 3, *[torch.int32] * 2]
    assert out.row.tolist() == [level.row]
    assert out.parent.tolist() == level.parent + [-1] * (beams - len(level.parent))
    assert out.num_rows.tolist() == [len(stage) for stage in level.stages]
    for stage, token, place in zip(level.stages, out.token.tolist(), out.place.tolist()):
        unused = beams - len(stage)
        assert token == [x for x, _ in stage] + [0] * unused
        assert place == [x for _, x in stage] + [-1] * unused
    assert out.num_tokens.tolist() == [sum(map(len, level.stages))]


# ---------------------------------------------------------------- against the oracles


def as_numpy(arguments):
    return {k: x if isinstance(x, Trie) else x.numpy() for k, x in arguments.items()}


def compare(got, want):
    assert set(want) == set(got._fields)
    for name, array in want.items():
        assert getattr(got, name).is_contiguous()
        assert torch.equal(getattr(got, name).long(), torch.from_numpy(np.asarray(array)).long()), name


@given(seed=st.integers(0, 2**32 - 1), dtype=st.sampled_from([torch.int32, torch.int64]))
def test_advance_beams_oracle(backend, seed, dtype):
    """Any sizes, 0 included, any strides, indices out of range."""
    arguments = sampling.advance_beams(np.random.default_rng(seed), dtype).arguments
    compare(advance_beams(**arguments), oracles.advance_beams(**as_numpy(arguments)))


@given(seed=st.integers(0, 2**32 - 1), dtype=st.sampled_from([torch.int32, torch.int64]))
def test_rows_to_run_oracle(backend, seed, dtype):
    arguments = sampling.rows_to_run(np.random.default_rng(seed), dtype).arguments
    given = as_numpy(arguments)
    children = Children.of(given.pop("trie")).children
    compare(rows_to_run(**arguments), oracles.rows_to_run(children, **given))


@pytest.mark.parametrize("beams", [31, 512, 513, 1025, 2100])
def test_more_beams_than_threads(backend, beams):
    random = torch.Generator().manual_seed(beams)
    trie = Trie.from_sequences(torch.randint(4, (40, 3), generator=random))
    node = torch.randint(-1, trie.num_nodes + 1, (2, beams), generator=random)
    sequence = torch.randint(4, (2, beams, 2), generator=random)
    slot, evaluated = torch.arange(2 * beams).view(2, -1), torch.randint(3, (2, beams), generator=random)
    arguments = {"node": node, "sequence": sequence, "slot": slot, "evaluated": evaluated}
    want = oracles.rows_to_run(Children.of(trie).children, **as_numpy(arguments))
    compare(rows_to_run(trie, **arguments), want)


# ---------------------------------------------------------------- errors


def zeros(*shape, dtype=torch.int32):
    return torch.zeros(shape, dtype=dtype)


STEP = {
    "parent": zeros(2, 3), "token": zeros(2, 3), "node": zeros(2, 3), "sequence": zeros(2, 4, 1),
    "slot": zeros(2, 4),
}  # fmt: skip
ROWS = {"node": zeros(2, 4), "sequence": zeros(2, 4, 1), "slot": zeros(2, 4), "evaluated": zeros(2, 4)}


@pytest.mark.parametrize(
    ("function", "changes", "error", "message"),
    [
        (advance_beams, {"parent": zeros(2)}, ValueError, r"parent must have the shape \[B, K\], got \[2\]"),
        (advance_beams, {"token": zeros(2, 3).float()}, TypeError, "token must be int32 or int64"),
        (advance_beams, {"node": zeros(3, 2)}, ValueError, r"node must have the shape \[B, K\] = \[2, 3\]"),
        (advance_beams, {"sequence": [[1]]}, TypeError, "sequence must be a tensor"),
        (advance_beams, {"slot": zeros(2, 3)}, ValueError, r"slot must have the shape \[B, W\] = \[2, 4\]"),
        (advance_beams, {"evaluated": zeros(2, 3)}, ValueError, r"evaluated must have the shape \[B, W\]"),
        (advance_beams, {"row": zeros(2, 4)}, ValueError, "row_slot must be given where row is, got None"),
        (advance_beams, {"row_slot": zeros(1)}, ValueError, "row must be given where row_slot is, got None"),
        (advance_beams, {"row": zeros(2, 4), "row_slot": zeros(1, 1)}, ValueError, r"row_slot must .*\[R\]"),
        (rows_to_run, {"trie": None}, TypeError, "trie must be a vstar_ops.Trie, got NoneType"),
        (rows_to_run, {"node": zeros(2, 4).bool()}, TypeError, "node must be int32 or int64, got bool"),
        (rows_to_run, {"sequence": zeros(2, 4)}, ValueError, r"sequence must have the shape \[B, W, l\]"),
        (rows_to_run, {"slot": zeros(2, 3)}, ValueError, r"slot must have the shape \[B, W\] = \[2, 4\]"),
        (rows_to_run, {"evaluated": zeros(2)}, ValueError, r"evaluated must have the shape \[B, W\]"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(backend, function, changes, error, message):
    usual = STEP if function is advance_beams else {"trie": Trie.from_sequences(CATALOGUE), **ROWS}
    with pytest.raises(error, match=message):
        function(**{**usual, **changes})


def test_values_are_checked_under_validation(backend):
    trie = Trie.from_sequences(CATALOGUE)
    with vstar_ops.validation():
        with pytest.raises(ValueError, match=r"parent must lie in \[-1, 4\)"):
            advance_beams(**{**STEP, "parent": zeros(2, 3) + 4})
        with pytest.raises(ValueError, match=r"row must lie in \[-1, 1\)"):
            advance_beams(**STEP, row=zeros(2, 4) + 1, row_slot=zeros(1))
        with pytest.raises(ValueError, match=r"node must lie in"):
            rows_to_run(trie, **{**ROWS, "node": zeros(2, 4) + trie.num_nodes})
