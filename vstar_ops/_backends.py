"""Which implementations of the ops exist here, and which one is used.

Every op is one entry of PyTorch's dispatcher (``torch.ops.vstar_ops.*``). The pure-torch reference is
registered for every device; a native backend registers faster kernels for its own device type on top.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch

from ._build_info import not_built

NAMES = ("reference", "cpu", "triton", "cuda")

# What runs an op on CUDA tensors, best first; where neither is on, the reference. To be set by measurement:
# neither backend has run on a GPU yet. Until then the one with fewer launches and limits comes first.
_ON_GPU = {
    "expand_topk": ("cuda", "triton"),  # both two launches; Triton's takes up to 2,048 winners
    "sibling_advantage": ("cuda", "triton"),  # one launch for all groups, Triton's up to 128 candidates
    "group_advantage": ("cuda", "triton"),
    "prefix_returns": ("cuda", "triton"),  # one launch, Triton's two and more
    "prefix_tree": ("cuda", "triton"),  # likewise
    "sibling_grpo_loss": ("cuda", "triton"),
    "token_logp": ("cuda", "triton"),  # one launch a pass, Triton's up to three
    "token_logp_backward": ("cuda", "triton"),
    "ved_select": ("cuda", "triton"),
    "ved_insert": ("cuda", "triton"),
    "ved_candidates": ("cuda", "triton"),
}


class BackendStatus(NamedTuple):
    """Whether a backend can be used, and what it is or why it is off."""

    available: bool
    detail: str


def _load_cpu() -> BackendStatus:
    library = library_path()
    if library is None:
        return BackendStatus(False, not_built("cpu"))
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return BackendStatus(False, f"{library.name} does not load beside torch {torch.__version__}: {error}")
    return BackendStatus(True, f"C++ on CPU tensors, {torch.ops.vstar_ops.simd_level()} loops")


def _find_triton() -> BackendStatus:
    """Triton is imported at the first call of a kernel, not here: the import takes a second."""
    try:
        found = version("triton")
    except PackageNotFoundError:
        return BackendStatus(False, "Triton is not installed: `pip install triton`")
    if tuple(int(x) for x in found.split(".")[:2]) < (3, 6):
        return BackendStatus(False, f"Triton {found} is older than 3.6")
    if interpreting():
        return BackendStatus(
            True, f"Triton {found}, interpreted on any device, slow (TRITON_INTERPRET is set)"
        )
    if torch.version.cuda is None:
        return BackendStatus(False, f"torch {torch.__version__} is built without CUDA")
    return BackendStatus(True, f"Triton {found} on CUDA tensors")


def _load_cuda() -> BackendStatus:
    library = library_path("_CUDA")
    if torch.version.cuda is None:
        built = "built, but " if library else ""
        return BackendStatus(False, f"{built}torch {torch.__version__} is built without CUDA")
    if library is None:
        return BackendStatus(False, not_built("cuda"))
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return BackendStatus(False, f"{library.name} does not load beside torch {torch.__version__}: {error}")
    return BackendStatus(True, "CUDA C++ on CUDA tensors")


def interpreting() -> bool:
    """Whether Triton kernels are interpreted in Python, on tensors of any device."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def library_path(name: str = "_C") -> Path | None:
    """The module beside this file, if it was built: ``_C`` for CPU tensors, ``_CUDA`` for CUDA tensors."""
    return next(iter(sorted(Path(__file__).parent.glob(f"{name}.*"))), None)


def default_cuda_backend(op: str) -> str:
    """The backend that runs an op on CUDA tensors where none is asked for."""
    return next((name for name in _ON_GPU[op] if _backends[name].available), "reference")


def _status() -> dict[str, BackendStatus]:
    return {
        "reference": BackendStatus(True, "pure torch, any device"),
        "cpu": _load_cpu(),
        "triton": _find_triton(),
        "cuda": _load_cuda(),
    }


_backends: dict[str, BackendStatus] = {}
_active: str | None = None  # None: what the dispatcher finds best for the tensors' device


def backends() -> dict[str, BackendStatus]:
    """All backends by name, each with ``available`` and a ``detail`` that says why it is off.

    Example:
        >>> vstar_ops.backends()["reference"]
        BackendStatus(available=True, detail='pure torch, any device')
    """
    return dict(_backends)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the ops inside the block on one backend, for the whole process.

    Outside of any block the environment variable ``VSTAR_OPS_BACKEND`` decides, and without it the
    fastest available backend of each tensor's device.

    Args:
        name: ``"reference"``, ``"cpu"`` (CPU tensors), ``"triton"`` or ``"cuda"`` (CUDA tensors), or
            ``"auto"`` for the default.

    Raises:
        ValueError: an unknown name.
        RuntimeError: the backend is not available here, with the reason.
    """
    global _active
    previous = _active
    _active = _checked("name", name)
    try:
        yield
    finally:
        _active = previous


def active_backend(device: torch.device) -> str | None:
    """The backend that an op called now with tensors on ``device`` must run, None for what is dispatched."""
    if _active is None:
        return None
    if _active == "cpu" and device.type != "cpu":
        raise RuntimeError(f"the backend 'cpu' runs on CPU tensors, got a tensor on {device}")
    if _active == "triton" and device.type != "cuda" and not interpreting():
        raise RuntimeError(f"the backend 'triton' runs on CUDA tensors, got a tensor on {device}")
    if _active == "cuda" and device.type != "cuda":
        raise RuntimeError(f"the backend 'cuda' runs on CUDA tensors, got a tensor on {device}")
    return _active


def _checked(argument: str, name: str) -> str | None:
    if name == "auto":
        return None
    if name not in NAMES:
        raise ValueError(f"{argument} must be one of {('auto', *NAMES)}, got {name!r}")
    status = _backends[name]
    if not status.available:
        raise RuntimeError(f"the backend {name!r} is off: {status.detail}")
    return name


def initialize() -> None:
    """Load what was built; called once by the package, after all schemas are defined."""
    global _active
    _backends.update(_status())
    _active = _checked("VSTAR_OPS_BACKEND", os.environ.get("VSTAR_OPS_BACKEND", "auto"))
