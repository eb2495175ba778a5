r"""Packed rows: each prompt once, and behind it the tree of its candidates' prefixes.

A trainer of candidates usually runs a prompt ``G`` times, once with each candidate behind it. What a causal
model says after a prefix depends on the prompt and the prefix alone, so it is enough to run every distinct
prefix once, all of them in one row: positions count by depth, and attention is causal on the prompt and
sees only ancestors on the tree. Logits, hidden states and gradients are those of the ``G`` rows, up to
rounding. Any decoder fits that takes token ids, position ids and a mask of four dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .ops import prefix_tree, token_logp
from .ops._checks import INTS, check, check_tokens, validating
from .trie import Trie


@dataclass(frozen=True)
class PackedRows:
    """``B`` rows of ``S = T + n`` columns: ``T`` of the prompt, then ``n`` nodes, parents before children.

    The *outputs* of a row are the ``1 + n`` places where something is predicted: 0 stands for the prompt's
    last token (the empty prefix), ``1 + i`` for node ``i``.

    Attributes:
        input_ids, position_ids: int64 ``[B, S]``.
        real: bool ``[B, S]``, False in padding of the prompt and in unused nodes, which nothing looks at.
        tokens: int64 ``[B, G, L]``, the candidates.
        outputs: int64 ``[B, 1 + n]``, the column of each output. If the prompts are padded on the left
            these are the last ``1 + n`` columns.
        source: int64 ``[B, G, L]``, the output that predicts token ``l`` of a candidate; -1 where that
            prefix is not run, and where masked.
        own: int64 ``[B, G, L]``, the output of the candidate's prefix of ``l + 1`` tokens, likewise.
        depth: int64 ``[B, n]``, tokens of each node's prefix, 0 for unused nodes.
        ancestor: int64 ``[B, n, L]``, the nodes on the way to each node, itself the last; -1 past its depth.
    """

    input_ids: Tensor
    position_ids: Tensor
    real: Tensor
    tokens: Tensor
    outputs: Tensor
    source: Tensor
    own: Tensor
    depth: Tensor
    ancestor: Tensor

    @property
    def prompt_columns(self) -> int:
        """``T``."""
        return self.input_ids.shape[1] - self.depth.shape[1]

    def mask(self, dtype: torch.dtype | None = None) -> Tensor:
        """What each column sees, ``[B, 1, S, S]`` as ``scaled_dot_product_attention`` takes it.

        Bool, or with a ``dtype`` numbers to add: 0, and the lowest of the dtype where nothing is seen.
        Every column sees itself, padding too, so that no softmax is empty.
        """
        (batch, columns), prompt = self.input_ids.shape, self.prompt_columns
        nodes = columns - prompt
        see = self.real.new_zeros(batch, columns, columns)
        see[:, :, :prompt] = self.real[:, None, :prompt]
        see[:, :prompt, :prompt] &= self.real.new_ones(prompt, prompt).tril()
        above = self.real.new_zeros(batch, nodes, nodes + 1)  # one more takes what is past a node's depth
        above.scatter_(2, torch.where(self.ancestor < 0, nodes, self.ancestor), True)
        see[:, prompt:, prompt:] = above[:, :, :nodes]
        see.diagonal(dim1=1, dim2=2).fill_(True)
        see = see[:, None]
        if dtype is None:
            return see
        return torch.zeros_like(see, dtype=dtype).masked_fill_(~see, torch.finfo(dtype).min)

    def mask_mod(self) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """The same as a function of ``(batch, head, query, key)`` for FlexAttention.

        For :func:`torch.nn.attention.flex_attention.create_block_mask`, with ``B=B`` and ``H=None``.
        """
        prompt, real = self.prompt_columns, self.real
        # At least one node, so that there is something to read where the answer is not used.
        spare = 1 if self.depth.shape[1] == 0 else 0
        level = F.pad(self.depth, (0, spare)).sub(1).clamp(min=0)
        ancestor = F.pad(self.ancestor, (0, 0, 0, spare), value=-1)

        def see(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            node, other = (query - prompt).clamp(min=0), (key - prompt).clamp(min=0)
            above = (query >= prompt) & (ancestor[batch, node, level[batch, other]] == other)
            causal = (query >= key) & real[batch, key]
            return (query == key) | torch.where(key < prompt, causal, above)

        return see

    def select(self, x: Tensor) -> Tensor:
        """The outputs ``[B, 1 + n, ...]`` of ``x[B, S, ...]``: hidden states or logits of all columns."""
        return x[torch.arange(len(x), device=x.device)[:, None], self.outputs]

    def unpack(self, x: Tensor, at: Tensor) -> Tensor:
        """``x[B, 1 + n, ...]`` laid out by candidate, ``[B, G, L, ...]``.

        ``at`` is :attr:`source` for what predicts token ``l``, :attr:`own` for what follows it. 0 where that
        is -1. The gradient is summed in a fixed order on every device.
        """
        return _lookup(x.flatten(2) if x.ndim > 2 else x[..., None], at).reshape(*at.shape, *x.shape[2:])

    def of_nodes(self, x: Tensor) -> Tensor:
        """``[B, n, ...]`` of ``x[B, G, L, ...]`` that speaks of the candidates' prefixes; any value in unused
        nodes."""
        group, length = self.own.shape[1:]
        nodes = self.depth.shape[1]
        place = torch.arange(group * length, device=x.device).expand(len(x), -1)
        holder = place.new_zeros(len(x), nodes + 2)
        holder.scatter_(1, self.own.flatten(1) + 1, place)  # some candidate through each node; 0 is nothing's
        return x.flatten(1, 2)[torch.arange(len(x), device=x.device)[:, None], holder[:, 2:]]

    def chosen(self, x: Tensor) -> Tensor:
        """Of ``x[B, 1 + n, V]`` at the outputs the entry of each candidate's tokens, ``[B, G, L]``; 0 where
        :attr:`source` is -1."""
        index = torch.where(self.source >= 0, self.source * x.shape[2] + self.tokens, -1)
        return _lookup(x.flatten(1)[..., None], index)[..., 0]

    def logp(
        self, logits: Tensor, trie: Trie | None = None, node: Tensor | None = None, temperature: float = 1.0
    ) -> Tensor:
        """Log-probability of every token of every candidate, float32 ``[B, G, L]``, differentiable.

        By :func:`vstar_ops.token_logp` of ``logits[B, 1 + n, V]`` at the outputs, each row once: over the
        whole vocabulary, or over the legal children of ``node[B, 1 + n]``. 0 where :attr:`source` is -1.
        """
        return self.logp_and_entropy(logits, trie, node, temperature)[0]

    def logp_and_entropy(
        self, logits: Tensor, trie: Trie | None = None, node: Tensor | None = None, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """:meth:`logp`, and likewise the entropy of the distribution that each token was drawn from."""
        group, outputs = self.tokens.shape[1], self.outputs.shape[1]
        # A candidate goes through an output once, so that (output, candidate) is a place of its own.
        place = self.source * group + torch.arange(group, device=self.source.device)[:, None]
        place = torch.where(self.source < 0, -1, place)
        targets = self.tokens.new_full((len(self.tokens), outputs * group + 1), -1)
        last = torch.where(place < 0, outputs * group, place)
        targets.scatter_(1, last.flatten(1), self.tokens.flatten(1))
        found = token_logp(
            logits, targets[:, :-1].unflatten(1, (outputs, group)), trie, node, temperature=temperature
        )
        return _lookup(found.logp.flatten(1)[..., None], place)[..., 0], self.unpack(
            found.entropy, self.source
        )


def pack_prompts(
    prompt: Tensor,
    tokens: Tensor,
    mask: Tensor | None = None,
    *,
    prompt_mask: Tensor | None = None,
    needed: Tensor | None = None,
    leaves: bool = False,
    compact: bool = False,
) -> PackedRows:
    """Pack prompts and the prefixes of their candidates into one row each.

    Args:
        prompt: integers ``[B, T]``, padded on either side.
        tokens: integers ``[B, G, L]``, the candidates.
        mask: bool ``[B, G]``, False for padded candidates, or ``[B, G, L]``: a candidate ends before its
            first masked token, whatever follows.
        prompt_mask: bool or integers ``[B, T]``, False or 0 in padding. Every prompt needs one real token.
        needed: bool ``[B, G, L]``, which prefixes of ``l + 1`` tokens to run (and those above them). For
            example a prefix that only one legal token can follow need not be run: that token is certain.
            Default: all.
        leaves: run whole candidates too. Nothing is predicted after them, but they may be valued.
        compact: make rows as short as the batch allows, which reads their length on the host. Without it a
            row has room for all that ``tokens`` could hold, ``G * (L - 1)`` nodes, or ``G * L`` with leaves.

    Raises:
        TypeError, ValueError: an argument's type, shape or device, by name; under
            :func:`vstar_ops.validation` also a prompt of padding alone.

    Example:
        Log-probabilities of sampled completions under a Hugging Face decoder, prompts padded on the left::

            packed = pack_prompts(prompt_ids, completion_ids, prompt_mask=attention_mask)
            out = model(
                input_ids=packed.input_ids,
                position_ids=packed.position_ids,
                attention_mask=packed.mask(model.dtype),
                logits_to_keep=packed.outputs.shape[1],
            )
            logp = packed.logp(out.logits)  # [B, G, L], what G * B rows of prompt and completion give

        A model that gives the logits of all columns: ``packed.logp(packed.select(out.logits))``.
    """
    prompt = check_tokens("prompt", prompt, (None, None), "[B, T]").long()
    device, batch = prompt.device, len(prompt)
    tokens = check_tokens("tokens", tokens, (batch, None, None), "[B, G, L]", device).long()
    group, length = tokens.shape[1:]
    if prompt_mask is None:
        prompt_mask = torch.ones_like(prompt)
    check("prompt_mask", prompt_mask, tuple(prompt.shape), "[B, T]", (torch.bool, *INTS), device)
    if needed is None:
        needed = torch.ones_like(tokens, dtype=torch.bool)
    check("needed", needed, tuple(tokens.shape), "[B, G, L]", (torch.bool,), device)
    prompt_real = prompt_mask != 0
    if validating() and not bool(prompt_real.any(1).all()):
        raise ValueError("prompt_mask must leave every prompt a token, got one of padding alone")

    tree = prefix_tree(tokens, mask)
    node = tree.node.long()
    there = node >= 0
    needed = needed & there
    if not leaves:  # what no token follows
        needed[..., :-1] &= there[..., 1:]
        needed[..., length - 1 :] = False
    needed = needed.flip(2).cumsum(2).flip(2) > 0  # a prefix is run for those below it, too

    # Nodes that are run move together; one slot more than there is room takes all others.
    capacity = group * length
    keep = torch.zeros(batch, capacity + 1, dtype=torch.int64, device=device)
    keep.scatter_(1, torch.where(needed, node, capacity).flatten(1), 1)
    keep[:, capacity] = 0
    number = keep.sum(1)
    room = group * max(length - (not leaves), 0)
    if compact:
        room = int(number.max()) if batch else 0
    slot = torch.where(keep > 0, keep.cumsum(1) - 1, -1)
    at = torch.where(keep > 0, slot, room)
    nodes = torch.zeros(batch, room + 1, dtype=torch.int64, device=device)
    nodes = nodes.scatter_(1, at, torch.arange(capacity + 1, device=device).expand(batch, -1))[:, :room]
    used = torch.arange(room, device=device) < number[:, None]

    if room:
        depth = torch.where(used, tree.depth.long().gather(1, nodes), 0)
        token = torch.where(used, tree.token.gather(1, nodes), 0)
        first = torch.where(used, tree.first.long().gather(1, nodes), 0)
        path = node.gather(1, first[..., None].expand(-1, -1, length)).clamp(min=0)
        path = slot.gather(1, path.flatten(1)).view(batch, room, length)
        ancestor = torch.where(torch.arange(length, device=device) < depth[..., None], path, -1)
    else:
        depth = token = nodes
        ancestor = nodes.new_zeros(batch, 0, length)

    length_of_prompt = prompt_real.sum(1, keepdim=True)
    last = (prompt_real * torch.arange(1, prompt.shape[1] + 1, device=device)).argmax(1, keepdim=True)
    own = slot.gather(1, torch.where(node < 0, capacity, node).flatten(1)).view_as(node)
    own = torch.where(own < 0, -1, own + 1)
    source = F.pad(own[..., : length - 1], (1, 0)) if length else own
    return PackedRows(
        input_ids=torch.cat([torch.where(prompt_real, prompt, 0), token], 1),
        position_ids=torch.cat(
            [(prompt_real.cumsum(1) - 1).clamp(min=0), (length_of_prompt - 1 + depth).clamp(min=0)], 1
        ),
        real=torch.cat([prompt_real, used], 1),
        tokens=tokens,
        outputs=torch.cat([last, prompt.shape[1] + torch.arange(room, device=device).expand(batch, -1)], 1),
        source=torch.where(there, source, -1),
        own=own,
        depth=depth,
        ancestor=ancestor,
    )


def _lookup(x: Tensor, at: Tensor) -> Tensor:
    """``[B, ..., D]``: rows ``at[B, ...]`` of each ``x[B, R, D]``, 0 where -1.

    As an embedding lookup, whose gradient sums repeated rows in a fixed order on CPU and GPU.
    """
    batch, rows, width = x.shape
    offset = torch.arange(batch, device=x.device).view(-1, *[1] * (at.ndim - 1)) * rows
    found = F.embedding(at.clamp(min=0) + offset, x.reshape(batch * rows, width))
    return torch.where((at >= 0)[..., None], found, 0)
