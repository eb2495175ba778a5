"""Names of the last release, which still work and warn. What uses this file goes with the next release."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def _warn(old: str, new: str) -> None:
    warnings.warn(f"{old} is now called {new}", FutureWarning, stacklevel=3)


def renamed_arguments(**new: str) -> Callable[[F], F]:
    """Let a function take keyword arguments by their old names: ``renamed_arguments(old="new")``."""
    names = frozenset(new)

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            if not names.isdisjoint(options):
                for old in names & options.keys():
                    if new[old] in options:
                        raise TypeError(f"{new[old]} must not be given together with its old name {old}")
                    _warn(old, new[old])
                    options[new[old]] = options.pop(old)
            return function(*arguments, **options)

        return call  # type: ignore[return-value]

    return decorate


def renamed_field(new: str) -> Any:
    """A field of a result under its old name."""

    def get(self: Any) -> Any:
        _warn("count", new)
        return getattr(self, new)

    return property(get)
