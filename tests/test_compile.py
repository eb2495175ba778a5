"""``torch.compile(fullgraph=True)`` makes no graph per value of a number, and none per catalogue.

That it takes every op, with its gradient, is in ``test_every_op.py``.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from helpers import assert_same
from torch._dynamo.testing import CompileCounterWithBackend

import vstar_ops
from vstar_ops import Trie, filter_items
from vstar_ops.ops import OPS
from vstar_ops.ops.ved import ved_insert, ved_select
from vstar_ops.verify.calls import Call
from vstar_ops.verify.cases import CASES

WITHOUT_NUMBERS = {"prefix_tree", "prefix_returns", "token_logp_backward"}
WITHOUT_NUMBERS |= {
    "advance_beams",
    "rows_to_run",
    "draw_children",
    "distinct_rows",
    "ved_inputs",
    "filter_items",
}
FIXED = {"ddof", "length"}  # which no schedule changes
WRAPPED = {
    "ved_select": ved_select,
    "ved_insert": ved_insert,
    "filter_items": filter_items,
}  # the cases call them on copies
FLOATS, INTS = [0.5 + i / 64 for i in range(12)], list(range(3, 15))  # torch gives up after 8 graphs
OPTIONS = {op: next(reversed(found.values())) for op, found in CASES.items()}


def numbers() -> list[tuple[str, str, list[Any]]]:
    """Op, argument and values of every argument that is a number."""
    found = []
    for op, make in OPTIONS.items():
        function = WRAPPED.get(op, make(1).function)
        for name, parameter in inspect.signature(function).parameters.items():
            kind = str(parameter.annotation).removesuffix(" | None")
            if kind in ("float", "int") and name not in FIXED and op not in WITHOUT_NUMBERS:
                values = FLOATS if kind == "float" else INTS
                found.append((op, name, [1 + x for x in values] if name == "dual_clip" else values))
    return found


def graphs(function: Callable[[Any], Any], values: Iterable[Any]) -> int:
    """How many graphs these calls need. Each must give what the function gives uncompiled."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for value in values:
        assert_same(compiled(value), function(value))
    return counter.frame_count


def changed(call: Call, **changes: Any) -> Any:
    return call.function(**{**call.arguments, **changes})


def test_every_op_has_numbers() -> None:
    assert {op for op, *_ in numbers()} == set(OPS) - WITHOUT_NUMBERS


@pytest.mark.parametrize(("op", "name", "values"), numbers(), ids=lambda x: x if isinstance(x, str) else "")
def test_a_number_that_varies(op: str, name: str, values: list[Any]) -> None:
    """One graph for the first value, and one for all others."""
    call = OPTIONS[op](3)
    assert graphs(lambda value: changed(call, **{name: value}), values) == 2


LISTS: dict[str, tuple[str, Callable[[float], dict[str, Any]]]] = {
    "clip": ("sibling_grpo_loss", lambda x: {"clip": (x, 2 * x)}),
    "one side of clip": ("sibling_grpo_loss", lambda x: {"clip": (x, math.inf)}),
    "depth_weights": ("sibling_grpo_loss", lambda x: {"depth_weights": [x, 1.0, 2 * x]}),
    "weights": ("prefix_returns", lambda x: {"weights": (x, 1.0, 2.0)}),
}


@pytest.mark.parametrize("name", LISTS)
def test_numbers_of_a_list_that_vary(name: str) -> None:
    op, arguments = LISTS[name]
    call = OPTIONS[op](3)
    assert graphs(lambda x: changed(call, **arguments(x)), FLOATS) == 2


@pytest.mark.parametrize(
    ("name", "values", "of"),
    [
        ("temperature", INTS, lambda x: x),  # an int where a float is expected
        ("temperature", INTS, lambda x: max(0.1, 1 - x / 20)),  # computed by the compiled function
        ("value_weight", [0.0, 1.0, *FLOATS], lambda x: x),  # 0: a term is not read
        ("gumbel_seed", INTS, lambda x: x),
    ],
)
def test_a_schedule(name: str, values: list[Any], of: Callable[[Any], Any]) -> None:
    call = OPTIONS["expand_topk"](3)
    assert graphs(lambda x: changed(call, **{name: of(x)}), values) == 2


def test_a_schedule_on_a_backend_that_was_asked_for() -> None:
    call = OPTIONS["expand_topk"](3)

    def expand(temperature: float) -> Any:
        with vstar_ops.use_backend("reference"):
            return changed(call, temperature=temperature)

    assert graphs(expand, FLOATS) == 2


@pytest.mark.parametrize(
    ("op", "name", "by"),
    [("token_logp", "temperature", "logits"), ("sibling_grpo_loss", "kl_weight", "logp")],
)
def test_the_gradient_too(op: str, name: str, by: str) -> None:
    call = OPTIONS[op](3)

    def step(x: float, given: torch.Tensor) -> torch.Tensor:
        return changed(call, **{name: x, by: given})[0].clamp(min=-50).sum()

    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for x in FLOATS:
        gradients = []
        for run in (step, compiled):
            given = call.arguments[by].clone().requires_grad_()
            gradients.append(*torch.autograd.grad(run(x, given), given))
        assert_same(*gradients)
    assert counter.frame_count == 2


def catalogues() -> list[Trie]:
    """Tries that differ in everything: items, tokens, children per node."""
    random = [torch.Generator().manual_seed(i) for i in range(12)]
    return [
        Trie.from_sequences(torch.randint(8 + 3 * i, (10 + 20 * i, 3), generator=g))
        for i, g in enumerate(random)
    ]


EXPANSION, SCORED = OPTIONS["expand_topk"](3), CASES["token_logp"]["legal"](3, columns=50)
TAKES_A_TRIE: dict[str, Callable[[Trie], Any]] = {
    "expand_topk": lambda trie: changed(EXPANSION, trie=trie),
    "token_logp": lambda trie: changed(SCORED, trie=trie),
    "sequences": lambda trie: trie.sequences(torch.arange(6)),
    "item_range": lambda trie: trie.item_range(torch.arange(6)),
}


@pytest.mark.parametrize("name", TAKES_A_TRIE)
def test_a_new_catalogue(name: str) -> None:
    tries = catalogues()
    assert len({trie.max_children for trie in tries}) == len({trie.max_token for trie in tries}) == 12
    assert graphs(TAKES_A_TRIE[name], tries) == 2


def test_lookup_keeps_to_the_bits_of_max_children() -> None:
    """It takes a step for each, so a graph serves the catalogues of as many."""
    tries = catalogues()
    bits = {trie.max_children.bit_length() for trie in tries}
    assert graphs(lambda trie: trie.lookup(torch.tensor([[1, 2], [3, 4]])), tries) <= 1 + len(bits)
