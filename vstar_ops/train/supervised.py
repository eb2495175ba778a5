"""Stage 1: next-token likelihood of the logged clicks."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..trie import Trie
from . import checkpoint
from .data import Split, UserWindows, on_device
from .model import SIDTransformer
from .scoring import legal_logp
from .trainer import Batches, Evaluate, Run, Schedule, digest, fit, optimizer_of
from .value import Prefixes, item_embeddings


def supervised(run: Run, evaluate: Evaluate) -> tuple[SIDTransformer, dict[str, float]]:
    """The supervised policy and the figures of :func:`fit`.

    The likelihood is over the legal children of every prefix. All steps of a user are learned in one pass.
    Early stopping looks at NDCG@10. With ``config.item_prior`` the policy then gets an item prior, see
    :func:`fit_prior`.
    """
    c, trie, windows = run.config, run.host_trie, UserWindows(run.dataset.train)
    torch.manual_seed(run.seed)
    model = SIDTransformer(run.dataset.vocab, run.dataset.max_tokens, dropout=c.dropout)
    model.to(run.device)
    call = run.world.wrap(model)

    def step(rows: Tensor, _: float) -> dict[str, float]:
        model.train()
        shard = run.world.shard(windows.items(rows, c.item_dropout))
        items = shard.rows  # [B, n, L]
        nodes = [trie.lookup(items[..., :depth]) for depth in range(items.shape[2] + 1)]
        node, child = (torch.stack(n, 2).flatten() for n in (nodes[:-1], nodes[1:]))
        # What is learned from is found on the CPU, so that a GPU is never waited for.
        branch = ((items >= 0).flatten() & (trie.num_children(node) > 1)).nonzero()[:, 0]
        node, child = node[branch].long(), child[branch].long()
        token, place = trie.children(node).token.long(), child - 1 - trie.offset[node]
        prompt, row, token, place = (
            on_device(x, run.device) for x in (items.flatten(1)[:, :-1], branch, token, place)
        )
        with run.world.rank_rng():
            logits = call("forward", prompt)
        logp, smooth = legal_logp(logits.flatten(0, 1)[row], token, place)
        loss = -((1 - c.label_smoothing) * logp + c.label_smoothing * smooth).sum()
        loss = loss / max(1, len(branch))
        (weight,) = shard.weights(len(branch))
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
    if c.item_prior and c.validate:
        of = digest(model.state_dict())
        model.add_item_prior(item_embeddings(c.item_embeddings, run.dataset, trie))
        model.to(run.device)
        weight = known_prior(run, model, of) if run.world.is_main else torch.zeros(0)
        model.prior = nn.Parameter(run.world.broadcast(weight).to(run.device))
    return model, figures


def known_prior(run: Run, model: SIDTransformer, of: str) -> Tensor:
    """:func:`fit_prior`, out of a file if it is done, since on another device it differs in the last bits.

    ``of`` is the digest of the weights that it is for.
    """
    path = run.folder / "prior.pt"
    saved = checkpoint.load(path) if path.exists() else {}
    if saved.get("of") != of:
        with run.autocast():
            saved = {"of": of, "weight": fit_prior(model, run.trie, run.dataset.valid)}
        checkpoint.save(path, saved)
    return saved["weight"]


@torch.no_grad()
def fit_prior(model: SIDTransformer, trie: Trie, split: Split) -> Tensor:
    """The most likely weights ``[L]`` of the model's item prior, whose own become 1.

    On rows that nothing was learned from: the clicks that make the embeddings of items are those of the
    training rows, so that there every target is near its own history. A normal distribution of the weights
    keeps them finite where few rows could want them infinite.
    """
    assert model.nearness is not None and model.prior is not None
    rows = []  # logits of the legal children, what a weight of 1 adds to them, which was taken, and the level
    nn.init.ones_(model.prior)
    model.eval()
    for batch in torch.arange(len(split)).split(256):
        part = split[batch].on(trie.device)
        logits, state = model.prefill(part.context)
        slot = torch.arange(len(part), device=trie.device)
        for level, token in enumerate(part.target.unbind(1)):
            at, near = Prefixes(*(x[slot] for x in state.at)), state.near
            assert near is not None
            child, legal = model.nearness.below(at.node)
            added = model.nearness.weighted(model.prior, near, at.request[:, None], child)
            base = logits.gather(1, legal.clamp(min=0)) - added
            rows.append((base.masked_fill(child < 0, -torch.inf), added, legal == token[:, None], level))
            if level < trie.length - 1:
                logits, slot = model.extend(state, slot, token)
    weight = torch.zeros(trie.length, device=trie.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=50, line_search_fn="strong_wolfe")

    @torch.enable_grad()
    def loss() -> Tensor:
        optimizer.zero_grad()
        logp = [(base + weight[level] * x).log_softmax(1)[taken] for base, x, taken, level in rows]
        total = (weight.square().sum() / 2 - torch.cat(logp).sum()) / len(split)
        total.backward()
        return total

    optimizer.step(loss)  # convex
    return weight.detach().cpu()
