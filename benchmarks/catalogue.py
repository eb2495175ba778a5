"""The catalogue that the benchmarks decode under."""

from __future__ import annotations

import torch
from torch import Tensor

from vstar_ops import Trie, expand_topk


def industrial_like(seed: int = 0) -> Tensor:
    """int64 ``[3670, 3]``: a made catalogue with the level sizes of Amazon Industrial (48, 2295, 3670).

    Codes of the three levels are columns 0-255, 256-511 and 512-767; fan-outs are about as skewed as the
    real ones: the widest depth-1 node has twice the mean, two thirds of the depth-2 nodes have one child,
    the widest has dozens.
    """
    generator = torch.Generator().manual_seed(seed)

    def split(total: int, parents: int, skew: float, most: int) -> list[int]:
        weight = torch.rand(parents, generator=generator).pow(skew) + 0.02
        parts = (weight / weight.sum() * (total - parents)).floor().long() + 1
        parts = parts.clamp(max=most)
        lucky = torch.randperm(parents, generator=generator)[: max(1, 28 * parents // 100)]
        for i in lucky.repeat(16)[: total - int(parts.sum())]:
            parts[i] += 1
        return parts.tolist()

    def codes(count: int, base: int) -> Tensor:
        return torch.randperm(256, generator=generator)[:count].sort().values + base

    first = codes(48, 0)
    second = split(2295, 48, 1.0, 95)
    third = split(3670, 2295, -0.6, 45)
    rows, node = [], 0
    for a, width in zip(first.tolist(), second):
        for b in codes(width, 256).tolist():
            rows += [[a, b, c] for c in codes(third[node], 512).tolist()]
            node += 1
    return torch.tensor(rows)


def made(items: int, codes: int, length: int) -> Tensor:
    """int64 ``[items, L]``: random ones, whose codes are the same columns on each level. A few are equal."""
    return torch.randint(codes, (items, length), generator=torch.Generator().manual_seed(0))


def load(data: str | None, category: str) -> tuple[str, Tensor, Tensor | None]:
    """Name, sequences, and prompts ``[1024, T]`` of random test requests.

    Of real data where ``data`` is given, else of the made catalogue, which has no users.
    """
    if data is None:
        return "made, Industrial's level sizes", industrial_like(), None
    from vstar_ops.train.data import load_minionerec

    real = load_minionerec(data, category)
    return category, torch.as_tensor(real.sequences), real.test.part(1024).context


def frontiers(trie: Trie, batch: int, width: int, columns: int) -> list[tuple[Tensor, Tensor]]:
    """``(node, cum_logp)`` of the beams that random logits leave at depths 0, 1, 2 …"""
    node, cum_logp = torch.zeros(batch, 1, dtype=torch.int32), torch.zeros(batch, 1)
    found = [(node, cum_logp)]
    for _ in range(1, trie.length):
        logits = torch.randn(batch, node.shape[1], columns)
        out = expand_topk(logits, trie, node, width, cum_logp=cum_logp)
        node, cum_logp = out.node, out.logp
        found.append((node, cum_logp))
    return found
