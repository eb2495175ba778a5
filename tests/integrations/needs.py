"""A module of tests is skipped where its package is missing; ``make integrations`` lets it fail instead."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest


def needs(*packages: str) -> None:
    """Call this before the packages are imported."""
    missing = [package for package in packages if find_spec(package) is None]
    if missing and not os.environ.get("VSTAR_OPS_INTEGRATIONS"):
        pytest.skip(f"not installed: {', '.join(missing)} (make integrations)", allow_module_level=True)
