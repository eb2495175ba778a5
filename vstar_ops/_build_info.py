"""What the build wrote down about itself: what compiled each module, or why it is missing.

The record, ``_build.json`` beside this file, is written by ``setup.py``. A checkout that was never built has
none.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def record() -> dict[str, Any]:
    """The record as it is; empty where there is none that can be read."""
    try:
        found = json.loads(Path(__file__).with_name("_build.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def reason(backend: str) -> str | None:
    """Why the module of ``"cpu"`` or ``"cuda"`` was not built; None where it was, or where nobody tried."""
    return record().get(backend, {}).get("missing")


def not_built(backend: str) -> str:
    """The sentence for a module that is missing, with the command that builds it or fails with the reason."""
    why, root = reason(backend), Path(__file__).parent.parent
    if why is None:
        why = f"no build has run in {root}"
        if (root / "setup.py").exists():
            why += ", whose sources Python imports here, whatever is installed"
    return (
        f"not built: {why}; `VSTAR_OPS_REQUIRE={backend} pip install --no-build-isolation -e .` "
        "in the source folder builds it"
    )


def summary() -> dict[str, str]:
    """The record as name -> text, for :mod:`vstar_ops.collect_env`."""
    lines = {}
    for name, entry in record().items():
        if isinstance(entry, dict):
            built = f"{entry.get('compiler')}: {entry.get('command')}"
            entry = f"not built: {entry['missing']}" if "missing" in entry else built
        lines[name] = str(entry)
    return lines or {"record": "none, no build has run here"}
