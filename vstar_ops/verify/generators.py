"""Random valid calls of all ops but those of the tree search, which ``trees.py`` makes.

The first dimension of every tensor among a call's arguments is the request.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

import vstar_ops
from vstar_ops import ItemFilter, Trie
from vstar_ops.reference.filters import num_words, pack_bits

from .calls import Call, filter_bits, token_logp_gradient, with_alive

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
    nodes = trie.num_nodes
    alive = torch.zeros(len(allowed), nodes, dtype=torch.uint8, device=trie.device)
    alive[:, nodes - trie.num_sequences :] = allowed.byte()
    parent = trie.parent(torch.arange(nodes, device=trie.device)).long()
    for first, end in zip(trie.level_offset[-2:0:-1], trie.level_offset[:0:-1]):
        above = parent[first:end].expand(len(allowed), end - first)
        alive.scatter_reduce_(1, above, alive[:, first:end].clone(), "amax")
    return with_alive(trie, pack_bits(alive))


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
