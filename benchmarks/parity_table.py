"""The table of ``benchmarks.parity``, and sibling advantages by loops."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

Tensors = Tensor | Sequence[Tensor]


class Table:
    """Rows, printed as they come; a bound that does not hold is marked and counted."""

    exceeded = 0

    def section(self, title: str) -> None:
        """Begin another table."""
        print(f"\n## {title}\n\n| ours | theirs | quantity | difference | bound |\n|---|---|---|---|---|")

    def add(
        self,
        ours: str,
        theirs: str,
        quantity: str,
        got: Tensors,
        want: Tensors,
        bound: float | None = None,
        relative: bool = False,
    ) -> None:
        """The largest difference of two tensors or lists, or relative to the largest entry of each tensor."""
        pairs = [(got, want)] if isinstance(got, Tensor) else zip(got, want, strict=True)
        gaps = []
        for x, y in pairs:
            assert x.shape == y.shape, f"{quantity}: {tuple(x.shape)} is compared with {tuple(y.shape)}"
            gap = (x.detach().double() - y.detach().double()).abs().max()
            gaps.append(gap / y.detach().double().abs().max() if relative else gap)
        worst = torch.stack(gaps).max().item()
        self.add_value(ours, theirs, quantity, worst, bound, " relative" if relative else "")

    def add_value(
        self, ours: str, theirs: str, quantity: str, value: float, bound: float | None = None, unit: str = ""
    ) -> None:
        """The same with the difference at hand."""
        holds = bound is None or value <= bound  # NaN does not
        self.exceeded += not holds
        limit = "differs on purpose" if bound is None else f"{bound:g}{unit}"
        mark = "" if holds else " **exceeded**"
        print(f"| {ours} | {theirs} | {quantity} | {value:.1e}{mark} | {limit} |", flush=True)


def siblings_by_hand(tokens: Tensor, rewards: Tensor, mask: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Eqs. 17 and 18 by loops in float64: advantages ``[N, T]`` and the candidates through each node."""
    advantage, number = torch.zeros(2, *tokens.shape, dtype=torch.float64)
    for row, place in mask.nonzero().tolist():
        children: dict[int, list[float]] = {}
        for mate in (group == group[row]).nonzero()[:, 0].tolist():
            if mask[mate, place] and torch.equal(tokens[mate, :place], tokens[row, :place]):
                children.setdefault(int(tokens[mate, place]), []).append(float(rewards[mate]))
        means = {token: sum(x) / len(x) for token, x in children.items()}
        of_all = np.array(list(means.values()))
        token = int(tokens[row, place])
        number[row, place] = len(children[token])
        if of_all.max() - of_all.min() > 1e-12:
            advantage[row, place] = (means[token] - of_all.mean()) / (of_all.std() + 1e-4)
    return advantage, number
