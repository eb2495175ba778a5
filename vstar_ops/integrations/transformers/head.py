"""The language model head on the columns that a catalogue uses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...ops._checks import INTS, check


class HeadTap:
    """What runs in place of a head's ``forward``: it sees the hidden states and gives fewer logits.

    Whatever the model does to its logits afterwards (scaling, soft capping) it does to these.

    Args:
        model: a Hugging Face model with a head.
        columns: int64 ``[C]``, the rows of the head's weight that are applied; None for all.

    Attributes:
        at: two index tensors: the hidden states ``hidden[at]`` of ``[B, S, D]`` get logits; None for all.
        hidden: the hidden states that got logits in the last call.
    """

    def __init__(self, model: Any, columns: Tensor | None) -> None:
        head = model.get_output_embeddings()
        if head is None:
            raise TypeError(f"model must have a language model head, got {type(model).__name__}")
        if columns is not None and type(head) is not nn.Linear:
            raise TypeError(
                "the head of the model must be a torch.nn.Linear to be applied to some columns alone, got "
                f"{type(head).__name__}: use full_head=True"
            )
        self.head, self.columns = head, columns
        self.at: tuple[Tensor, Tensor] | None = None
        self.hidden: Any = None
        self.rows: tuple[Tensor, Tensor | None] | None = None  # what gather() gave, if it may be kept

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Run in place of the head's ``forward`` in this block."""
        own = self.head.__dict__.get("forward")  # others replace it the same way
        self.original = self.head.forward
        self.head.forward = self
        try:
            yield
        finally:
            del self.head.forward
            if own is not None:
                self.head.forward = own

    @torch.compiler.disable  # a graph for each set of columns and rows would be compiled instead
    def __call__(self, hidden: Tensor) -> Tensor:
        self.hidden = hidden
        if self.at is not None:
            request, column = (index.to(hidden.device) for index in self.at)
            hidden = hidden[request, column]
            self.hidden = hidden.to(self.at[0].device)  # layers may be spread over devices
        if self.columns is None:
            return self.original(hidden)
        weight, bias = self.rows or self.gather(self.columns)
        return F.linear(hidden.to(weight.device), weight, bias)

    def gather(self, columns: Tensor) -> tuple[Tensor, Tensor | None]:
        """The rows of weight and bias that belong to the columns."""
        weight, bias = self.head.weight, self.head.bias
        if weight.is_meta:
            raise RuntimeError("the head's weight is not on a device (offloaded): use full_head=True")
        columns = columns.to(weight.device)
        return weight.index_select(0, columns), None if bias is None else bias.index_select(0, columns)


@contextmanager
def legal_head(model: Any, columns: Tensor) -> Iterator[None]:
    """Within this block the model's logits are those of some columns only: ``[..., C]`` and not ``[..., V]``.

    The head multiplies by ``C`` rows of its weight, and the full logits are never made. Column ``c`` is what
    column ``columns[c]`` is without the block, and gradients are those of these columns. Heads with a bias,
    tied heads, and whatever the model does to its logits afterwards are included. Any code may run in the
    block, a trainer's loss as well, as long as it takes its tokens by the numbers of a compact trie.

    The model is changed while the block runs, so two threads must not share it.

    Args:
        model: a Hugging Face model whose head is a ``torch.nn.Linear``, or a wrapper that hands on
            ``get_output_embeddings``.
        columns: int32 or int64 ``[C]``, distinct token ids; see :meth:`vstar_ops.Trie.compact`.

    Raises:
        TypeError, ValueError: the head is of another kind, or ``columns`` are not such integers.

    Example:
        >>> trie, columns = vstar_ops.Trie.from_sequences([[900, 930], [901, 930]]).compact()
        >>> with torch.no_grad(), legal_head(model, columns):
        ...     logits = model(input_ids).logits
        >>> logits.shape[-1]
        3
        >>> torch.testing.assert_close(logits, model(input_ids).logits[..., columns])
    """
    check("columns", columns, (None,), "[C]", INTS)
    with HeadTap(model, columns.long()).installed():
        yield
