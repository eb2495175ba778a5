"""For those who stay with ``generate()``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from ...ops._checks import check_int
from ...trie import Trie


class TrieLogitsProcessor(LogitsProcessor):
    """Lets ``generate()`` produce items of a catalogue only.

    Pass it as ``generate(..., logits_processor=[processor])``. One look-up of nodes, one gather and one
    scatter per step. ``beam_search`` over :func:`prefix_model` finds the same sequences several times
    faster, and where a catalogue has fewer sequences than there are beams it says so, while ``generate()``
    returns duplicates and illegal rows without a warning.

    Args:
        trie: the catalogue, in token ids, on the device of the model. Of a restricted one only allowed items
            are produced; a filter per request is that of all its rows. Where a request has none left, every
            score is -inf, or with ``eos_token_id`` it ends at once.
        prompt_length: the columns of ``input_ids`` before the first token of an item:
            ``inputs["input_ids"].shape[1]``, or 1 for an encoder-decoder.
        normalize: ``"legal"``: probabilities are renormalized over the legal tokens. ``"vocab"``: they are
            those of the whole vocabulary, as with ``prefix_allowed_tokens_fn``. In beam search the sum of
            these is what the beams are ranked by, so that the two give different items; when sampling they
            are the same.
        eos_token_id: what follows a whole item, needed if ``max_new_tokens`` is above ``L``, and when
            sampling items that end early. An item that ends early holds it itself, see :func:`append_eos`.

    Example:
        >>> processor = TrieLogitsProcessor(trie, prompt_length=input_ids.shape[1])
        >>> out = model.generate(input_ids, logits_processor=[processor], max_new_tokens=trie.length,
        ...                      num_beams=4, num_return_sequences=4, do_sample=False, length_penalty=0.0)
        >>> bool((trie.lookup(out[:, input_ids.shape[1] :]) >= 0).all())
        True
    """

    def __init__(
        self,
        trie: Trie,
        prompt_length: int,
        *,
        normalize: str = "legal",
        eos_token_id: int | None = None,
    ) -> None:
        check_int("prompt_length", prompt_length, 0)
        if normalize not in ("legal", "vocab"):
            raise ValueError(f"normalize must be 'legal' or 'vocab', got {normalize!r}")
        if eos_token_id is not None:
            check_int("eos_token_id", eos_token_id, 0)
        self.trie, self.prompt_length = trie, prompt_length
        self.normalize, self.eos_token_id = normalize, eos_token_id

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """``scores[R, V]`` with -inf for what the trie does not allow after ``input_ids[R, T]``."""
        if input_ids.shape[1] < self.prompt_length:
            raise ValueError(
                f"prompt_length must be at most the {input_ids.shape[1]} columns of input_ids, got "
                f"{self.prompt_length}"
            )
        if self.trie.max_token >= scores.shape[1]:
            raise ValueError(
                f"scores must have more columns than the trie's largest token {self.trie.max_token}, "
                f"got {scores.shape[1]}"
            )
        tokens = self._by_request(input_ids[:, self.prompt_length :])
        if tokens.shape[2] <= self.trie.length:
            node = self.trie.lookup(tokens)
        else:
            node = torch.full_like(tokens[..., 0], -1)
        token = self.trie.children(node).token.long().flatten(0, 1)
        if self.eos_token_id is not None:  # after a whole item, and in rows that have ended
            rest = token.new_full((len(token), 1), -1)
            token = torch.cat([token, rest], 1)
            token[:, 0] = torch.where((token < 0).all(1), self.eos_token_id, token[:, 0])
        return self._keep(scores, token)

    def _by_request(self, tokens: Tensor) -> Tensor:
        """``tokens[R, T]`` as ``[requests, rows of each, T]``, as ``generate()`` lays out beams and draws."""
        requests = 1 if self.trie.alive is None else len(self.trie.alive)
        if requests and len(tokens) % requests:
            raise ValueError(
                f"trie is restricted for {requests} requests, got {len(tokens)} rows of input_ids"
            )
        return tokens.reshape(requests, len(tokens) // max(requests, 1), tokens.shape[1])

    def _keep(self, scores: Tensor, token: Tensor) -> Tensor:
        """-inf but for the tokens ``[R, C]``, which are padded with -1."""
        out = torch.full_like(scores, -torch.inf)
        if token.shape[1] == 0:
            return out
        legal = token >= 0
        first = token[:, :1].clamp(min=0)
        at = torch.where(legal, token, first)  # padding writes the first token once more
        kept = scores.gather(1, at).masked_fill(~legal, -torch.inf)
        if self.normalize == "legal":
            kept = kept - kept.logsumexp(1, keepdim=True).nan_to_num(neginf=0.0)
        return out.scatter_(1, at, torch.where(legal, kept, kept[:, :1]))
