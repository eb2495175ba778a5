"""Spearman's correlation, within a request, of what ranks prefixes with what they are worth."""

from __future__ import annotations

import torch
from torch import Tensor

from vstar_ops.decoding import beam_search
from vstar_ops.train.data import Split
from vstar_ops.train.model import SIDTransformer
from vstar_ops.train.scoring import candidate_scores
from vstar_ops.train.trainer import Run


@torch.no_grad()
def correlations(model: SIDTransformer, run: Run, part: Split) -> dict[str, Tensor]:
    """``"score level"`` -> a correlation per request, over the distinct prefixes of 64 beams.

    The scores are log-probability, nearness to the user's items, V, and what ranks the beams of a search,
    log pi plus weighted V. NaN where one side is constant. The reward of a prefix is the mean true reward of
    the items below it, or, where that is not known, 1 for a prefix of the target and 0 otherwise.
    """
    trie, result = run.trie, {}
    tokens = beam_search(model, part.context, trie, 64).sequence.long()
    scores = candidate_scores(model, part.context, trie, tokens, values=True, child_values=True, leaves=False)
    assert scores.value_from_parent is not None and model.nearness is not None
    value, logp = scores.value_from_parent, scores.logp.cumsum(2)  # V by the parent is what ranks beams
    prompt = torch.nn.functional.pad(part.context.long(), (1, 0), value=model.vocab)
    near = model.nearness(prompt, prompt >= 0)
    leaves = trie.sequences(torch.arange(trie.level_offset[-2], trie.num_nodes))
    for level in range(1, trie.length + 1):
        node = trie.lookup(tokens[..., :level]).long()
        distinct = node >= 0
        distinct &= ~((node[:, :, None] == node[:, None]).tril(-1)).any(2)
        at = node.clamp(min=0)
        if run.dataset.reward is not None:
            every = run.dataset.reward(part.user, leaves.long().expand(len(part), -1, -1))
            below = trie.lookup(leaves[:, :level]).long().expand(len(part), -1)
            total = every.new_zeros(len(part), trie.num_nodes).scatter_add_(1, below, every)
            number = torch.bincount(below[0], minlength=trie.num_nodes)
            reward = (total / number.clamp(min=1)).gather(1, at)
        else:
            reward = (tokens[..., :level] == part.target[:, None, :level]).all(2).float()
        here, weight = level - 1, run.config.ved.value_weight
        for name, score in (
            ("log pi", logp[..., here]),
            ("item prior", near.gather(1, at)),
            ("V", value[..., here]),
            ("log pi + weighted V", logp[..., here] + weight * value[..., here]),
        ):
            result[f"{name} {level}"] = spearman(score, reward, distinct)
    return result


def spearman(x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    """Per row of ``[B, N]``: Pearson's correlation of the average ranks of what the mask keeps."""

    def ranks(values: Tensor) -> Tensor:
        less = ((values[:, None] < values[:, :, None]) & mask[:, None]).sum(2)
        equal = ((values[:, None] == values[:, :, None]) & mask[:, None]).sum(2)
        rank = (less + 0.5 * equal.double()).masked_fill(~mask, 0)
        return (rank - (rank.sum(1) / mask.sum(1)).unsqueeze(1)).masked_fill(~mask, 0)

    a, b = ranks(x), ranks(y)
    return (a * b).sum(1) / (a.square().sum(1) * b.square().sum(1)).sqrt()
