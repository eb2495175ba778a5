"""Decoders over any language model that implements :class:`PrefixModel`."""

from .beam import BeamResult, beam_search
from .protocol import PrefixModel

__all__ = ["BeamResult", "PrefixModel", "beam_search"]
