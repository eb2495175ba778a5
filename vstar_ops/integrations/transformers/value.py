"""A value head over the hidden states of a language model."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from ..._files import replacing

_FORMAT = "vstar_ops.value_head.v1"


class ValueHead(nn.Module):
    r"""V(s) of a prefix out of what the language model's head reads after it, and child values.

    .. math:: V = w^T g + b, \quad Q(s, v) - V(s) = U_v^T g + c_v, \quad g = \text{GELU}(W \, \text{LN}(h))

    The language model gets no gradient from it. Before training both are 0.

    Args:
        hidden_size: ``D``, of the language model.
        columns: int64 ``[C]``, the tokens that have child values, see :meth:`vstar_ops.Trie.compact`; None
            for a head without them (``VEDConfig(child_values=False, num_value_beams=0)``).
        width: of the hidden layer, by default ``hidden_size``.

    Example:
        >>> lm = prefix_model(model, trie)
        >>> head = lm.add_value_head()
        >>> head.save(path)
        >>> lm = prefix_model(model, trie, value_head=ValueHead.load(path))
    """

    columns: Tensor

    def __init__(self, hidden_size: int, columns: Tensor | None = None, *, width: int | None = None) -> None:
        super().__init__()
        width = width or hidden_size
        self.norm = nn.LayerNorm(hidden_size)
        self.hidden = nn.Linear(hidden_size, width)
        self.value = nn.Linear(width, 1)
        self.child = None if columns is None else nn.Linear(width, len(columns))
        self.register_buffer("columns", columns if columns is not None else torch.zeros(0, dtype=torch.int64))
        for layer in (self.value, self.child):
            if layer is not None:
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """V, float32 ``[...]`` of hidden states ``[..., D]``."""
        return self.value(self._features(hidden))[..., 0]

    def child_values(self, hidden: Tensor) -> Tensor:
        """What each token of ``columns`` adds to V, float32 ``[..., C]``."""
        if self.child is None:
            raise ValueError("the value head was made without child values")
        return self.child(self._features(hidden))

    def _features(self, hidden: Tensor) -> Tensor:
        dtype = self.norm.weight.dtype
        return F.gelu(self.hidden(self.norm(hidden.detach().to(dtype))))

    def check_columns(self, columns: Tensor) -> None:
        """Raise where the child values are those of other columns."""
        if self.child is not None and not torch.equal(self.columns.cpu(), columns.cpu()):
            raise ValueError(
                f"value_head must have child values of the {len(columns)} tokens of the trie, got one "
                f"of {len(self.columns)} tokens that are not the same"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the head to a safetensors file, atomically."""
        metadata = {"format": _FORMAT}
        state = {name: x.detach().cpu().contiguous() for name, x in self.state_dict().items()}
        with replacing(Path(path)) as temporary:
            save_file(state, temporary, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ValueHead:
        """Read a head written by :meth:`save`, onto the CPU.

        Raises:
            ValueError: the file is not a value head, or is damaged.
        """
        try:
            with safe_open(path, framework="pt") as file:
                found = (file.metadata() or {}).get("format")
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path}: not a value head, or damaged ({error})") from error
        if found != _FORMAT:
            raise ValueError(f"{path}: expected the format {_FORMAT!r}, got {found!r}")
        width, size = state["hidden.weight"].shape
        columns = state["columns"] if "child.weight" in state else None
        head = cls(size, columns, width=width)
        head.load_state_dict(state)
        return head.to(state["hidden.weight"].dtype)
