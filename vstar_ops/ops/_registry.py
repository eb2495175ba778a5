"""The registry of ops. One call of :func:`define` declares an op for every backend; :data:`OPS` lists all.

The reference function is the declaration: its name is the op's name, its parameters are the schema. Its
module is the basename that the op's files share in ``csrc/``, ``kernels/``, ``tests/`` and here. Four
dispatcher libraries hold the implementations:

===================== ============ =======================================================================
library               dispatch key what runs
===================== ============ =======================================================================
``vstar_ops``         CPU          C++, which registers itself when its library is loaded (``csrc/cpu``)
``vstar_ops``         CUDA         each op's first backend that works here (:func:`install_on_cuda`)
``vstar_ops``         any other    the reference
``vstar_ops_<name>``  any          the backend ``reference``, ``triton`` or ``cuda``, and nothing else
===================== ============ =======================================================================

``torch.compile`` makes a graph for every value of a float that a custom op takes, but one for all values of a
number in a tensor. So every op with floats has a twin, ``<op>_dynamic``, that takes them as tensors and runs
the op. Only a compiled function calls it, where one of the floats varies.

An op without a gradient returns selections and statistics: no gradient flows out of it, whatever runs it.
"""

from __future__ import annotations

import functools
import inspect
import logging
import operator
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

from .. import _triton
from .._backends import active_backend, backends, turn_off
from ._checks import as_tensor, validating, varies

OPS: dict[str, Op] = {}
REFUSED: Any = object()  # what Op.attempt() returns in place of a result

_log = logging.getLogger("vstar_ops")
_passed_over: set[tuple[str, str]] = set()  # op, backend
_libraries = {
    backend: torch.library.Library(namespace, "DEF")
    for backend, namespace in (
        (None, "vstar_ops"),
        ("reference", "vstar_ops_reference"),
        ("triton", "vstar_ops_triton"),
        ("cuda", "vstar_ops_cuda"),
    )
}
_DYNAMIC = "_dynamic"
_libraries[None].define("simd_level() -> str")
_libraries[None].define("poison_outputs(bool enabled) -> ()")
_libraries["cuda"].define("probe() -> str")
_libraries["cuda"].define("install(str[] names) -> ()")


def _overloads(name: str) -> dict[str | None, Any]:
    """The dispatcher op of each backend."""
    found: dict[str | None, Any] = {
        backend: getattr(getattr(torch.ops, library.ns), name).default
        for backend, library in _libraries.items()
    }
    return {**found, "cpu": found[None]}


class Op:
    """An op that was defined: a call runs it on the backend that is active for the device.

    Attributes:
        name: within ``torch.ops.vstar_ops``.
        module: the basename of its files.
        mutates: positions of the arguments that it changes in place.
        differentiable: whether a gradient flows through it.
        cuda_backends: what may run it on CUDA tensors if none is asked for, best first.
        double: names and positions of the arguments that may be float64. The reference then runs where no
            backend was asked for, and nothing else takes them.
        overloads: the dispatcher op of each backend; under None the one that chooses by the tensors' device.
        dynamic: its twins that take floats as tensors, likewise; empty without floats.
    """

    def __init__(
        self,
        reference: Callable[..., Any],
        mutates: Sequence[str],
        differentiable: bool,
        cuda_backends: tuple[str, ...],
        has_floats: bool,
        double: Sequence[str],
    ) -> None:
        self.name = reference.__name__
        self.module = reference.__module__.rpartition(".")[2]
        parameters = list(inspect.signature(reference).parameters)
        self.mutates = [parameters.index(name) for name in mutates]
        self._changed: Any = operator.itemgetter(*self.mutates) if mutates else None
        self.differentiable = differentiable
        self.cuda_backends = cuda_backends
        self.double = [(name, parameters.index(name)) for name in double]
        self.overloads = _overloads(self.name)
        self.dynamic = _overloads(self.name + _DYNAMIC) if has_floats else {}

    @functools.cached_property
    def in_cpp(self) -> set[str]:
        """Types of devices on which C++ runs the op, if no backend is asked for."""
        return {"cpu"} if backends()["cpu"].available else set()

    def attempt(self, *arguments: Any) -> Any:
        """Call the op where C++ runs it, whose own look at sizes, dtypes and devices costs nearly nothing.

        Only for ops whose ``csrc/torch`` header compares all tensors that the function does not check.

        Returns:
            The result; or :data:`REFUSED` if something else would run, or the call has failed. Checks in
            Python then make the arguments right or say what is wrong, before an ordinary call.
        """
        first = arguments[0]
        if is_dynamo_compiling() or validating() or type(first) is not Tensor:
            return REFUSED
        if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active():
            return REFUSED
        if self.double and first.dtype is torch.float64:
            return REFUSED
        backend = active_backend(first.device)
        kind = "cpu" if first.is_cpu else "cuda" if first.is_cuda else ""  # a device makes its type anew
        if backend != "cuda" and (backend not in (None, "cpu") or kind not in self.in_cpp):
            return REFUSED
        try:
            return self.run(backend, arguments)
        except RuntimeError:
            return REFUSED

    def __call__(self, device: torch.device, *arguments: Any) -> Any:
        return self.run(active_backend(device), arguments)

    def run(self, backend: str | None, arguments: tuple[Any, ...]) -> Any:
        """Call the op on a backend; None: what the dispatcher chooses, or the reference for float64."""
        compiling, past_python = is_dynamo_compiling(), False
        if self.differentiable or self.mutates:
            transforms = not compiling and torch._C._are_functorch_transforms_active()
            past_python = not (compiling or transforms)
            if self.differentiable and (transforms or forward_ad._current_level >= 0):
                self._refuse_transforms(arguments, transforms)
        for name, position in self.double:
            if backend != "reference" and arguments[position].dtype is torch.float64:
                if backend is not None:
                    raise TypeError(
                        f"{name} must be float32, bfloat16 or float16 on the backend {backend!r}, got float64"
                    )
                backend = "reference"
        if compiling and any(map(varies, arguments)):
            return self.dynamic[backend](*map(as_tensor, arguments))
        overload = self.overloads[backend]
        return self._past_python(overload, arguments) if past_python else overload(*arguments)

    def _past_python(self, overload: Any, arguments: tuple[Any, ...]) -> Any:
        """Call a dispatcher op past what :func:`_implement` puts in its way in Python, 5 to 8 us per call."""
        if self.mutates:
            with torch._C._AutoDispatchBelowADInplaceOrView():
                result = overload(*arguments)
            torch.autograd.graph.increment_version(self._changed(arguments))  # not of what is refused
            return result
        if torch.is_grad_enabled() and arguments[0].requires_grad:
            return overload(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return overload(*arguments)

    def _refuse_transforms(self, arguments: tuple[Any, ...], transforms: bool) -> None:
        """Raise where a derivative is asked for that would be 0, or fail without naming the op."""
        for x in arguments:
            if not isinstance(x, Tensor):
                continue
            if forward_ad.unpack_dual(x).tangent is not None:
                raise NotImplementedError(
                    f"{self.name} has no forward-mode derivative (jvp, jacfwd): use backward or autograd.grad"
                )
            while transforms and torch._C._functorch.is_batchedtensor(x):
                x = torch._C._functorch.get_unwrapped(x)
            if transforms and torch._C._functorch.is_gradtrackingtensor(x) and x.requires_grad:
                raise NotImplementedError(
                    f"{self.name} is differentiated by backward and autograd.grad, not by torch.func"
                )


class Gradient(NamedTuple):
    """How an op is differentiated, once and by its first input.

    Attributes:
        op: computes the gradient, on the backend that computed the result. None if ``backward`` needs no op.
        save: ``setup_context(ctx, inputs, output)`` of an autograd function. It saves the first input, so
            that a second derivative by it is refused instead of being 0.
        backward: its backward, ``(ctx, op, *gradients)``: a gradient or None for each input.
    """

    op: Op | None
    save: Callable[..., None]
    backward: Callable[..., tuple[Any, ...]]

    def formula(self, name: str, backend: str | None, dynamic: bool) -> Callable[..., tuple[Any, ...]]:
        """The backward of an op on one backend."""
        op = self.op and (self.op.dynamic if dynamic else self.op.overloads)[backend]

        def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
            with torch.no_grad():
                first, *others = self.backward(ctx, op, *gradients)
            if first is not None and torch.is_grad_enabled():
                first = _Once.apply(name, first, *gradients, *ctx.saved_tensors)
            return first, *others

        return backward


class _Once(torch.autograd.Function):
    """A gradient as it is, that depends on tensors in a way that is not differentiated."""

    @staticmethod
    def forward(ctx: Any, name: str, gradient: Tensor, *_: Tensor | None) -> Tensor:
        ctx.name = name
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise NotImplementedError(f"{ctx.name} has no second derivative")


def define(
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    gradient: Gradient | None = None,
    *,
    mutates: Sequence[str] = (),
    cuda_backends: tuple[str, ...] = ("cuda", "triton"),
    double: Sequence[str] = (),
) -> Op:
    """Declare an op for every backend, and return what calls it.

    Args:
        reference: the op in pure torch, with positional parameters only. ``torch.library.infer_schema`` reads
            the schema off its annotations.
        fake: shapes and dtypes of the results; may ignore trailing arguments by ``*_``.
        gradient: None if no gradient flows.
        mutates: parameters that change in place. None of the others may be called ``node``, which Inductor
            refuses in mutating ops.
        cuda_backends, double: see :class:`Op`.
    """
    name = reference.__name__
    schema = torch.library.infer_schema(reference, mutates_args=mutates)
    schemas, has_floats = {name: schema}, "float " in schema
    if has_floats:
        schemas[name + _DYNAMIC] = schema.replace("float ", "Tensor ")
    for library in _libraries.values():
        for each, its_schema in schemas.items():
            library.define(each + its_schema, tags=(torch.Tag.pt2_compliant_tag,))
            torch.library.register_fake(f"{library.ns}::{each}", _on_one_device(fake), lib=library)
    op = OPS[name] = Op(reference, mutates, gradient is not None, cuda_backends, has_floats, double)
    kernels: dict[str | None, Callable[..., Any]] = {
        None: _slow(reference),
        "reference": reference,
        "triton": functools.partial(_triton.run, op.name, op.module),
    }
    for backend in _libraries:
        _implement(op, op.overloads[backend], backend, kernels.get(backend), gradient)
        if op.dynamic:
            kernel = functools.partial(_with_floats, op.overloads[backend])
            _implement(op, op.dynamic[backend], backend, kernel, gradient)
    return op


def _on_one_device(fake: Callable[..., Any]) -> Callable[..., Any]:
    """A meta tensor among others brings a call here, not to a kernel that refuses it."""

    @functools.wraps(fake)
    def on_one_device(*arguments: Any) -> Any:
        devices = {x.device for x in arguments if isinstance(x, Tensor) and x.dim()}
        if len(devices) > 1:
            raise RuntimeError(f"all tensors must be on one device, got {sorted(map(str, devices))}")
        return fake(*arguments)

    return on_one_device


def _implement(
    op: Op, overload: Any, backend: str | None, kernel: Callable[..., Any] | None, gradient: Gradient | None
) -> None:
    """Give a dispatcher op what runs it, if that is in Python, and its gradient."""
    library, name = _libraries[backend], overload.name()
    if kernel is not None:
        # Autograd falls through to the kernel, and does not switch itself off on the way. What Triton kernels
        # write has no history.
        recording = gradient is None and backend != "triton"
        library.impl(name, torch.no_grad()(kernel) if recording else kernel, "CompositeExplicitAutograd")
    if op.mutates:
        library.impl(name, _mutating(op, overload), "ADInplaceOrView", with_keyset=True)
    if gradient is None:
        library.impl(name, torch.library.fallthrough_kernel, "Autograd")
    else:
        backward = gradient.formula(op.name, backend, overload in op.dynamic.values())
        library.impl(name, _differentiable(overload, gradient.save, backward), "Autograd", with_keyset=True)


def _with_floats(overload: Any, *arguments: Any) -> Any:
    """What a twin runs: the op, with the numbers of the tensors that stand for floats."""
    kinds = overload._schema.arguments
    return overload(
        *(float(x) if isinstance(kind.type, torch.FloatType) else x for x, kind in zip(arguments, kinds))
    )


def _slow(reference: Callable[..., Any]) -> Callable[..., Any]:
    """The reference as what runs for lack of anything better, which is said once."""

    @functools.wraps(reference)
    def kernel(*arguments: Any) -> Any:
        device = next(x.device.type for x in arguments if isinstance(x, Tensor))
        _warn_of_missing_backend(device)
        return reference(*arguments)

    return kernel


@functools.cache
def _warn_of_missing_backend(device: str) -> None:
    wanted = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}.get(device, ())
    reasons = [f"{name}: {backends()[name].detail}" for name in wanted if not backends()[name].available]
    if reasons:
        warnings.warn(
            f"vstar_ops runs on the pure-torch reference on {device}, many times slower: "
            f"{'; '.join(reasons)}",
            stacklevel=5,
        )


def _mutating(op: Op, overload: Any) -> Callable[..., Any]:
    """Bumps the version counters of what an op changes, as torch's own in-place ops do."""

    def kernel(keyset: Any, *arguments: Any) -> Any:
        torch.autograd.graph.increment_version([arguments[i] for i in op.mutates])
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return overload.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *arguments)

    return kernel


def _differentiable(
    overload: Any, save: Callable[..., None], formula: Callable[..., Any]
) -> Callable[..., Any]:
    """What records a call for its backward pass.

    As ``torch.library.register_autograd`` does, but that reads the schema again for every argument of every
    call: 100 us for 19 of them.
    """

    def run(keyset: Any, arguments: Sequence[Any]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return overload.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)

    def forward(ctx: Any, *given: Any) -> Any:
        *arguments, keyset = given
        output = run(keyset, arguments)
        save(ctx, arguments, output)
        return output

    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        return *formula(ctx, *gradients), None

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: Any = type(overload._opname, (torch.autograd.Function,), methods)

    def kernel(keyset: Any, *arguments: Any) -> Any:
        if torch.is_grad_enabled() and arguments[0].requires_grad:
            return function.apply(*arguments, keyset)
        return run(keyset, arguments)

    return kernel


def install_on_cuda() -> None:
    """Give each op its best backend that runs here on CUDA tensors; called once, when CUDA is initialized.

    The kernels of the CUDA module are then what the dispatcher calls, without Python in between.
    """
    if backends()["cuda"].available:
        problem = torch.ops.vstar_ops_cuda.probe()
        if problem:
            turn_off("cuda", f"its kernels do not run on this GPU: {problem}")
    in_cpp = []
    for op in OPS.values():
        order = [name for name in op.cuda_backends if backends()[name].available]
        if order[:1] == ["cuda"]:
            in_cpp.append(op.name)
            op.in_cpp.add("cuda")
        elif order:
            _libraries[None].impl(op.name, functools.partial(_first_that_can, op, order), "CUDA")
    if in_cpp:
        torch.ops.vstar_ops_cuda.install(in_cpp)


def _first_that_can(op: Op, order: Sequence[str], *arguments: Any) -> Any:
    """Run an op on the first backend that can take the arguments; say once that one was passed over."""
    for name in order:
        try:
            return op.overloads[name](*arguments)
        except _triton.Unsupported as limit:
            if (op.name, name) not in _passed_over:
                _passed_over.add((op.name, name))
                _log.warning("%s; such calls go to the next backend", limit)
    return op.overloads["reference"](*arguments)
