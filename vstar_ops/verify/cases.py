"""Valid random inputs of every op, by the op's name: what the tests of all ops run on.

``CASES[op][label](batch)`` makes a call of the public function that runs the op. The first dimension of every
tensor among its arguments is the request.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from .calls import Call
from .generators import (
    differentiated,
    distinct,
    draws,
    embedded,
    expansion,
    filtering,
    loss,
    pending,
    rewarded,
    scored,
    siblings,
    tree,
    winners,
)
from .trees import beams, evaluation, inputs, insertion, listing, ranking, selection

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
        partial(siblings, group=40, by_token=True, scale="group", baseline="leave_one_out"),
        partial(siblings, group=40, tokens=2**40, masked=True, baseline="parent"),
        partial(siblings, group=100),
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
    "ved_candidates": [
        *(partial(ranking, rounds=8, k=k) for k in (5, 40, 13_000)),
        *(partial(listing, leaves=leaves) for leaves in (20, 70)),
    ],
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
