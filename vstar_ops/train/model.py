"""The reference model: a small decoder-only transformer over semantic-ID tokens.

One model, three ways to run it. :meth:`SIDTransformer.forward` is the plain causal pass of supervised
training. :meth:`~SIDTransformer.prefill` and :meth:`~SIDTransformer.extend` implement
:class:`vstar_ops.decoding.protocol.PrefixModel` for a search: a request's prompt is run once, and every
prefix that is evaluated after it adds one key/value row to the request's cache.
:meth:`~SIDTransformer.packed` runs prefixes that are known beforehand, those of the RL loss, in one pass
with their prompt. All give the same numbers (up to float rounding) and the same gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..decoding.slots import Slots
from ..packing import PackedRows, pack_prompts
from .value import ItemEmbeddings, ItemNearness, Prefixes, ValueHead, hash_prefix, hash_prefixes


@dataclass
class PrefixCache:
    """The evaluated prefixes of ``B`` requests.

    Keys and values are laid out by request, ``[B, heads, S, head_dim]`` per layer: first the prompt, then
    the evaluated prefixes.

    Attributes:
        keys, values: one tensor per layer, the value head's block being the last; ``S`` columns are in use.
        slots: the columns that each prefix sees.
        at: the prefixes ``[slots]``.
        valued: ``[slots, dim]``, outputs of the value head's block, None without one.
        near: ``[B, T + 1]``, how near the prompt's items are to the catalogue, None without an item prior.
    """

    keys: list[Tensor]
    values: list[Tensor]
    slots: Slots
    at: Prefixes
    valued: Tensor | None
    near: Tensor | None

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add the columns ``[B, heads, width, head_dim]`` to a layer; returns all of it.

        Without gradients the columns go into spare room that doubles when it is used up, so that a search
        of many small rounds does not copy the cache in each. Autograd wants tensors that stay as they were.
        """
        end = self.slots.visible.shape[1]
        used = end - key.shape[2]
        if torch.is_grad_enabled():
            self.keys[layer] = torch.cat([self.keys[layer][:, :, :used], key], 2)
            self.values[layer] = torch.cat([self.values[layer][:, :, :used], value], 2)
            return self.keys[layer], self.values[layer]
        for pool, new in ((self.keys, key), (self.values, value)):
            if pool[layer].shape[2] < end:
                wider = new.new_empty(*new.shape[:2], 2 * end, new.shape[3])
                wider[:, :, :used] = pool[layer][:, :, :used]
                pool[layer] = wider
            pool[layer][:, :, used:end] = new
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]


class PackedScores(NamedTuple):
    """What a model says at the outputs of :class:`vstar_ops.packing.PackedRows`.

    Logits ``[B, 1 + n, V]``, with a value head V ``[B, 1 + n]``, on demand child values ``[B, 1 + n, V]``.
    """

    logits: Tensor
    value: Tensor | None
    child_value: Tensor | None


class SIDTransformer(nn.Module):
    """Pre-norm decoder over SID tokens; token ids are the logits' columns.

    Sequences are int tensors ``[B, T]``; ``-1`` is padding and may stand on either side, without any
    effect on the result. The model itself puts a begin token in front (an input id that has no column).

    Args:
        vocab: logits columns ``V``.
        max_tokens: longest sequence, without the begin token.
        dim, layers, heads, dropout: the usual.
    """

    finite_logits = True  # nothing is masked; see PrefixModel
    rows_by_request = True

    def __init__(
        self,
        vocab: int,
        max_tokens: int,
        *,
        dim: int = 128,
        layers: int = 4,
        heads: int = 4,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        self.vocab, self.max_tokens = vocab, max_tokens
        self.token = nn.Embedding(vocab + 1, dim)  # the last row is the begin token
        self.position = nn.Embedding(max_tokens + 1, dim)
        self.blocks = nn.ModuleList(Block(dim, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)
        self.bias = nn.Parameter(torch.zeros(vocab))
        self.value_head: ValueHead | None = None
        self.nearness: ItemNearness | None = None
        self.prior: nn.Parameter | None = None
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                deep = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(weight, std=0.02 / (2 * layers) ** 0.5 if deep else 0.02)

    def add_item_prior(self, items: ItemEmbeddings) -> None:
        """Add to the logits of legal children how near the prompt's items are to them, with one weight per
        level, 0 at first; see :class:`ItemNearness`. A value head added later has weights of its own."""
        self.nearness = ItemNearness(items)
        self.prior = self.nearness.new_weight()

    def add_value_head(self, *, child_values: bool = False) -> None:
        """Value prefixes from now on. The head reads the backbone's hidden states and never moves them."""
        dim, block = self.token.weight.shape[1], self.blocks[0]
        own = Block(dim, block.heads, block.rate)  # type: ignore[arg-type]
        self.value_head = ValueHead(own, dim, self.vocab, child_values=child_values, nearness=self.nearness)

    def parts(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """The parameters of the policy and of the value head."""
        head = list(self.value_head.parameters()) if self.value_head is not None else []
        own = {id(p) for p in head}
        return [p for p in self.parameters() if id(p) not in own], head

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``[B, 1 + T, V]``: row ``t`` predicts the token after the first ``t`` columns. Without the
        item prior, whose weights are fitted to these logits."""
        return self._head(self._causal(tokens)[0])

    def pack(
        self,
        context: Tensor,
        candidates: Tensor,
        mask: Tensor,
        needed: Tensor,
        *,
        leaves: bool,
        compact: bool = True,
    ) -> PackedRows:
        """Prompts ``context[B, T]`` and the prefixes of their candidates, for :meth:`packed`."""
        prompt = F.pad(context.long(), (1, 0), value=self.vocab)
        return pack_prompts(
            prompt, candidates, mask, prompt_mask=prompt >= 0, needed=needed, leaves=leaves, compact=compact
        )

    def packed(self, rows: PackedRows, *, child_values: bool = False) -> PackedScores:
        """Evaluate all prefixes of packed rows in one causal pass."""
        token, mask = rows.input_ids, rows.mask()[:, 0]
        x = self.dropout(self.token(token) + self.position(rows.position_ids))
        prefix = F.pad(rows.of_nodes(hash_prefixes(rows.tokens)), (rows.prompt_columns, 0))

        def layer(_: int, block: Block, x: Tensor) -> Tensor:
            q, k, v = (part.transpose(1, 2) for part in block.project(x))
            return block.finish(x, block.attend(q, k, v, mask).transpose(1, 2))

        x, valued = self._run(token, prefix, x, layer)
        hidden, prompt = rows.select(x), slice(rows.prompt_columns)
        shape = hidden.shape[:2]
        node = torch.zeros_like(token)
        if self.nearness is not None:
            node = F.pad(rows.of_nodes(self.nearness.nodes(rows.tokens)), (rows.prompt_columns, 0))
        request = torch.arange(shape[0], device=token.device).repeat_interleave(shape[1])
        at = Prefixes(rows.select(prefix).flatten(), rows.select(node).flatten(), request)
        near = self._near(token[:, prompt], rows.real[:, prompt])
        logits = self._logits(hidden.flatten(0, 1), at, near).unflatten(0, shape)
        if self.value_head is None or valued is None:
            return PackedScores(logits, None, None)
        of = (rows.select(valued).flatten(0, 1), at, near)
        value = self.value_head(*of).view(shape)
        if not child_values:
            return PackedScores(logits, value, None)
        return PackedScores(logits, value, self.value_head.child_values(*of).view(*shape, -1))

    def value(self, state: PrefixCache, slot: Tensor) -> Tensor:
        """V of evaluated prefixes; see :class:`ValueModel`."""
        head, of = self._valued(state, slot)
        return head(*of)

    def child_value(self, state: PrefixCache, slot: Tensor) -> Tensor:
        """Child values of evaluated prefixes and every token; see :class:`ValueModel`."""
        head, of = self._valued(state, slot)
        return head.child_values(*of)

    def _valued(
        self, state: PrefixCache, slot: Tensor
    ) -> tuple[ValueHead, tuple[Tensor, Prefixes, Tensor | None]]:
        if self.value_head is None or state.valued is None:
            raise ValueError("the model has no value head: call add_value_head() before prefill")
        slot = slot.clamp(min=0)
        return self.value_head, (state.valued[slot], Prefixes(*(x[slot] for x in state.at)), state.near)

    def _near(self, prompt: Tensor, real: Tensor) -> Tensor | None:
        """How near the items of prompts with their begin token are to the catalogue, ``[B, T + 1]``."""
        return self.nearness(prompt, real) if self.nearness is not None else None

    def _logits(self, hidden: Tensor, at: Prefixes, near: Tensor | None) -> Tensor:
        """The policy's logits ``[N, V]`` after prefixes."""
        logits = self._head(hidden)
        if self.nearness is None or self.prior is None or near is None:
            return logits
        return logits + self.nearness.of_children(self.prior, near, at.request, at.node, self.vocab)

    def prefill(self, context: Tensor) -> tuple[Tensor, PrefixCache]:
        """Evaluate prompts ``context[B, T]``; see :class:`PrefixModel`."""
        x, valued, position, seen, keys, values = self._causal(context)
        # The last real token stands in the column with the highest position (the begin token if none).
        batch, last = torch.arange(len(x), device=x.device), position.argmax(1)
        valued = valued[batch, last] if valued is not None else None
        prompt = F.pad(context.long(), (1, 0), value=self.vocab)
        near = self._near(prompt, prompt >= 0)
        position = position[batch, last]
        slots = Slots(seen[batch, last], batch, position, len(x))
        at = Prefixes(batch * 0, batch * 0, batch)
        cache = PrefixCache(keys, values, slots, at, valued, near)
        return self._logits(x[batch, last], at, near), cache

    def extend(self, state: PrefixCache, parent: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        """Evaluate the prefixes ``parent`` + ``token``, all ``[N]``; see :class:`PrefixModel`."""
        rows = state.slots.add(parent)
        if rows is None:
            none = state.keys[0].new_zeros(len(parent), self.vocab)
            return none, torch.full_like(parent, -1, dtype=torch.int64)
        shape, parent, token = parent.shape, rows.parent, token.flatten()[rows.row].long()
        # Attention runs on [B, widest request] rows, so the prompt's keys are shared by the rows of a request
        # instead of being copied for each.
        mask = rows.mask()
        x = self.token(token) + self.position(rows.position)

        def layer(i: int, block: Block, x: Tensor) -> Tensor:
            q, k, v = (rows.laid_out(part).transpose(1, 2) for part in block.project(x))
            attended = block.attend(q, *state.append(i, k, v), mask)
            return block.finish(x, attended[rows.request, :, rows.rank])

        above, node = Prefixes(*(x[parent] for x in state.at)), torch.zeros_like(parent)
        if self.nearness is not None:
            node = self.nearness.child(above.node, token)
        at = Prefixes(hash_prefix(above.hash, token), node, above.request)
        x, valued = self._run(token, at.hash, self.dropout(x), layer)
        state.at = Prefixes(*(torch.cat(pair) for pair in zip(state.at, at)))
        if state.valued is not None and valued is not None:
            state.valued = torch.cat([state.valued, valued])
        logits = self._logits(x, at, state.near)
        if len(logits) < shape.numel():
            logits = logits.new_zeros(shape.numel(), self.vocab).index_put((rows.row,), logits)
        return logits.view(*shape, self.vocab), rows.slot.view(shape)

    def _causal(
        self, tokens: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor, list[Tensor], list[Tensor]]:
        """The causal pass: hidden states of backbone and value block, positions, mask ``[B, 1+T, 1+T]``, keys
        and values per layer."""
        tokens = F.pad(tokens.long(), (1, 0), value=self.vocab)
        real = tokens >= 0
        position = (real.cumsum(1) - 1).masked_fill(~real, 0)  # columns of padding do not count
        causal = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool, device=tokens.device).tril()
        mask = causal & real[:, None, :]
        x = self.dropout(self.token(tokens.clamp(min=0)) + self.position(position))
        keys, values = [], []

        def layer(_: int, block: Block, x: Tensor) -> Tensor:
            q, k, v = (part.transpose(1, 2) for part in block.project(x))
            keys.append(k)
            values.append(v)
            return block.finish(x, block.attend(q, k, v, mask).transpose(1, 2))

        tokens = tokens.clamp(min=0)
        x, valued = self._run(tokens, torch.zeros_like(tokens), x, layer)
        return x, valued, position, mask, keys, values

    def _run(
        self, token: Tensor, prefix: Tensor, x: Tensor, layer: Callable[[int, Block, Tensor], Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """``x`` through all layers: what the backbone makes of it, and the value head's block of that."""
        for i, block in enumerate(self.blocks):
            x = layer(i, block, x)  # type: ignore[arg-type]  # a ModuleList does not know what it holds
        head = self.value_head
        if head is None:
            return x, None
        return x, layer(len(self.blocks), head.block, x.detach() + head.embed(token, prefix))  # type: ignore[arg-type]

    def _head(self, x: Tensor) -> Tensor:
        return F.linear(self.norm(x), self.token.weight[: self.vocab], self.bias)


class Block(nn.Module):
    """One pre-norm layer, cut at the attention so that both passes share every weight and every line."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.rate = heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.dropout = nn.Dropout(dropout)

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys, values ``[..., heads, head_dim]`` of ``x[..., dim]``."""
        return self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).unbind(-3)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """Attention over ``[B, heads, rows, head_dim]`` with ``mask[B, rows, columns]``."""
        rate = self.rate if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, mask[:, None], dropout_p=rate)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """What follows the attention: ``attended[..., heads, head_dim]`` into ``x[..., dim]``."""
        x = x + self.dropout(self.out(attended.flatten(-2)))
        return x + self.dropout(self.down(F.gelu(self.up(self.norm2(x)))))
