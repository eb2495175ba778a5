"""A key/value cache with room for the prefixes behind the prompt."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


class RoomyLayer(DynamicLayer):
    """A layer of a cache that is written in place; its room grows by half, or by ``SPARE`` columns.

    ``DynamicLayer`` copies the whole cache in each call, and drops columns in layers with a sliding window,
    where the columns that a prefix may see are not the last ones.
    """

    SPARE = 64

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add columns ``[B, heads, n, head_dim]``; returns all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.used = 0
            self.room = tuple(x.new_empty(*x.shape[:2], 0, x.shape[3]) for x in (key_states, value_states))
        end = self.used + key_states.shape[2]
        if self.room[0].shape[2] < end:
            self.room = tuple(self._wider(x, end + max(end // 2, self.SPARE)) for x in self.room)
        for room, new in zip(self.room, (key_states, value_states)):
            room[:, :, self.used : end] = new
        self.used = end
        self.keys, self.values = (room[:, :, :end] for room in self.room)
        return self.keys, self.values

    def _wider(self, old: Tensor, columns: int) -> Tensor:
        new = old.new_empty(*old.shape[:2], columns, old.shape[3])
        new[:, :, : self.used] = old[:, :, : self.used]
        return new


def empty_cache() -> Cache:
    """A cache of such layers, as many as the model asks for."""
    return Cache(layer_class_to_replicate=RoomyLayer)
