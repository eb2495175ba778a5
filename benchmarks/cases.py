"""The cases that ``python -m benchmarks``, ``python -m benchmarks.gpu`` and ``bench_ops.py`` time.

A case is one op on one shape and the torch compositions that compute the same. :data:`SIZES` lists the shapes
for a CPU, for a GPU, and small ones that check the programs themselves.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

import vstar_ops
from vstar_ops import NodeEvaluation, SearchTrees, SelectedRows, Trie, ved_candidates, ved_insert, ved_select
from vstar_ops.verify.calls import with_alive
from vstar_ops.verify.cases import restricted

from . import baselines, catalogue

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
        compiled: whether to time ``torch.compile`` of the last variant on a GPU, which takes long.
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
        return read + nbytes(self._results(self.variants["ours"], self.inputs[0]))

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

    ``banned``: the share of the sequences that the trie is restricted to do without.
    """
    trie = Trie.from_sequences(items.cpu())
    columns = max(trie.max_token + 1, 768)
    with torch.device("cpu"), vstar_ops.use_backend("auto"):
        if banned:
            trie = restricted(trie, torch.rand(1, trie.num_sequences) >= banned)
        node, cum_logp = catalogue.frontiers(trie, batch, width, columns)[depth]
    there = trie.to(items.device)
    there = there if trie.alive is None else with_alive(there, trie.alive.to(items.device))
    return there, columns, node.to(items.device), cum_logp.to(items.device)


def short(dtype: torch.dtype) -> str:
    return {FP32: "fp32", BF16: "bf16"}[dtype]


def expand_dense(
    items: Tensor, batch: int, width: int, columns: int, k: int, dtype: torch.dtype, normalize: str = "legal"
) -> Case:
    """Every column legal, as at the first level of a catalogue."""
    trie = Trie.from_sequences(torch.arange(columns, device="cpu")[:, None]).to(items.device)
    cum_logp, node = torch.randn(batch, width), torch.zeros(batch, width, dtype=torch.int32)

    def ours(logits: Tensor, node: Tensor, cum_logp: Tensor) -> Any:
        return vstar_ops.expand_topk(logits, trie, node, k, cum_logp=cum_logp, normalize=normalize)

    kind = "dense" if normalize == "legal" else normalize
    return Case(
        f"expand_topk {kind} {short(dtype)} B={batch} W={width} V={columns} K={k}",
        {"ours": ours, "log_softmax, top-k": partial(baselines.expand_dense, k=k)},
        [(z, node, cum_logp) for z in random_logits(batch, width, columns, dtype=dtype)],
        ranked=True,
        compiled=dtype == BF16,
    )


def expand_legal(
    items: Tensor,
    batch: int,
    width: int,
    k: int,
    depth: int,
    dtype: torch.dtype,
    columns: int = 0,
    normalize: str = "legal",
    banned: float = 0,
) -> Case:
    """Below the beams that random logits leave, with value and entropy; 0 columns for the catalogue's own.

    ``banned``: the share of the items that are not allowed.
    """
    trie, own, node, cum_logp = beams(items, batch, width, depth, banned)
    alive = None
    if trie.alive is not None:
        alive = (trie.alive[0, :, None] >> torch.arange(32) & 1).flatten()[: trie.num_nodes + 1].bool()
    columns, vocab, edges = columns or own, normalize == "vocab", int(trie.num_children(node).sum())
    tables, index, value = baselines.child_tables(trie, depth), node.long(), torch.randn(node.shape)
    scoring: dict[str, Any] = {"cum_logp": cum_logp, "value": value, "value_weight": 1.0}
    scoring |= {"entropy_weight": 0.1, "normalize": normalize}
    logits = random_logits(*node.shape, columns, dtype=dtype)
    return Case(
        f"expand_topk {normalize} depth {depth} {short(dtype)} B={batch} W={width} V={columns} K={k}"
        + f", {banned:.0%} banned" * bool(banned),
        {
            "ours": lambda z: vstar_ops.expand_topk(z, trie, node, k, **scoring),
            "log_softmax, gather, top-k" if vocab else "gather, log_softmax, top-k": lambda z: (
                baselines.expand_legal(z, tables, index, cum_logp, value, k, vocab, alive)
            ),
        },
        [(z,) for z in logits],
        (logits[0].nbytes if vocab else dtype.itemsize * edges) + 4 * edges + nbytes((node, cum_logp, value)),
        ranked=True,
        compiled=batch == 16 and depth == 1,
    )


def sibling_advantage(items: Tensor, batch: int, group: int, length: int = 0) -> Case:
    """Of candidates drawn at random."""
    tokens = random_items(items, batch, group, length)
    variants: dict[str, Function] = {
        "ours": vstar_ops.sibling_advantage,
        "unique, index_add": baselines.sibling_advantage,
        "unique of packed keys, index_add": partial(baselines.sibling_advantage, packed=True),
    }
    name = f"sibling_advantage B={batch} G={group} L={tokens.shape[2]}"
    return Case(name, variants, [(tokens, torch.rand(batch, group))])


def group_advantage(items: Tensor, batch: int, group: int) -> Case:
    """GRPO's advantage."""
    variants = {"ours": vstar_ops.group_advantage, "mean, std": baselines.group_advantage}
    return Case(
        f"group_advantage B={batch} G={group}", variants, [(torch.rand(batch, group),)], compiled=True
    )


def prefix_returns(items: Tensor, batch: int, group: int, width: int) -> Case:
    """Dense returns of prefix buckets, from embeddings of ``width`` numbers."""
    tokens = random_items(items, batch, group)
    inputs = tokens, torch.randn(batch, group, width), tokens[:, 0].clone(), torch.randn(batch, width)
    torch_way = partial(baselines.prefix_returns, weights=(0.3, 0.5, 1.0))
    variants: dict[str, Function] = {
        "ours": vstar_ops.prefix_returns,
        "unique of packed keys, index_add": torch_way,
    }
    return Case(f"prefix_returns B={batch} G={group} L={tokens.shape[2]} E={width}", variants, [inputs])


def prefix_tree(items: Tensor, batch: int, group: int) -> Case:
    """The distinct prefixes of candidates drawn at random."""
    tokens = random_items(items, batch, group)
    variants = {"ours": vstar_ops.prefix_tree, "unique of packed keys, scatter": baselines.prefix_tree}
    return Case(f"prefix_tree B={batch} G={group} L={tokens.shape[2]}", variants, [(tokens,)])


def advance_beams(items: Tensor, batch: int, width: int) -> Case:
    """The winners of random logits at depth 2, as beams."""
    trie, columns, node, cum_logp = beams(items, batch, width, 1)
    out = vstar_ops.expand_topk(torch.randn(*node.shape, columns), trie, node, width, cum_logp=cum_logp)
    tokens, slot = trie.sequences(node)[..., :1].contiguous(), torch.randint(2**31, node.shape)
    variants: dict[str, Function] = {"ours": vstar_ops.advance_beams, "gather, mask": baselines.advance_beams}
    return Case(
        f"advance_beams B={batch} W={width}", variants, [(out.parent, out.token, out.node, tokens, slot)]
    )


def rows_to_run(items: Tensor, batch: int, width: int) -> Case:
    """Of the same beams, after the first level has been run where it branches."""
    trie, _, node, _ = beams(items, batch, width, 2)
    tokens, slot = trie.sequences(node)[..., :2].contiguous(), torch.randint(2**31, node.shape)
    evaluated = (trie.num_children(trie.parent(node)) > 1).int()
    variants = {"ours": partial(vstar_ops.rows_to_run, trie), "nonzero": partial(baselines.rows_to_run, trie)}
    return Case(f"rows_to_run B={batch} W={width}", variants, [(node, tokens, slot, evaluated)])


def filter_items(items: Tensor, number: int, changed: int) -> Case:
    """One filter of a made catalogue of three levels of 256 codes, of which so many items are banned."""
    trie = Trie.from_sequences(torch.randint(256, (number, 3)).cpu()).to(items.device)
    view = trie.restrict(ban=[])
    planted = view.alive.clone(), view.bits.allowed.clone()
    parent, leaf = (
        trie.parent(torch.arange(trie.num_nodes)).long(),
        torch.repeat_interleave(trie.item_offset.diff()),
    )
    flags = torch.ones(number, dtype=torch.bool)

    def ours(row: Tensor) -> tuple[Tensor, ...]:
        vstar_ops.filter_items(view.bits, trie, row, allow=False)
        return view.alive, view.bits.allowed

    def torch_way(row: Tensor) -> tuple[Tensor, ...]:
        return baselines.filter_items(trie, flags, parent, leaf + trie.level_offset[-2], row, allow=False)

    def reset() -> None:
        view.alive.copy_(planted[0])
        view.bits.allowed.copy_(planted[1])

    rows = torch.randperm(number)[None, :changed]
    variants: dict[str, Function] = {"ours": ours, "all nodes, amax by level": torch_way}
    # Every changed item and its nodes are read and written once.
    name, words = f"filter_items {number:,} items, {changed:,} changed", 4 * changed * (3 * trie.length + 3)
    return Case(name, variants, [(rows,)], words, reset=reset, calls=1)


def draw_children(items: Tensor, batch: int, candidates: int) -> Case:
    """At depth 1, out of the 50 most probable tokens of the prefixes that random logits leave."""
    trie, columns, node, _ = beams(items, batch, candidates, 1)
    lists = vstar_ops.expand_topk(torch.randn(node.numel(), 1, columns), trie, node.reshape(-1, 1), 50)
    row = torch.arange(node.numel()).view(node.shape)
    inputs = (
        lists.logp,
        lists.token,
        lists.node,
        trie.sequences(node)[..., :1],
        row,
        node,
        torch.arange(batch),
    )

    def ours(*a: Tensor) -> Any:
        return vstar_ops.draw_children(*a[:4], row=a[4], prefix=a[5], seed=a[6])

    variants = {"ours": ours, "noise, argmax, gather": baselines.draw_children}
    return Case(f"draw_children B={batch} K={candidates} C=50", variants, [inputs])


def distinct_rows(items: Tensor, batch: int, candidates: int) -> Case:
    """Of candidates drawn at random, at depth 1."""
    tokens = random_items(items, batch, candidates)[..., 0].int()
    inputs = tokens + 1, tokens, torch.arange(batch), torch.arange(batch)[:, None].repeat(1, candidates)
    variants: dict[str, Function] = {
        "ours": lambda *a: vstar_ops.distinct_rows(*a[:3], row=a[3]),
        "unique, scatter": baselines.distinct_rows,
    }
    return Case(f"distinct_rows B={batch} K={candidates}", variants, [inputs])


def all_columns(logits: Tensor, target: Tensor, *_: Any) -> Tensor:
    return vstar_ops.token_logp(logits, target).logp


def token_logp(items: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Case:
    """Over the whole vocabulary, forward and backward, beside the memory's own pace."""
    logits = torch.randn(rows, columns).to(dtype).requires_grad_()
    variants = {
        "ours": all_columns,
        "cross_entropy": baselines.cross_entropy,
        "log_softmax, gather": baselines.token_logp,
    }
    return Case(
        f"token_logp {short(dtype)} [{rows}, {columns}] forward, backward",
        variants,
        [(logits, torch.randint(columns, (rows,)))],
        2 * logits.nbytes,
        {"reading twice, writing once": baselines.memory_pace},
        few=16,
        atol=1e-6,
    )


def token_logp_legal(items: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Case:
    """Over the legal children at depth 1, forward and backward, beside the same over all columns."""
    trie, _, node, _ = beams(items, -(-rows // 16), 16, 1)
    node = node.flatten()[:rows]
    tokens = trie.children(node).token.long()
    logits = torch.randn(rows, columns).to(dtype).requires_grad_()
    return Case(
        f"token_logp legal depth 1 {short(dtype)} [{rows}, {columns}] forward, backward",
        {
            "ours": lambda z, target, node, _: vstar_ops.token_logp(z, target, trie, node).logp,
            "gather, log_softmax": baselines.token_logp_legal,
        },
        [(logits, tokens[:, 0].clone(), node, tokens)],
        int((tokens >= 0).sum()) * (2 * dtype.itemsize + 8),
        {"ours, all columns": all_columns},
        few=16,
        atol=1e-6,
    )


def sibling_grpo_loss(items: Tensor, batch: int, group: int, length: int = 0) -> Case:
    """With clipping and KL, forward and backward; the advantages are given."""
    tokens, rewards = random_items(items, batch, group, length), torch.rand(batch, group)
    siblings, over_group = vstar_ops.sibling_advantage(tokens, rewards), vstar_ops.group_advantage(rewards)
    given: dict[str, Any] = {"sibling_advantage": siblings, "group_advantage": over_group}
    given |= {"form": "paper", "clip": (0.2, 0.2)}
    old, ref, logp = (-torch.rand(tokens.shape) for _ in range(3))

    def ours(logp: Tensor, old: Tensor, ref: Tensor, *_: Tensor) -> Tensor:
        return vstar_ops.sibling_grpo_loss(logp, old_logp=old, ref_logp=ref, **given).loss

    read = siblings.advantage, siblings.valid, siblings.num_candidates, over_group
    return Case(
        f"sibling_grpo_loss B={batch} G={group} L={tokens.shape[2]} forward, backward",
        {"ours": ours, "torch, autograd": baselines.sibling_grpo_loss},
        [(logp.requires_grad_(), old, ref, *read)],
        atol=1e-6,
    )


def _search(batch: int, budget: int, device: torch.device) -> tuple[SearchTrees, Callable[[], Any]]:
    """Trees that have spent half of their budget, and a round without the model. A node has 32 children."""

    def evaluation(node: Tensor) -> NodeEvaluation:
        child = 32 * node.clamp(min=0)[..., None] + torch.arange(1, 33, dtype=torch.int32)
        children, zero = torch.where(node < 1 + 32 + 32**2, 32, 0).int(), torch.zeros_like(node)
        expected, value = torch.rand(2, *node.shape)
        logp, leaf_logp, child_value = torch.rand(3, *child.shape)
        lists = children, child, -logp, child, -leaf_logp, child_value
        return NodeEvaluation(zero.long(), expected, value, *lists, zero)

    trees = SearchTrees.empty(batch, budget, 3, children=32, leaves=32, device=device)
    root = torch.zeros(batch, 1, dtype=torch.int32)
    rows = SelectedRows(root - 1, root, torch.zeros(batch, 1))
    ved_insert(trees, rows, evaluation(rows.node))
    for _ in range(budget // 6):
        rows = ved_select(trees)
        ved_insert(trees, rows, evaluation(rows.node))
    said = evaluation(rows.node)

    def round_() -> SelectedRows:
        chosen = ved_select(trees)
        ved_insert(trees, chosen, said)
        return chosen

    return trees, round_


def ved_round(items: Tensor, batch: int, budget: int) -> Case:
    """A round of tree search without the model: select, insert what a made-up model says.

    Every sample starts with the same trees.
    """
    trees, round_ = _search(batch, budget, items.device)
    planted = {name: value.clone() for name, value in vars(trees).items()}

    def ours() -> tuple[Tensor, ...]:
        return (*round_(), trees.visits, trees.size)

    def reset() -> None:
        for name, value in planted.items():
            getattr(trees, name).copy_(value)

    fields = trees.node, trees.parent, trees.priority, trees.next_child, trees.num_children, trees.depth
    name = f"ved_select, ved_insert B={batch} budget={budget}"
    return Case(name, {"ours": ours}, [()], nbytes(fields), rtol=1.3e-6, atol=1e-5, reset=reset, calls=10)


def ved_rows(items: Tensor, batch: int, width: int, dtype: torch.dtype) -> Case:
    """Both lists of the first level's beams, of which half the children stand for a leaf.

    Child values, which alone rank the leaves, are well apart: no two of a row nearly tie.
    """
    trie, columns, node, logp = beams(items, batch, width, 1)
    children, seeds = trie.max_children, torch.arange(batch)
    trees = SearchTrees.empty(batch, 1, 2, children=children, leaves=children, device=items.device)
    rows, value = SelectedRows(node, node, logp), torch.randint(9, node.shape).float()
    tables, index, slot = baselines.child_tables(trie, 1), node.long(), torch.zeros(node.shape).long()
    logits, others = (random_logits(*node.shape, columns, dtype=dtype) for _ in range(2))

    def ours(z: Tensor, child_value: Tensor) -> tuple[Tensor, ...]:
        given = {"value": value, "child_value": child_value, "skip_forced": True}
        return vstar_ops.ved_evaluate(trees, trie, rows, z, slot, seeds, **given)[1:]

    def composed(z: Tensor, child_value: Tensor) -> tuple[Tensor | None, ...]:
        given = tables, index, logp, value, seeds, trie.only_leaf, children
        return baselines.ved_rows(z, child_value, *given)

    edges = int(trie.num_children(node).sum())
    return Case(
        f"ved_evaluate {short(dtype)} B={batch} P={width} V={columns}",
        {"ours": ours, "gather, log_softmax, noise, top-k": composed},
        [(z, x.argsort(2).float()) for z, x in zip(logits, others)],
        (dtype.itemsize + 4 + 4 + 4) * edges + nbytes((node, logp, value)),
    )


def ved_level(items: Tensor, batch: int, width: int) -> Case:
    """The beams of a level from two lists, and what the model extends."""
    trie, columns, node, logp = beams(items, batch, width, 1)
    trees = SearchTrees.empty(batch, 1 + width, 2, children=1, leaves=1, device=items.device)
    trees.size.fill_(1 + width)
    rows, value = SelectedRows(node, node, logp), torch.randn(*node.shape, columns)
    lists = [
        vstar_ops.expand_topk(value, trie, node, 2 * width, cum_logp=logp, temperature=x) for x in (1.0, 2.0)
    ]

    def ours() -> tuple[Tensor, ...]:
        options: dict[str, Any] = {"num_first": width // 2, "others": lists[1], "skip_forced": True}
        chosen = vstar_ops.ved_beams(trees, trie, rows, lists[0], width, **options)
        return *chosen, *vstar_ops.ved_inputs(trees, trie, chosen)

    read = [getattr(x, name) for x in lists for name in ("node", "parent", "logp")]
    return Case(f"ved_beams, ved_inputs B={batch} P={width}", {"ours": ours}, [()], nbytes(read))


def ved_candidates_of(items: Tensor, batch: int, budget: int) -> Case:
    """The best leaves of the same trees."""
    trees, _ = _search(batch, budget, items.device)

    def ours() -> tuple[Tensor, ...]:
        return tuple(ved_candidates(trees, 3, 16))

    lists = trees.node, trees.leaf_node, trees.leaf_logp, trees.leaf_score
    name = f"ved_candidates B={batch} budget={budget} K=16"
    return Case(name, {"ours": ours}, [()], nbytes(lists), rtol=1.3e-6, atol=1e-5)


STEPS = (advance_beams, rows_to_run, draw_children, distinct_rows)
SIZES: dict[str, list[tuple[Any, ...]]] = {
    "cpu": [
        (expand_legal, 64, 16, 16, 1, FP32),
        (expand_legal, 64, 16, 16, 2, FP32),
        (expand_legal, 64, 16, 16, 1, FP32, 152_064),
        *(
            (expand_legal, 64, 16, 16, depth, FP32, 0, "legal", share)
            for depth in (1, 2)
            for share in (0.01, 0.5)
        ),
        (expand_dense, 16, 128, 8192, 128, FP32, "vocab"),
        *((sibling_advantage, *size) for size in ((64, 16), (256, 64))),
        *((prefix_returns, *size, 64) for size in ((64, 16), (256, 64))),
        *((make, *size) for make in (prefix_tree, sibling_grpo_loss) for size in ((64, 16), (256, 64))),
        (group_advantage, 256, 64),
        *((make, 64, 16) for make in STEPS),
        (filter_items, 1_000_000, 10_000),
        *((make, 64, 129) for make in (ved_round, ved_candidates_of)),
        (ved_rows, 64, 12, FP32),
        (ved_level, 64, 12),
        (token_logp, 1024, 152_064, FP32),
        (token_logp_legal, 1024, 152_064, FP32),
    ],
    "cuda": [
        *((expand_dense, batch, 128, 8192, 128, BF16) for batch in (16, 256)),
        (expand_dense, 16, 128, 8192, 128, FP32),
        (expand_dense, 1, 1, 151_936, 128, BF16),
        *((expand_legal, *size, depth, BF16) for depth in (1, 2) for size in ((16, 128, 128), (64, 16, 16))),
        *((expand_legal, 16, 16, 16, 1, BF16, 151_936, domain) for domain in ("legal", "vocab")),
        *((expand_legal, 16, 128, 128, depth, BF16, 0, "legal", 0.5) for depth in (1, 2)),
        *((sibling_advantage, *size) for size in ((64, 16), (1024, 64), (64, 512, 8))),
        (group_advantage, 1024, 64),
        (prefix_returns, 256, 64, 64),
        (prefix_tree, 256, 64),
        *((make, 64, 128) for make in STEPS),
        (filter_items, 1_000_000, 10_000),
        *((token_logp, 4096, columns, BF16) for columns in (151_936, 152_437)),
        (token_logp_legal, 4096, 151_936, BF16),
        *((sibling_grpo_loss, *size) for size in ((64, 16), (1024, 64), (64, 512, 8))),
        *((make, 1024, 129) for make in (ved_round, ved_candidates_of)),
        (ved_rows, 256, 12, BF16),
        (ved_level, 1024, 12),
    ],
    "small": [
        (expand_dense, 2, 4, 64, 8, BF16),
        (expand_legal, 2, 4, 8, 1, BF16),
        (expand_legal, 2, 4, 4, 2, BF16, 0, "vocab"),
        (expand_legal, 2, 4, 4, 1, BF16, 0, "legal", 0.5),
        *((make, 2, 8) for make in (sibling_advantage, group_advantage, prefix_tree, sibling_grpo_loss)),
        (prefix_returns, 2, 8, 16),
        *((make, 2, 8) for make in STEPS),
        (filter_items, 500, 20),
        *((make, 4, 5000, BF16) for make in (token_logp, token_logp_legal)),
        *((make, 2, 13) for make in (ved_round, ved_candidates_of)),
        (ved_rows, 2, 4, BF16),
        (ved_level, 2, 4),
    ],
}


def cases(size: str, items: Tensor) -> list[Callable[[], Case]]:
    """Makers of the cases of ``"cpu"``, ``"cuda"`` or ``"small"`` on the device of the catalogue's ``items``.

    One is made at a time, for its memory. Its ``__name__`` tells op and shape before that.
    """

    def made(make: Callable[..., Case], *arguments: Any) -> Case:
        with torch.device(items.device):
            return make(items, *arguments)

    makers = [partial(made, *row) for row in SIZES[size]]
    for maker, (make, *arguments) in zip(makers, SIZES[size], strict=True):
        maker.__name__ = " ".join([make.__name__, *map(str, arguments)])  # type: ignore[attr-defined]
    return list(makers)
