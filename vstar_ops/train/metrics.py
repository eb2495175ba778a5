"""What a model's candidates are worth: accuracy, diversity, reward, cost."""

from __future__ import annotations

import ctypes
import math
import os

import torch
from torch import Tensor
from tqdm import tqdm

from ..reference import derive_seeds
from ..trie import Trie
from .data import Dataset
from .decode import Decoder
from .model import SIDTransformer
from .rewards import hits, rule

Scores = dict[str, float]

CUTOFFS = (1, 3, 5, 10)
MISSING = 2**31 - 1
BATCH_SIZE = 256


def target_rank(candidates: Tensor, target: Tensor) -> Tensor:
    """int64 ``[B]``: the 0-based rank of ``target[B, L]`` among the distinct ``candidates[B, K, L]``.

    Repeats of an earlier candidate take no rank. :data:`MISSING` where the target is missing.
    """
    same = (candidates[:, :, None] == candidates[:, None]).all(-1)
    repeated = same.tril(-1).any(2)
    rank = (~repeated).cumsum(1) - 1
    return torch.where(hits(candidates, target), rank, MISSING).min(1).values


def accuracy(rank: Tensor) -> Scores:
    """``HR@k`` and ``NDCG@k`` over ``rank[R]``; one relevant item, so NDCG is ``1 / log2(rank + 2)``.

    Raises:
        ValueError: there are no ranks.
    """
    if not len(rank):
        raise ValueError("rank must be that of at least one request, got [0]")
    gain = 1 / torch.log2(rank.double() + 2)
    scores = {f"HR@{k}": (rank < k).double().mean().item() for k in CUTOFFS}
    return scores | {f"NDCG@{k}": (gain * (rank < k)).mean().item() for k in CUTOFFS}


def diversity(candidates: Tensor) -> Tensor:
    """float32 ``[B]``: mean over the pairs of a request's candidates of ``1 - LCP / L``.

    LCP is the length of their longest common prefix. Rows of -1 take no part; 0 below two candidates.
    """
    length, size = candidates.shape[2], candidates.shape[1]
    present = candidates[..., 0] >= 0
    equal = candidates[:, :, None] == candidates[:, None]
    distance = 1 - equal.cumprod(3).sum(3) / length
    upper = torch.ones(size, size, dtype=torch.bool, device=candidates.device).triu(1)
    pair = present[:, :, None] & present[:, None] & upper
    return (distance * pair).sum((1, 2)) / pair.sum((1, 2)).clamp(min=1)


def evaluate(
    model: SIDTransformer, data: Dataset, trie: Trie, decoder: Decoder, name: str, rows: int | None = None
) -> Scores:
    """The means of :func:`per_request`, with the accuracy of the ranks.

    Raises:
        ValueError: the split is empty.
        FloatingPointError: a score is not finite, as a reward is not.
    """
    joined = per_request(model, data, trie, decoder, name, rows)
    number = len(joined["rank"])
    scores = accuracy(joined.pop("rank")) | {score: x.double().mean().item() for score, x in joined.items()}
    for score, x in scores.items():
        if not math.isfinite(x):
            raise FloatingPointError(f"{data.name}: {score} is {x} over {number} requests of {name}")
    return scores


@torch.no_grad()
def per_request(
    model: SIDTransformer, data: Dataset, trie: Trie, decoder: Decoder, name: str, rows: int | None = None
) -> dict[str, Tensor]:
    """Decode candidates for the requests of the split ``name`` with fixed seeds, and score each, ``[R]``.

    With ``rows`` only for so many requests, a fixed random choice; see :meth:`Split.part`.
    The reward is the true one where it is known (this adds ``true_reward@10``), otherwise 1 for the target.

    Raises:
        ValueError: the split is empty.
    """
    split, true_reward, training = getattr(data, name).part(rows), data.reward, model.training
    if not len(split):
        raise ValueError(f"{data.name}: the {name} split is empty, so there is nothing to evaluate on")
    model.eval()
    parts: dict[str, list[Tensor]] = {}
    seeds = derive_seeds(0, len(split), trie.device)
    order = split.items.argsort(stable=True)  # equal lengths together: little padding
    for batch in tqdm(order.split(BATCH_SIZE), desc=name, leave=False, disable=None):
        part = split[batch].on(trie.device)
        found = decoder(model, part.context, trie, seeds[batch.to(trie.device)])
        tokens = found.sequence.long()
        reward = true_reward(part.user, tokens) if true_reward else rule(tokens, part.target)
        for score, values in {
            "rank": target_rank(tokens, part.target),
            "diversity": diversity(tokens),
            "best_reward": reward.max(1).values,
            "forward_tokens": found.forward_tokens,
            "true_reward@10": reward[:, :10].sum(1) / found.num_valid.clamp(1, 10),
        }.items():
            parts.setdefault(score, []).append(values.cpu())
    model.train(training)
    _return_memory()
    if not true_reward:
        del parts["true_reward@10"]
    return {score: torch.cat(values)[order.argsort()] for score, values in parts.items()}


def _return_memory() -> None:
    """Give freed memory back to the system, where the C library can (glibc).

    A search frees many tensors of many sizes, and the heap breaks into pieces that the next one hardly uses:
    without this a process holds more after every evaluation, although no tensor is left.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)
