"""The decoders by name, with one interface for training and evaluation."""

from __future__ import annotations

import inspect
from typing import Any, Protocol

from torch import Tensor

from ..decoding import BeamResult, beam_search, topk_sampling, ved
from ..trie import Trie
from .model import SIDTransformer

DECODERS = ("beam", "topk", "ved")

# Options of `ved`: the paper's own setting, and ours. Half of the first beams are the most probable prefixes,
# half the most valuable of the others. So is a training batch: half of the candidates, at first, are what the
# policy would answer anyway, since its mistakes are only unlearned in sight, and the others are the best leaf
# of each other prefix, which spreads what V learns from. Action values rank the leaves, so that no tokens go
# to these.
PAPER: dict[str, Any] = {
    "entropy_weight": 0.1,
    "exploration": 1.0,
    "logp_weight": 0.0,
    "evaluate_leaves": True,
}
TUNED: dict[str, Any] = {
    "entropy_weight": 0.1,
    "exploration": 1.0,
    "logp_weight": 1.0,
    "value_weight": 3.0,
    "evaluate_leaves": False,
    "action_values": True,
    "width": 12,
    "guided": 6,
    "completions": 1,
    "own": 8,
}

VED_OPTIONS = {
    name: parameter.default
    for name, parameter in inspect.signature(ved).parameters.items()
    if type(parameter.default) in (int, float, bool) and name not in ("candidates", "seed")
}


def at_test(options: dict[str, Any]) -> dict[str, Any]:
    """The options of a search in training, as a decoder at test: all candidates by rank."""
    return {**options, "own": 0, "completions": 0}


class Decoded(Protocol):
    """What all decoders return, as far as training and evaluation look at it."""

    @property
    def sequence(self) -> Tensor: ...
    @property
    def node(self) -> Tensor: ...
    @property
    def num_valid(self) -> Tensor: ...
    @property
    def forward_tokens(self) -> Tensor: ...


def decode(
    decoder: str,
    model: SIDTransformer,
    context: Tensor,
    trie: Trie,
    candidates: int,
    seed: Tensor,
    options: dict[str, Any],
) -> Decoded:
    """Candidates of one of :data:`DECODERS`.

    Args:
        seed: int64 ``[B]``; a beam search needs none.
        options: of :func:`vstar_ops.decoding.ved`. Its budget is what a beam search of the same number of
            candidates may spend, ``1 + (L - 1) K``, if there is none. A beam search takes a ``width`` above
            ``candidates``, of which it returns the first.
    """
    if decoder == "beam":
        found = beam_search(model, context, trie, max(options.get("width", 0), candidates))
        sequence, node, logp = (x[:, :candidates] for x in found[:3])
        num_valid = found.num_valid.clamp(max=candidates)
        return BeamResult(sequence, node, logp, num_valid, found.forward_tokens)
    if decoder == "topk":
        return topk_sampling(model, context, trie, candidates, seed=seed)
    if decoder != "ved":
        raise ValueError(f"decoder must be one of {DECODERS}, got {decoder!r}")
    budget = 1 + (trie.length - 1) * candidates
    return ved(model, context, trie, candidates, seed=seed, **{"budget": max(budget, trie.length), **options})
