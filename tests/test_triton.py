"""The Triton backend without a GPU: every op's tests under the interpreter, ahead-of-time compilation."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import vstar_ops
from vstar_ops import _triton
from vstar_ops.ops._registry import Op
from vstar_ops.verify.cases import CASES
from vstar_ops.verify.generators import embedded, expansion, scored
from vstar_ops.verify.trees import evaluation

ROOT = Path(__file__).resolve().parents[1]
INTERPRETING = vstar_ops._backends.interpreting()
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def python(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, **env},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETING or vstar_ops.backends()["triton"].available, reason="they run as they are")
@pytest.mark.parametrize("module", _triton.modules())
def test_interpreted(module: str) -> None:
    """The tests of an op with its kernels interpreted, in a process of their own: Triton reads the variable
    when a kernel is defined."""
    command = (
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        f"tests/test_{module}.py",
        "tests/test_every_op.py",
        "-k",
        f"triton and {module}",
    )
    done = python(*command, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    print(done.stdout)
    assert done.returncode == 0


@pytest.mark.slow
def test_the_table_of_resources_is_current() -> None:
    """Every kernel compiles, spills nothing and takes what the table says; of Triton's those for sm_90."""
    done = python("-m", "benchmarks.resources", "--check", "--only", "90", TRITON_INTERPRET="0")
    print(done.stdout)
    assert done.returncode == 0


def test_every_specialization_has_a_name_of_its_own() -> None:
    names = [item.name for item in _triton.specializations()]
    assert len(names) > 30
    assert len(names) == len(set(names))


def test_warmup_names_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="names must be some of .*expand_topk.*, got 'beam'"):
        vstar_ops.warmup("beam")
    if not vstar_ops.backends()["triton"].available:
        with pytest.raises(RuntimeError, match="cannot be compiled here: torch .* is built without CUDA"):
            vstar_ops.warmup("ved")


@pytest.mark.parametrize(
    ("k", "max_children", "message"),
    [
        (3000, 3000, "expand_topk: the Triton backend takes at most 2,048 winners, got 3,000"),
        (8, 2**31, "the Triton backend takes fewer than 2\\^31 children per request, got 2,147,483,648"),
    ],
)
def test_expand_topk_says_what_it_does_not_take(k: int, max_children: int, message: str) -> None:
    logits, offset, token = torch.zeros(1, 1, 3000), torch.tensor([0, 3000]), torch.arange(3000)
    node, options = torch.zeros(1, 1, dtype=torch.int64), (1.0, 0.0, 0.0, 1.0, False, max_children)
    arguments = (logits, offset, token, None, node, None, k, *[None] * 5, *options)
    with pytest.raises(_triton.Unsupported, match=message):
        _triton.run("expand_topk", "expand_topk", *arguments)


@pytest.mark.parametrize("vocab", [False, True])
def test_long_rows_are_shared_alike_in_any_batch(vocab: bool) -> None:
    """Their sums would otherwise have other bits when more rows are computed along with them."""
    from vstar_ops.kernels.expand_topk import _plan

    plans = [_plan(batch, 4, 20_000, 16, vocab, 20_000, False) for batch in (1, 3, 100, 1000)]
    assert {plan.grid[1] for plan in plans} == {3}
    assert len({plan.rows for plan in plans}) == 1


def test_ved_select_says_what_it_does_not_take() -> None:
    node, other = torch.zeros(1, 2049, dtype=torch.int32), [None] * 12
    with pytest.raises(NotImplementedError, match="ved_select: the Triton backend takes at most 2,048 nodes"):
        _triton.run("ved_select", "ved", node, *other, 3, 1.0, 1, 1)


@pytest.mark.parametrize(("current", "entered"), [(0, [torch.device("cuda:1")]), (1, [])])
def test_a_kernel_runs_on_the_device_of_its_tensors(
    monkeypatch: pytest.MonkeyPatch, current: int, entered: list[torch.device]
) -> None:
    class OnSecondGpu(torch.Tensor):
        device = torch.device("cuda:1")

    found: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "device", lambda device: found.append(device) or nullcontext())
    monkeypatch.setattr(_triton, "_called", {})
    monkeypatch.setattr(_triton, "_kernels", lambda module: SimpleNamespace(op=lambda *arguments: len(found)))
    x = torch.zeros(2).as_subclass(OnSecondGpu)
    assert _triton.run("op", "module", None, x, 1.0) == len(entered)
    assert found == entered


def test_warmup_loads_what_it_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton would load a kernel at its first launch, which fails while a CUDA graph is captured."""
    loaded: list[str] = []

    def item(name: str) -> Any:
        compiled = SimpleNamespace(_init_handles=lambda: loaded.append(name))
        kernel = SimpleNamespace(warmup=lambda *arguments, grid, **options: compiled)
        return SimpleNamespace(kernel=kernel, constants={}, options={}, signature=lambda: {"x": "*fp32"})

    monkeypatch.setattr(_triton, "specializations", lambda names: map(item, names or ("all",)))
    monkeypatch.setattr(_triton, "interpreting", lambda: False)
    status = vstar_ops._backends.BackendStatus(True, "")
    monkeypatch.setattr(_triton, "backends", lambda: {"triton": status})
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    assert vstar_ops.warmup("ved", "token_logp") >= 0
    assert vstar_ops.warmup() >= 0
    assert loaded == ["ved", "token_logp", "all"]


def test_parts_of_the_workspace_are_aligned() -> None:
    """Triton compiles another variant for a pointer that is no multiple of 16."""
    from vstar_ops.kernels._kernel import workspace

    lengths = (3, 0, 5, 1, 7)
    dtypes = (torch.float32, torch.int64, torch.int32, torch.float64, torch.float32)
    parts = workspace(torch.device("cpu"), *zip(lengths, dtypes, strict=True))
    assert [x.dtype for x in parts] == list(dtypes)
    starts = [0, 16, 16, 48, 64]  # an empty part's is of no use
    for i in (0, 2, 3, 4):
        assert parts[i].data_ptr() - parts[0].data_ptr() == starts[i]


def test_the_first_call_is_logged_once() -> None:
    code = "import logging, torch, vstar_ops; logging.basicConfig(level=logging.INFO)\n"
    code += "with vstar_ops.use_backend('triton'):\n"
    code += "    for _ in range(3): vstar_ops.group_advantage(torch.rand(2, 4))"
    done = python("-c", code, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("group_advantage: first call of the Triton kernel, compiled in") == 1


def test_import_leaves_triton_alone() -> None:
    """Its import takes a second; it is for those who call a kernel."""
    done = python("-c", "import sys, vstar_ops; assert 'triton' not in sys.modules")
    assert done.returncode == 0, done.stdout


def bound(kernel: Any, arguments: Any, options: Any) -> Any:
    """What Triton tells compiled variants of a kernel apart by, argument by argument: its own binder."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import MockTensor, create_function_from_signature

    backend = make_backend(GPUTarget("cuda", 90, 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    return bind(*map(MockTensor.wrap_dtype, arguments), **options)[1]


@pytest.fixture
def compiled_anew(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], list[str]]:
    """The kernels that a call would compile although ``warmup`` has run. Nothing is launched."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    monkeypatch.setattr(driver, "_active", SimpleNamespace(get_current_device=lambda: 0))

    def variant(kernel: Any, arguments: Any, options: Any) -> tuple[str, str]:
        return f"{kernel.fn.__module__}.{kernel.fn.__name__}", str(bound(kernel, arguments, options))

    warm = {variant(x.kernel, _triton.stand_ins(x), x.options) for x in _triton.specializations()}
    launched: list[tuple[str, str]] = []

    def run(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launched.append(variant(self, arguments, options))

    monkeypatch.setattr(JITFunction, "run", run)  # which remembers no variant
    monkeypatch.setattr(Op, "run", lambda op, backend, arguments: _triton.run(op.name, op.module, *arguments))

    def anew(call: Callable[[], Any]) -> list[str]:
        launched.clear()
        call()
        assert launched
        return [name for name, key in launched if (name, key) not in warm]

    return anew


# Sizes whose rows are multiples of 16 long, as warmup says.
ALIGNED: dict[str, list[Callable[[int], Any]]] = {
    **{op: list(found.values()) for op, found in CASES.items()},
    "expand_topk": [
        partial(expansion, width=width, columns=64, options=options)
        for width in (1, 3, 16, 17)
        for options in (False, True)
    ],
    "prefix_returns": [partial(embedded, width=16), partial(embedded, width=48, masked=True)],
    "token_logp": [partial(scored, columns=32), partial(scored, columns=32, legal=True)],
    "ved_evaluate": [partial(evaluation, columns=32), partial(evaluation, columns=32, options=True)],
}
del ALIGNED["token_logp_backward"]  # its arguments are made by a forward pass that really runs


@pytest.mark.skipif(INTERPRETING, reason="interpreted kernels are not compiled")
@pytest.mark.parametrize("op", ALIGNED)
def test_sizes_compile_nothing_anew(compiled_anew: Any, op: str) -> None:
    """A number of requests, beams or candidates that is 1, odd or a multiple of 16 is one variant."""
    for make in ALIGNED[op]:
        for batch in (1, 3, 16, 17):
            assert compiled_anew(make(batch)) == []


@pytest.mark.skipif(INTERPRETING, reason="interpreted kernels are not compiled")
def test_layouts_compile_nothing_anew(compiled_anew: Any) -> None:
    """The logits as decoders hand them over: one prefix per request, the last position, rows of a table."""
    trie = expansion(1, columns=64).arguments["trie"]
    table, node = torch.zeros(5, 3, 64), torch.zeros(5, 1, dtype=torch.int32)
    row = torch.arange(5)[:, None]
    for logits in (table[:, 0, None], table[:, -1:], table[:1, -1].expand(5, 1, 64)):
        assert compiled_anew(lambda z=logits: vstar_ops.expand_topk(z, trie, node, 4)) == []
    assert compiled_anew(lambda: vstar_ops.expand_topk(table[:, 1], trie, node, 4, row=row)) == []


def leaves(x: Any) -> Iterator[Any]:
    """What a tuple of tuples holds."""
    if isinstance(x, tuple):
        for part in x:
            yield from leaves(part)
    else:
        yield x


@pytest.mark.skipif(INTERPRETING, reason="an interpreted kernel has no signature")
def test_warmup_compiles_what_is_recorded() -> None:
    """Triton's own binder gives the arguments of ``warmup`` the types of the specialization."""
    for item in _triton.specializations():
        found = bound(item.kernel, _triton.stand_ins(item), item.options)
        for (name, kind), (got, attribute, *_) in zip(item.signature().items(), found, strict=True):
            assert got == _triton.plain(kind), (item.name, name)
            if kind != "constexpr":
                aligned = any(leaves(attribute))
                assert aligned == _triton.is_aligned(kind), (item.name, name, attribute)
