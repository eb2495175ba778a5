"""Hugging Face models under the decoders of :mod:`vstar_ops.decoding`, in three lines.

>>> lm = prefix_model(model, trie)
>>> found = beam_search(lm, {"input_ids": input_ids}, lm.trie, 4)
>>> lm.token_ids(found.node).shape
torch.Size([2, 4, 3])

The prompt of a request is run once, all its beams share one cache, and the language model head is applied
to the columns of the catalogue only. The model itself is not changed.
"""

from __future__ import annotations

from typing import Any

from .. import require

require("transformers", "5.5", "5.25")

from ...trie import Trie
from .checks import unwrapped
from .eos import append_eos
from .head import legal_head
from .logits import TrieLogitsProcessor
from .model import CausalPrefixModel, PrefixState, Scores
from .t5 import T5PrefixModel
from .value import ValueHead

__all__ = [
    "CausalPrefixModel",
    "PrefixState",
    "Scores",
    "T5PrefixModel",
    "TrieLogitsProcessor",
    "ValueHead",
    "append_eos",
    "legal_head",
    "prefix_model",
]


def prefix_model(
    model: Any,
    trie: Trie,
    *,
    full_head: bool = False,
    value_head: ValueHead | None = None,
    eos_token_id: int | list[int] | None = None,
) -> CausalPrefixModel:
    """A Hugging Face model as a :class:`vstar_ops.decoding.PrefixModel`, and for packed training.

    Any decoder with position ids, dense or mixture of experts, with full attention or sliding windows, and
    T5; ``attn_implementation`` ``"sdpa"`` or ``"eager"``. It is used as it is, in eval mode while decoding.
    It may be wrapped by DistributedDataParallel, by PEFT, whose LoRA layers take part, or by
    ``torch.compile(..., dynamic=True)``, which compiles once for prompts and once for prefixes, without the
    head.

    Args:
        model: for example of ``AutoModelForCausalLM.from_pretrained(...)``.
        trie: the catalogue, in token ids of the model.
        full_head: compute the logits of the whole vocabulary, which ``normalize="vocab"`` needs. By default
            the head is applied to the tokens of the catalogue only, see :func:`legal_head`, and decoders take
            ``.trie``, where these tokens have new numbers. Nodes have the same numbers in both.
        value_head: for :func:`vstar_ops.decoding.ved`; see :class:`ValueHead`.
        eos_token_id: EOS tokens, by default those of the model's generation config. They matter where they
            are in the trie, see :func:`append_eos`.

    Raises:
        TypeError: the model cannot be run exactly, and why: recurrent or linear attention layers, no position
            ids, ALiBi; or its head is not a ``torch.nn.Linear``, which ``full_head`` does not need.
        ValueError: another ``attn_implementation``, such as FlashAttention, which knows no such mask; a trie
            in which something follows an EOS token; a value head of another catalogue.

    Example:
        >>> lm = prefix_model(model, trie)
        >>> inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
        >>> found = beam_search(lm, inputs, lm.trie, 4)      # or topk_sampling, or ved
        >>> candidates = lm.token_ids(found.node)            # int64 [B, 4, L]
        >>> scores = lm.score(inputs, candidates)            # with gradients, each prompt run once
        >>> torch.testing.assert_close(scores.logp.sum(2), found.logp)
        >>> reward = torch.rand(candidates.shape[:2])
        >>> vstar_ops.sibling_grpo_loss(scores.logp, candidates, reward).loss.backward()
    """
    kind = T5PrefixModel if unwrapped(model).config.is_encoder_decoder else CausalPrefixModel
    return kind(model, trie, full_head=full_head, value_head=value_head, eos_token_id=eos_token_id)
