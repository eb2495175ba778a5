"""Which backends exist here, and which one runs the ops of a thread. See also ``ops/_registry.py``."""

from __future__ import annotations

import os
import threading
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch

from ._build_info import not_built

NAMES = ("reference", "cpu", "triton", "cuda")


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


def _status() -> dict[str, BackendStatus]:
    return {
        "reference": BackendStatus(True, "pure torch, any device"),
        "cpu": _load_cpu(),
        "triton": _find_triton(),
        "cuda": _load_cuda(),
    }


_backends: dict[str, BackendStatus] = {}
_default: str | None = None  # of threads that asked for nothing; None: what the dispatcher chooses by device
_DEVICES = {"cpu": "cpu", "triton": "cuda", "cuda": "cuda"}  # types of tensors that a backend runs on
# A plain threading.local: torch.compile reads it while tracing, and compiles anew where it changes.
_thread = threading.local()


def backends() -> dict[str, BackendStatus]:
    """All backends by name, each with ``available`` and a ``detail`` that says why it is off.

    Example:
        >>> vstar_ops.backends()["reference"]
        BackendStatus(available=True, detail='pure torch, any device')
    """
    return dict(_backends)


def turn_off(name: str, reason: str) -> None:
    """Note that a backend was found not to work here."""
    _backends[name] = BackendStatus(False, reason)


class use_backend:
    """Run the ops inside the block on one backend, in this thread, also under ``torch.compile``.

    Outside of any block the environment variable ``VSTAR_OPS_BACKEND`` decides, and without it the
    fastest available backend of each tensor's device.

    Args:
        name: ``"reference"``, ``"cpu"`` (CPU tensors), ``"triton"`` or ``"cuda"`` (CUDA tensors), or
            ``"auto"`` for the default.

    Raises:
        ValueError: an unknown name.
        RuntimeError: the backend is not available here, with the reason.

    Example:
        >>> with vstar_ops.use_backend("reference"):
        ...     vstar_ops.group_advantage(torch.tensor([[1.0, 1.0]]))
        tensor([[0., 0.]])
    """

    def __init__(self, name: str) -> None:
        self.backend = _checked("name", name)

    def __enter__(self) -> None:
        self.previous = getattr(_thread, "backend", _default)
        _thread.backend = self.backend

    def __exit__(self, *_: object) -> None:
        _thread.backend = self.previous


def active_backend(device: torch.device) -> str | None:
    """The backend for an op that is called now on ``device``; None: the dispatcher chooses."""
    name = getattr(_thread, "backend", _default)
    if name is None or name == "reference":
        return name
    if device.type != _DEVICES[name] and not (name == "triton" and interpreting()):
        raise RuntimeError(
            f"the backend {name!r} runs on {_DEVICES[name].upper()} tensors, got a tensor on {device}"
        )
    return name


def _checked(argument: str, name: str) -> str | None:
    if name == "auto":
        return None
    if name == "cpp":
        warnings.warn("the backend 'cpp' is now called 'cpu'", FutureWarning, stacklevel=3)
        name = "cpu"
    if name not in NAMES:
        raise ValueError(f"{argument} must be one of {('auto', *NAMES)}, got {name!r}")
    status = _backends[name]
    if not status.available:
        raise RuntimeError(f"the backend {name!r} is off: {status.detail}")
    return name


def initialize() -> None:
    """Load what was built; called once by the package, after all schemas are defined."""
    global _default
    _backends.update(_status())
    _default = _checked("VSTAR_OPS_BACKEND", os.environ.get("VSTAR_OPS_BACKEND", "auto"))
    _thread.backend = _default  # found at once where it is set; other threads look twice
