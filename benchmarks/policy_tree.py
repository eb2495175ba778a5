"""Policy gradients on a catalogue's trie: the exact one, candidates to estimate it from, estimators.

The policy chooses among legal children alone, so for one request it is a tree, with a probability for each
edge of the trie. The gradient of an expectation over the items is then a sum over the catalogue. Every
estimator is a number per token of each candidate, which multiplies the gradient of that token's
log-probability.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from vstar_ops import Trie, derive_seeds, group_advantage, sibling_advantage
from vstar_ops.ops import _forms
from vstar_ops.train.decode import Decoder
from vstar_ops.train.model import SIDTransformer


class Tree:
    """A catalogue by its edges; edge ``e`` leads to node ``e + 1``, siblings are consecutive.

    Attributes:
        parent: int64 ``[E]``, the node that each edge leaves.
        path: int64 ``[leaves, L]``, the edges on the way to each leaf.
        levels: a slice of edges per level.
        child: int64 ``[inner, widest]``, the token of each child of each inner node, -1 past the last.
    """

    def __init__(self, trie: Trie) -> None:
        self.trie, begin = trie, trie.level_offset
        self.levels = [slice(a - 1, b - 1) for a, b in zip(begin[1:], begin[2:])]
        inner = torch.arange(begin[-2])
        self.first_edge = trie.offset[: begin[-2] + 1].long()
        self.parent = inner.repeat_interleave(self.first_edge.diff())
        self.child = trie.children(inner).token.long()
        path = [torch.arange(begin[-2], begin[-1]) - 1]
        while len(path) < trie.length:
            path.insert(0, self.parent[path[0]] - 1)
        self.path = torch.stack(path, 1)

    def sequences(self, leaf: Tensor) -> Tensor:
        """int64 ``[*leaf.shape, L]``: tokens of leaves, numbered from 0; -1 stays -1."""
        return self.trie.sequences(torch.where(leaf < 0, -1, leaf + self.trie.level_offset[-2])).long()

    def logits(self, model: SIDTransformer, context: Tensor) -> Tensor:
        """Logits of the children of all inner nodes, ``[B, inner, widest]``, differentiable.

        Any finite number past the last child, and for an only child, whose parent is not run."""
        begin = self.trie.level_offset
        # The first leaf below each node of the last inner level: together they pass through all prefixes.
        cover = self.sequences(self.first_edge[begin[-3] : begin[-2]] + 1 - begin[-2])
        node = torch.stack([self.trie.lookup(cover[:, : n + 1]).long() for n in range(self.trie.length)], 1)
        batch, branches = len(context), self.trie.num_children(node) > 1
        cover, branches = (x.expand(batch, *x.shape) for x in (cover, branches))
        rows = model.pack(
            context, cover, torch.ones(cover.shape[:2], dtype=torch.bool), branches, leaves=False
        )
        own, output = rows.own[0], torch.zeros(begin[-1], dtype=torch.int64)  # equal for all requests
        output[node[own >= 0]] = own[own >= 0]
        logits = model.packed(rows).logits[:, output[: begin[-2]]]
        return logits.gather(2, self.child.clamp(min=0).expand(batch, *self.child.shape))

    def by_edge(self, x: Tensor) -> Tensor:
        """``[B, E]`` of ``x[B, inner, widest]``."""
        return x[:, self.child >= 0]

    def by_child(self, x: Tensor) -> Tensor:
        """``[B, inner, widest]`` of ``x[B, E]``, 0 past the last child."""
        result = x.new_zeros(len(x), *self.child.shape)
        result[:, self.child >= 0] = x
        return result

    def logp(self, logits: Tensor) -> Tensor:
        """float64 ``[B, E]``: log-probability of each edge, given its parent."""
        return self.by_edge(logits.double().masked_fill(self.child < 0, -torch.inf).log_softmax(2))

    def leaf_logp(self, logp: Tensor) -> Tensor:
        """``[B, leaves]``: log-probability of each item."""
        return logp[:, self.path].sum(2)

    def below(self, x: Tensor) -> Tensor:
        """``[B, E]``: the sum of ``x[B, leaves]`` over the leaves below each edge."""
        total = x.new_zeros(len(x), len(self.parent))
        for edge in self.path.unbind(1):
            total.index_add_(1, edge, x)
        return total

    def gradient(self, logp: Tensor, weight: Tensor) -> Tensor:
        """``[B, E]``: the gradient of ``sum(weight * logp)`` by the logits; ``weight[B, E]`` is constant."""
        sums = F.pad(weight.cumsum(1), (1, 0))
        siblings = sums[:, self.first_edge[1:]] - sums[:, self.first_edge[:-1]]
        return weight - logp.exp() * siblings[:, self.parent]

    def exact(self, logp: Tensor, worth: Tensor) -> Tensor:
        """``[B, E]``: the gradient of the expectation of ``worth[B, leaves]`` by the logits."""
        return self.gradient(logp, self.below(self.leaf_logp(logp).exp() * worth))

    def decided(self, logp: Tensor, reward: Tensor) -> Tensor:
        """``[B, L]``: the share of the variance of ``reward[B, leaves]`` that each level decides.

        That is the variance between the expectations of siblings; the levels add up to all of it."""
        p = self.leaf_logp(logp).exp()
        reach, total = self.below(p), self.below(p * reward)
        value = F.pad(total / reach.clamp(min=1e-300), (1, 0))
        value[:, 0] = (p * reward).sum(1)
        between = reach * (value[:, 1:] - value[:, self.parent]).square()
        share = torch.stack([between[:, level].sum(1) for level in self.levels], 1)
        return share / share.sum(1, keepdim=True).clamp(min=1e-300)


def best_of(p: Tensor, reward: Tensor, draws: int) -> Tensor:
    r"""The derivative of the expected best reward of ``draws`` independent items by each item's probability.

    All ``[B, N]``. With rewards in rising order and :math:`F_i` the probability of the first :math:`i`,
    :math:`E \max = \sum_i R_i (F_i^G - F_{i-1}^G) = R_N - \sum_{i<N} (R_{i+1} - R_i) F_i^G`.
    """
    value, order = reward.sort(1)
    step = F.pad(value.diff(dim=1), (0, 1)) * draws * p.gather(1, order).cumsum(1) ** (draws - 1)
    return torch.empty_like(p).scatter_(1, order, -step.flip(1).cumsum(1).flip(1))


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Over the last dimension; 0 where one side is 0."""
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1)).clamp(min=1e-300)


# ------------------------------------------------------------------ candidates


@dataclass(frozen=True)
class Draws:
    """Candidates of ``B`` requests, drawn ``D`` times.

    Attributes:
        leaf: int64 ``[B, D, G]``, -1 where there are fewer.
        p: float64 ``[B, D, G]``, their probabilities.
        share: float64 ``[B, D, G]``, how much each counts in a mean; None if all count the same.
    """

    leaf: Tensor
    p: Tensor
    share: Tensor | None = None


def sample(leaf_logp: Tensor, draws: int, group: int) -> Draws:
    """Independent candidates, which may repeat."""
    p = leaf_logp.exp()
    leaf = torch.multinomial(p, draws * group, replacement=True)
    return Draws(*(x.unflatten(1, (draws, group)) for x in (leaf, p.gather(1, leaf))))


def gumbel_top(leaf_logp: Tensor, draws: int, group: int) -> Draws:
    r"""Candidates drawn without replacement: the largest log-probabilities after adding Gumbel noise.

    With :math:`\kappa` the largest of the others, a candidate's probability to be drawn is
    :math:`q = 1 - \exp(-\exp(\log p - \kappa))`, and :math:`\sum_i f_i p_i / q_i` is unbiased for the
    expectation of :math:`f` (Kool et al., arXiv 1903.06059). The shares are :math:`p / q`.
    """
    found = []
    for _ in range(draws):
        noise = -torch.empty_like(leaf_logp).exponential_().log()
        top = (leaf_logp + noise).topk(group + 1, 1)
        leaf, threshold = top.indices[:, :-1], top.values[:, -1:]
        logp = leaf_logp.gather(1, leaf)
        found.append((leaf, logp.exp(), logp.exp() / -torch.expm1(-(logp - threshold).exp())))
    return Draws(*(torch.stack(x, 1) for x in zip(*found)))


def searched(
    decoder: Decoder, model: SIDTransformer, context: Tensor, tree: Tree, leaf_logp: Tensor, draws: int = 1
) -> Draws:
    """What a decoder of the library finds. With the shares ``p`` a mean is a part of the exact sum."""
    seeds = [derive_seeds(draw, len(context)) for draw in range(draws)]
    node = torch.stack([decoder(model, context, tree.trie, seed).node.long() for seed in seeds], 1)
    leaf = (node - tree.trie.level_offset[-2]).clamp(min=-1)
    p = leaf_logp.gather(1, leaf.clamp(min=0).flatten(1)).exp().view(leaf.shape) * (leaf >= 0)
    return Draws(leaf, p, p)


# ------------------------------------------------------------------ estimators


@dataclass(frozen=True)
class Form:
    """A form of the sibling term: whether each node counts once or each candidate, and what
    :func:`vstar_ops.sibling_advantage` subtracts and divides by."""

    weighting: str
    baseline: str
    scale: str

    def __str__(self) -> str:
        presets = [name for name, form in PRESETS.items() if form == self]
        return presets[0] if presets else f"{self.weighting}, {self.baseline}, {self.scale}"


PRESETS = {
    name: Form(_forms.FORMS[name].weighting, *(_forms.FORMS[name].options[x] for x in ("baseline", "scale")))
    for name in ("paper", "centered")
}
BASELINES, SCALES = ("sibling", "parent", "leave_one_out"), ("siblings", "group", "none")
FORMS = tuple(Form(*choice) for choice in product(("node", "candidate"), BASELINES, SCALES))
SIBLING, PARENT = (Form("candidate", baseline, "none") for baseline in ("sibling", "parent"))
JOINT = (*PRESETS.values(), Form("candidate", "sibling", "group"))


def estimates(nodes: Tensor, reward: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """By name of the estimator a number per token, float64 ``[R, G, L]``.

    Args:
        nodes: int64 ``[R, G, L]``, an id of each prefix of each candidate.
        reward: float32 ``[R, G]``.
        mask: bool ``[R, G]``, False for padded candidates.
    """
    number = mask.sum(1, keepdim=True).double()

    def over_tokens(advantage: Tensor) -> Tensor:
        return (advantage * mask / number / nodes.shape[2])[..., None].expand(nodes.shape)

    others = ((reward * mask).sum(1, keepdim=True) - reward) / (number - 1)
    result = {
        "GRPO": over_tokens(group_advantage(reward, mask)),
        "leave-one-out": over_tokens(reward - others),
    }
    for baseline, scale in product(BASELINES, SCALES):
        ddof = 1 if scale == "group" else 0
        found = sibling_advantage(nodes, reward, mask, baseline=baseline, scale=scale, ddof=ddof)
        each = found.advantage / number[..., None]
        result[str(Form("node", baseline, scale))] = each / found.num_candidates.clamp(min=1)
        result[str(Form("candidate", baseline, scale))] = each
    return _with_joint(result)


def weighted_estimates(nodes: Tensor, reward: Tensor, p: Tensor, share: Tensor) -> dict[str, Tensor]:
    """Those of :func:`estimates` that count each candidate once, where it counts by its ``share[R, G]``.

    All means are weighted by the shares. Leave-one-out subtracts ``share * R`` of the others and the
    candidate's own ``p * R``, which together have the expectation of R, whatever the candidate. With the
    shares of :func:`gumbel_top` it is unbiased.
    """
    reward, length = reward.double(), nodes.shape[2]
    weight = share / share.sum(1, keepdim=True)
    mean = (weight * reward).sum(1, keepdim=True)
    std = (weight * (reward - mean).square()).sum(1)[:, None, None].sqrt() + 1e-4
    others = (share * reward).sum(1, keepdim=True) + (p - share) * reward
    share = share[..., None].expand(nodes.shape)
    above, parent, sibling = mean, [], []
    for level, node in enumerate(nodes.unbind(2)):
        place = torch.searchsorted(node.sort(1).values, node.contiguous())  # of the first that is equal
        size, sums = (torch.zeros_like(p).scatter_add_(1, place, x) for x in (weight, weight * reward))
        here = (sums / size.clamp(min=1e-300)).gather(1, place)
        parent.append(here - above)
        sibling.append(sibling_advantage(nodes, here.float(), scale="none").advantage[..., level])
        above = here
    by_parent, by_sibling = (share * torch.stack(x, 2) for x in (parent, sibling))
    return _with_joint(
        {
            "GRPO": share * (reward - mean)[..., None] / std / length,
            "leave-one-out": share * (reward - others)[..., None] / length,
            str(PARENT): by_parent,
            str(PRESETS["centered"]): by_parent / std,
            str(SIBLING): by_sibling,
            str(JOINT[-1]): by_sibling / std,
        }
    )


def _with_joint(found: dict[str, Tensor]) -> dict[str, Tensor]:
    joint = {f"GRPO + {form}": found["GRPO"] + found[str(form)] for form in JOINT if str(form) in found}
    return found | joint
