"""``python -m benchmarks.gpu``: every op on the GPU at hand, checked and then timed against torch.

For each case: time a call (CUDA events; the replay of a graph where a call takes less than 100 us), bytes
that any implementation must move and their share of the measured copy bandwidth, and the ratio to the best
eager composition of torch operations we know and to ``torch.compile`` of it. All of them are timed in turns.
Results are compared with the reference backend first; one that differs is not timed and fails the run. Inputs
rotate among several sets where they would fit into the L2 cache.

``--device cpu`` runs all of it on the CPU's backends, without events and graphs: a check of this program.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import vstar_ops
from vstar_ops import (
    NodeEvaluation,
    SearchTrees,
    SelectedRows,
    Trie,
    ved_candidates,
    ved_insert,
    ved_select,
)
from vstar_ops._files import replacing

from . import baselines, catalogue

RESULTS = Path(__file__).parent / "results"
GRAPH_BELOW = 100e-6  # seconds; shorter calls are timed without the gaps between launches
CACHE = 150e6  # bytes: three times the L2 cache of an H100
Call = Callable[[int], Any]  # of the number of an input set


class Case(NamedTuple):
    """One row of the table for each backend.

    Attributes:
        name: op and shape.
        ours: the op.
        check: compares the active backend with the reference on input set 0, raises where they differ.
        bytes: that any implementation must read and write, each once.
        sets: how many input sets ``ours`` and ``inputs`` know.
        eager: the composition in torch, of ``inputs(i)``; None where there is no sensible one.
        inputs: of ``eager``.
        compiled: whether to time ``torch.compile(eager)`` as well, which takes long.
        reset: brings back what the calls change, before every sample.
        most: calls a sample; 0 for as many as are good for the clock.
    """

    name: str
    ours: Call
    check: Callable[[], None]
    bytes: int
    sets: int = 1
    eager: Callable[..., Any] | None = None
    inputs: Callable[[int], tuple[Any, ...]] = lambda _: ()
    compiled: bool = False
    reset: Callable[[], None] = lambda: None
    most: int = 0


def _sets(one: int) -> int:
    return max(1, min(16, round(CACHE / max(one, 1)))) if one > 1e6 else 1


def _nbytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _agree(op: Callable[[], Any], exact: tuple[int, ...], close: tuple[int, ...]) -> Callable[[], None]:
    """Compares the outputs of ``op`` on the active backend with the reference's.

    Floats to 1e-4; integers but for near ties, which may swap: one in a thousand.
    """

    def check() -> None:
        got = op()
        with vstar_ops.use_backend("reference"):
            want = op()
        for i in close:
            torch.testing.assert_close(got[i], want[i], rtol=1e-4, atol=1e-4)
        for i in exact:
            differ = (got[i] != want[i]).float().mean().item()
            if differ > 1e-3:
                raise AssertionError(f"output {i}: {differ:.2%} of the entries differ from the reference")

    return check


def dense(device: str, batch: int, width: int, columns: int, k: int, dtype: torch.dtype) -> Case:
    """Every column legal, as at the first level of a catalogue."""
    trie = Trie.from_sequences(torch.arange(columns)[:, None]).to(device)
    n = _sets(batch * width * columns * dtype.itemsize)
    logits = [torch.randn(batch, width, columns, device=device).to(dtype) for _ in range(n)]
    cum_logp = torch.randn(batch, width, device=device)
    node = torch.zeros(batch, width, dtype=torch.int32, device=device)

    def ours(i: int) -> Any:
        return vstar_ops.expand_topk(logits[i], trie, node, k, cum_logp=cum_logp)

    return Case(
        f"expand_topk dense {_short(dtype)} B={batch} W={width} V={columns} K={k}",
        ours,
        _agree(lambda: ours(0), (2, 3), (0, 1, 6)),
        _nbytes(logits[0], cum_logp, node, *ours(0)),
        n,
        baselines.expand_dense,
        lambda i: (logits[i], cum_logp, k),
        compiled=dtype == torch.bfloat16,
    )


def legal(device: str, batch: int, width: int, depth: int, columns: int, k: int, full: bool = False) -> Case:
    """Below prefixes of a catalogue like Amazon Industrial, with value and entropy."""
    trie = Trie.from_sequences(catalogue.industrial_like())
    with vstar_ops.use_backend("auto"):  # on the CPU
        node, cum_logp = catalogue.frontiers(trie, batch, width, 768)[depth]
    tables = tuple(t.to(device) for t in baselines.child_tables(trie, depth))
    trie, node, cum_logp = trie.to(device), node.to(device), cum_logp.to(device)
    n = _sets(batch * width * columns * 2)
    logits = [torch.randn(batch, node.shape[1], columns, device=device).bfloat16() for _ in range(n)]
    value, index = torch.randn(node.shape, device=device), node.long()
    options: dict[str, Any] = {"cum_logp": cum_logp, "value": value, "value_weight": 1.0}
    options |= {"entropy_weight": 0.1, "normalize": "vocab" if full else "legal"}

    def ours(i: int) -> Any:
        return vstar_ops.expand_topk(logits[i], trie, node, k, **options)

    edges = int(trie.num_children(node).sum())
    read = _nbytes(logits[0]) if full else 2 * edges
    return Case(
        f"expand_topk {'vocab' if full else 'legal'} depth {depth} B={batch} W={width} V={columns} K={k}",
        ours,
        # The entropy is that of the legal children in both; the composition is right for legal only.
        _agree(lambda: ours(0), (2, 3), (0, 1, 6)),
        read + 4 * edges + _nbytes(node, cum_logp, value, *ours(0)),
        n,
        baselines.expand_vocab if full else baselines.expand_legal,
        lambda i: (logits[i], tables, index, cum_logp, value, k),
        compiled=batch == 16 and depth == 1,
    )


def siblings(device: str, batch: int, group: int, length: int) -> Case:
    """Candidates of which many share prefixes."""
    tokens = torch.randint(8, (batch, group, length), device=device)
    rewards = torch.rand(batch, group, device=device)
    return Case(
        f"sibling_advantage B={batch} G={group} L={length}",
        lambda _: vstar_ops.sibling_advantage(tokens, rewards),
        _agree(lambda: vstar_ops.sibling_advantage(tokens, rewards), (1, 2, 3), (0,)),
        _nbytes(tokens, rewards, *vstar_ops.sibling_advantage(tokens, rewards)),
        eager=functools.partial(baselines.sibling_advantage, packed=True),
        inputs=lambda _: (tokens, rewards),
    )


def group(device: str, batch: int, size: int) -> Case:
    """GRPO's advantage."""
    rewards = torch.rand(batch, size, device=device)
    return Case(
        f"group_advantage B={batch} G={size}",
        lambda _: vstar_ops.group_advantage(rewards),
        _agree(lambda: (vstar_ops.group_advantage(rewards),), (), (0,)),
        2 * _nbytes(rewards),
        eager=lambda x: (x - x.mean(1, True)) / (x.std(1, keepdim=True) + 1e-4),
        inputs=lambda _: (rewards,),
        compiled=True,
    )


def returns(device: str, batch: int, size: int, width: int) -> Case:
    """Dense returns of prefix buckets."""
    tokens = torch.randint(8, (batch, size, 3), device=device)
    item, target = torch.randn(batch, size, width, device=device), torch.randn(batch, width, device=device)
    inputs = tokens, item, tokens[:, 0].clone(), target
    return Case(
        f"prefix_returns B={batch} G={size} L=3 E={width}",
        lambda _: vstar_ops.prefix_returns(*inputs),
        _agree(lambda: vstar_ops.prefix_returns(*inputs), (2, 3), (0, 1)),
        _nbytes(*inputs, *vstar_ops.prefix_returns(*inputs)),
        eager=functools.partial(baselines.prefix_returns, weights=(0.3, 0.5, 1.0)),
        inputs=lambda _: inputs,
    )


def tree(device: str, batch: int, size: int) -> Case:
    """Distinct prefixes of candidates of which many share some."""
    tokens = torch.randint(8, (batch, size, 3), device=device)
    return Case(
        f"prefix_tree B={batch} G={size} L=3",
        lambda _: vstar_ops.prefix_tree(tokens),
        _agree(lambda: vstar_ops.prefix_tree(tokens), tuple(range(7)), ()),
        _nbytes(tokens, *vstar_ops.prefix_tree(tokens)),
        eager=baselines.prefix_tree,
        inputs=lambda _: (tokens,),
    )


def token_logp(device: str, rows: int, columns: int) -> Case:
    """Over the whole vocabulary, forward and backward: two reads of the logits and a write."""
    logits = torch.randn(rows, columns, device=device).bfloat16().requires_grad_()
    target = torch.randint(columns, (rows,), device=device)

    def ours(_: int) -> Any:
        out = vstar_ops.token_logp(logits, target)
        return out.logp.detach(), torch.autograd.grad(out.logp.sum(), logits)[0]

    def check() -> None:
        few = slice(0, min(rows, 16))
        logp, gradient = (x[few] for x in ours(0))
        want = baselines.token_logp(logits.detach()[few].float().requires_grad_(), target[few])
        torch.testing.assert_close(logp, want[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(gradient.float(), want[1], rtol=2**-8, atol=1e-5)

    name = f"token_logp bf16 [{rows}, {columns}] forward, backward"
    inputs = (logits, target)
    return Case(name, ours, check, 3 * _nbytes(logits), eager=baselines.token_logp, inputs=lambda _: inputs)


def loss(device: str, batch: int, size: int, length: int) -> Case:
    """The objective with clipping and KL, forward and backward; the advantages are given."""
    tokens = torch.randint(8, (batch, size, length), device=device)
    rewards = torch.rand(batch, size, device=device)
    siblings, over_group = vstar_ops.sibling_advantage(tokens, rewards), vstar_ops.group_advantage(rewards)
    logp, old, ref = (-torch.rand(tokens.shape, device=device) for _ in range(3))
    logp.requires_grad_()

    def ours(_: int) -> Any:
        given: dict[str, Any] = {
            "sibling_advantage": siblings,
            "group_advantage": over_group,
            "clip": (0.2, 0.2),
        }
        out = vstar_ops.sibling_grpo_loss(logp, old_logp=old, ref_logp=ref, **given)
        return out.loss.detach(), torch.autograd.grad(out.loss, logp)[0]

    return Case(
        f"sibling_grpo_loss B={batch} G={size} L={length} forward, backward",
        ours,
        _agree(lambda: ours(0), (), (0, 1)),
        _nbytes(logp, old, ref, logp, logp, *siblings[:2], siblings.num_candidates, over_group),
        eager=baselines.sibling_grpo_loss,
        inputs=lambda _: (logp, old, ref, siblings, over_group),
    )


def ved_round(device: str, batch: int, budget: int = 129) -> Case:
    """A round of tree search without the model: select, insert what a made-up model says, rank.

    Half of the budget is planted first, and every sample starts there again.
    """
    trie = Trie.from_sequences(torch.cartesian_prod(*[torch.arange(32)] * 3)).to(device)
    generator = torch.Generator(device).manual_seed(0)

    def evaluation(node: Tensor) -> NodeEvaluation:
        rows = node.shape[1]

        def floats(*shape: int) -> Tensor:
            return torch.rand(batch, rows, *shape, generator=generator, device=device)

        first, last = trie.offset[node.clamp(min=0).long()], trie.offset[node.clamp(min=0).long() + 1]
        child = first[..., None] + torch.arange(1, 33, device=device, dtype=torch.int32)
        children = (last - first).int()
        zero = torch.zeros_like(node)
        return NodeEvaluation(
            zero.long(),
            floats(),
            floats(),
            children,
            child,
            -floats(32),
            child,
            -floats(32),
            floats(32),
            zero,
        )

    trees = SearchTrees.empty(batch, budget, 3, children=32, leaves=32, device=device)
    root = torch.zeros(batch, 1, dtype=torch.int32, device=device)
    rows = SelectedRows(root - 1, root, torch.zeros(batch, 1, device=device))
    ved_insert(trees, rows, evaluation(rows.node))
    for _ in range(budget // 6):
        rows = ved_select(trees)
        ved_insert(trees, rows, evaluation(rows.node))
    said = evaluation(rows.node)
    planted = {name: value.clone() for name, value in vars(trees).items()}

    def ours(_: int) -> Any:
        chosen = ved_select(trees)
        ved_insert(trees, chosen, said)
        return ved_candidates(trees, 3, 16)

    def reset() -> None:
        for name, value in planted.items():
            getattr(trees, name).copy_(value)

    def check() -> None:
        def run() -> tuple[Tensor, ...]:
            reset()
            chosen = ved_select(trees)
            ved_insert(trees, chosen, said)
            return (*chosen, *ved_candidates(trees, 3, 16), trees.visits.clone(), trees.size.clone())

        got = run()
        with vstar_ops.use_backend("reference"):
            want = run()
        for x, y in zip(got, want):
            torch.testing.assert_close(x, y)

    touched = _nbytes(trees.node, trees.parent, trees.priority, trees.visits, trees.next_child)
    touched += _nbytes(trees.num_children, trees.depth)
    name = f"ved round B={batch} budget={budget}, without the model"
    return Case(name, ours, check, touched, reset=reset, most=10)


def cases(device: str, small: bool) -> Iterator[Callable[[], Case]]:
    """Everything that is measured; made one at a time, for the memory that they take."""
    make = functools.partial
    if small:
        yield make(dense, device, 2, 4, 64, 8, torch.bfloat16)
        yield make(legal, device, 2, 4, 1, 768, 8)
        yield make(legal, device, 2, 4, 2, 768, 8, True)
        yield make(siblings, device, 2, 8, 3)
        yield make(group, device, 2, 8)
        yield make(returns, device, 2, 8, 16)
        yield make(tree, device, 2, 8)
        yield make(token_logp, device, 4, 5000)
        yield make(loss, device, 2, 8, 3)
        yield make(ved_round, device, 2, 13)
        return
    for batch in (16, 256):
        yield make(dense, device, batch, 128, 8192, 128, torch.bfloat16)
    yield make(dense, device, 16, 128, 8192, 128, torch.float32)
    yield make(dense, device, 1, 1, 151_936, 128, torch.bfloat16)
    for depth in (1, 2):
        yield make(legal, device, 16, 128, depth, 768, 128)
        yield make(legal, device, 64, 16, depth, 768, 16)
    yield make(legal, device, 16, 16, 1, 151_936, 16)
    yield make(legal, device, 16, 16, 1, 151_936, 16, True)
    for batch, size, length in ((64, 16, 3), (1024, 64, 3), (64, 512, 8)):
        yield make(siblings, device, batch, size, length)
    yield make(group, device, 1024, 64)
    yield make(returns, device, 256, 64, 64)
    yield make(tree, device, 256, 64)
    yield make(token_logp, device, 4096, 151_936)
    for batch, size, length in ((64, 16, 3), (1024, 64, 3), (64, 512, 8)):
        yield make(loss, device, batch, size, length)
    yield make(ved_round, device, 1024)


# ------------------------------------------------------------------ timing


class Sample(NamedTuple):
    """What is timed at once: a run of ``calls`` calls, and how: ``graph``, ``events`` or ``clock``."""

    run: Callable[[], Any]
    calls: int
    how: str


class Clock:
    """Seconds of a repeated call on a device."""

    def __init__(self, device: str) -> None:
        self.gpu = device == "cuda"

    def once(self, run: Callable[[], Any]) -> float:
        """By events on the GPU, after everything queued before has ended."""
        if not self.gpu:
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        torch.cuda.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def sample(self, call: Call, case: Case, graph: bool) -> Sample:
        """A sample of at least some milliseconds, or ``case.most`` calls."""

        def sweep(calls: int) -> None:
            for i in range(calls):
                call(i % case.sets)

        sweep(max(3, case.sets))  # compiles, fills the allocator
        case.reset()
        estimate = min(self.once(lambda: sweep(case.sets)) / case.sets for _ in range(3))
        if not self.gpu:
            return Sample(functools.partial(sweep, case.most or 1), case.most or 1, "clock")
        if not graph or estimate > 2 * GRAPH_BELOW:
            calls = case.most or max(case.sets, min(200, round(2e-3 / max(estimate, 1e-6))))
            return Sample(functools.partial(sweep, calls), calls, "events")
        captured, calls = torch.cuda.CUDAGraph(), case.most or max(case.sets, 20)
        torch.cuda.synchronize()
        with torch.cuda.graph(captured):
            sweep(calls)
        return Sample(captured.replay, calls, "graph")

    def compare(self, samples: dict[str, Sample], case: Case, rounds: int) -> dict[str, float]:
        """Median seconds per call, measured in turns."""
        seconds: dict[str, list[float]] = {name: [] for name in samples}
        for _ in range(rounds):
            for name, sample in samples.items():
                case.reset()
                seconds[name].append(self.once(sample.run) / sample.calls)
        return {name: statistics.median(s) for name, s in seconds.items()}


def copy_bandwidth(clock: Clock, device: str, size: int) -> float:
    """Bytes a second, read and written, of a copy that no cache holds."""
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    seconds = statistics.median(clock.once(lambda: target.copy_(source)) for _ in range(20))
    return 2 * size / seconds


def call_overhead(device: str) -> float:
    """Seconds of host time of one small ``expand_topk``, queued and not waited for."""
    trie = Trie.from_sequences(torch.arange(32)[:, None]).to(device)
    logits = torch.randn(1, 1, 32, device=device)
    node = torch.zeros(1, 1, dtype=torch.int32, device=device)
    samples = []
    for _ in range(30):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(20):
            vstar_ops.expand_topk(logits, trie, node, 4)
        samples.append((time.perf_counter() - start) / 20)
    return statistics.median(samples)


def measure(
    device: str, backends: list[str], case: Case, bandwidth: float, rounds: int
) -> list[dict[str, Any]]:
    """A row a backend."""
    clock = Clock(device)
    samples: dict[str, Sample] = {}
    failed: dict[str, str] = {}

    def attempt(name: str, call: Call, graph: bool) -> None:
        try:
            if name in backends:
                case.check()
            samples[name] = clock.sample(call, case, graph)
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"

    def on(backend: str) -> Call:
        def call(i: int) -> Any:
            with vstar_ops.use_backend(backend):
                return case.ours(i)

        return call

    for backend in backends:
        with vstar_ops.use_backend(backend):
            attempt(backend, on(backend), True)
    if case.eager is not None:
        eager, compiled = case.eager, torch.compile(case.eager, dynamic=False)
        attempt("eager", lambda i: eager(*case.inputs(i)), False)
        if case.compiled and device == "cuda":
            attempt("compile", lambda i: compiled(*case.inputs(i)), False)
    seconds = clock.compare(samples, case, rounds)
    torch._dynamo.reset()
    others = {name: s for name, s in seconds.items() if name not in backends}
    rows = []
    for backend in backends:
        row: dict[str, Any] = {"case": case.name, "backend": backend, "bytes": case.bytes}
        if backend in failed:
            rows.append(row | {"error": failed[backend]})
            continue
        own = seconds[backend]
        row |= {"seconds": own, "how": samples[backend].how, "other_seconds": others, "failed": failed}
        row |= {"bytes_per_second": case.bytes / own, "bandwidth_share": case.bytes / own / bandwidth}
        rows.append(row | {"ratio": {name: s / own for name, s in others.items()}})
    return rows


# ------------------------------------------------------------------ the report


def table(header: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Markdown, a line per row."""
    text = "\n".join(f"- {name}: {value}" for name, value in header.items())
    text += "\n\n| case | backend | time | GB/s | of copy bandwidth | eager torch | torch.compile |\n"
    text += "|---|---|---|---|---|---|---|\n"
    for row in rows:
        if "error" in row:
            text += f"| {row['case']} | {row['backend']} | **{row['error']}** | | | | |\n"
            continue
        ratios = [f"{row['ratio'][n]:.1f}x" if n in row["ratio"] else "" for n in ("eager", "compile")]
        time_of = f"{row['seconds'] * 1e6:.1f} us ({row['how']})"
        share = f"{row['bytes_per_second'] / 1e9:.1f} | {row['bandwidth_share']:.1%}"
        text += f"| {row['case']} | {row['backend']} | {time_of} | {share} | {' | '.join(ratios)} |\n"
    return text


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def _header(device: str, bandwidth: float, overhead: dict[str, float]) -> dict[str, Any]:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=RESULTS, capture_output=True, text=True
    ).stdout.strip()
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    return {
        "device": name,
        "date": datetime.date.today().isoformat(),
        "commit": commit or "unknown",
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda}",
        "triton": version("triton") if vstar_ops.backends()["triton"].available else "off",
        "copy bandwidth": f"{bandwidth / 1e9:.0f} GB/s",
        "host time of a small expand_topk": ", ".join(f"{k} {v * 1e6:.1f} us" for k, v in overhead.items()),
    }


def main(argv: list[str] | None = None) -> int:
    """Measure, write the files, print the table last."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="small shapes, to check this program")
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds a case (default: 15)")
    parser.add_argument("--only", default="", help="cases whose name holds this text")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU: torch.cuda.is_available() is False")
    names = ("triton", "cuda") if args.device == "cuda" else ("cpu", "reference")
    on = [name for name in names if vstar_ops.backends()[name].available]
    if not on:
        parser.error("no backend: " + "; ".join(f"{n}: {vstar_ops.backends()[n].detail}" for n in names))

    torch.manual_seed(0)
    clock = Clock(args.device)
    bandwidth = copy_bandwidth(clock, args.device, 2**24 if args.small else 2**31)
    overhead = {}
    for name in on:
        with vstar_ops.use_backend(name):
            overhead[name] = call_overhead(args.device)
    rows: list[dict[str, Any]] = []
    for make in cases(args.device, args.small):
        case = make()
        if args.only in case.name:
            print(case.name, "…", file=sys.stderr, flush=True)
            rows += measure(args.device, on, case, bandwidth, args.rounds)
    header = _header(args.device, bandwidth, overhead)
    text = table(header, rows)
    slug = "-".join(f"{header['device']} {header['date']}".lower().split())
    args.out.mkdir(parents=True, exist_ok=True)
    for suffix, content in (
        (".json", json.dumps({"machine": header, "rows": rows}, indent=1)),
        (".md", text),
    ):
        with replacing(args.out / f"{slug}{suffix}") as path:
            path.write_text(content)
    print(text)
    return any("error" in row for row in rows)


if __name__ == "__main__":
    sys.exit(main())
