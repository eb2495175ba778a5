"""Calls of the ops as data: a function of tensors that returns tensors, and its arguments."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

import vstar_ops
from vstar_ops import (
    ItemFilter,
    NodeEvaluation,
    SearchTrees,
    SelectedRows,
    Trie,
    filter_items,
    ved_insert,
    ved_select,
)


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """``value`` with ``function`` applied to its tensors: a tensor, a dataclass or a tuple of them."""
    if isinstance(value, Tensor):
        return function(value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(
            value, **{f.name: map_tensors(function, getattr(value, f.name)) for f in fields(value)}
        )
    if isinstance(value, tuple):
        parts = [map_tensors(function, x) for x in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


def with_alive(trie: Trie, alive: Tensor) -> Trie:
    """A trie that is restricted by these bits of its nodes, ``[R, words]``."""
    trie = copy.copy(trie)
    trie.alive = alive
    return trie


def map_alive(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """A restricted trie with ``function`` applied to its bits; other values as they are."""
    if not isinstance(value, Trie) or value.alive is None:
        return value
    return with_alive(value, function(value.alive))


def tensors(value: Any) -> list[Tensor]:
    """The tensors in a result or an argument, in order."""
    found: list[Tensor] = []
    map_tensors(found.append, value)
    return found


class Call(NamedTuple):
    """A function and its arguments."""

    function: Callable[..., Any]
    arguments: dict[str, Any]

    def __call__(self) -> Any:
        return self.function(**self.arguments)

    def map(self, function: Callable[[Tensor], Any]) -> Call:
        """The same call with other tensors."""
        return Call(self.function, {k: map_tensors(function, x) for k, x in self.arguments.items()})

    def request(self, index: int) -> Call:
        """The call of one request alone; its first dimension is that of every tensor but these."""
        shared = {"normalizer", "depth_weights", "row_slot"}
        if self.arguments.get("row") is not None:
            shared |= {"logits", "child_value"}
            if self.function is vstar_ops.draw_children:
                shared |= {"logp", "token", "node"}

        def part(x: Tensor) -> Tensor:
            return x[index : index + 1]

        return self._replace(
            arguments={
                k: x
                if k in shared
                else map_alive(lambda x: part(x) if len(x) > 1 else x, map_tensors(part, x))
                for k, x in self.arguments.items()
            }
        )


def token_logp_gradient(
    logits: Tensor, grad_logp: Tensor | None, grad_entropy: Tensor | None, **options: Any
) -> Tensor:
    """The gradient of the logits of ``token_logp``."""
    z = logits.detach().requires_grad_()
    out = vstar_ops.token_logp(z, **options)
    pairs = [(x, g) for x, g in zip(out, (grad_logp, grad_entropy)) if g is not None]
    (gradient,) = torch.autograd.grad([x for x, _ in pairs], z, [g for _, g in pairs])
    return gradient


def loss_and_gradient(logp: Tensor, *given: Any, **options: Any) -> tuple[vstar_ops.SiblingGRPOLoss, Tensor]:
    """``sibling_grpo_loss``, and its gradient by ``logp``."""
    x = logp.detach().requires_grad_()
    out = vstar_ops.sibling_grpo_loss(x, *given, **options)
    (gradient,) = torch.autograd.grad(out.loss, x)
    return vstar_ops.SiblingGRPOLoss(*(x.detach() for x in out)), gradient


def select(trees: SearchTrees, **options: Any) -> tuple[Any, ...]:
    """``ved_select`` on a copy: its rows, and the trees after it."""
    trees = map_tensors(lambda x: x.detach().clone(), trees)
    return ved_select(trees, **options), trees


def insert(trees: SearchTrees, rows: SelectedRows, evaluation: NodeEvaluation, **options: Any) -> SearchTrees:
    """``ved_insert`` on a copy: the trees after it."""
    trees = map_tensors(lambda x: x.detach().clone(), trees)
    ved_insert(trees, rows, evaluation, **options)
    return trees


def filter_bits(bits: ItemFilter, trie: Trie, row: Tensor | None, **options: Any) -> ItemFilter:
    """``filter_items`` on a copy: the bits after it."""
    bits = map_tensors(lambda x: x.detach().clone(), bits)
    filter_items(bits, trie, row, **options)
    return bits


# What changes its arguments, in place of the calls on copies above.
IN_PLACE: dict[str, Callable[..., Any]] = {
    "ved_select": ved_select, "ved_insert": ved_insert, "filter_items": filter_items,
}  # fmt: skip


def moved(x: Tensor, device: str) -> Tensor:
    """A copy on a device. The whole storage is copied, so that strides and offset stay."""
    memory = torch.empty(0, dtype=torch.uint8, device=x.device).set_(x.untyped_storage())
    there = memory.to(device, copy=True).untyped_storage()
    return torch.empty(0, dtype=x.dtype, device=device).set_(there, x.storage_offset(), x.shape, x.stride())
