"""Decoders over any language model that implements :class:`PrefixModel`."""

from .beam import BeamResult, beam_search
from .protocol import PrefixModel, ValueModel
from .ved import VEDResult, ved

__all__ = ["BeamResult", "PrefixModel", "VEDResult", "ValueModel", "beam_search", "ved"]
