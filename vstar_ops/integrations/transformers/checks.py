"""What a model must be, what a prompt must be, and the mode in which a model decodes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...ops._checks import INTS, check, check_tokens


def check_decoder(model: Any, config: Any, names: Mapping[str, Any]) -> None:
    """Refuse a decoder that could not be run exactly, with the reason."""
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    local = "local" in (getattr(config, "attention_layers", None) or ())
    why = None
    if "position_ids" not in names:
        why = "it takes no position_ids, so prefixes beside each other would count as a sequence"
    elif getattr(config, "alibi", False):
        why = "ALiBi goes by the column in the cache and not by the position"
    elif kinds or getattr(model, "_is_stateful", False):
        which = f" ({', '.join(sorted(kinds))})" if kinds else ""
        why = f"only full and sliding attention can go back to an earlier prefix, not its other layers{which}"
    elif local or getattr(config, "attention_chunk_size", None):
        why = "its local attention goes by the column in the cache and not by the position"
    if why is not None:
        raise TypeError(f"{type(model).__name__} cannot be a prefix model: {why}")
    attention_of(config)


def attention_of(config: Any) -> str:
    """``"sdpa"`` or ``"eager"``; others are refused."""
    name = config._attn_implementation
    if name not in ("sdpa", "eager"):
        raise ValueError(
            "the model must use attention that takes any mask, attn_implementation='sdpa' or 'eager', "
            f"got {name!r}: model.set_attn_implementation('sdpa')"
        )
    return name


def read_prompt(context: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and a bool mask, both ``[B, T]``, of what a tokenizer returns."""
    if isinstance(context, Tensor):
        context = {"input_ids": context}
    if not isinstance(context, Mapping) or "input_ids" not in context:
        raise TypeError(f"context must hold input_ids and attention_mask, got {type(context).__name__}")
    if other := sorted(set(context) - {"input_ids", "attention_mask"}):
        raise ValueError(f"context must hold input_ids and attention_mask, got also {', '.join(other)}")
    ids = check_tokens("input_ids", context["input_ids"], (None, None), "[B, T]", device).long()
    mask = context.get("attention_mask")
    if mask is None:
        mask = torch.ones_like(ids)
    real = check("attention_mask", mask, tuple(ids.shape), "[B, T]", (torch.bool, *INTS), device) != 0
    if not bool(real.any(1).all()):
        raise ValueError("attention_mask must leave every prompt a token, got one of padding alone")
    return ids, real


def unwrapped(model: Any) -> Any:
    """The Hugging Face model inside of wrappers: ``torch.compile``, DistributedDataParallel, PEFT."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return unwrapped(model.module)
    if hasattr(model, "_orig_mod"):
        return unwrapped(model._orig_mod)
    if hasattr(model, "get_base_model"):
        return unwrapped(model.get_base_model())
    if not all(hasattr(model, name) for name in ("config", "get_output_embeddings")):
        raise TypeError(f"model must be a Hugging Face model, got {type(model).__name__}")
    return model


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout; afterwards every module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
