"""Decoders over any model that implements :class:`PrefixModel`."""

from .beam import BeamResult, beam_search
from .protocol import PrefixModel, ValueModel
from .topk import SampleResult, topk_sampling
from .ved import VEDResult, ved

__all__ = [
    "BeamResult",
    "PrefixModel",
    "SampleResult",
    "VEDResult",
    "ValueModel",
    "beam_search",
    "topk_sampling",
    "ved",
]
