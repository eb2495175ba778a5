"""What holds for every op: fake tensors, ``torch.compile``, threads, batches, gradients, empty inputs.

What an op computes is tested in its own file.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import cuda_emulator
import op_calls
import pytest
import torch
from conftest import BACKENDS
from helpers import Ops, assert_same, check_every_float16, map_tensors, op_arguments, steps, tensors

import vstar_ops
from vstar_ops.ops import OPS
from vstar_ops.verify.calls import IN_PLACE, Call
from vstar_ops.verify.cases import CASES, LARGE

NAMES = [pytest.param(op, label, id=f"{op}-{label}") for op, found in CASES.items() for label in found]
DIFFERENTIABLE = {"token_logp": ["logp", "entropy"], "sibling_grpo_loss": ["loss"]}
COMPILED = [x for x in NAMES if x.values[0] != "token_logp_backward"]  # compiled as token_logp's gradient
NUMBERED = ["rows_to_run", "distinct_rows"]  # rows of all requests together
OVER_THE_BATCH = ["sibling_grpo_loss", *NUMBERED]  # the loss is a mean over the requests
every_op = pytest.mark.parametrize(("op", "label"), NAMES)
ROOT = Path(__file__).resolve().parent.parent


def requires_grad(call: Call) -> Call:
    """The call with copies of its tensors, of which all floats ask for a gradient."""
    return call.map(lambda x: x.detach().clone().requires_grad_(x.is_floating_point()))


def case(op: str, label: str, batch: int = 3) -> Call:
    return CASES[op][label](batch)


def test_every_op_has_cases():
    assert set(CASES) == set(LARGE) == set(OPS)
    assert set(DIFFERENTIABLE) == {op.name for op in OPS.values() if op.differentiable}


@every_op
def test_opcheck(op, label):
    """Schema, fake tensors, autograd registration and AOT dispatch, as PyTorch checks them."""
    arguments = op_arguments(op, case(op, label))
    if op in DIFFERENTIABLE:
        arguments[0].requires_grad_()
    torch.library.opcheck(getattr(torch.ops.vstar_ops, op).default, arguments)


@every_op
def test_meta_tensors(op, label):
    """Shapes, dtypes and strides without data are those with data."""
    arguments, run = op_arguments(op, case(op, label)), getattr(torch.ops.vstar_ops, op).default
    want = run(*map_tensors(torch.Tensor.clone, arguments))
    got = run(*map_tensors(lambda x: x.to("meta"), arguments))
    for x, y in zip(tensors(got), tensors(want), strict=True):
        assert (x.device.type, x.shape, x.dtype, x.stride()) == ("meta", y.shape, y.dtype, y.stride())


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("op", "label"), COMPILED)
def test_compile(op, label, dynamic):
    """``torch.compile(fullgraph=True)`` takes the public function, with its gradient, for several sizes."""
    torch.compiler.reset()  # what was compiled for other cases counts toward the limit of recompilations
    function = IN_PLACE.get(op, case(op, label).function)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    differentiable = DIFFERENTIABLE.get(op, [])
    for batch in (5, 3):
        results = []
        for run in (function, compiled):
            call = case(op, label, batch)
            arguments = (requires_grad(call) if differentiable else call).arguments
            out = run(**arguments)
            results.append([x.detach() for x in tensors((out, *arguments.values()))])
            if differentiable:
                sum(getattr(out, name).clamp(min=-50).sum() for name in differentiable).backward()
                gradients = [x.grad for x in tensors(tuple(arguments.values())) if x.grad is not None]
                assert gradients
                results[-1] += gradients
        assert_same(*map(tuple, results))


@every_op
def test_an_empty_batch(backend, op, label):
    """No requests: outputs of the usual shapes and dtypes."""
    got, want = tensors(case(op, label, 0)()), tensors(case(op, label)())
    for x, y in zip(got, want, strict=True):
        assert x.dtype == y.dtype
        empty = x.shape == ((0, *y.shape[1:]) if y.dim() else ())
        assert empty or (op in NUMBERED and (x.numel() == 0 or not x.any()))


@every_op
def test_a_request_alone(backend, op, label):
    """The same bits alone as in a batch."""
    call = case(op, label, 4)
    together = call()
    assert op in OVER_THE_BATCH or all(x.shape[0] == 4 for x in tensors(together))
    for b in range(4) if op not in OVER_THE_BATCH else ():
        assert_same(call.request(b)(), map_tensors(lambda x, b=b: x[b : b + 1], together))
    if op_calls.counts_launches(backend):
        counted = op.removesuffix("_backward")  # autograd calls the backward op past the counter
        assert op_calls.launches["every_op", backend, counted], "no kernel was launched"


@pytest.mark.parametrize(
    ("op", "label"), [pytest.param(op, label, id=f"{op}-{label}") for op in LARGE for label in LARGE[op]]
)
def test_threads_and_batch_give_the_same_bits(cpu, restore_threads, op, label):
    call, results = LARGE[op][label](), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(call())
    assert_same(*results)
    size = len(tensors(results[0])[0]) if op not in OVER_THE_BATCH else 0
    for b in {0, size // 2, size - 1} if size else ():
        assert_same(call.request(b)(), map_tensors(lambda x, b=b: x[b : b + 1], results[0]))


@every_op
def test_no_other_gradient_flows(backend, op, label):
    """Selections and statistics have no gradient, whatever the inputs ask for, and come out the same."""
    call = case(op, label)
    want, got = call(), requires_grad(call)()
    flows = [name for name in getattr(got, "_fields", ()) if getattr(got, name).requires_grad]
    assert flows == DIFFERENTIABLE.get(op, [])
    if not flows:
        assert not any(x.requires_grad for x in tensors(got))
    assert_same(map_tensors(torch.Tensor.detach, got), want)


@every_op
def test_inputs_are_not_changed(backend, op, label):
    call = case(op, label)
    before = call.map(torch.Tensor.clone)
    call()
    assert_same(tuple(call.arguments.values()), tuple(before.arguments.values()))


NARROWER = """
import vstar_ops
from helpers import assert_close, check_every_float16, tensors
from vstar_ops.verify.cases import LARGE

assert {loops!r} in vstar_ops.backends()["cpu"].detail
for op, found in LARGE.items():
    for label, make in found.items():
        with vstar_ops.use_backend("reference"):
            want = make()()
        halves = any(x.is_floating_point() and x.itemsize == 2 for x in tensors(want))
        # A ratio next to its bound is clipped or not, which the loss counts.
        loose = halves or op == "sibling_grpo_loss"
        assert_close(make()(), want, tolerance=1e-2 if loose else 1e-4)
check_every_float16()
"""


def test_every_float16(cpu):
    check_every_float16()


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="other processors have one instruction set")
@pytest.mark.parametrize(("capability", "loops"), [("default", "SSE2"), ("avx2", "AVX2")])
def test_narrower_vectors(cpu, capability, loops):
    """The loops for processors with less than this one has."""
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command = [sys.executable, "-c", NARROWER.format(loops=loops)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_kernels_get_the_inputs_as_they_lie(backend, monkeypatch):
    """On the way to a kernel of any backend no tensor is made contiguous."""
    rewards, seen = torch.rand(9, 8)[1::2, 2:].transpose(0, 1), []
    overloads = OPS["group_advantage"].overloads
    key = {"emulated": "cuda"}.get(backend, backend)
    for name in {key, None if key == "cpu" else key}:
        run = overloads[name]

        def recorded(*arguments, run=run):
            seen.append(arguments[0])
            return run(*arguments)

        monkeypatch.setitem(overloads, name, recorded)
    vstar_ops.group_advantage(rewards)
    assert [(x.stride(), x.storage_offset()) for x in seen] == [(rewards.stride(), rewards.storage_offset())]


def test_what_goes_to_a_gpu_keeps_its_strides(monkeypatch):
    """``through_gpu``, here on the CPU: layout and values go there, and the gradient comes back."""
    logits = torch.randn(3, 5, 9, requires_grad=True)
    case = Call(vstar_ops.token_logp, {"logits": logits[:, 1::2, ::2], "targets": torch.tensor([[1, 0]] * 3)})
    arguments, op = [], OPS["token_logp"]
    run = op.overloads["reference"]

    def recorded(*given):
        arguments.append(given[0])
        return run(*given)

    monkeypatch.setitem(op.overloads, "reference", recorded)
    through = op_calls.through_gpu(op, "reference", "cpu")
    monkeypatch.setattr(type(op), "run", lambda op, backend, given: through(*given))
    case().logp.sum().backward()
    got, want = arguments[0], case.arguments["logits"]
    assert (got.stride(), got.storage_offset(), got.dtype) == (
        want.stride(),
        want.storage_offset(),
        want.dtype,
    )
    assert got.untyped_storage().data_ptr() != want.untyped_storage().data_ptr()
    assert torch.equal(got, want)
    monkeypatch.undo()
    (gradient,) = torch.autograd.grad(case().logp.sum(), logits)
    torch.testing.assert_close(logits.grad, gradient)


# Functions that the host may run in a call: what its checks cost on any machine.
STEPS = {
    "expand_topk": 36, "filter_items": 51, "group_advantage": 24, "sibling_advantage": 33,
    "prefix_returns": 50, "prefix_tree": 22, "advance_beams": 33, "rows_to_run": 34, "draw_children": 33,
    "distinct_rows": 26, "token_logp": 24, "sibling_grpo_loss": 95, "ved_select": 35, "ved_insert": 32,
    "ved_candidates": 30, "ved_inputs": 36, "ved_evaluate": 42, "ved_beams": 36,
}  # fmt: skip
RECORDED = {"token_logp": 60, "sibling_grpo_loss": 156}  # where a gradient is asked for
OTHER_OPS = {"sibling_grpo_loss": 3}  # advantages, terms
PUBLIC = [x for x in CASES if x != "token_logp_backward"]


def in_place(op: str) -> Call:
    """The call on the arguments themselves, where an op changes them."""
    call = case(op, "plain", 1)
    return call._replace(function=IN_PLACE.get(op, call.function))


@pytest.mark.parametrize("op", PUBLIC)
def test_functions_of_a_call(cpu, op):
    assert steps(in_place(op)) <= STEPS[op]


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_functions_of_a_call_that_is_recorded(cpu, op):
    assert steps(requires_grad(case(op, "plain", 1))) <= RECORDED[op]


@pytest.mark.parametrize("op", PUBLIC)
def test_a_call_is_one_op(cpu, op):
    """A view costs the host as much as all checks of two arguments."""
    call = in_place(op)
    call()  # makes what is kept
    with Ops() as ops:
        call()
    assert f"vstar_ops::{op}" in ops.names
    assert len(ops.names) == 1 + OTHER_OPS.get(op, 0)


@pytest.mark.parametrize("rows", [(), (3,), (2, 3)])
@pytest.mark.parametrize("targets", [(), (4,)])
def test_rows_are_read_without_views(cpu, rows, targets):
    """``token_logp`` of [V], [N, V] and [B, W, V], of one target or several."""
    logits, targets = torch.randn(*rows, 9), torch.zeros((*rows, *targets), dtype=torch.int64)
    with Ops() as ops:
        vstar_ops.token_logp(logits, targets)
    assert ops.names == ["vstar_ops::token_logp"]


# Where C++ is asked first it looks at all tensors but those of the trie. Axes of any size, from the last one:
ASKED = {"token_logp": {"logits -1", "targets -1"}, "ved_evaluate": {"logits -1"}, "ved_beams": {"above -1"}}
ASKED |= {"ved_select": set(), "ved_insert": set(), "ved_candidates": set()}
OF_THE_TRIE = {"offset", "token", "alive", "only_leaf"}
TOGETHER = [{"offset", "token", "node"}, {"other_node", "other_parent", "other_logp"}]  # all of them, or none


@pytest.mark.parametrize(
    ("op", "label"), [pytest.param(op, label, id=f"{op}-{label}") for op in ASKED for label in CASES[op]]
)
@pytest.mark.parametrize("module", [x for x in BACKENDS if x in ("cpu", "emulated")])
def test_what_is_not_checked_in_python_is_refused(module, op, label):
    """Another size, number of axes, dtype or device of any tensor is an error of the op itself."""
    if module == "emulated":
        cuda_emulator.load()
    overload = OPS[op].overloads["cpu" if module == "cpu" else "cuda"]
    given = op_arguments(op, case(op, label))
    for i, x in enumerate(given):
        name = overload._schema.arguments[i].name
        if not isinstance(x, torch.Tensor) or name in OF_THE_TRIE:
            continue
        wrong = [x[None].clone(), x.to(torch.int16), x.to("meta")]
        wrong += [
            x.narrow(axis, 0, size - 1).clone()
            for axis, size in enumerate(x.shape)
            if f"{name} {axis - x.dim()}" not in ASKED[op]
        ]
        for other in wrong:
            with pytest.raises(RuntimeError, match="argument|one device|sums of one more|must be int32"):
                overload(*given[:i], other, *given[i + 1 :])
    kept = {x._use_count() for x in tensors(given)}
    assert kept == {1}, "a refused call has kept a tensor"


@pytest.mark.parametrize("module", [x for x in BACKENDS if x in ("cpu", "emulated")])
@every_op
def test_an_optional_tensor_that_is_absent(module, op, label):
    """Whatever else is there, the op itself gives a result or refuses: it reads nothing that is not there."""
    if module == "emulated":
        cuda_emulator.load()
    overload = OPS[op].overloads["cpu" if module == "cpu" else "cuda"]
    given, there, refused = op_arguments(op, case(op, label)), set(), set()
    for i, argument in enumerate(overload._schema.arguments):
        if isinstance(argument.type, torch.OptionalType) and given[i] is not None:
            there.add(argument.name)
            try:
                overload(*given[:i], None, *given[i + 1 :])
            except RuntimeError:
                refused.add(argument.name)
    assert refused == set().union(*(names for names in TOGETHER if names <= there))


@pytest.mark.parametrize(("op", "label"), COMPILED)
def test_tensors_on_several_devices_are_refused(op, label):
    """Each tensor in turn on another device than the rest: the error names an argument and both devices."""
    call = case(op, label)
    for name, value in call.arguments.items():
        if isinstance(value, torch.Tensor) and len(tensors(tuple(call.arguments.values()))) > 1:
            with pytest.raises(ValueError, match=r"^[\w.]+ must be on (cpu|meta) like .*, got (cpu|meta)"):
                Call(call.function, {**call.arguments, name: value.to("meta")})()


def test_helpers_find_differences():
    """The comparison that the tests above rely on."""
    x: Any = (torch.tensor([1.0, float("nan")]), torch.tensor([3]))
    assert_same(x, map_tensors(torch.Tensor.clone, x))
    for other in ((x[0] + 1e-7, x[1]), (x[0], x[1] + 1), (x[0],), ()):
        with pytest.raises(AssertionError):
            assert_same(x, other)
