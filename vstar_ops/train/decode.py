"""The decoders by name, with one interface for training and evaluation."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any, Protocol

from torch import Tensor

from ..decoding import BeamResult, VEDConfig, beam_search, topk_sampling, ved
from ..trie import Trie
from .model import SIDTransformer

DECODERS = ("beam", "topk", "ved")

PAPER: dict[str, Any] = asdict(VEDConfig.paper())
TUNED: dict[str, Any] = asdict(VEDConfig.training())
_KINDS = {"bool": bool, "int": int, "int | None": int, "float": float}
VED_OPTIONS = {field.name: _KINDS[str(field.type)] for field in fields(VEDConfig) if field.type in _KINDS}


def at_test(options: dict[str, Any]) -> dict[str, Any]:
    """The options of a search in training, as a decoder at test: all candidates by rank."""
    return {**options, "num_policy_candidates": 0, "max_leaves_per_prefix": None}


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
        options: fields of :class:`vstar_ops.decoding.VEDConfig`. A beam search takes a ``beam_width`` above
            ``candidates``, of which it returns the first.
    """
    if decoder == "beam":
        found = beam_search(model, context, trie, max(options.get("beam_width", 0), candidates))
        sequence, node, logp = (x[:, :candidates] for x in found[:3])
        num_valid = found.num_valid.clamp(max=candidates)
        return BeamResult(sequence, node, logp, num_valid, found.forward_tokens)
    if decoder == "topk":
        return topk_sampling(model, context, trie, candidates, seed=seed)
    if decoder != "ved":
        raise ValueError(f"decoder must be one of {DECODERS}, got {decoder!r}")
    return ved(model, context, trie, candidates, VEDConfig(**options), seed=seed)
