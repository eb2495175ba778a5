"""Decoders over any model that implements :class:`PrefixModel`."""

from .beam import BeamResult, beam_search
from .protocol import PrefixModel, ValueModel
from .topk import SampleResult, topk_sampling
from .ved import VEDResult, ved
from .ved_config import VEDConfig

__all__ = [
    "BeamResult",
    "PrefixModel",
    "SampleResult",
    "VEDConfig",
    "VEDResult",
    "ValueModel",
    "beam_search",
    "topk_sampling",
    "ved",
]
