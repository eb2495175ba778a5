"""A step of a beam search, or of sampling: ``expand_topk`` and the ops between two forwards."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

import vstar_ops
from vstar_ops import Trie

from .. import baselines
from .case import Case, Function, beams, nbytes, random_items, random_logits, short


def expand_dense(
    items: Tensor, batch: int, width: int, columns: int, k: int, dtype: torch.dtype, normalize: str = "legal"
) -> Case:
    """Every column legal, as at the first level of a catalogue."""
    trie = Trie.from_sequences(torch.arange(columns, device="cpu")[:, None]).to(items.device)
    cum_logp, node = torch.randn(batch, width), torch.zeros(batch, width, dtype=torch.int32)

    def ours(logits: Tensor, node: Tensor, cum_logp: Tensor) -> Any:
        return vstar_ops.expand_topk(logits, trie, node, k, cum_logp=cum_logp, normalize=normalize)

    kind = "dense" if normalize == "legal" else normalize
    return Case(
        f"expand_topk {kind} {short(dtype)} B={batch} W={width} V={columns} K={k}",
        {"ours": ours, "log_softmax, top-k": partial(baselines.expand_dense, k=k)},
        [(z, node, cum_logp) for z in random_logits(batch, width, columns, dtype=dtype)],
        ranked=True,
        compiled=True,
    )


def expand_legal(
    items: Tensor,
    batch: int,
    width: int,
    k: int,
    depth: int,
    dtype: torch.dtype,
    columns: int = 0,
    normalize: str = "legal",
    banned: float = 0,
) -> Case:
    """Below the beams that random logits leave, with value and entropy; 0 columns for the catalogue's own.

    ``banned``: the share of the items that are not allowed.
    """
    trie, own, node, cum_logp = beams(items, batch, width, depth, banned)
    columns, vocab, edges = columns or own, normalize == "vocab", int(trie.num_children(node).sum())
    tables, index, value = baselines.child_tables(trie, depth), node.long(), torch.randn(node.shape)
    scoring: dict[str, Any] = {"cum_logp": cum_logp, "value": value, "value_weight": 1.0}
    scoring |= {"entropy_weight": 0.1, "normalize": normalize}
    logits = random_logits(*node.shape, columns, dtype=dtype)
    return Case(
        f"expand_topk {normalize} depth {depth} {short(dtype)} B={batch} W={width} V={columns} K={k}"
        + f", {banned:.0%} banned" * bool(banned),
        {
            "ours": lambda z: vstar_ops.expand_topk(z, trie, node, k, **scoring),
            "log_softmax, gather, top-k" if vocab else "gather, log_softmax, top-k": lambda z: (
                baselines.expand_legal(z, tables, index, cum_logp, value, k, vocab)
            ),
        },
        [(z,) for z in logits],
        (logits[0].nbytes if vocab else dtype.itemsize * edges) + 4 * edges + nbytes((node, cum_logp, value)),
        ranked=True,
        compiled=True,
    )


def advance_beams(items: Tensor, batch: int, width: int) -> Case:
    """The winners of random logits at depth 2, as beams."""
    trie, columns, node, cum_logp = beams(items, batch, width, 1)
    out = vstar_ops.expand_topk(torch.randn(*node.shape, columns), trie, node, width, cum_logp=cum_logp)
    tokens, slot = trie.sequences(node)[..., :1].contiguous(), torch.randint(2**31, node.shape)
    variants: dict[str, Function] = {"ours": vstar_ops.advance_beams, "gather, mask": baselines.advance_beams}
    return Case(
        f"advance_beams B={batch} W={width}", variants, [(out.parent, out.token, out.node, tokens, slot)]
    )


def rows_to_run(items: Tensor, batch: int, width: int) -> Case:
    """Of the same beams, after the first level has been run where it branches."""
    trie, _, node, _ = beams(items, batch, width, 2)
    tokens, slot = trie.sequences(node)[..., :2].contiguous(), torch.randint(2**31, node.shape)
    evaluated = (trie.num_children(trie.parent(node)) > 1).int()
    variants = {"ours": partial(vstar_ops.rows_to_run, trie), "nonzero": partial(baselines.rows_to_run, trie)}
    return Case(f"rows_to_run B={batch} W={width}", variants, [(node, tokens, slot, evaluated)])


def draw_children(items: Tensor, batch: int, candidates: int) -> Case:
    """At depth 1, out of the 50 most probable tokens of the prefixes that random logits leave."""
    trie, columns, node, _ = beams(items, batch, candidates, 1)
    lists = vstar_ops.expand_topk(torch.randn(node.numel(), 1, columns), trie, node.reshape(-1, 1), 50)
    row = torch.arange(node.numel()).view(node.shape)
    inputs = (
        lists.logp,
        lists.token,
        lists.node,
        trie.sequences(node)[..., :1],
        row,
        node,
        torch.arange(batch),
    )

    def ours(*a: Tensor) -> Any:
        return vstar_ops.draw_children(*a[:4], row=a[4], prefix=a[5], seed=a[6])

    variants = {"ours": ours, "noise, argmax, gather": baselines.draw_children}
    return Case(f"draw_children B={batch} K={candidates} C=50", variants, [inputs])


def distinct_rows(items: Tensor, batch: int, candidates: int) -> Case:
    """Of candidates drawn at random, at depth 1."""
    tokens = random_items(items, batch, candidates)[..., 0].int()
    inputs = tokens + 1, tokens, torch.arange(batch), torch.arange(batch)[:, None].repeat(1, candidates)
    variants: dict[str, Function] = {
        "ours": lambda *a: vstar_ops.distinct_rows(*a[:3], row=a[3]),
        "unique, scatter": baselines.distinct_rows,
    }
    return Case(f"distinct_rows B={batch} K={candidates}", variants, [inputs])
