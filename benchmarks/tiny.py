"""Tiny language models with random weights, of the kinds that the integrations take."""

from __future__ import annotations

from typing import Any

import transformers


def qwen2(vocab: int, dim: int, layers: int) -> Any:
    """A tiny decoder under a head of ``vocab`` columns."""
    config = transformers.Qwen2Config(
        vocab_size=vocab,
        hidden_size=dim,
        intermediate_size=3 * dim,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        initializer_range=0.1,
    )
    return transformers.Qwen2ForCausalLM(config).eval()


def t5(vocab: int, spread: float = 4.0) -> Any:
    """A tiny encoder-decoder, whose logits are the larger the greater ``spread`` is."""
    config = transformers.T5Config(
        vocab_size=vocab,
        d_model=128,
        d_kv=32,
        d_ff=384,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        initializer_factor=spread,
    )
    return transformers.T5ForConditionalGeneration(config).eval()
