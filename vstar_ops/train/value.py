r"""The value model: its head, what it is trained on, and where item embeddings come from (Eqs. 5-9)."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops import prefix_returns
from ..trie import Trie, pick, ragged
from .data import Dataset, Split, user_sequences
from .rewards import Reward


class ItemEmbeddings:
    """Embeddings of the catalogue's leaves; items that share a SID are one, with their mean.

    Args:
        trie: the catalogue.
        sequences: ints ``[N, L]``, its items.
        vectors: float ``[N, E]``, one row per item.
    """

    def __init__(self, trie: Trie, sequences: Tensor, vectors: Tensor) -> None:
        self.trie = trie = trie.unrestricted
        leaf = trie.lookup(sequences).long() - trie.level_offset[-2]
        total = torch.zeros(trie.num_sequences, vectors.shape[1]).index_add_(0, leaf, vectors.float())
        self.vectors = total / torch.bincount(leaf, minlength=len(total)).clamp(min=1)[:, None]

    def to(self, device: torch.device) -> ItemEmbeddings:
        """The same on a device."""
        moved = copy.copy(self)
        moved.trie, moved.vectors = self.trie.to(device), self.vectors.to(device)
        return moved

    def __call__(self, sequences: Tensor) -> Tensor:
        """float32 ``[..., E]`` of ``sequences[..., L]``; 0 where not in the catalogue."""
        leaf = self.trie.lookup(sequences).long() - self.trie.level_offset[-2]
        return self.vectors[leaf.clamp(min=0)] * (leaf >= 0)[..., None]


@functools.lru_cache(maxsize=1)  # they take seconds, and are the same for all variants and seeds of a run
def item_embeddings(path: str | None, dataset: Dataset, trie: Trie) -> ItemEmbeddings:
    """Those of the file ``path``, or, for None, out of the training clicks."""
    if path:
        vectors = load_embeddings(path, len(dataset.sequences))
    else:
        vectors = cooccurrence_embeddings(dataset, trie)
    return ItemEmbeddings(trie, dataset.sequences, vectors)


def load_embeddings(path: str | Path, items: int) -> Tensor:
    """Read float ``[items, E]`` from a ``.npy`` file, rows in the order of the catalogue's index.

    Raises:
        FileNotFoundError, ValueError: the file is missing, or is not such an array.
    """
    array = np.load(path, allow_pickle=False)
    if array.ndim != 2 or len(array) != items or not np.issubdtype(array.dtype, np.floating):
        raise ValueError(
            f"{path}: expected floats [{items}, E], one row per item, got {array.dtype} {list(array.shape)}"
        )
    return torch.from_numpy(array.astype(np.float32))


def cooccurrence_embeddings(dataset: Dataset, trie: Trie, dim: int = 64) -> Tensor:
    """Embeddings ``[N, dim]`` out of the training clicks alone: who clicked what.

    The leading singular vectors of the user-item matrix, each entry divided by the square roots of its
    row's and column's sums; items never clicked get 0. A pure function of the data.
    """
    histories = user_sequences(dataset.train)
    user = torch.arange(len(histories)).repeat_interleave(torch.tensor([len(h) for h in histories]))
    trie = trie.unrestricted
    leaf = trie.lookup(torch.cat(histories)).long() - trie.level_offset[-2]
    shape = (len(histories), trie.num_sequences)
    entry = torch.unique(user * shape[1] + leaf)
    user, leaf = entry // shape[1], entry % shape[1]
    users, items = torch.bincount(user, minlength=shape[0]), torch.bincount(leaf, minlength=shape[1])
    weight = (users[user].float() * items[leaf]).rsqrt()
    where = torch.stack([user, leaf])
    matrix = torch.sparse_coo_tensor(where, weight, shape, check_invariants=True).coalesce()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _, scale, right = torch.svd_lowrank(matrix, q=min(dim, *shape), niter=4)
    vectors = F.normalize(right * scale, dim=1) * (items > 0)[:, None]
    return vectors[trie.lookup(dataset.sequences).long() - trie.level_offset[-2]]


def td_target(value: Tensor, returns: Tensor, gamma: float) -> Tensor:
    r"""Eq. 9, ``[B, G, L]``: :math:`r_\ell + \gamma V(s_{\ell+1})`, and :math:`r_L` for :math:`\ell = L`."""
    target = returns.clone()
    target[..., :-1] += gamma * value.detach()[..., 1:]
    return target


def squared_error(value: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens of all candidates that are there; ``[B, G, L]``, ``mask[B, G]``."""
    error = (value - target).square().mean(2)
    return torch.where(mask, error, 0).sum() / mask.sum().clamp(min=1)


@dataclass(frozen=True)
class DenseReturn:
    """r of Eq. 8: nearness of a prefix's items to the logged target, at every level."""

    items: ItemEmbeddings

    def __call__(self, split: Split, candidates: Tensor, mask: Tensor) -> Tensor:
        """float32 ``[B, G, L]`` of ``candidates[B, G, L]``."""
        target = split.target
        return prefix_returns(candidates, self.items(candidates), target, self.items(target), mask).returns


@dataclass(frozen=True)
class RewardReturn:
    """r where the reward itself says enough: 0 on the way, and the candidate's reward at its last token."""

    reward: Reward

    def __call__(self, split: Split, candidates: Tensor, mask: Tensor) -> Tensor:
        """float32 ``[B, G, L]`` of ``candidates[B, G, L]``."""
        returns = torch.zeros(candidates.shape, device=candidates.device)
        returns[..., -1] = torch.where(mask, self.reward(split, candidates), 0)
        return returns


def hash_prefix(prefix: Tensor, token: Tensor) -> Tensor:
    """The hash, in [0, 2^31), of a prefix with one more token, out of the prefix' own; 0 is no token."""
    return ((prefix ^ (token + 1)) * 0x9E3779B1 + (prefix >> 15)) & 0x7FFFFFFF


def hash_prefixes(tokens: Tensor) -> Tensor:
    """The hashes ``[..., L]`` of all prefixes of ``tokens[..., L]``."""
    hashes = [torch.zeros_like(tokens[..., 0])]
    for token in tokens.unbind(-1):
        hashes.append(hash_prefix(hashes[-1], token))
    return torch.stack(hashes[1:], -1)


class ItemNearness(nn.Module):
    r"""How near the user's own items are to every prefix of the catalogue, before anything is learned of it.

    :math:`\langle u, e(y_{\le\ell}) \rangle`, where :math:`e` is the direction of the mean embedding of the
    items below a prefix, added to those of the prefixes before it, since few clicks make the embedding of an
    item but many that of a prefix; :math:`u` is the mean direction of the items in the prompt. The *item
    prior* of policy or value is this number times one learned weight per level: it generalizes over all users
    and prefixes from the first step on, where embeddings of prefixes learn what everybody likes and know
    nothing of what was never tried. Nothing of it is in a state dict: it is a function of the data.
    """

    # The optimizer moves all weights by steps of one size, and those of few inputs have far to go.
    SCALE = 10.0

    direction: Tensor
    level: Tensor
    offset: Tensor
    token: Tensor
    edge: Tensor

    def __init__(self, items: ItemEmbeddings) -> None:
        super().__init__()
        trie, leaf = items.trie, items.trie.level_offset[-2]
        children = trie.offset[1:].long() - trie.offset[:-1].long()
        parent = F.pad(torch.arange(len(children)).repeat_interleave(children), (1, 0), value=-1)
        total = torch.zeros(trie.num_nodes, items.vectors.shape[1])
        total[leaf:] = items.vectors
        for first, last in reversed(_levels(trie)):
            total.index_add_(0, parent[first:last], total[first:last].clone())
        total[0] = 0
        direction = F.normalize(total, dim=1)
        level = torch.zeros(trie.num_nodes, dtype=torch.int64)
        for depth, (first, last) in enumerate(_levels(trie), 1):
            direction[first:last] += direction[parent[first:last]]
            level[first:last] = depth
        direction = F.normalize(direction, dim=1)
        direction[1:] -= direction[leaf:].mean(0)
        self.length, self.vocab, self.widest = trie.length, int(trie.token.max()) + 1, trie.max_children
        edge = parent[1:] * self.vocab + trie.token.long()  # ascending, as the trie's edges are
        for name, tensor in (
            ("direction", direction),  # [T, E]
            ("level", level),  # [T]
            ("offset", trie.offset.long()),  # [T + 1], the trie's
            ("token", trie.token.long()),
            ("edge", edge),
        ):
            self.register_buffer(name, tensor, persistent=False)

    def new_weight(self) -> nn.Parameter:
        """A weight per level, with which the prior says nothing yet."""
        return nn.Parameter(torch.zeros(self.length))

    def forward(self, prompt: Tensor, real: Tensor) -> Tensor:
        """float32 ``[B, T + 1]`` of every node, 0 for the root and in the last column; ``prompt[B, P]``
        begins with a token that is no item's."""
        place = real.cumsum(1) - 2  # the first token of the first item is 0
        node = torch.zeros_like(prompt)
        for _ in range(self.length):
            above = torch.where(place % self.length > 0, F.pad(node, (1, -1)), 0)
            node = self.child(above, prompt)
        whole = real & (place >= 0) & (place % self.length == self.length - 1) & (node >= 0)
        chosen = self.direction[node.clamp(min=0)] * whole[..., None]
        near = F.normalize(chosen.sum(1), dim=1) @ self.direction.T
        return F.pad(near.masked_fill(self.level == 0, 0), (0, 1))

    def child(self, node: Tensor, token: Tensor) -> Tensor:
        """The nodes that ``token`` leads to from ``node``, -1 where there is none; both of one shape."""
        wanted = torch.where((node >= 0) & (token >= 0) & (token < self.vocab), node * self.vocab + token, -1)
        at = torch.searchsorted(self.edge, wanted).clamp(max=len(self.edge) - 1)
        return torch.where(self.edge[at] == wanted, at + 1, -1)

    def nodes(self, tokens: Tensor) -> Tensor:
        """The nodes ``[..., L]`` of all prefixes of ``tokens[..., L]``."""
        nodes = [torch.zeros_like(tokens[..., 0])]
        for token in tokens.unbind(-1):
            nodes.append(self.child(nodes[-1], token))
        return torch.stack(nodes[1:], -1)

    def weighted(self, weight: Tensor, near: Tensor, request: Tensor, node: Tensor) -> Tensor:
        """The prior of nodes for requests, all of one shape, out of :meth:`forward`'s result; 0 for -1."""
        columns = near.shape[1]
        found = near.flatten()[request * columns + node % columns]
        return found * F.pad(self.SCALE * weight, (1, 0))[self.level[node.clamp(min=0)]]

    def below(self, node: Tensor) -> tuple[Tensor, Tensor]:
        """The children ``[N, C]`` of ``node[N]`` and their tokens, -1 where there are no more."""
        parent = node.clamp(min=0)
        begin = self.offset[parent]
        end = torch.where(node >= 0, self.offset[parent + 1], begin)
        # On a GPU all that there is room for, so that the host does not wait for the widest.
        edge, there = ragged(begin, end, self.widest if node.device.type != "cpu" else None)
        return torch.where(there, edge + 1, -1), pick(self.token, edge, there)

    def of_children(
        self, weight: Tensor, near: Tensor, request: Tensor, node: Tensor, columns: int
    ) -> Tensor:
        """The prior of the children of ``node[N]`` in the columns of their tokens, ``[N, columns]``."""
        child, token = self.below(node)
        prior = self.weighted(weight, near, request[:, None], child)
        return _in_columns(prior, token, columns)


def _in_columns(x: Tensor, token: Tensor, columns: int) -> Tensor:
    """``x[N, C]`` in the columns of its tokens ``[N, C]``, -1 for none; ``[N, columns]``, 0 elsewhere."""
    result = x.new_zeros(len(x), columns + 1)  # one more for what is not there
    return result.scatter(1, torch.where(token >= 0, token, columns), x)[:, :columns]


def _levels(trie: Trie) -> list[tuple[int, int]]:
    """First node and end of every level below the root."""
    return list(zip(trie.level_offset[1:], trie.level_offset[2:]))


class Prefixes(NamedTuple):
    """Evaluated prefixes, each ``[N]``: hash (0 for none), node of the catalogue (-1 outside, 0 where there
    is no prior to ask for it), request."""

    hash: Tensor
    node: Tensor
    request: Tensor


class ValueHead(nn.Module):
    """An MLP over the hidden states of a causal block of its own: V(s), and on demand
    the child values, ``Q(s, v) - V(s)``.

    The block is the model's own kind and is run with the model's layers, see :class:`SIDTransformer`. It
    reads the backbone's hidden states, which it never moves, and embeddings of its own, of the token and of
    the whole prefix since the prompt (hashed into ``BUCKETS`` rows): what makes an item worth something need
    not be in features that were trained on clicks, and tokens of SIDs mean little without those before them.
    For the same reason every prefix has a read-out of its own (``reader``) on top of the shared one: worth is
    a product of who asks and what is offered, and a sum of embeddings learns a product slowly. With
    ``nearness`` all of this is learned on top of an item prior of its own, see :class:`ItemNearness`.
    """

    BUCKETS = 2**14

    def __init__(
        self, block: nn.Module, dim: int, vocab: int, *, child_values: bool, nearness: ItemNearness | None
    ) -> None:
        super().__init__()
        self.token = nn.Embedding(vocab + 1, dim)
        self.prefix = nn.Embedding(self.BUCKETS, dim)
        self.block = block
        self.norm, self.hidden = nn.LayerNorm(dim), nn.Linear(dim, dim)
        self.value = nn.Linear(dim, 1)
        self.reader = nn.Embedding(self.BUCKETS, dim)
        self.child = ChildValues(dim, vocab, 4 * self.BUCKETS) if child_values else None
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                nn.init.normal_(weight, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(weight)
        nn.init.zeros_(self.reader.weight)
        if self.child is not None:
            self.child.reset()
        self.nearness = nearness
        self.prior = nearness.new_weight() if nearness is not None else None

    def embed(self, token: Tensor, prefix: Tensor) -> Tensor:
        """What is added to the hidden states; ``prefix`` as :func:`hash_prefix` makes it."""
        return self.token(token) + self.prefix(prefix % self.BUCKETS)

    def forward(self, x: Tensor, at: Prefixes, near: Tensor | None) -> Tensor:
        """V ``[N]`` of block outputs ``[N, dim]`` at prefixes, and the nearness ``[B, T + 1]``."""
        features = self._features(x)
        own = (features * self.reader(at.hash % self.BUCKETS)).sum(1)
        value = self.value(features)[:, 0] + own
        if self.nearness is None or self.prior is None or near is None:
            return value
        return value + self.nearness.weighted(self.prior, near, at.request, at.node)

    def child_values(self, x: Tensor, at: Prefixes, near: Tensor | None) -> Tensor:
        """The child values ``[N, vocab]``; with a prior, 0 for what is no legal child."""
        if self.child is None:
            raise ValueError("the value head was made without child values")
        features, columns = self._features(x), self.child.token.out_features
        if self.nearness is None or self.prior is None or near is None:
            token = torch.arange(columns, device=x.device)
            return self.child(features, at.hash, token.expand(len(x), -1))
        child, token = self.nearness.below(at.node)
        value = self.child(features, at.hash, token.clamp(min=0))
        value = value + self.nearness.weighted(self.prior, near, at.request[:, None], child)
        value = value - self.nearness.weighted(self.prior, near, at.request, at.node)[:, None]
        return _in_columns(value, token, columns)

    def _features(self, x: Tensor) -> Tensor:
        return F.gelu(self.hidden(self.norm(x)))


class ChildValues(nn.Module):
    """What each next token adds to V: by the token, and by the child itself, a read-out of low rank."""

    def __init__(self, dim: int, vocab: int, buckets: int, rank: int = 16) -> None:
        super().__init__()
        self.token = nn.Linear(dim, vocab)
        self.query = nn.Linear(dim, rank)
        self.reader, self.bias = nn.Embedding(buckets, rank), nn.Embedding(buckets, 1)

    def reset(self) -> None:
        """Nothing is known of any child; the query is large enough for the readers to start moving."""
        nn.init.zeros_(self.reader.weight)
        nn.init.zeros_(self.bias.weight)
        nn.init.normal_(self.query.weight, std=0.1)

    def forward(self, features: Tensor, prefix: Tensor, token: Tensor) -> Tensor:
        """``[N, C]`` of ``features[N, dim]`` of the prefixes ``[N]``, for the tokens ``[N, C]``."""
        child = hash_prefix(prefix[:, None], token) % self.bias.num_embeddings
        own = (self.reader(child) @ self.query(features)[..., None])[..., 0]
        return self.token(features).gather(1, token) + self.bias(child)[..., 0] + own
