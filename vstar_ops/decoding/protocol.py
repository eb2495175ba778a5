"""What a decoder needs of a language model: two methods over a pool of evaluated prefixes, and values."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from ..trie import Trie


class PrefixModel(Protocol):
    """A causal language model that keeps a cache that the prefixes of a request share.

    Every evaluated prefix owns a *slot*, a row of the model's own cache. ``prefill`` evaluates the
    prompts and gives request ``b`` the slot ``b`` (its root, the empty prefix); ``extend`` evaluates
    new prefixes, each one token longer than an evaluated one. Slots stay valid for the life of the
    state, so a tree search may return to any earlier prefix; a decoder that walks level by level
    simply never looks back.

    Rows of one ``extend`` call may belong to any requests, in any number and order, and may lie at
    different depths. A decoder passes fewer rows than beams where it can skip forced tokens, and a
    constant number where it wants constant shapes (unused rows have parent ``-1``).

    Attributes may say more about a model:

    - ``finite_logits``: True promises that no logit of a legal token is NaN or -inf, whatever the prefix. A
      decoder may then skip a forward whose result is certain. A model whose logits are masked, by itself, a
      subclass or a wrapper, has False, or no such attribute.
    - ``partial_logits``: True says that its logits are those of some columns alone, as for
      :meth:`vstar_ops.Trie.compact`. It cannot be asked for ``normalize="vocab"``.
    - ``rows_by_request``: True says that ``extend`` also takes ``parent`` and ``token`` ``[B, P]``, row ``b``
      those of request ``b``, and returns ``logits[B, P, V]`` and ``slot[B, P]``. No shape then depends on
      what the rows hold, so that the host has nothing to wait for. Decoders ask for it with constant shapes.
    """

    def prefill(self, context: Any) -> tuple[Tensor, Any]:
        """Evaluate a batch of prompts.

        Args:
            context: whatever the model calls a batch of ``B`` prompts.

        Returns:
            ``(logits, state)``: float ``logits[B, V]`` of the next token after each prompt, and an
            opaque cache in which slot ``b`` is prompt ``b``.
        """
        ...

    def extend(self, state: Any, parent: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        """Append one token to evaluated prefixes, and evaluate the results.

        Args:
            state: the cache of ``prefill``; it is extended in place.
            parent: int64 ``[N]``, the slot of the prefix to extend, or ``-1`` for an unused row.
            token: int64 ``[N]``, the token to append (a column of ``logits``).

        Returns:
            ``(logits, slot)``: ``logits[N, V]`` of the next token after each new prefix
            (unspecified in unused rows) and int64 ``slot[N]``, where each new prefix is kept.
        """
        ...


class ValueModel(PrefixModel, Protocol):
    """A language model that also values the prefixes it has evaluated (V-STAR, section 4)."""

    def value(self, state: Any, slot: Tensor) -> Tensor:
        """V of evaluated prefixes.

        Args:
            state: the cache of ``prefill``.
            slot: int64 ``[N]``, or ``-1`` for an unused row.

        Returns:
            float ``[N]`` (unspecified in unused rows). It must not depend on later tokens.
        """
        ...

    def child_value(self, state: Any, slot: Tensor) -> Tensor:
        """What each next token adds to V: float ``[N, V]``, asked for only with ``child_values``.

        Args:
            state, slot: as for :meth:`value`.
        """
        ...


def extend_by_request(model: PrefixModel, state: Any, parent: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
    """``model.extend`` of rows ``[B, P]``: logits ``[B, P, V]`` and slots ``[B, P]``, -1 in unused rows."""
    if getattr(model, "rows_by_request", False):
        return model.extend(state, parent, token)
    logits, slot = model.extend(state, parent.flatten(), token.flatten())
    return logits.unflatten(0, parent.shape), slot.view_as(parent)


def check_model(model: PrefixModel, trie: Trie, normalize: str = "legal") -> None:
    """Raise if it is no such model, or lacks columns that the trie or ``normalize`` needs."""
    if not (hasattr(model, "prefill") and hasattr(model, "extend")):
        raise TypeError(
            f"model must have the methods prefill and extend, got {type(model).__name__}; of a Hugging Face "
            "model vstar_ops.integrations.transformers.prefix_model makes one that has"
        )
    own = getattr(model, "trie", None)
    if isinstance(own, Trie) and isinstance(trie, Trie) and trie.max_token > own.max_token:
        raise ValueError(
            f"trie must be the model's own, model.trie, or a restriction of it: the model has logits of "
            f"{own.max_token + 1} columns, got a trie with tokens up to {trie.max_token}"
        )
    if normalize == "vocab" and getattr(model, "partial_logits", False):
        raise ValueError(
            "normalize='vocab' needs the logits of all columns, and the model has partial_logits: make it "
            "with its full head, or use normalize='legal'"
        )


def can_skip_forced(model: PrefixModel, normalize: str) -> bool:
    """Whether the log-probability of a single legal child is 0 for certain, so that no forward tells it."""
    return normalize == "legal" and bool(getattr(model, "finite_logits", False))


def check_finite_logits(found: Tensor, legal: Tensor) -> None:
    """Raise if fewer children were ``found`` than are ``legal``; it looks at the host."""
    if bool((found < legal).any()):
        raise ValueError("model must have finite_logits False, got a legal token at -inf or NaN")
