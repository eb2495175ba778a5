"""Items of different lengths: each ends with an EOS token, which is repeated up to the longest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...ops._checks import check_int
from ...trie import Trie


def append_eos(sequences: Iterable[Sequence[int] | Tensor], eos_token_id: int) -> Tensor:
    """Rows for :meth:`vstar_ops.Trie.from_sequences` of items of any length, int64 ``[N, L]``.

    Every item gets an EOS token, and more of them up to the longest item and its EOS token. So an item may
    be a prefix of another: at its end the model chooses between EOS and going on. The EOS tokens after the
    first have no alternative and cost nothing: log-probability 0, no forward.

    Args:
        sequences: ``N`` items, each of one token or more.
        eos_token_id: a token that is in no item.

    Raises:
        ValueError: an item is empty or holds ``eos_token_id``.

    Example:
        >>> append_eos([[5, 6], [5, 6, 7], [8]], eos_token_id=2)
        tensor([[5, 6, 2, 2],
                [5, 6, 7, 2],
                [8, 2, 2, 2]])
    """
    check_int("eos_token_id", eos_token_id, 0)
    items = [torch.as_tensor(item, dtype=torch.int64) for item in sequences]
    for item in items:
        if len(item) == 0 or bool((item == eos_token_id).any()):
            raise ValueError(
                f"sequences must be items of one token or more, without {eos_token_id}, got {item.tolist()}"
            )
    longest = max((len(item) for item in items), default=0)
    rows = torch.full((len(items), longest + 1), eos_token_id)
    for row, item in zip(rows, items):
        row[: len(item)] = item
    return rows


def end_tokens(model: Any, eos_token_id: int | list[int] | None) -> list[int]:
    """The EOS tokens, as given or as the model's own configuration has them."""
    if eos_token_id is None:
        eos_token_id = getattr(model.generation_config, "eos_token_id", None)
    if eos_token_id is None:
        return []
    tokens = eos_token_id if isinstance(eos_token_id, list) else [eos_token_id]
    return [check_int("eos_token_id", token, 0) for token in tokens]


def check_ends(trie: Trie, ends: list[int]) -> None:
    """Raise where something other than the EOS token itself follows it."""
    trie = trie.unrestricted
    edge = torch.isin(trie.token, trie.token.new_tensor(ends)).nonzero()[:, 0]
    below = trie.children(edge + 1).token
    parent = trie.token[edge][:, None]
    wrong = (below >= 0) & (below != parent)
    if bool(wrong.any()):
        row = int(wrong.any(1).nonzero()[0, 0])
        child = below[row][wrong[row]][0]
        raise ValueError(
            f"trie must have nothing but EOS tokens after the EOS token {int(parent[row])}, "
            f"got {int(child)}; see append_eos, and eos_token_id"
        )


def repeat_ends(tokens: Tensor, ends: list[int]) -> Tensor:
    """``tokens[..., L]`` with the first EOS token instead of whatever follows it."""
    end = torch.isin(tokens, tokens.new_tensor(ends))
    first = end.int().argmax(-1, keepdim=True)
    after = end.any(-1, keepdim=True) & (torch.arange(tokens.shape[-1], device=tokens.device) > first)
    return torch.where(after, tokens.gather(-1, first), tokens)
