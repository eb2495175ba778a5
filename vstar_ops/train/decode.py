"""The decoders as one type, for training and evaluation."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from ..decoding import BeamResult, SampleResult, VEDConfig, VEDResult, beam_search, topk_sampling, ved
from ..trie import Trie
from .config import DECODERS
from .model import SIDTransformer

Decoded = BeamResult | SampleResult | VEDResult


@dataclass(frozen=True)
class Decoder:
    """A decoder and its options.

    Attributes:
        name: a key of :data:`DECODERS`.
        num_candidates: per request.
        ved: options of the tree search.
        beam_width: of a beam search that returns only the first ``num_candidates`` of its beams.
        constant_shapes: run more rows than are needed, so that the host need not wait for their number. VED
            still reads one flag per round: rounds that nobody needs would cost more.

    Raises:
        ValueError: the name is not known.
    """

    name: str = "beam"
    num_candidates: int = 16
    ved: VEDConfig = VEDConfig()  # noqa: RUF009 (it is immutable)
    beam_width: int = 0
    constant_shapes: bool = False

    def __post_init__(self) -> None:
        if self.name not in DECODERS:
            raise ValueError(f"decoder must be one of {', '.join(DECODERS)}, got {self.name!r}")

    def __call__(self, model: SIDTransformer, context: Tensor, trie: Trie, seed: Tensor) -> Decoded:
        """Candidates of prompts ``context[B, T]``; ``seed`` int64 ``[B]``, which a beam search ignores."""
        size, constant = self.num_candidates, self.constant_shapes
        if self.name == "topk":
            return topk_sampling(model, context, trie, size, seed=seed, constant_shapes=constant)
        if self.name == "ved":
            return ved(model, context, trie, size, self.ved, seed=seed, constant_shapes=constant)
        found = beam_search(model, context, trie, max(self.beam_width, size), skip_forced=not constant)
        sequence, node, logp = (x[:, :size] for x in found[:3])
        return BeamResult(sequence, node, logp, found.num_valid.clamp(max=size), found.forward_tokens)

    def for_model(self, model: SIDTransformer) -> Decoder:
        """This decoder; instead of VED, beam search for a model without a value head."""
        return self if self.name != "ved" or model.value_head is not None else replace(self, name="beam")
