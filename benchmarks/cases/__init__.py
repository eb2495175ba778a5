"""The cases that ``python -m benchmarks``, ``python -m benchmarks.gpu`` and ``bench_ops.py`` time.

A case is one op on one shape and the torch compositions that compute the same. :data:`SIZES` lists the shapes
for a CPU, for a GPU, and small ones that check the programs themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .beams import advance_beams, distinct_rows, draw_children, expand_dense, expand_legal, rows_to_run
from .case import BF16, FP32, Case
from .filters import filter_items
from .search import ved_candidates_of, ved_level, ved_round, ved_rows
from .training import (
    group_advantage,
    prefix_returns,
    prefix_tree,
    sibling_advantage,
    sibling_grpo_loss,
    token_logp,
    token_logp_legal,
)

STEPS = (advance_beams, rows_to_run, draw_children, distinct_rows)
SIZES: dict[str, list[tuple[Any, ...]]] = {
    "cpu": [
        (expand_legal, 64, 16, 16, 1, FP32),
        (expand_legal, 64, 16, 16, 2, FP32),
        (expand_legal, 64, 16, 16, 1, FP32, 152_064),
        *((expand_legal, 64, 16, 16, depth, FP32, 0, "legal", x) for depth in (1, 2) for x in (0.01, 0.5)),
        (expand_dense, 16, 128, 8192, 128, FP32, "vocab"),
        *((sibling_advantage, *size) for size in ((64, 16), (256, 64))),
        *((prefix_returns, *size, 64) for size in ((64, 16), (256, 64))),
        *((make, *size) for make in (prefix_tree, sibling_grpo_loss) for size in ((64, 16), (256, 64))),
        (group_advantage, 256, 64),
        *((make, 64, 16) for make in STEPS),
        (filter_items, 1_000_000, 10_000),
        *((make, 64, 129) for make in (ved_round, ved_candidates_of)),
        (ved_rows, 64, 12, FP32),
        (ved_level, 64, 12),
        (token_logp, 1024, 152_064, FP32),
        (token_logp_legal, 1024, 152_064, FP32),
    ],
    "cuda": [
        *((expand_dense, batch, 128, 8192, 128, BF16) for batch in (16, 256)),
        (expand_dense, 16, 128, 8192, 128, FP32),
        (expand_dense, 1, 1, 151_936, 128, BF16),
        *((expand_legal, *size, depth, BF16) for depth in (1, 2) for size in ((16, 128, 128), (64, 16, 16))),
        *((expand_legal, 16, 16, 16, 1, BF16, 151_936, domain) for domain in ("legal", "vocab")),
        *((expand_legal, 16, 128, 128, depth, BF16, 0, "legal", 0.5) for depth in (1, 2)),
        *((sibling_advantage, *size) for size in ((64, 16), (1024, 64), (64, 512, 8))),
        (group_advantage, 1024, 64),
        (prefix_returns, 256, 64, 64),
        (prefix_tree, 256, 64),
        *((make, 64, 128) for make in STEPS),
        (filter_items, 1_000_000, 10_000),
        *((token_logp, 4096, columns, BF16) for columns in (151_936, 152_437)),
        (token_logp_legal, 4096, 151_936, BF16),
        *((sibling_grpo_loss, *size) for size in ((64, 16), (1024, 64), (64, 512, 8))),
        *((make, 1024, 129) for make in (ved_round, ved_candidates_of)),
        (ved_rows, 256, 12, BF16),
        (ved_level, 1024, 12),
    ],
    "small": [
        (expand_dense, 2, 4, 64, 8, BF16),
        (expand_legal, 2, 4, 8, 1, BF16),
        (expand_legal, 2, 4, 4, 2, BF16, 0, "vocab"),
        (expand_legal, 2, 4, 4, 1, BF16, 0, "legal", 0.5),
        *((make, 2, 8) for make in (sibling_advantage, group_advantage, prefix_tree, sibling_grpo_loss)),
        (prefix_returns, 2, 8, 16),
        *((make, 2, 8) for make in STEPS),
        (filter_items, 500, 20),
        *((make, 4, 5000, BF16) for make in (token_logp, token_logp_legal)),
        *((make, 2, 13) for make in (ved_round, ved_candidates_of)),
        (ved_rows, 2, 4, BF16),
        (ved_level, 2, 4),
    ],
}


def cases(size: str, items: Tensor) -> list[Callable[[], Case]]:
    """Makers of the cases of ``"cpu"``, ``"cuda"`` or ``"small"`` on the device of the catalogue's ``items``.

    One is made at a time, for its memory. Its ``__name__`` tells op and shape before that.
    """

    def made(make: Callable[..., Case], *arguments: Any) -> Case:
        with torch.device(items.device):
            return make(items, *arguments)

    makers = [partial(made, *row) for row in SIZES[size]]
    for maker, (make, *arguments) in zip(makers, SIZES[size], strict=True):
        maker.__name__ = " ".join([make.__name__, *map(str, arguments)])  # type: ignore[attr-defined]
    return list(makers)
