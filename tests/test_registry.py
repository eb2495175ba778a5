"""The registry: what is promised of every op, whatever backend runs it."""

from __future__ import annotations

import logging
import threading
import warnings

import pytest
import torch
from helpers import op_arguments, tensors
from torch.func import grad, jacrev, jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode

import vstar_ops
from vstar_ops import SearchTrees, Trie, _triton
from vstar_ops._backends import BackendStatus, active_backend
from vstar_ops.ops import OPS, _registry
from vstar_ops.verify.cases import CASES

CPU = torch.device("cpu")
# Those that run on the CPU tensors of these tests.
BACKENDS = [
    name
    for name, status in vstar_ops.backends().items()
    if status.available and (name in ("reference", "cpu") or vstar_ops._backends.interpreting())
]


def _selections():
    """A call of each op without a gradient, of one vector."""
    trie = Trie.from_sequences([[0, 3], [0, 4], [2, 3]])
    node = torch.zeros(1, 1, dtype=torch.int32)
    tokens = torch.tensor([[[0, 3], [0, 4], [2, 3]]])
    yield (
        "expand_topk",
        lambda x: vstar_ops.expand_topk(x.expand(1, 1, 5), trie, node, 3, cum_logp=x[None, :1]),
    )
    yield "sibling_advantage", lambda x: vstar_ops.sibling_advantage(tokens, x[None, :3])
    yield "group_advantage", lambda x: vstar_ops.group_advantage(x[None, :3])
    yield (
        "prefix_returns",
        lambda x: vstar_ops.prefix_returns(
            tokens, x.expand(1, 3, 5), tokens[:, 0], x[None], weights=(0.5, 1.0)
        ),
    )


SELECTIONS = dict(_selections())


def outputs(result):
    return [result] if isinstance(result, torch.Tensor) else list(result)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SELECTIONS)
def test_vmap_is_a_loop(name, backend):
    x, call = torch.rand(3, 5), SELECTIONS[name]
    with vstar_ops.use_backend(backend), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is a loop
        together, alone = outputs(vmap(call)(x)), [outputs(call(row)) for row in x]
    for i, got in enumerate(together):
        assert torch.equal(got, torch.stack([out[i] for out in alone]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_vmap_of_a_differentiable_op(backend):
    """Right numbers and a right gradient, or an error; see below for what is refused."""
    x, targets = torch.rand(3, 2, 5, requires_grad=True), torch.tensor([1, 4])
    with vstar_ops.use_backend(backend), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is a loop
        together = vmap(lambda row: vstar_ops.token_logp(row, targets).logp)(x)
        alone = vstar_ops.token_logp(x, targets.expand(3, 2)).logp
    assert torch.equal(together, alone)
    assert torch.equal(*(torch.autograd.grad(y.sum(), x)[0] for y in (together, alone)))


class Recorded(TorchDispatchMode):
    """The names of all ops that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def in_double(op, label):
    return CASES[op][label](3).map(lambda x: x.double() if x.is_floating_point() else x)


DOUBLE = [
    pytest.param(op, label, id=f"{op}-{label}") for op in CASES if OPS[op].double for label in CASES[op]
]


@pytest.mark.parametrize(("op", "label"), DOUBLE)
def test_float64_runs_on_the_reference(op, label):
    """Silently, with results in float64, compiled too."""
    call, names = in_double(op, label), [name for name, _ in OPS[op].double]
    with Recorded() as recorded, warnings.catch_warnings():
        warnings.simplefilter("error")
        got = call()
    *others, last = [x for x in recorded.names if x.startswith("vstar_ops")]
    assert last == f"vstar_ops_reference.{op}.default"
    assert all(x.startswith("vstar_ops_reference") for x in others)  # the loss computes its advantages
    assert {x.dtype for x in tensors(got) if x.is_floating_point()} == {torch.float64}
    single = call.map(lambda x: x.float() if x.is_floating_point() else x)()
    for x, y in zip(tensors(got), tensors(single), strict=True):
        assert x.shape == y.shape
        if y.is_floating_point():
            torch.testing.assert_close(x.float(), y, rtol=1e-4, atol=1e-4)
    torch.compiler.reset()
    compiled = torch.compile(call.function, fullgraph=True, backend="aot_eager")(**call.arguments)
    assert all(map(torch.equal, tensors(compiled), tensors(got)))
    for backend in set(BACKENDS) - {"reference"}:
        # The loss refuses the rewards that it would compute its advantages of first.
        message = rf"^({names[0]}|rewards) must be .* on the backend '{backend}', got float64"
        with vstar_ops.use_backend(backend), pytest.raises(TypeError, match=message):
            call()


@pytest.mark.parametrize(("op", "label"), DOUBLE)
def test_opcheck_in_float64(op, label):
    arguments = op_arguments(op, CASES[op][label](3))
    arguments = [
        x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in arguments
    ]
    if OPS[op].differentiable:
        arguments[0].requires_grad_()
    torch.library.opcheck(OPS[op].overloads["reference"], tuple(arguments))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_forced_backend_compiles(backend):
    """The choice is made while tracing, and a graph of one choice is not taken for another."""
    seen = []

    def graph(module, _):
        seen.append({str(node.target) for node in module.graph.nodes if node.op == "call_function"})
        return module

    logits = torch.randn(2, 7, requires_grad=True)

    def compute(x):
        logp = vstar_ops.token_logp(x, torch.tensor([1, 2])).logp
        return logp.sum(), vstar_ops.group_advantage(x.detach())

    compiled = torch.compile(compute, backend=graph, fullgraph=True)
    want, advantage = compute(logits)
    want = torch.autograd.grad(want, logits)[0], advantage
    for name in ("auto", backend, "auto"):
        with vstar_ops.use_backend(name):
            loss, advantage = compiled(logits)
            got = torch.autograd.grad(loss, logits)[0], advantage
        torch.testing.assert_close(got, want)
    namespace = "vstar_ops" if backend == "cpu" else f"vstar_ops_{backend}"
    assert f"{namespace}.token_logp.default" in seen[-1]
    assert len(seen) == 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_use_backend_inside_of_a_compiled_function(backend):
    def compute(x):
        with vstar_ops.use_backend(backend):
            return vstar_ops.group_advantage(x)

    x = torch.rand(2, 4)
    torch.testing.assert_close(torch.compile(compute, backend="eager", fullgraph=True)(x), compute(x))
    assert active_backend(CPU) is None


def test_a_backend_is_asked_for_by_a_thread():
    found = []
    with vstar_ops.use_backend("reference"):
        thread = threading.Thread(target=lambda: found.append(active_backend(CPU)))
        thread.start()
        thread.join()
        assert active_backend(CPU) == "reference"
    assert found == [None]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backward_pass_stays_on_its_backend(backend):
    logits = torch.randn(2, 7, requires_grad=True)
    with vstar_ops.use_backend(backend):
        logp = vstar_ops.token_logp(logits, torch.tensor([1, 2])).logp
    with Recorded() as recorded:
        logp.sum().backward()
    namespace = "vstar_ops" if backend == "cpu" else f"vstar_ops_{backend}"
    assert f"{namespace}.token_logp_backward.default" in recorded.names


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", ["token_logp", "sibling_grpo_loss"])
def test_transforms_that_give_no_gradient_are_refused(op, backend):
    tokens, rewards = torch.tensor([[[0, 3], [0, 4]]]), torch.tensor([[1.0, 0.0]])
    calls = {
        "token_logp": lambda x: vstar_ops.token_logp(x, torch.tensor([1])).logp,
        "sibling_grpo_loss": lambda x: vstar_ops.sibling_grpo_loss(x.view(1, 2, 2), tokens, rewards).loss,
    }
    x = torch.randn(1, 4)
    with vstar_ops.use_backend(backend):
        with pytest.raises(NotImplementedError, match=f"{op} has no forward-mode derivative"):
            jvp(calls[op], (x,), (torch.ones_like(x),))
        with torch.autograd.forward_ad.dual_level():
            calls[op](x)  # without a tangent there is nothing to refuse
        for transform, given in ((grad, x), (jacrev, x), (lambda f: vmap(grad(f)), x[None])):
            with pytest.raises(NotImplementedError, match=f"{op} is differentiated by backward"):
                transform(lambda z: calls[op](z).sum())(given)


@pytest.mark.parametrize("backend", BACKENDS)
def test_double_backward_is_refused(backend):
    logits = torch.randn(2, 7, requires_grad=True)
    with vstar_ops.use_backend(backend):
        logp = vstar_ops.token_logp(logits, torch.tensor([1, 2])).logp
        (grad,) = torch.autograd.grad(logp.sum(), logits, create_graph=True)
        for second in (grad.square().sum().backward, lambda: torch.autograd.grad(grad.sum(), logits)):
            with pytest.raises(NotImplementedError, match="token_logp has no second derivative"):
                second()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_call_is_recorded_for_its_first_input(backend):
    """Not for others that ask for a gradient, of which there is none."""
    logp, other = torch.zeros(1, 3, 2), torch.zeros(1, 3, 2, requires_grad=True)
    tokens, rewards = torch.tensor([[[1, 5], [1, 6], [2, 5]]]), torch.rand(1, 3, requires_grad=True)
    with vstar_ops.use_backend(backend):
        for options in ({}, {"old_logp": other, "ref_logp": other}):
            for x in (logp, other):
                loss = vstar_ops.sibling_grpo_loss(x, tokens, rewards, **options).loss
                assert loss.requires_grad == (x is other)


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_an_op_changes_has_a_new_version(backend, direct):
    """Whether it is called as the public functions do, or through ``torch.ops``."""
    trees = SearchTrees.empty(2, 6, 2, children=3, leaves=3)
    arguments = *(getattr(trees, name) for name in vstar_ops.ops.ved._SELECT), 2, 1.0, 1, 10
    op = OPS["ved_select"]
    with vstar_ops.use_backend(backend):
        op.overloads[backend](*arguments) if direct else op(CPU, *arguments)
    changed = {name for name in vstar_ops.ops.ved._SELECT if getattr(trees, name)._version > 0}
    assert changed == {"visits", "next_child", "budget"}


def test_no_argument_of_a_mutating_op_is_named_node():
    """Inductor of torch 2.13 hands arguments on by name, and has one of its own that is called so."""
    for op in OPS.values():
        if op.mutates:
            assert "node" not in [x.name for x in op.overloads[None]._schema.arguments]


def test_automatic_choice_passes_a_limit_over(monkeypatch, caplog):
    """What a backend cannot do goes to the next, said once; asked for by name it is an error."""
    calls = []

    def limited(*_):
        calls.append("triton")
        raise _triton.Unsupported("group_advantage: at most 1 candidate, got 3")

    op = OPS["group_advantage"]
    monkeypatch.setattr(_registry, "_passed_over", set())
    monkeypatch.setitem(op.overloads, "triton", limited)
    arguments = (torch.rand(2, 3), None, 1e-4, 1, 0.0, True)
    with caplog.at_level(logging.WARNING, logger="vstar_ops"):
        for _ in range(2):
            got = _registry._first_that_can(op, ["triton"], *arguments)
    assert torch.equal(got, op.overloads["reference"](*arguments))
    assert calls == ["triton"] * 2
    assert [record.message for record in caplog.records] == [
        "group_advantage: at most 1 candidate, got 3; such calls go to the next backend"
    ]


class Installed:
    """Stands in for the CUDA module and for the library that Python kernels are put into."""

    def __init__(self, problem: str) -> None:
        self.problem, self.in_cpp, self.in_python = problem, [], []

    def probe(self) -> str:
        return self.problem

    def install(self, names: list[str]) -> None:
        self.in_cpp += names

    def impl(self, name, kernel, key) -> None:
        assert key == "CUDA"
        self.in_python.append((name, kernel.args[1]))


@pytest.mark.parametrize(
    ("on", "problem", "in_cpp", "in_python"),
    [
        ({"cuda", "triton"}, "", set(OPS), {}),
        ({"cuda"}, "", set(OPS), {}),
        ({"triton"}, "", set(), {name: ["triton"] for name in OPS}),
        ({"cuda", "triton"}, "no kernel image is available", set(), {name: ["triton"] for name in OPS}),
        ({"cuda"}, "no kernel image is available", set(), {}),
        (set(), "", set(), {}),
    ],
)
def test_what_runs_on_cuda_tensors(monkeypatch, on, problem, in_cpp, in_python):
    """The CUDA module's kernels where they run, then Triton's; a module that cannot run says why."""
    stand_in = Installed(problem)
    status = {name: BackendStatus(name in on, "") for name in vstar_ops.backends()}
    monkeypatch.setattr(vstar_ops._backends, "_backends", status)
    monkeypatch.setattr(torch.ops, "vstar_ops_cuda", stand_in)
    monkeypatch.setitem(_registry._libraries, None, stand_in)
    _registry.install_on_cuda()
    assert set(stand_in.in_cpp) == in_cpp
    assert dict(stand_in.in_python) == in_python
    if problem:
        assert status["cuda"] == (False, "its kernels do not run on this GPU: no kernel image is available")
