"""Stage 1: next-token likelihood of the logged clicks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .data import UserWindows
from .model import SIDTransformer
from .scoring import legal_logp
from .trainer import Batches, Evaluate, Run, Schedule, fit, optimizer_of


def supervised(run: Run, evaluate: Evaluate) -> tuple[SIDTransformer, dict[str, float]]:
    """The supervised policy and the figures of :func:`fit`.

    The likelihood is over the legal children of every prefix. All steps of a user are learned in one pass.
    Early stopping looks at NDCG@10.
    """
    c, trie, windows = run.config, run.trie, UserWindows(run.dataset.train)
    torch.manual_seed(run.seed)
    model = SIDTransformer(run.dataset.vocab, run.dataset.max_tokens, dropout=c.dropout)
    call = run.world.wrap(model)

    def step(rows: Tensor, _: float) -> dict[str, float]:
        model.train()
        shard = run.world.shard(windows.items(rows, c.item_dropout))
        items = shard.rows  # [B, n, L]
        nodes = [trie.lookup(items[..., :depth]) for depth in range(items.shape[2] + 1)]
        node, child = (torch.stack(n, 2).flatten(1) for n in (nodes[:-1], nodes[1:]))
        branch = (items >= 0).flatten(1) & (trie.num_children(node) > 1)
        with run.world.rank_rng():
            logits = call("forward", items.flatten(1)[:, :-1])
        logp, smooth = legal_logp(logits[branch], trie, node[branch], child[branch])
        loss = -((1 - c.label_smoothing) * logp + c.label_smoothing * smooth).sum()
        loss = loss / branch.sum().clamp(min=1)
        (weight,) = shard.weights(branch.sum())
        (weight * loss).backward()
        return shard.averages({"loss": loss.detach()}, {"loss": weight})

    figures = fit(
        run,
        "sft",
        model,
        optimizer_of(model, c.sft_lr, c.weight_decay),
        Batches(windows.draw, c.sft_batch_size),
        step,
        evaluate,
        schedule=Schedule(
            steps=c.sft_epochs * math.ceil(len(windows) / c.sft_batch_size),
            evals=c.sft_evals,
            warmup=100,
            cosine=True,
        ),
        metric="NDCG@10",
    )
    return model, figures
