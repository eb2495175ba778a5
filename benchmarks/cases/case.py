"""What a case is, how its variants are checked, and the random inputs that cases share."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import vstar_ops
from vstar_ops import Trie

from .. import catalogue

CACHE = 150e6  # bytes: three times the L2 cache of an H100
PIECE = 2**18  # elements compared at a time: the temporaries stay in the cache
BF16, FP32 = torch.bfloat16, torch.float32
Function = Callable[..., Any]


@dataclass(frozen=True)
class Case:
    """One op on one shape.

    Attributes:
        name: op and shape.
        variants: functions of an input set that compute the same: ``ours``, then compositions in torch, the
            last of which is for GPUs. Results stand in the op's order, None for what is not computed.
        inputs: the input sets; several where one would fit into the cache of a GPU.
        read: bytes that any implementation must read, each once; None for all of an input set.
        others: timed beside the variants, but compute something else.
        ranked: whether results are sorted by result 0, so that those of nearly the same score may swap.
        few: how many requests the reference computes; None for all.
        rtol, atol: of the check.
        reset: brings back what calls change, before every sample.
        calls: in a sample; 0 for as many as are good for the clock.
        compiled: whether to time ``torch.compile`` of the last variant, which takes long.
    """

    name: str
    variants: Mapping[str, Function]
    inputs: Sequence[tuple[Any, ...]]
    read: int | None = None
    others: Mapping[str, Function] = field(default_factory=dict)
    ranked: bool = False
    few: int | None = None
    rtol: float = 1e-4
    atol: float = 1e-4
    reset: Callable[[], None] = lambda: None
    calls: int = 0
    compiled: bool = False

    def run(self, function: Function, i: int = 0) -> Any:
        """What is timed: a variant on an input set, with the gradient where the first input asks for it."""
        return _with_gradient(function, self.inputs[i])

    def bytes(self) -> int:
        """That any implementation must read and write, each once."""
        read = nbytes(self.inputs[0]) if self.read is None else self.read
        return read + nbytes(self.results("ours"))

    def results(self, variant: str) -> list[Tensor | None]:
        """Of the first input set."""
        return self._results(self.variants[variant], self.inputs[0])

    def check(self, **more: Function) -> None:
        """Compare all variants, ``more`` and the reference with one another; raise where two differ."""
        variants, inputs = {**self.variants, **more}, self.inputs[0]
        found = {name: self._results(function, inputs) for name, function in variants.items()}
        with vstar_ops.use_backend("reference"):
            found["reference"] = self._results(self.variants["ours"], [self._exact(x) for x in inputs])
        self.reset()
        for (first, got), (second, want) in itertools.combinations(found.items(), 2):
            rows = self.few if second == "reference" else None
            may_swap = near_ties(want[0]) if self.ranked else torch.zeros(0)
            for i, (x, y) in enumerate(zip(got, want)):
                if x is None or y is None:
                    continue
                what, x = f"{self.name}: result {i} of {first!r} and {second!r}", x[:rows] if rows else x
                if i and x.shape == may_swap.shape:
                    if {first, second} == {"ours", "reference"} and not x.is_floating_point():
                        share = (x != y).float().mean().item()  # both break exact ties by index
                        assert share <= 1e-3, f"{what}: {share:.2%} differ"
                    x, y = x[~may_swap], y[~may_swap]
                self._compare(x, y, what)

    def _exact(self, x: Any) -> Any:
        """An input of the reference: few requests, and no gradient that is rounded to bfloat16."""
        x = x[: self.few] if self.few else x
        return x.detach().float().requires_grad_() if isinstance(x, Tensor) and x.requires_grad else x

    def _results(self, function: Function, inputs: Sequence[Any]) -> list[Tensor | None]:
        self.reset()
        found = _with_gradient(function, inputs)
        found = [found] if isinstance(found, Tensor) else found
        return [x.clone() if self.calls else x for x in found]  # later calls change what has a reset

    def _compare(self, x: Tensor, y: Tensor, what: str) -> None:
        if not x.is_floating_point():
            assert torch.equal(x.long(), y.long()), f"{what} differ"
            return
        rtol = max(self.rtol, sum(2**-8 for t in (x, y) if t.dtype == BF16))
        for a, b in zip(x.flatten().split(PIECE), y.flatten().split(PIECE), strict=True):
            torch.testing.assert_close(
                a, b, rtol=rtol, atol=self.atol, check_dtype=False, msg=lambda text: f"{what}: {text}"
            )


def _with_gradient(function: Function, inputs: Sequence[Any]) -> Any:
    out = function(*inputs)
    if not isinstance(out, Tensor) or not out.requires_grad:
        return out
    return out.detach(), torch.autograd.grad(out, inputs[0], torch.ones_like(out))[0]


def near_ties(score: Any) -> Tensor:
    """Where another order is right too: beside nearly the same score, and at the end, beside what was cut."""
    swaps, near = torch.zeros_like(score, dtype=torch.bool), score.diff(dim=1).abs() < 1e-5
    swaps[:, 1:] |= near
    swaps[:, :-1] |= near
    swaps[:, -1] = True
    return swaps


def nbytes(tensors: Sequence[Any]) -> int:
    return sum(t.nbytes for t in tensors if isinstance(t, Tensor))


def random_logits(*shape: int, dtype: torch.dtype) -> list[Tensor]:
    """Of each input set: several where a GPU's cache would hold one."""
    logits = [torch.randn(shape).to(dtype)]
    if logits[0].is_cuda and logits[0].nbytes > 1e6:
        logits += [torch.randn(shape).to(dtype) for _ in range(min(15, round(CACHE / logits[0].nbytes) - 1))]
    return logits


def random_items(items: Tensor, batch: int, group: int, length: int = 0) -> Tensor:
    """``[B, G, L]``: of the catalogue, or of ``length`` tokens of 8 codes."""
    return (
        torch.randint(8, (batch, group, length))
        if length
        else items[torch.randint(len(items), (batch, group))]
    )


def beams(
    items: Tensor, batch: int, width: int, depth: int, banned: float = 0
) -> tuple[Trie, int, Tensor, Tensor]:
    """The trie, its columns, and ``node, cum_logp`` that beam search of random logits has at ``depth``.

    ``banned``: the share of the items that the trie is restricted to do without.
    """
    trie = Trie.from_sequences(items.cpu())
    columns = max(trie.max_token + 1, 768)
    with torch.device("cpu"), vstar_ops.use_backend("auto"):
        if banned:
            trie = trie.restrict(ban=torch.rand(trie.num_items) < banned)
        node, cum_logp = catalogue.frontiers(trie, batch, width, columns)[depth]
    return trie.to(items.device), columns, node.to(items.device), cum_logp.to(items.device)


def short(dtype: torch.dtype) -> str:
    return {FP32: "fp32", BF16: "bf16"}[dtype]
