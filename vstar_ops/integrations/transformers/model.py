"""Hugging Face models as :class:`vstar_ops.decoding.PrefixModel`, and their packed training."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...decoding.slots import Slots
from ...ops._checks import check_tokens
from ...packing import PackedRows, pack_prompts
from ...trie import Trie
from .cache import empty_cache
from .checks import attention_of, check_decoder, evaluating, read_prompt, unwrapped
from .eos import check_ends, end_tokens, repeat_ends
from .head import HeadTap
from .value import ValueHead


@dataclass
class PrefixState:
    """The cache of one decode.

    Attributes:
        slots: the evaluated prefixes.
        cache: keys and values, by request.
        position: int64 ``[B, S]``, the position of each column in use.
        tap: the head.
        hidden: ``[slots, D]``, what the head saw, None without a value head.
        fixed: arguments of every call: what an encoder said.
    """

    slots: Slots
    cache: Any
    position: Tensor
    tap: HeadTap
    hidden: Tensor | None
    fixed: dict[str, Any]


class Scores(NamedTuple):
    """What a model says of candidates; the result of :meth:`CausalPrefixModel.score`."""

    logp: Tensor
    value: Tensor | None
    value_from_parent: Tensor | None
    rows: PackedRows
    logits: Tensor
    hidden: Tensor


class CausalPrefixModel:
    """A decoder that takes position ids, as a prefix model. :func:`prefix_model` makes it.

    Attributes:
        model: the Hugging Face model, as it was given.
        catalogue: the trie that was given, in token ids, on the model's device.
        trie: the trie to decode with: the compact one, or with the full head the catalogue.
        columns: int64 ``[C]``, the token ids of the logits' columns; None with the full head.
        value_head: a :class:`ValueHead`, or None.
    """

    finite_logits = True  # language models mask none of their logits; see PrefixModel
    rows_by_request = True

    def __init__(
        self,
        model: Any,
        trie: Trie,
        *,
        full_head: bool = False,
        value_head: ValueHead | None = None,
        eos_token_id: int | list[int] | None = None,
    ) -> None:
        self.model, self._inner = model, unwrapped(model)
        distributed = isinstance(model, nn.parallel.DistributedDataParallel)
        self._decoder = model.module if distributed else model  # each process decodes on its own
        names = inspect.signature(self._inner.forward).parameters
        self._check_model(names)
        self._cache_name = "cache" if "cache" in names else "past_key_values"  # renamed after 5.10
        self.catalogue = trie.to(self._inner.device)
        self._compact, self._sid_columns = self.catalogue.compact()
        self.trie = self.catalogue if full_head else self._compact
        self.columns = None if full_head else self._sid_columns
        HeadTap(self._inner, self.columns)  # raises where there is no such head
        if trie.max_token >= self._vocab:
            raise ValueError(f"trie must hold tokens of the model, below {self._vocab}, got {trie.max_token}")
        self._ends = end_tokens(self._inner, eos_token_id)
        check_ends(self.catalogue, self._ends)
        if value_head is not None:
            value_head.to(self._inner.device).check_columns(self._sid_columns)
        self.value_head = value_head

    def add_value_head(self, *, child_values: bool = True, width: int | None = None) -> ValueHead:
        """Make a :class:`ValueHead` for this model and catalogue, in float32, and attach it."""
        size = self._config.hidden_size
        columns = self._sid_columns if child_values else None
        self.value_head = ValueHead(size, columns, width=width).to(self._inner.device)
        return self.value_head

    @property
    def partial_logits(self) -> bool:
        """Whether the logits are those of the catalogue's tokens alone; see :class:`PrefixModel`."""
        return self.columns is not None

    # ---------------------------------------------------------------- decoding

    @torch.no_grad()
    def prefill(self, context: Any) -> tuple[Tensor, PrefixState]:
        """Evaluate prompts; see :class:`vstar_ops.decoding.PrefixModel`.

        Args:
            context: what a tokenizer returns, ``{"input_ids": [B, T], "attention_mask": [B, T]}``, padded on
                either side; or the ids alone.
        """
        ids, real, fixed = self._prompt(context)
        # Padding goes to the left, wherever it was: the last column is every prompt's last token.
        order = real.int().argsort(dim=1, stable=True)
        real = real.gather(1, order)
        ids = ids.gather(1, order).masked_fill(~real, 0)
        position = (real.cumsum(1) - 1).clamp(min=0)
        batch, columns = ids.shape
        see = real[:, None, :] & real.new_ones(columns, columns).tril()
        see.diagonal(dim1=1, dim2=2).fill_(True)
        request = torch.arange(batch, device=ids.device)
        tap = HeadTap(self._inner, self.columns)
        if self.columns is not None:
            tap.rows = tap.gather(self.columns)
        slots = Slots(see[:, -1], request, position[:, -1], batch)
        state = PrefixState(slots, self._empty_cache(), position, tap, None, fixed)
        tap.at = request, torch.full_like(request, columns - 1)
        with evaluating(self._inner):
            out = self._call(self._decoder, tap, ids, position, position, see, fixed, state.cache)
        state.fixed = self._after_prefill(out, fixed)
        if self.value_head is not None:
            state.hidden = tap.hidden
        return out.logits, state

    @torch.no_grad()
    def extend(self, state: PrefixState, parent: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        """Evaluate the prefixes ``parent`` + ``token``; see :class:`vstar_ops.decoding.PrefixModel`."""
        rows = state.slots.add(parent)
        if rows is None:
            unused = torch.full_like(parent, -1, dtype=torch.int64)
            return state.slots.visible.new_zeros(len(parent), self._width, dtype=self._inner.dtype), unused
        token = token.flatten()[rows.row].long()
        if self.columns is not None:
            token = self.columns[token]
        ids, position = rows.laid_out(token), rows.laid_out(rows.position)
        state.position = torch.cat([state.position, position], 1)
        state.tap.at = rows.request, rows.rank
        see = rows.mask()
        with evaluating(self._inner):
            arguments = (ids, position, state.position, see, state.fixed, state.cache)
            logits = self._call(self._decoder, state.tap, *arguments).logits
        if state.hidden is not None:
            state.hidden = torch.cat([state.hidden, state.tap.hidden])
        if self.columns is None and self._ends:
            # What has ended is followed by its last token again, for certain.
            ended = torch.isin(token, token.new_tensor(self._ends))
            certain = torch.full_like(logits, -torch.inf).scatter_(1, token[:, None], 0)
            logits = torch.where(ended[:, None], certain, logits)
        if len(token) < parent.numel():
            logits = logits.new_zeros(parent.numel(), logits.shape[1]).index_put((rows.row,), logits)
        return logits.unflatten(0, parent.shape), rows.slot.view_as(parent)

    def value(self, state: PrefixState, slot: Tensor) -> Tensor:
        """V of evaluated prefixes; see :class:`vstar_ops.decoding.ValueModel`."""
        head, hidden = self._valued(state)
        return head(hidden[slot.clamp(min=0)])

    def child_value(self, state: PrefixState, slot: Tensor) -> Tensor:
        """What each next token adds to V; see :class:`vstar_ops.decoding.ValueModel`."""
        head, hidden = self._valued(state)
        value = head.child_values(hidden[slot.clamp(min=0)])
        if self.columns is not None:
            return value
        out = value.new_zeros(len(value), self._width)
        return out.index_copy_(1, self._sid_columns, value)

    def token_ids(self, node: Tensor, pad_token_id: int | None = None) -> Tensor:
        """The tokens of leaves as Hugging Face writes them: int64 ``[..., L]`` in the model's vocabulary.

        Args:
            node: ints ``[...]``, the ``node`` of a decoder's result.
            pad_token_id: what stands after an EOS token and for node -1. Default: the model's padding token,
                or its EOS token.
        """
        own = self._inner.generation_config.pad_token_id, self._config.pad_token_id
        pad = next(token for token in (pad_token_id, *own, *self._ends, -1) if token is not None)
        tokens = self.catalogue.sequences(node).long()
        return tokens.masked_fill(self._ended(tokens) | (tokens < 0), pad)

    # ---------------------------------------------------------------- training

    def score(
        self,
        context: Any,
        candidates: Tensor,
        *,
        normalize: str = "legal",
        temperature: float = 1.0,
        values: bool = False,
    ) -> Scores:
        """Log-probabilities of candidates, and their values, with gradients.

        Each prompt is run once, with the tree of its candidates' prefixes behind it
        (:mod:`vstar_ops.packing`), in the model's present mode, train or eval. Log-probabilities are those
        of running every candidate behind a prompt of its own, and so are gradients, up to rounding and
        dropout. Under ``"legal"`` prefixes with a single legal child are not run unless they are valued.

        Args:
            context: as for :meth:`prefill`.
            candidates: ints ``[B, G, T]``, in the model's vocabulary, ``T`` at most ``L``: what
                :meth:`token_ids` returns. What follows an EOS token does not count. A row that begins with -1
                is no candidate.
            normalize: over the legal children of a prefix, or, with the full head, ``"vocab"``.
            temperature: divides the logits.
            values: also value every prefix, which needs a value head.

        Returns:
            A named tuple; the outputs are the ``1 + n`` places of :class:`vstar_ops.packing.PackedRows`:

            - ``logp`` float32 ``[B, G, T]``: exactly 0 for a token without an alternative, after an EOS token
              and in rows that are no candidates; -inf, under ``"legal"``, from the first illegal token on
            - ``value`` float32 ``[B, G, T]``: V of the prefixes of ``l + 1`` tokens, 0 in rows that are no
              candidates. ``value_from_parent``: V of their parents, which gets no gradient by this, plus the
              child value; None for a head without child values. None unless asked for.
            - ``rows``: the packed rows; at their outputs ``logits`` ``[B, 1 + n, C]``, one for each of
              ``columns``, and ``hidden`` ``[B, 1 + n, D]``

        Raises:
            TypeError, ValueError: an argument's type, shape or device, by name.
        """
        self._check_score(normalize, values)
        ids, real, fixed = self._prompt(context)
        candidates = check_tokens("candidates", candidates, (len(ids), None, None), "[B, G, T]", ids.device)
        given, length = candidates.shape[2], self.trie.length
        if given > length:
            raise ValueError(f"candidates must have at most L = {length} tokens, got {given}")
        tokens = repeat_ends(F.pad(candidates.long(), (0, length - given), value=-1), self._ends)
        present, ended = tokens[..., 0] >= 0, self._ended(tokens)
        prefixes = [self.catalogue.lookup(tokens[..., :depth]) for depth in range(1, length + 1)]
        child = torch.stack(prefixes, 2).long().masked_fill(~present[..., None], -1)
        needed = tokens >= 0
        if not values:
            needed = self.trie.num_children(child) > 1 if normalize == "legal" else needed & ~ended
        layout: dict[str, Any] = {"prompt_mask": real, "needed": needed, "leaves": values, "compact": True}
        rows = pack_prompts(ids, tokens.clamp(min=0), present, **layout)

        tap = HeadTap(self._inner, self.columns)
        tap.at = torch.arange(len(ids), device=ids.device)[:, None], rows.outputs
        arguments = (rows.input_ids, rows.position_ids, rows.position_ids, rows.mask()[:, 0], fixed)
        logits = self._call(self.model, tap, *arguments).logits

        target = torch.where(child > 0, self._compact.token[(child - 1).clamp(min=0)].long(), -1)
        compact = replace(rows, tokens=target)
        placed = compact if self.columns is not None else replace(rows, tokens=tokens)
        if normalize == "vocab":
            logp = placed.logp(logits, temperature=temperature).masked_fill(ended, 0)
        else:
            logp = placed.logp(logits, self.trie, F.pad(rows.of_nodes(child), (1, 0)), temperature)
            logp = logp.masked_fill((child < 0) & present[..., None], -torch.inf)
        value, from_parent = self._values(compact, tap.hidden) if values else (None, None)
        value, from_parent = (None if x is None else x[..., :given] for x in (value, from_parent))
        return Scores(logp[..., :given], value, from_parent, rows, logits, tap.hidden)

    def _values(self, rows: PackedRows, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """V by candidate, of its prefixes and from their parents."""
        head = self.value_head
        assert head is not None
        value = head(hidden)
        own = rows.unpack(value, rows.own)
        if head.child is None:
            return own, None
        return own, rows.unpack(value.detach(), rows.source) + rows.chosen(head.child_values(hidden))

    # ---------------------------------------------------------------- the model

    @property
    def _config(self) -> Any:
        return self._inner.config.get_text_config(decoder=True)

    @property
    def _width(self) -> int:
        """Columns of the logits."""
        return self._vocab if self.columns is None else len(self.columns)

    @property
    def _vocab(self) -> int:
        """Rows of the head's weight; a vocabulary may be padded to more of them than it has tokens."""
        return self._inner.get_output_embeddings().weight.shape[0]

    def _valued(self, state: PrefixState) -> tuple[ValueHead, Tensor]:
        if self.value_head is None or state.hidden is None:
            raise ValueError("the model has no value head: give prefix_model one, or call add_value_head()")
        return self.value_head, state.hidden

    def _ended(self, tokens: Tensor) -> Tensor:
        """Whether an EOS token stands before each of ``tokens[..., L]``."""
        end = torch.isin(tokens, tokens.new_tensor(self._ends))
        return end.cumsum(-1) - end.long() > 0

    def _check_score(self, normalize: str, values: bool) -> None:
        if normalize not in ("legal", "vocab"):
            raise ValueError(f"normalize must be 'legal' or 'vocab', got {normalize!r}")
        if normalize == "vocab" and self.columns is not None:
            raise ValueError("normalize='vocab' needs the logits of all columns: full_head=True")
        if values and self.value_head is None:
            raise ValueError("values needs a value head: give prefix_model one, or call add_value_head()")

    def _check_model(self, names: Mapping[str, Any]) -> None:
        """Refuse what would not be exact; ``names`` are the arguments of the model."""
        check_decoder(self._inner, self._config, names)

    def _call(
        self,
        model: Any,
        tap: HeadTap,
        ids: Tensor,
        position: Tensor,
        key_position: Tensor,
        see: Tensor,
        fixed: dict[str, Any],
        cache: Any = None,
    ) -> Any:
        """Run ``model`` on new columns ``[B, q]``; ``see[B, q, k]`` is about all of them."""
        arguments = {**fixed, **self._arguments(ids, position, key_position, see)}
        if cache is not None:
            arguments[self._cache_name] = cache
        tap.hidden = None
        with tap.installed():
            out = model(**arguments, use_cache=cache is not None, return_dict=True)
        if tap.hidden is None:
            raise TypeError(
                f"{type(self._inner).__name__} cannot be a prefix model: it does not call its head"
            )
        return out

    def _prompt(self, context: Any) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Ids ``[B, T]`` of what the decoder reads first, which of them are real, other arguments."""
        return *read_prompt(context, self._inner.device), {}

    def _after_prefill(self, out: Any, fixed: dict[str, Any]) -> dict[str, Any]:
        """The other arguments of calls after the first."""
        return fixed

    def _empty_cache(self) -> Any:
        return empty_cache()

    def _arguments(self, ids: Tensor, position: Tensor, key_position: Tensor, see: Tensor) -> dict[str, Any]:
        window: Any = getattr(self._config, "sliding_window", None)
        alike = "full_attention" if window is None else "sliding_attention"
        masks = {}
        for kind in set(getattr(self._config, "layer_types", None) or [alike]):
            seen = see
            if kind == "sliding_attention":
                seen = see & (position[:, :, None] - key_position[:, None, :] < window)
            masks[kind] = self._mask(seen)
        mask = masks if len(masks) > 1 else next(iter(masks.values()))
        return {"input_ids": ids, "position_ids": position, "attention_mask": mask}

    def _mask(self, see: Tensor) -> Tensor:
        """A mask of four dimensions: bool, or to be added."""
        see = see[:, None]
        if attention_of(self._config) == "sdpa":
            return see
        dtype = self._inner.dtype
        return torch.zeros_like(see, dtype=dtype).masked_fill_(~see, torch.finfo(dtype).min)
