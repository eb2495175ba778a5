"""An embedded catalogue and user model in which clicks are a biased view of what is rewarded.

Items have a latent vector, a quality and an appeal. Quality and appeal belong to *regions* of the latent
space, so they are properties of SID prefixes. The true reward of an item is what a user thinks of it
afterward: how well it fits the user, and its quality. A click comes before that: users choose by fit and
appeal, which agrees with quality in part; the rest is bias, such as popularity, position or a good picture. A
model of the clicks therefore ranks some poor regions high and misses some good ones, and it has few clicks to
learn the users' fit from. Feedback on what it proposes helps with both.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..trie import Trie
from .data import Dataset, Split

DIM = 16  # of latent vectors
FIT, OFFSET = 7.5, 4.5  # weight of the fit in reward and clicks; where a reward is 1/2
DECISIVENESS = 2.0  # of users in choosing what to click


@dataclass(frozen=True)
class LatentReward:
    """The true reward of candidates, ``sigmoid(FIT * <user, item> + quality - OFFSET)``.

    Items that share a SID are one candidate, with their mean vector and quality.
    """

    users: Tensor  # float32 [U, D]
    trie: Trie
    vector: Tensor  # float32 [leaves, D]
    quality: Tensor  # float32 [leaves]

    def to(self, device: torch.device) -> LatentReward:
        """The reward of candidates that are on a device."""
        users, vector, quality = (x.to(device) for x in (self.users, self.vector, self.quality))
        return LatentReward(users, self.trie.to(device), vector, quality)

    def __call__(self, user: Tensor, candidates: Tensor) -> Tensor:
        """float32 ``[B, G]`` of ``candidates[B, G, L]`` for ``user[B]``; 0 where not in the catalogue."""
        leaf = self.trie.lookup(candidates).long() - self.trie.level_offset[-2]
        known = leaf >= 0
        leaf = leaf.clamp(min=0)
        affinity = torch.einsum("bd,bgd->bg", self.users[user], self.vector[leaf])
        return torch.sigmoid(FIT * affinity + self.quality[leaf] - OFFSET) * known


def synthetic(
    *,
    seed: int = 0,
    agreement: float = 0.5,
    items: int = 3000,
    users: int = 3000,
    requests: int = 1000,
    max_history: int = 10,
    codes: tuple[int, int] = (32, 16),
) -> Dataset:
    r"""Draw a catalogue and click logs; a pure function of its arguments.

    User u clicks items without replacement, in proportion to
    :math:`\exp(2 \, (7.5 \langle u, i \rangle + \text{appeal}_i))`, where
    :math:`\text{appeal} = a \, \text{quality} + \sqrt{1 - a^2} \, \text{bias}`. Quality and bias are
    independent and normally distributed.

    Args:
        seed: of everything.
        agreement: a, the correlation of appeal with quality: how far clicks and rewards agree on what is not
            a matter of fit. With 1 users click what is good, and a model of the clicks has little to learn
            from rewards; with 0 what is popular may be anything; below 0 it is mostly poor, so that either
            clicks or rewards can be served. Real popularity says something of quality, but not much.
        items, users: how many. Each user clicks 5 to ``max_history + 2`` items.
        requests: rows of valid and of test. As in the usual protocol, a user's last click is the test
            target, the one before the valid target, and all before those is for training.
        codes: branching of the first two SID levels; the third numbers the items of a cell.
    """
    rng = np.random.default_rng(seed)
    regions = _unit(rng.normal(size=(items // 25 + 1, DIM)))
    region = rng.integers(len(regions), size=items)
    vector = _unit(regions[region] + 0.5 * rng.normal(size=(items, DIM)) / np.sqrt(DIM))
    quality, bias = rng.normal(size=(len(regions), 2))[region].T + 0.5 * rng.normal(size=(items, 2)).T
    appeal = agreement * quality + np.sqrt(1 - agreement**2) * bias

    tokens, sizes = _semantic_ids(vector, codes, rng)
    interests = rng.integers(len(regions), size=(users, 2))
    person = _unit(regions[interests].sum(1) + 0.5 * rng.normal(size=(users, DIM)) / np.sqrt(DIM))
    utility = DECISIVENESS * (FIT * person @ vector.T + appeal)
    counts = rng.integers(5, max_history + 3, size=users)
    # The best n of Gumbel-perturbed utilities are n clicks drawn without replacement, in order.
    clicks = np.argsort(-(utility + rng.gumbel(size=utility.shape)), axis=1)[:, : max_history + 2]

    trie = Trie.from_sequences(tokens)
    leaf = trie.lookup(tokens).numpy() - trie.level_offset[-2]
    means = [np.bincount(leaf, column) / np.bincount(leaf) for column in (*vector.T, quality)]
    reward = LatentReward(_float(person), trie, _float(np.stack(means[:-1], 1)), _float(means[-1]))

    sequences, every = torch.from_numpy(tokens), np.arange(users)
    # A user's training targets are clicks 1 .. count - 3 (counted from 0).
    steps = [(every[counts - 2 > n], n) for n in range(1, max_history)]
    learned = (np.concatenate([u for u, _ in steps]), np.concatenate([np.full(len(u), n) for u, n in steps]))
    chosen = every[:requests]  # users are exchangeable
    held_out = [(chosen, counts[chosen] - 2), (chosen, counts[chosen] - 1)]
    train, valid, test = (_split(sequences, clicks, *rows) for rows in (learned, *held_out))
    return Dataset("synthetic", sequences, torch.arange(items), sizes, train, valid, test, reward)


def _split(sequences: Tensor, clicks: np.ndarray, user: np.ndarray, at: np.ndarray) -> Split:
    """Requests whose targets are the clicks number ``at`` of users."""
    order = np.lexsort((at, user))
    user, at = user[order], at[order]
    max_history = clicks.shape[1] - 2
    column = np.arange(max_history)
    begin = np.maximum(at - max_history, 0)[:, None]
    item = clicks[user[:, None], np.minimum(begin + column, max_history + 1)]
    history = torch.where(torch.from_numpy(begin + column < at[:, None])[..., None], sequences[item], -1)
    return Split(history, sequences[clicks[user, at]], torch.from_numpy(user))


def _semantic_ids(
    vector: np.ndarray, codes: tuple[int, int], rng: np.random.Generator
) -> tuple[np.ndarray, tuple[int, ...]]:
    """Tokens int64 ``[N, 3]`` by hierarchical clustering, and the level sizes.

    In a cell of the second level one item in 30 has no code of its own: it takes its nearest neighbor's,
    so some SIDs collide, as in real catalogues.
    """
    token = np.zeros((len(vector), 3), np.int64)
    token[:, 0] = _cluster(vector, codes[0], rng)
    for a in np.unique(token[:, 0]):
        inside = np.flatnonzero(token[:, 0] == a)
        token[inside, 1] = _cluster(vector[inside], codes[1], rng)
        for b in np.unique(token[inside, 1]):
            cell = inside[token[inside, 1] == b]
            token[cell, 2] = _cluster(vector[cell], max(1, round(len(cell) * 29 / 30)), rng, rounds=0)
    sizes = tuple(int(level.max()) + 1 for level in token.T)
    return token + np.cumsum([0, *sizes[:2]]), sizes


def _cluster(points: np.ndarray, k: int, rng: np.random.Generator, rounds: int = 8) -> np.ndarray:
    """k-means labels (no empty ones are named: labels are dense from 0)."""
    center = points[rng.permutation(len(points))[:k]]
    for step in range(rounds + 1):
        label = ((points[:, None] - center) ** 2).sum(-1).argmin(1)
        label = np.unique(label, return_inverse=True)[1].reshape(-1)
        if step < rounds:
            center = np.stack([points[label == c].mean(0) for c in range(label.max() + 1)])
    return label


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _float(x: np.ndarray) -> Tensor:
    return torch.from_numpy(x.astype(np.float32))
