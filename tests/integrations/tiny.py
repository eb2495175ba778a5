"""Tiny Hugging Face models with random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers

VOCAB, WINDOW = 97, 4
SIZE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}


def best(model: Any) -> str:
    """The attention that a class of models takes; T5's had no other than eager at first."""
    return "sdpa" if model._supports_sdpa else "eager"


def causal(kind: str, model: str = "", **changes: Any) -> Callable[..., Any]:
    """A function of ``attn_implementation`` that makes the model of a kind, always the same one."""

    def make(attention: str = "") -> Any:
        config = getattr(transformers, f"{kind}Config")(**{**SIZE, **changes})
        torch.manual_seed(0)
        config._attn_implementation = attention or best(make.model)
        return spread(make.model(config).eval())

    make.model = getattr(transformers, model or f"{kind}ForCausalLM")
    return make


def spread(model: Any, factor: float = 4.0) -> Any:
    """Weights that make distributions which differ by prompt, position and prefix."""
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            weight.data.mul_(12 if "relative_attention_bias" in name else factor)
        elif name.endswith("bias"):
            weight.data.normal_()
    return model


MIXED = ["sliding_attention", "full_attention"]
CAUSAL = {
    "qwen2": causal("Qwen2"),
    "qwen2, layers of two kinds": causal(
        "Qwen2", layer_types=MIXED, sliding_window=WINDOW, use_sliding_window=True
    ),
    "qwen3": causal("Qwen3", head_dim=8),
    "llama, tied head": causal("Llama", tie_word_embeddings=True),
    "gpt2": causal("GPT2", "GPT2LMHeadModel", **GPT),
    "mistral, window": causal("Mistral", sliding_window=WINDOW),
    "gemma2, window, soft cap": causal(
        "Gemma2", sliding_window=WINDOW, head_dim=8, final_logit_softcapping=2.0
    ),
    "gemma3, window": causal(
        "Gemma3Text", "Gemma3ForCausalLM", sliding_window=WINDOW, head_dim=8, layer_types=MIXED
    ),
    "phi, head with bias": causal("Phi", num_key_value_heads=4),
    "phi3, window": causal("Phi3", sliding_window=WINDOW),
    "cohere, scaled logits": causal("Cohere", logit_scale=0.3),
    "granite, scaled logits": causal("Granite", logits_scaling=3.0),
    "mixtral": causal("Mixtral", num_local_experts=4),
}


def t5(kind: str = "T5", **changes: Any) -> Callable[..., Any]:
    """The same for encoder-decoders."""

    def make(attention: str = "") -> Any:
        config = getattr(transformers, f"{kind}Config")(
            vocab_size=VOCAB,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            relative_attention_num_buckets=8,
            relative_attention_max_distance=6,
            decoder_start_token_id=0,
            pad_token_id=0,
            eos_token_id=1,
            dropout_rate=0.0,
            **changes,
        )
        config._attn_implementation = attention or best(make.model)
        torch.manual_seed(0)
        return spread(make.model(config).eval(), 1.5)

    make.model = getattr(transformers, f"{kind}ForConditionalGeneration")
    return make


SEQ2SEQ = {
    "t5": t5(),
    "t5, gated": t5(feed_forward_proj="gated-gelu"),
    "mt5": t5("MT5"),
}
MODELS = {**CAUSAL, **SEQ2SEQ}
ALL = [
    (name, attention)
    for name, make in MODELS.items()
    for attention in ("sdpa", "eager")
    if attention in ("eager", best(make.model))
]
