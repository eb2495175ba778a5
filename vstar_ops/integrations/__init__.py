"""Adapters for other people's models and trainers, one module per package.

Each module imports its package when it is imported itself, and ``vstar_ops`` imports none of them. The
extras of the same names, as in ``pip install "vstar_ops[transformers]"``, install versions that were tested.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def require(package: str, oldest: str, before: str) -> None:
    """Check that a package is installed in a version that this library was tested with.

    Args:
        package: its name, which is also that of the extra and of the module here.
        oldest: the first version that will do, such as ``"5.5"``.
        before: the first version that will not.

    Raises:
        ImportError: it is missing, or of another version.
    """
    name = f"vstar_ops.integrations.{package}"
    wanted = f'{package}>={oldest},<{before}: pip install "vstar_ops[{package}]"'
    try:
        found = version(package)
    except PackageNotFoundError:
        raise ImportError(f"{name} needs {wanted}; it is not installed") from None
    if not _release(oldest) <= _release(found) < _release(before):
        raise ImportError(f"{name} was tested with {wanted}; {found} is installed")


def _release(text: str) -> tuple[int, ...]:
    """``(5, 10, 4)`` of ``"5.10.4"``; what follows the numbers does not count."""
    numbers = []
    for part in text.split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)
