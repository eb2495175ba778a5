"""T5, an encoder-decoder whose decoder knows positions by a bias alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import EncoderDecoderCache
from transformers.cache_utils import DynamicCache

from .cache import empty_cache
from .checks import attention_of, read_prompt
from .model import CausalPrefixModel

_FAMILY = ("t5", "mt5")


class T5PrefixModel(CausalPrefixModel):
    """T5 and mT5 as prefix models. :func:`prefix_model` makes it.

    The encoder runs once. The decoder takes no position ids: its bias goes by the column in the cache,
    and on a tree columns are no positions. So the mask that is added to the bias also carries what is wrong
    with it, for each head: the bias of the true distance less that of the columns' distance.
    """

    def _check_model(self, names: Mapping[str, Any]) -> None:
        kind = self._inner.config.model_type
        if kind not in _FAMILY:
            raise TypeError(
                f"{type(self._inner).__name__} cannot be a prefix model: of encoder-decoders only "
                f"{' and '.join(_FAMILY)} can, got {kind!r}"
            )
        own = self._inner.generation_config.decoder_start_token_id, self._inner.config.decoder_start_token_id
        starts = [token for token in own if token is not None]
        if not starts:
            raise ValueError("model must have a decoder_start_token_id in its configuration, got None")
        self._start = starts[0]
        attention_of(self._config)

    def _prompt(self, context: Any) -> tuple[Tensor, Tensor, dict[str, Any]]:
        ids, real = read_prompt(context, self._inner.device)
        start = torch.full_like(ids[:, :1], self._start)
        return (
            start,
            torch.ones_like(start, dtype=torch.bool),
            {"input_ids": ids, "attention_mask": real.long()},
        )

    def _after_prefill(self, out: Any, fixed: dict[str, Any]) -> dict[str, Any]:
        return {
            "encoder_outputs": (out.encoder_last_hidden_state,),
            "attention_mask": fixed["attention_mask"],
        }

    def _empty_cache(self) -> Any:
        return EncoderDecoderCache(empty_cache(), DynamicCache())

    def _arguments(self, ids: Tensor, position: Tensor, key_position: Tensor, see: Tensor) -> dict[str, Any]:
        columns = torch.arange(see.shape[2], device=see.device)
        by_column = self._bias(columns[None] - columns[-see.shape[1] :, None])
        bias = self._bias(key_position[:, None, :] - position[:, :, None]) - by_column
        mask = bias.permute(0, 3, 1, 2).masked_fill(~see[:, None], torch.finfo(bias.dtype).min)
        return {"decoder_input_ids": ids, "decoder_attention_mask": mask}

    def _bias(self, distance: Tensor) -> Tensor:
        """``[..., heads]`` of key position less query position."""
        attention = self._inner.decoder.block[0].layer[0].SelfAttention
        bucket = attention._relative_position_bucket(
            distance,
            bidirectional=False,
            num_buckets=attention.relative_attention_num_buckets,
            max_distance=attention.relative_attention_max_distance,
        )
        return attention.relative_attention_bias(bucket)
