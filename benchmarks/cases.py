"""The cases that ``python -m benchmarks``, ``python -m benchmarks.gpu`` and ``bench_ops.py`` time.

A case is one op on one shape: the op, the torch compositions that compute the same, and what each call reads.
:data:`SIZES` lists the shapes for a CPU, for a GPU, and small ones that check the programs themselves.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import vstar_ops
from vstar_ops import (
    NodeEvaluation,
    SearchTrees,
    SelectedRows,
    Trie,
    expand_topk,
    ved_candidates,
    ved_insert,
    ved_select,
)

from . import baselines, catalogue

CACHE = 150e6  # bytes: three times the L2 cache of an H100
PIECE = 2**18  # elements compared at a time: the temporaries stay in the cache
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
Function = Callable[
    ..., Sequence[Any]
]  # of one input set; returns tensors, None for what it does not compute


@dataclass(frozen=True)
class Case:
    """One op on one shape.

    Attributes:
        name: op and shape.
        variants: functions of an input set that compute the same: ``ours``, then compositions in torch. Their
            results stand in the order of the op's. The last one is what GPUs are compared with.
        read: bytes that any implementation must read, each once.
        inputs: the input sets; several where one would fit into the cache of a GPU.
        others: timed beside the variants, but compute something else.
        oracle: what the variants are checked against as well; None for ``ours`` on the reference backend.
        ranked: whether results are sorted by result 0, so that those of nearly the same score may swap.
        rtol, atol: of the check.
        reset: brings back what the calls change, before every sample.
        calls: in a sample; 0 for as many as are good for the clock.
        compiled: whether to time ``torch.compile`` of the last variant on a GPU, which takes long.
    """

    name: str
    variants: dict[str, Function]
    read: int
    inputs: Sequence[tuple[Tensor, ...]] = ((),)
    others: dict[str, Function] = field(default_factory=dict)
    oracle: Function | None = None
    ranked: bool = False
    rtol: float = 1e-4
    atol: float = 1e-4
    reset: Callable[[], None] = lambda: None
    calls: int = 0
    compiled: bool = False

    def timed(self) -> dict[str, Callable[[int], Any]]:
        """Variants and others as functions of the number of an input set."""
        return {name: self.on_set(function) for name, function in (self.variants | self.others).items()}

    def on_set(self, function: Function) -> Callable[[int], Any]:
        """A variant as a function of the number of an input set."""
        return lambda i=0: function(*self.inputs[i])

    def results(self, function: Function) -> list[Tensor | None]:
        """Those on input set 0, which later calls do not change."""
        self.reset()
        found = function(*self.inputs[0])
        return [x.clone() if self.calls else x for x in found]

    def bytes(self) -> int:
        """That any implementation must read and write, each once."""
        return self.read + _nbytes(*self.results(self.variants["ours"]))

    def check(self, **more: Function) -> None:
        """Compare every variant, the oracle, and ``more`` with every other; raises where two differ."""
        found = {name: self.results(function) for name, function in (self.variants | more).items()}
        found["reference"] = self.results(self.oracle or self._reference)
        self.reset()
        for (first, got), (second, want) in itertools.combinations(found.items(), 2):
            may_swap = _near_ties(want[0]) if self.ranked else None  # type: ignore[arg-type]
            for i, (x, y) in enumerate(zip(got, want)):
                if x is not None and y is not None:
                    what = f"{self.name}: result {i} of {first!r} and {second!r}"
                    if i and may_swap is not None and x.shape == may_swap.shape:
                        if {first, second} == {"ours", "reference"}:  # both break exact ties by index
                            share = (x != y).float().mean().item()
                            assert x.is_floating_point() or share <= 1e-3, f"{what}: {share:.2%} differ"
                        x, y = x[~may_swap], y[~may_swap]
                    self._compare(x, y, what)

    def _reference(self, *inputs: Tensor) -> Sequence[Any]:
        with vstar_ops.use_backend("reference"):
            return self.variants["ours"](*inputs)

    def _compare(self, x: Tensor, y: Tensor, what: str) -> None:
        if not x.is_floating_point():
            assert torch.equal(x.long(), y.long()), f"{what} differ"
            return
        rounding = sum(2**-8 for t in (x, y) if t.dtype == torch.bfloat16)
        bounds = {"rtol": max(self.rtol, rounding), "atol": self.atol, "check_dtype": False}
        for a, b in zip(x.flatten().split(PIECE), y.flatten().split(PIECE), strict=True):
            torch.testing.assert_close(a, b, **bounds, msg=lambda text: f"{what}: {text}")


def _near_ties(score: Tensor) -> Tensor:
    """Where another order is right too: beside nearly the same score, and at the end, beside what was cut."""
    swaps, near = torch.zeros_like(score, dtype=torch.bool), score.diff(dim=1).abs() < 1e-5
    swaps[:, 1:] |= near
    swaps[:, :-1] |= near
    swaps[:, -1] = True
    return swaps


def _nbytes(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


class Setting(NamedTuple):
    """Where the cases run, and on which catalogue.

    Attributes:
        device: of all inputs.
        sequences: of the catalogue, on the CPU.
        rotate: whether to make several input sets where one would fit into a GPU's cache.
    """

    device: str
    sequences: Tensor
    rotate: bool = False

    @property
    def columns(self) -> int:
        """Of the logits of a model of this catalogue."""
        return max(int(self.sequences.max()) + 1, 768)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device)

    def logits(self, *shape: int, dtype: torch.dtype) -> list[tuple[Tensor]]:
        """Input sets of logits."""
        size = torch.Size(shape).numel() * dtype.itemsize
        sets = max(1, min(16, round(CACHE / size))) if self.rotate and size > 1e6 else 1
        return [(self.normal(*shape).to(dtype),) for _ in range(sets)]

    def candidates(self, batch: int, group: int, length: int) -> Tensor:
        """``[B, G, L]``: random items of the catalogue, or of ``length`` tokens of 8 codes."""
        if length:
            return torch.randint(8, (batch, group, length), device=self.device)
        return self.sequences[torch.randint(len(self.sequences), (batch, group))].to(self.device)

    def beams(self, batch: int, width: int, depth: int) -> tuple[Trie, Tensor, Tensor]:
        """The catalogue's trie, and ``node, cum_logp`` that a beam search over random logits has at ``depth``."""
        trie = Trie.from_sequences(self.sequences)
        with vstar_ops.use_backend("auto"):  # on the CPU
            node, cum_logp = catalogue.frontiers(trie, batch, width, self.columns)[depth]
        return trie.to(self.device), node.to(self.device), cum_logp.to(self.device)


def expand_dense(
    s: Setting, batch: int, width: int, columns: int, k: int, dtype: torch.dtype, normalize: str = "legal"
) -> Case:
    """Every column legal, as at the first level of a catalogue."""
    trie = Trie.from_sequences(torch.arange(columns)[:, None]).to(s.device)
    inputs, cum_logp = s.logits(batch, width, columns, dtype=dtype), s.normal(batch, width)
    node = torch.zeros(batch, width, dtype=torch.int32, device=s.device)
    kind = "dense" if normalize == "legal" else normalize
    return Case(
        f"expand_topk {kind} {NAMES[dtype]} B={batch} W={width} V={columns} K={k}",
        {
            "ours": lambda z: expand_topk(z, trie, node, k, cum_logp=cum_logp, normalize=normalize),
            "log_softmax, top-k": lambda z: baselines.expand_dense(z, cum_logp, k),
        },
        _nbytes(*inputs[0], cum_logp, node),
        inputs,
        ranked=True,
        compiled=dtype == torch.bfloat16,
    )


def expand_legal(
    s: Setting,
    batch: int,
    width: int,
    k: int,
    depth: int,
    dtype: torch.dtype,
    columns: int = 0,
    normalize: str = "legal",
) -> Case:
    """Below the beams that random logits leave, with value and entropy; 0 columns for the catalogue's own."""
    columns = columns or s.columns
    trie, node, cum_logp = s.beams(batch, width, depth)
    tables = baselines.child_tables(trie, depth)
    index, value = node.long(), s.normal(*node.shape)
    inputs, vocab = s.logits(*node.shape, columns, dtype=dtype), normalize == "vocab"
    scoring: dict[str, Any] = {"cum_logp": cum_logp, "value": value, "value_weight": 1.0}
    scoring |= {"entropy_weight": 0.1, "normalize": normalize}
    edges = int(trie.num_children(node).sum())
    read = _nbytes(*inputs[0]) if vocab else dtype.itemsize * edges
    return Case(
        f"expand_topk {normalize} depth {depth} {NAMES[dtype]} B={batch} W={width} V={columns} K={k}",
        {
            "ours": lambda z: expand_topk(z, trie, node, k, **scoring),
            "log_softmax, gather, top-k" if vocab else "gather, log_softmax, top-k": lambda z: (
                baselines.expand_legal(z, tables, index, cum_logp, value, k, vocab)
            ),
        },
        read + 4 * edges + _nbytes(node, cum_logp, value),
        inputs,
        ranked=True,
        compiled=batch == 16 and depth == 1,
    )


def sibling_advantage(s: Setting, batch: int, group: int, length: int = 0) -> Case:
    """Of candidates drawn at random."""
    tokens, rewards = s.candidates(batch, group, length), torch.rand(batch, group, device=s.device)
    return Case(
        f"sibling_advantage B={batch} G={group} L={tokens.shape[2]}",
        {
            "ours": lambda: vstar_ops.sibling_advantage(tokens, rewards),
            "unique, index_add": lambda: baselines.sibling_advantage(tokens, rewards),
            "unique of packed keys, index_add": lambda: baselines.sibling_advantage(tokens, rewards, True),
        },
        _nbytes(tokens, rewards),
    )


def group_advantage(s: Setting, batch: int, group: int) -> Case:
    """GRPO's advantage."""
    x = torch.rand(batch, group, device=s.device)
    return Case(
        f"group_advantage B={batch} G={group}",
        {
            "ours": lambda: (vstar_ops.group_advantage(x),),
            "mean, std": lambda: ((x - x.mean(1, True)) / (x.std(1, keepdim=True) + 1e-4),),
        },
        _nbytes(x),
        compiled=True,
    )


def prefix_returns(s: Setting, batch: int, group: int, width: int) -> Case:
    """Dense returns of prefix buckets, from embeddings of ``width`` numbers."""
    tokens = s.candidates(batch, group, 0)
    given = (tokens, s.normal(batch, group, width), tokens[:, 0].clone(), s.normal(batch, width))
    return Case(
        f"prefix_returns B={batch} G={group} L={tokens.shape[2]} E={width}",
        {
            "ours": lambda: vstar_ops.prefix_returns(*given),
            "unique of packed keys, index_add": lambda: baselines.prefix_returns(*given, (0.3, 0.5, 1.0)),
        },
        _nbytes(*given),
    )


def prefix_tree(s: Setting, batch: int, group: int) -> Case:
    """The distinct prefixes of candidates drawn at random."""
    tokens = s.candidates(batch, group, 0)
    return Case(
        f"prefix_tree B={batch} G={group} L={tokens.shape[2]}",
        {
            "ours": lambda: vstar_ops.prefix_tree(tokens),
            "unique of packed keys, scatter": lambda: baselines.prefix_tree(tokens),
        },
        _nbytes(tokens),
    )


def _with_gradient(logits: Tensor, target: Tensor, *where: Any) -> tuple[Tensor, Tensor]:
    logp = vstar_ops.token_logp(logits, target, *where).logp
    return logp.detach(), torch.autograd.grad(logp.sum(), logits)[0]


def token_logp(s: Setting, rows: int, columns: int, dtype: torch.dtype) -> Case:
    """Over the whole vocabulary, forward and backward, beside the memory's own pace."""
    logits = s.normal(rows, columns).to(dtype).requires_grad_()
    target, plain = torch.randint(columns, (rows,), device=s.device), logits.detach()
    return Case(
        f"token_logp {NAMES[dtype]} [{rows}, {columns}] forward, backward",
        {
            "ours": lambda: _with_gradient(logits, target),
            "cross_entropy": lambda: baselines.cross_entropy(logits, target),
            "log_softmax, gather": lambda: baselines.token_logp(logits, target),
        },
        2 * _nbytes(logits),
        others={
            "reading twice, writing once": lambda: (
                plain.sum(),
                plain.sum(),
                torch.empty_like(plain).fill_(1.0),
            )
        },
        # The reference's tables in float64 would not fit into memory.
        oracle=lambda: baselines.token_logp(plain.float().requires_grad_(), target),
        atol=1e-6,
    )


def token_logp_legal(s: Setting, rows: int, columns: int, dtype: torch.dtype) -> Case:
    """Over the legal children at depth 1, forward and backward, beside the same over all columns."""
    trie, node, _ = s.beams(-(-rows // 16), 16, 1)
    node = node.flatten()[:rows]
    tokens = trie.children(node).token.long()
    target, logits = tokens[:, 0].clone(), s.normal(rows, columns).to(dtype).requires_grad_()
    return Case(
        f"token_logp legal depth 1 {NAMES[dtype]} [{rows}, {columns}] forward, backward",
        {
            "ours": lambda: _with_gradient(logits, target, trie, node),
            "gather, log_softmax": lambda: baselines.token_logp_legal(logits, tokens),
        },
        int((tokens >= 0).sum()) * (2 * dtype.itemsize + 8),
        others={"ours, all columns": lambda: _with_gradient(logits, target)},
        atol=1e-6,
    )


def sibling_grpo_loss(s: Setting, batch: int, group: int, length: int = 0) -> Case:
    """With clipping and KL, forward and backward; the advantages are given."""
    tokens, rewards = s.candidates(batch, group, length), torch.rand(batch, group, device=s.device)
    siblings, over_group = vstar_ops.sibling_advantage(tokens, rewards), vstar_ops.group_advantage(rewards)
    old, ref, logp = (-torch.rand(tokens.shape, device=s.device) for _ in range(3))
    logp.requires_grad_()

    def ours() -> tuple[Tensor, ...]:
        given: dict[str, Any] = {"sibling_advantage": siblings, "group_advantage": over_group}
        out = vstar_ops.sibling_grpo_loss(logp, old_logp=old, ref_logp=ref, clip=(0.2, 0.2), **given)
        return out.loss.detach(), torch.autograd.grad(out.loss, logp)[0]

    return Case(
        f"sibling_grpo_loss B={batch} G={group} L={tokens.shape[2]} forward, backward",
        {
            "ours": ours,
            "torch, autograd": lambda: baselines.sibling_grpo_loss(logp, old, ref, siblings, over_group),
        },
        _nbytes(logp, old, ref, *siblings[:2], siblings.num_candidates, over_group),
        atol=1e-6,
    )


def ved_round(s: Setting, batch: int, budget: int) -> Case:
    """A round of tree search without the model: select, insert what a made-up model says, rank.

    Half of the budget is spent first, and every sample starts there again.
    """
    trie = Trie.from_sequences(torch.cartesian_prod(*[torch.arange(32)] * 3)).to(s.device)

    def evaluation(node: Tensor) -> NodeEvaluation:
        def floats(*shape: int) -> Tensor:
            return torch.rand(*node.shape, *shape, device=s.device)

        start, zero = trie.offset[node.clamp(min=0).long()], torch.zeros_like(node)
        child = start[..., None] + torch.arange(1, 33, device=s.device, dtype=torch.int32)
        lists = (trie.num_children(node), child, -floats(32), child, -floats(32), floats(32), zero)
        return NodeEvaluation(zero.long(), floats(), floats(), *lists)

    trees = SearchTrees.empty(batch, budget, 3, children=32, leaves=32, device=s.device)
    root = torch.zeros(batch, 1, dtype=torch.int32, device=s.device)
    rows = SelectedRows(root - 1, root, torch.zeros(batch, 1, device=s.device))
    ved_insert(trees, rows, evaluation(rows.node))
    for _ in range(budget // 6):
        rows = ved_select(trees)
        ved_insert(trees, rows, evaluation(rows.node))
    said = evaluation(rows.node)
    planted = {name: value.clone() for name, value in vars(trees).items()}

    def ours() -> tuple[Tensor, ...]:
        chosen = ved_select(trees)
        ved_insert(trees, chosen, said)
        return (*chosen, *ved_candidates(trees, 3, 16), trees.visits, trees.size)

    def reset() -> None:
        for name, value in planted.items():
            getattr(trees, name).copy_(value)

    return Case(
        f"ved round B={batch} budget={budget}, without the model",
        {"ours": ours},
        _nbytes(trees.node, trees.parent, trees.priority, trees.next_child, trees.num_children, trees.depth),
        rtol=1.3e-6,
        atol=1e-5,
        reset=reset,
        calls=10,
    )


FP32, BF16 = torch.float32, torch.bfloat16
SIZES: dict[str, list[tuple[Any, ...]]] = {
    "cpu": [
        (expand_legal, 64, 16, 16, 1, FP32),
        (expand_legal, 64, 16, 16, 2, FP32),
        (expand_legal, 64, 16, 16, 1, FP32, 152_064),
        (expand_dense, 16, 128, 8192, 128, FP32, "vocab"),
        *((sibling_advantage, *size) for size in ((64, 16), (256, 64))),
        (group_advantage, 256, 64),
        *((prefix_returns, *size, 64) for size in ((64, 16), (256, 64))),
        *((prefix_tree, *size) for size in ((64, 16), (256, 64))),
        *((sibling_grpo_loss, *size) for size in ((64, 16), (256, 64))),
        (ved_round, 64, 129),
        (token_logp, 1024, 152_064, FP32),
        (token_logp_legal, 1024, 152_064, FP32),
    ],
    "cuda": [
        *((expand_dense, batch, 128, 8192, 128, BF16) for batch in (16, 256)),
        (expand_dense, 16, 128, 8192, 128, FP32),
        (expand_dense, 1, 1, 151_936, 128, BF16),
        *((expand_legal, *size, depth, BF16) for depth in (1, 2) for size in ((16, 128, 128), (64, 16, 16))),
        (expand_legal, 16, 16, 16, 1, BF16, 151_936),
        (expand_legal, 16, 16, 16, 1, BF16, 151_936, "vocab"),
        *((sibling_advantage, *size) for size in ((64, 16), (1024, 64), (64, 512, 8))),
        (group_advantage, 1024, 64),
        (prefix_returns, 256, 64, 64),
        (prefix_tree, 256, 64),
        (token_logp, 4096, 151_936, BF16),
        (token_logp_legal, 4096, 151_936, BF16),
        *((sibling_grpo_loss, *size) for size in ((64, 16), (1024, 64), (64, 512, 8))),
        (ved_round, 1024, 129),
    ],
    "small": [
        (expand_dense, 2, 4, 64, 8, BF16),
        (expand_legal, 2, 4, 8, 1, BF16),
        (expand_legal, 2, 4, 4, 2, BF16, 0, "vocab"),
        (sibling_advantage, 2, 8),
        (group_advantage, 2, 8),
        (prefix_returns, 2, 8, 16),
        (prefix_tree, 2, 8),
        (token_logp, 4, 5000, BF16),
        (token_logp_legal, 4, 5000, BF16),
        (sibling_grpo_loss, 2, 8),
        (ved_round, 2, 13),
    ],
}


def cases(size: str, setting: Setting) -> Iterator[partial[Case]]:
    """Makers of the cases of ``"cpu"``, ``"cuda"`` or ``"small"``: one is made at a time, for its memory."""
    for make, *arguments in SIZES[size]:
        yield partial(make, setting, *arguments)
