"""A filter that changes."""

from __future__ import annotations

import torch
from torch import Tensor

import vstar_ops
from vstar_ops import Trie

from .. import baselines
from .case import Case, Function


def filter_items(items: Tensor, number: int, changed: int) -> Case:
    """One filter of a made catalogue of three levels of 256 codes, of which so many items are banned."""
    trie = Trie.from_sequences(torch.randint(256, (number, 3)).cpu()).to(items.device)
    view = trie.restrict(ban=[])
    planted = view.alive.clone(), view.bits.allowed.clone()
    parent, leaf = (
        trie.parent(torch.arange(trie.num_nodes)).long(),
        torch.repeat_interleave(trie.item_offset.diff()),
    )
    flags = torch.ones(number, dtype=torch.bool)

    def ours(row: Tensor) -> tuple[Tensor, ...]:
        vstar_ops.filter_items(view.bits, trie, row, allow=False)
        return view.alive, view.bits.allowed

    def torch_way(row: Tensor) -> tuple[Tensor, ...]:
        return baselines.filter_items(trie, flags, parent, leaf + trie.level_offset[-2], row, allow=False)

    def reset() -> None:
        view.alive.copy_(planted[0])
        view.bits.allowed.copy_(planted[1])

    rows = torch.randperm(number)[None, :changed]
    variants: dict[str, Function] = {"ours": ours, "all nodes, amax by level": torch_way}
    # Every changed item and its nodes are read and written once.
    name, words = f"filter_items {number:,} items, {changed:,} changed", 4 * changed * (3 * trie.length + 3)
    return Case(name, variants, [(rows,)], words, reset=reset, calls=1)
