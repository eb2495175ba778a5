"""Advantages, returns, log-probabilities, the loss."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

import vstar_ops

from .. import baselines
from .case import Case, Function, beams, random_items, short


def sibling_advantage(items: Tensor, batch: int, group: int, length: int = 0) -> Case:
    """Of candidates drawn at random."""
    tokens = random_items(items, batch, group, length)
    variants: dict[str, Function] = {
        "ours": vstar_ops.sibling_advantage,
        "unique, index_add": baselines.sibling_advantage,
        "unique of packed keys, index_add": partial(baselines.sibling_advantage, packed=True),
    }
    name = f"sibling_advantage B={batch} G={group} L={tokens.shape[2]}"
    return Case(name, variants, [(tokens, torch.rand(batch, group))])


def group_advantage(items: Tensor, batch: int, group: int) -> Case:
    """GRPO's advantage."""
    variants = {"ours": vstar_ops.group_advantage, "mean, std": baselines.group_advantage}
    return Case(
        f"group_advantage B={batch} G={group}", variants, [(torch.rand(batch, group),)], compiled=True
    )


def prefix_returns(items: Tensor, batch: int, group: int, width: int) -> Case:
    """Dense returns of prefix buckets, from embeddings of ``width`` numbers."""
    tokens = random_items(items, batch, group)
    inputs = tokens, torch.randn(batch, group, width), tokens[:, 0].clone(), torch.randn(batch, width)
    torch_way = partial(baselines.prefix_returns, weights=(0.3, 0.5, 1.0))
    variants: dict[str, Function] = {
        "ours": vstar_ops.prefix_returns,
        "unique of packed keys, index_add": torch_way,
    }
    return Case(f"prefix_returns B={batch} G={group} L={tokens.shape[2]} E={width}", variants, [inputs])


def prefix_tree(items: Tensor, batch: int, group: int) -> Case:
    """The distinct prefixes of candidates drawn at random."""
    tokens = random_items(items, batch, group)
    variants = {"ours": vstar_ops.prefix_tree, "unique of packed keys, scatter": baselines.prefix_tree}
    return Case(f"prefix_tree B={batch} G={group} L={tokens.shape[2]}", variants, [(tokens,)])


def all_columns(logits: Tensor, target: Tensor, *_: Any) -> Tensor:
    return vstar_ops.token_logp(logits, target).logp


def token_logp(items: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Case:
    """Over the whole vocabulary, forward and backward, beside the memory's own pace."""
    logits = torch.randn(rows, columns).to(dtype).requires_grad_()
    variants = {
        "ours": all_columns,
        "cross_entropy": baselines.cross_entropy,
        "log_softmax, gather": baselines.token_logp,
    }
    return Case(
        f"token_logp {short(dtype)} [{rows}, {columns}] forward, backward",
        variants,
        [(logits, torch.randint(columns, (rows,)))],
        2 * logits.nbytes,
        {"reading twice, writing once": baselines.memory_pace},
        few=16,
        atol=1e-6,
        compiled=True,
    )


def token_logp_legal(items: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Case:
    """Over the legal children at depth 1, forward and backward, beside the same over all columns."""
    trie, _, node, _ = beams(items, -(-rows // 16), 16, 1)
    node = node.flatten()[:rows]
    tokens = trie.children(node).token.long()
    logits = torch.randn(rows, columns).to(dtype).requires_grad_()
    return Case(
        f"token_logp legal depth 1 {short(dtype)} [{rows}, {columns}] forward, backward",
        {
            "ours": lambda z, target, node, _: vstar_ops.token_logp(z, target, trie, node).logp,
            "gather, log_softmax": baselines.token_logp_legal,
        },
        [(logits, tokens[:, 0].clone(), node, tokens)],
        int((tokens >= 0).sum()) * (2 * dtype.itemsize + 8),
        {"ours, all columns": all_columns},
        few=16,
        atol=1e-6,
    )


def sibling_grpo_loss(items: Tensor, batch: int, group: int, length: int = 0) -> Case:
    """With clipping and KL, forward and backward; the advantages are given."""
    tokens, rewards = random_items(items, batch, group, length), torch.rand(batch, group)
    siblings, over_group = vstar_ops.sibling_advantage(tokens, rewards), vstar_ops.group_advantage(rewards)
    given: dict[str, Any] = {"sibling_advantage": siblings, "group_advantage": over_group}
    given |= {"form": "paper", "clip": (0.2, 0.2)}
    old, ref, logp = (-torch.rand(tokens.shape) for _ in range(3))

    def ours(logp: Tensor, old: Tensor, ref: Tensor, *_: Tensor) -> Tensor:
        return vstar_ops.sibling_grpo_loss(logp, old_logp=old, ref_logp=ref, **given).loss

    read = siblings.advantage, siblings.valid, siblings.num_candidates, over_group
    return Case(
        f"sibling_grpo_loss B={batch} G={group} L={tokens.shape[2]} forward, backward",
        {"ours": ours, "torch, autograd": baselines.sibling_grpo_loss},
        [(logp.requires_grad_(), old, ref, *read)],
        atol=1e-6,
        compiled=True,
    )
