"""What only a GPU can show of the Triton and CUDA kernels: no wait for the GPU, graphs, streams, sizes.

That results are right is what the tests of the ops ask, on every backend (``backend`` in conftest.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import vstar_ops
from vstar_ops import SearchTrees, Trie
from vstar_ops.decoding import VEDConfig, beam_search, ved
from vstar_ops.ops.ved import ved_candidates, ved_select

ON = [name for name in ("triton", "cuda") if vstar_ops.backends()[name].available]
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.fixture(params=["triton", "cuda"])
def gpu(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend that runs on CUDA tensors."""
    if request.param not in ON:
        pytest.skip(vstar_ops.backends()[request.param].detail)
    with vstar_ops.use_backend(request.param):
        yield request.param


class StaticModel:
    """A ValueModel of constant shapes that never looks at the host: random features of a prefix."""

    def __init__(self, columns: int) -> None:
        random = torch.Generator("cuda").manual_seed(3)
        make = {"generator": random, "device": "cuda"}
        self.token, self.head = torch.randn(columns, 32, **make), torch.randn(32, columns + 1, **make)

    def prefill(self, context):
        state = [torch.tanh(self.token[context])]
        return (state[0] @ self.head)[:, :-1], state

    def extend(self, state, parent, token):
        first = state[0].shape[0]
        state[0] = torch.cat([state[0], torch.tanh(state[0][parent.clamp(min=0)] + self.token[token])])
        slot = torch.arange(first, first + parent.shape[0], device="cuda")
        return (state[0][first:] @ self.head)[:, :-1], slot

    def value(self, state, slot):
        return (state[0][slot.clamp(min=0)] @ self.head)[:, -1]


def in_a_graph(call: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A call that has run once, captured; and its results, which a replay writes anew."""
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    return graph, captured


def catalogue(items: int = 5000, codes: int = 64) -> Trie:
    random = torch.Generator().manual_seed(0)
    return Trie.from_sequences(torch.randint(codes, (items, 3), generator=random)).to("cuda")


def inputs() -> dict[str, Callable[[], tuple[Any, ...]]]:
    """A call of every op whose outputs are new tensors."""
    trie = catalogue()
    logits, value = torch.randn(16, 128, 64, device="cuda"), torch.randn(16, 128, device="cuda")
    node = torch.randint(trie.level_offset[1], trie.level_offset[2], (16, 128), device="cuda").int()
    wide, root = torch.randn(4, 32, 8192, device="cuda").bfloat16(), torch.zeros(4, 32, device="cuda").int()
    dense = Trie.from_sequences(torch.arange(8192)[:, None]).to("cuda")
    tokens, rewards = (
        torch.randint(8, (256, 64, 3), device="cuda"),
        torch.rand(256, 64, device="cuda").round(),
    )
    many, prizes = torch.randint(8, (8, 700, 3), device="cuda"), torch.rand(8, 700, device="cuda")
    items, item = torch.randn(256, 64, 48, device="cuda"), torch.randn(256, 48, device="cuda")
    seeds = torch.arange(16, device="cuda")
    scoring = {"value": value, "value_weight": 1.0, "entropy_weight": 0.1}
    trees = SearchTrees.empty(64, 40, 3, children=64, leaves=64, device="cuda")
    return {
        "legal": lambda: vstar_ops.expand_topk(logits, trie, node, 128, **scoring),
        "noise": lambda: vstar_ops.expand_topk(logits, trie, node, 16, gumbel_seed=seeds),
        "vocab": lambda: vstar_ops.expand_topk(logits, trie, node, 16, normalize="vocab"),
        "dense": lambda: vstar_ops.expand_topk(wide, dense, root, 128),
        "one row": lambda: vstar_ops.expand_topk(wide[:1, :1], dense, root[:1, :1], 1000),
        "sibling_advantage": lambda: vstar_ops.sibling_advantage(tokens, rewards),
        "sibling_advantage, many": lambda: vstar_ops.sibling_advantage(many, prizes),
        "group_advantage": lambda: (vstar_ops.group_advantage(rewards),),
        "prefix_returns": lambda: vstar_ops.prefix_returns(tokens, items, tokens[:, 0], item),
        "ved_candidates": lambda: ved_candidates(trees, 3, 16),
    }


@pytest.mark.parametrize("case", inputs() if torch.cuda.is_available() else [])
def test_same_bits_no_sync_no_stray_memory(case: str, gpu: str) -> None:
    """50 runs beside other work give the same bits, never wait for the GPU, and allocate outputs and at most
    one workspace."""
    call = inputs()[case]
    first = [x.clone() for x in call()]
    other = torch.cuda.Stream()
    busy = torch.randn(2048, 2048, device="cuda")
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    result = call()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] - before <= len(result) + 1
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(other):
            for _ in range(50):
                busy = busy @ busy / 45
        runs = [call() for _ in range(50)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for run in runs:
        for got, want in zip(run, first):
            assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))


def test_current_stream(gpu: str) -> None:
    """Work follows what the caller has queued on its stream, without an event."""
    trie, stream = catalogue(), torch.cuda.Stream()
    root = torch.zeros(2, 1, dtype=torch.int32, device="cuda")
    with torch.cuda.stream(stream):
        logits = torch.zeros(2, 1, 64, device="cuda")
        torch.cuda._sleep(50_000_000)
        logits += torch.arange(64, device="cuda")
        got = vstar_ops.expand_topk(logits, trie, root, 4).token
    stream.synchronize()
    assert torch.equal(got, vstar_ops.expand_topk(logits, trie, root, 4).token)
    assert (got[:, 0] == 63).all()


def test_a_beam_search_in_a_graph(gpu: str) -> None:
    """A chain of three ``expand_topk`` calls, captured once and replayed on new logits."""
    trie = catalogue()
    logits = [torch.empty(8, w, 64, device="cuda") for w in (1, 32, 32)]

    def chain() -> Any:
        node, logp = torch.zeros(8, 1, dtype=torch.int32, device="cuda"), None
        for z in logits:
            out = vstar_ops.expand_topk(z, trie, node, 32, cum_logp=logp, entropy_weight=0.1)
            node, logp = out.node, out.logp
        return out

    for z in logits:
        z.normal_()
    chain()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain()
    for _ in range(3):
        for z in logits:
            z.normal_()
        graph.replay()
        for got, want in zip(captured, chain()):
            assert torch.equal(got, want)


def test_a_whole_beam_search_in_a_graph(gpu: str) -> None:
    """With constant shapes ``beam_search`` never looks at the host: with its model it is one graph."""
    trie, model = catalogue(), StaticModel(64)
    context = torch.zeros(32, dtype=torch.int64, device="cuda")

    def search() -> Any:
        return beam_search(model, context, trie, 24, skip_forced=False)

    graph, captured = in_a_graph(search)
    for _ in range(3):
        context.random_(64)
        graph.replay()
        for name, want in search()._asdict().items():
            assert torch.equal(getattr(captured, name), want), name


def test_filters_change_under_a_graph(gpu: str) -> None:
    """A captured search sees what changes its filters, and the changes themselves are captured."""
    trie, model = catalogue(), StaticModel(64)
    context = torch.zeros(32, dtype=torch.int64, device="cuda").random_(64)
    history, stock = torch.full((32, 50), -1, device="cuda"), torch.full((500,), -1, device="cuda")
    view = trie.restrict(ban=history)

    def step() -> Any:
        view.update(ban=history)
        view.update(ban=stock)
        return beam_search(model, context, view, 24, skip_forced=False)

    step()  # the index of the ids
    graph, captured = in_a_graph(step)
    for _ in range(3):
        view.reset(ban=torch.full_like(stock, -1))
        history.random_(5000)
        stock.random_(5000)
        graph.replay()
        fresh = trie.restrict(ban=stock).restrict(ban=history)
        assert torch.equal(view.alive, fresh.alive) and torch.equal(view.bits.allowed, fresh.bits.allowed)
        for name, want in beam_search(model, context, fresh, 24, skip_forced=False)._asdict().items():
            assert torch.equal(getattr(captured, name), want), name


@pytest.mark.parametrize(
    "config",
    [VEDConfig.paper(beam_width=4), VEDConfig(beam_width=4, child_values=False, num_value_beams=0)],
    ids=["paper", "skip_forced"],
)
def test_a_whole_search_in_a_graph(gpu: str, config: VEDConfig) -> None:
    """``ved`` with a fixed number of rounds never looks at the host: all of it is one graph."""
    trie, model = catalogue(), StaticModel(64)
    model.finite_logits = True
    context = torch.zeros(32, dtype=torch.int64, device="cuda")
    seeds = torch.zeros(32, dtype=torch.int64, device="cuda")

    def search() -> Any:
        return ved(model, context, trie, 16, config, seed=seeds, num_rounds=12)

    graph, captured = in_a_graph(search)
    for _ in range(3):
        context.random_(64)
        seeds.random_()
        graph.replay()
        want = search()
        assert (want.forward_tokens > 12).all()
        for name in ("sequence", "node", "logp", "score", "num_valid", "forward_tokens"):
            assert torch.equal(getattr(captured, name), getattr(want, name)), name


def test_decoders_agree_with_the_cpu(gpu: str) -> None:
    """Beam search and tree search of one model on both devices."""
    trie, model = catalogue(), StaticModel(64)
    context = torch.arange(48, device="cuda")

    def search() -> tuple[Any, Any]:
        return beam_search(model, context, trie, 24), ved(model, context, trie, 16, VEDConfig.paper(), seed=1)

    beams, found = search()
    with vstar_ops.use_backend("reference"):
        other_beams, other = search()
    # One near tie may swap two candidates; a wrong kernel changes all of them.
    assert (beams.node == other_beams.node).float().mean() > 0.99
    assert (found.node == other.node).float().mean() > 0.98


@pytest.mark.parametrize("rows", [2**15 + 3])
def test_offsets_beyond_32_bits(rows: int, gpu: str) -> None:
    """More than 2^31 logits; the last rows are as right as the first."""
    columns = 2**17
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of GPU memory")
    trie = Trie.from_sequences(torch.tensor([[5], [99], [columns - 1]])).to("cuda")
    logits = torch.zeros(1, rows, columns, dtype=torch.bfloat16, device="cuda")
    node = torch.full((1, rows), -1, dtype=torch.int32, device="cuda")
    node[0, -2:] = 0
    logits[0, -1, -1], logits[0, -2, 99] = 3.0, 2.0
    out = vstar_ops.expand_topk(logits, trie, node, 4)
    assert out.parent[0, :2].tolist() == [rows - 1, rows - 2]
    assert out.token[0, :2].tolist() == [columns - 1, 99]
    part = vstar_ops.expand_topk(logits[:, -2:].contiguous(), trie, node[:, -2:], 4)
    assert torch.equal(out.score, part.score)


def test_compiles_whole(gpu: str) -> None:
    """``torch.compile(fullgraph=True)`` takes the ops as they are."""
    trie = catalogue()
    logits = torch.randn(4, 8, 64, device="cuda")
    node = torch.ones(4, 8, dtype=torch.int32, device="cuda")
    tokens, rewards = torch.randint(8, (4, 8, 3), device="cuda"), torch.rand(4, 8, device="cuda")

    def step(logits: torch.Tensor) -> Any:
        out = vstar_ops.expand_topk(logits * 2, trie, node, 5)
        return out.score + 1, vstar_ops.sibling_advantage(tokens, rewards).advantage

    for got, want in zip(torch.compile(step, fullgraph=True)(logits), step(logits)):
        torch.testing.assert_close(got, want)


def test_select_leaves_a_spent_tree_alone(gpu: str) -> None:
    trees = SearchTrees.empty(3, 8, 2, children=4, leaves=4, budget=1, device="cuda")
    assert (ved_select(trees).node == -1).all()


two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")


def results_on(device: torch.device) -> list[torch.Tensor]:
    """Of an expansion, a loss and its gradient, on the CPU."""
    random = torch.Generator().manual_seed(5)
    trie, logits = catalogue().to(device), torch.randn(4, 8, 64, generator=random).to(device)
    node = torch.ones(4, 8, dtype=torch.int32, device=device)
    tokens = torch.randint(8, (4, 8, 3), generator=random).to(device)
    rewards = torch.rand(4, 8, generator=random).to(device)
    logp = torch.zeros(4, 8, 3, device=device, requires_grad=True)
    loss = vstar_ops.sibling_grpo_loss(logp, tokens, rewards).loss
    (gradient,) = torch.autograd.grad(loss, logp)
    out = vstar_ops.expand_topk(logits, trie, node, 40)
    assert all(x.device == device for x in (*out, gradient))
    return [x.cpu() for x in (*out, loss.detach(), gradient)]


@two_gpus
def test_a_device_that_is_not_the_current_one(gpu: str) -> None:
    """The tensors decide where a call runs; the current device stays what it was."""
    want = results_on(torch.device("cuda", 0))
    assert torch.cuda.current_device() == 0
    got = results_on(torch.device("cuda", 1))
    assert torch.cuda.current_device() == 0
    assert all(torch.equal(x, y) for x, y in zip(got, want))


def test_two_host_threads(gpu: str) -> None:
    """Each with a stream of its own, and a GPU of its own where there are two."""
    devices = [torch.device("cuda", i % torch.cuda.device_count()) for i in range(4)]
    want = results_on(devices[0])

    def work(device: torch.device) -> list[list[torch.Tensor]]:
        with vstar_ops.use_backend(gpu), torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream()):
            return [results_on(device) for _ in range(20)]

    with ThreadPoolExecutor(len(devices)) as pool:
        for found in pool.map(work, devices):
            assert all(torch.equal(x, y) for one in found for x, y in zip(one, want))


@two_gpus
@pytest.mark.parametrize("gpu", [None], ids=["nccl"])
def test_two_processes_train_as_one(gpu: None, toy: Path, tmp_path: Path) -> None:
    """On a GPU each, gradients averaged by nccl."""
    from toy_data import TOGETHER, finish, start, weights

    options = (
        f"--data {toy} --category Toy --dropout 0 --sft-epochs 3 --rl-steps 8 --candidates 6 --device cuda"
    )
    options += " --sft-batch-size 13 --rl-batch-size 13 --decoder ved --objective joint"
    alone, together = tmp_path / "alone", tmp_path / "together"
    finish(start(toy, *options.split(), "--out", str(alone)))
    finish(start(toy, *options.split(), "--out", str(together), launcher=TOGETHER))
    for stage in ("sft", "ved+joint"):
        got = weights(together, stage)
        for name, weight in weights(alone, stage).items():
            torch.testing.assert_close(got[name], weight, rtol=1e-2, atol=1e-3, msg=name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_loop(dtype: str, tmp_path: Path) -> None:
    """All stages, resumed on the CPU; the scores are those of the CPU, roughly."""
    from test_device import VARIANTS, config, train

    settings = config(dtype=dtype, rl_steps=20, variants=VARIANTS)
    want = train(tmp_path / "cpu", settings)
    got = train(tmp_path / "cuda", settings, torch.device("cuda", 0))
    for row, scores in want.items():
        assert got[row]["true_reward@10"] == pytest.approx(scores["true_reward@10"], abs=0.05)
    (tmp_path / "cuda" / "seed-0" / "results.json").unlink()
    assert train(tmp_path / "cuda", settings).keys() == want.keys()
