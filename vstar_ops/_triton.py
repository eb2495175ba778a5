"""The Triton backend: how a kernel is found and called, compiled ahead, and what it takes of a GPU.

The kernel of an op is the function of the same name in ``kernels/<the op's module>.py``, imported at its
first call: the import of Triton takes a second.
"""

from __future__ import annotations

import importlib
import logging
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ._backends import backends, interpreting

ARCHITECTURES = (80, 90, 100)


_log = logging.getLogger("vstar_ops")
_called: dict[str, Callable[..., Any]] = {}  # the kernels of ops that have been called


class Unsupported(NotImplementedError):
    """A Triton kernel does not take this call, and nothing has been launched."""


def modules() -> tuple[str, ...]:
    """The files in ``kernels/`` that hold an op's kernels."""
    from .ops import OPS  # which need this file

    return tuple(sorted({op.module for op in OPS.values()}))


def run(name: str, module: str, *arguments: Any) -> Any:
    """Call the Triton kernel ``kernels/<module>.py: <name>``; say once how long its first call took.

    Raises:
        Unsupported: the call is beyond what the kernel takes.
    """
    kernel = _called.get(name)
    if kernel is None:
        start = time.perf_counter()
        kernel = getattr(_kernels(module), name)
        result = _on_their_device(kernel, arguments)
        _called[name] = kernel
        seconds = time.perf_counter() - start
        _log.info("%s: first call of the Triton kernel, compiled in %.2f s", name, seconds)
        return result
    return _on_their_device(kernel, arguments)


def _on_their_device(kernel: Callable[..., Any], arguments: Sequence[Any]) -> Any:
    """Make the GPU of the tensors the current one for a call: Triton launches on that."""
    device = next(x for x in arguments if isinstance(x, torch.Tensor)).device
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return kernel(*arguments)
    with torch.cuda.device(device):
        return kernel(*arguments)


def _kernels(module: str) -> Any:
    return importlib.import_module(f"vstar_ops.kernels.{module}")


def specializations(names: Iterable[str] | None = None) -> Iterator[Any]:
    """All that these modules (or all) compile, for contiguous inputs whose rows are multiples of 16 long."""
    for module in modules() if names is None else names:
        yield from _kernels(module).specializations()


def warmup(*names: str, device: torch.device | str = "cuda") -> float:
    """Compile Triton kernels and load them onto a GPU ahead of their first call.

    A kernel is otherwise compiled when it is first called with new dtypes or a new class of sizes, which
    takes from half a second to ten. Triton keeps what was compiled on disk, so a second process loads it in
    milliseconds. A kernel that is not loaded cannot be captured in a CUDA graph.

    Args:
        names: some of ``"beams"``, ``"draws"``, ``"expand_topk"``, ``"filters"``,
            ``"group_advantage"``, ``"prefix_returns"``, ``"prefix_tree"``, ``"sibling_advantage"``,
            ``"sibling_grpo_loss"``, ``"token_logp"``, ``"ved"``, ``"ved_rows"``; all if none is given.
        device: the GPU to compile for.

    Returns:
        Seconds that it took.

    Raises:
        ValueError: an unknown name.
        RuntimeError: Triton kernels cannot run here, with the reason.

    Example:
        >>> vstar_ops.warmup("sibling_advantage")  # doctest: +SKIP
        12.3
    """
    for name in names:
        if name not in modules():
            raise ValueError(f"names must be some of {modules()}, got {name!r}")
    status = backends()["triton"]
    if not status.available or interpreting():
        raise RuntimeError(f"Triton kernels cannot be compiled here: {status.detail}")
    start = time.perf_counter()
    with torch.cuda.device(device):
        for item in specializations(names or None):
            compiled = item.kernel.warmup(*stand_ins(item), grid=(1,), **item.options)
            compiled._init_handles()  # otherwise Triton loads it at its first launch
    return time.perf_counter() - start


_POINTERS = {
    "*fp32": torch.float32, "*bf16": torch.bfloat16, "*fp16": torch.float16, "*fp64": torch.float64,
    "*u1": torch.bool, "*i32": torch.int32, "*i64": torch.int64,
}  # fmt: skip


def stand_ins(item: Any) -> list[Any]:
    """Arguments of a call that compiles a specialization and does not run."""
    return [item.constants.get(name, _stand_in(kind)) for name, kind in item.signature().items()]


def _stand_in(kind: Any) -> Any:
    if isinstance(kind, tuple):
        return type(kind)(*map(_stand_in, kind))
    if kind in _POINTERS:
        return _POINTERS[kind]
    return 1.5 if kind.startswith("fp") else 16 if kind.endswith(":16") else 17


def is_aligned(kind: Any) -> bool:
    """Whether the compiler may count on a multiple of 16."""
    return isinstance(kind, str) and (kind.startswith("*") or kind.endswith(":16"))


def plain(kind: Any) -> Any:
    """The type alone, as Triton writes it."""
    return kind.removesuffix(":16") if isinstance(kind, str) else kind


class Resources(NamedTuple):
    """What a compiled kernel takes."""

    registers: int  # per thread
    shared: int  # bytes per block
    spilled: int  # bytes per thread


def compiled(item: Any, architecture: int, aligned: bool = True) -> Any:
    """A specialization compiled for ``sm_<architecture>``, which needs no GPU.

    Not ``aligned``: for integers of which none need be a multiple of 16.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kinds = item.signature()
    multiples = [i for i, x in enumerate(kinds.values()) if is_aligned(x) and (aligned or x.startswith("*"))]
    source = ASTSource(
        item.kernel,
        {name: plain(kind) for name, kind in kinds.items()},
        dict(item.constants),
        {(i,): [["tt.divisibility", 16]] for i in multiples},
    )
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=item.options)


def cuobjdump(cubin: bytes, option: str) -> str:
    """What NVIDIA's tool of that name, which comes with Triton, prints about machine code."""
    import triton

    path = Path(triton.knobs.nvidia.cuobjdump.path)
    search = f"{path.parent}{os.pathsep}{os.environ['PATH']}"  # it calls nvdisasm
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(path), option, file.name]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, env={**os.environ, "PATH": search}
        ).stdout


def resources(item: Any, architecture: int) -> Resources:
    """Compile for ``sm_<architecture>``, which needs no GPU, and look at the result."""
    kernel = compiled(item, architecture)
    report = cuobjdump(kernel.asm["cubin"], "-res-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", report)
    if found is None:
        raise RuntimeError(f"cuobjdump reports no resources of {item.name}: {report!r}")
    registers, stack, local = map(int, found.groups())
    return Resources(registers, kernel.metadata.shared, stack + local)
