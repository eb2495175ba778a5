"""What the integrations need: their tests are in ``tests/integrations``, these run without the packages."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from vstar_ops import integrations
from vstar_ops.integrations import require


def test_a_missing_package():
    install = r'no_such_thing>=1.2,<1.10: pip install "vstar_ops\[no_such_thing\]"'
    with pytest.raises(ImportError, match=install) as error:
        require("no_such_thing", "1.2", "1.10")
    assert str(error.value).startswith("vstar_ops.integrations.no_such_thing needs")
    assert str(error.value).endswith("it is not installed")


@pytest.mark.parametrize("found", ["1.2", "1.2.0", "1.9.12", "1.9rc1", "1.3.0.dev0+cpu"])
def test_a_tested_version(monkeypatch, found):
    monkeypatch.setattr(integrations, "version", lambda package: found)
    require("transformers", "1.2", "1.10")


@pytest.mark.parametrize("found", ["1.1.9", "0.9", "1.10", "1.10.0", "1.11", "2.0"])
def test_another_version(monkeypatch, found):
    monkeypatch.setattr(integrations, "version", lambda package: found)
    with pytest.raises(
        ImportError, match=f"was tested with transformers>=1.2,<1.10: .* {found} is installed"
    ):
        require("transformers", "1.2", "1.10")


def test_importing_vstar_ops_imports_no_integration():
    code = "import sys, vstar_ops.decoding; assert not [m for m in sys.modules if 'integrations' in m]"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_extras_have_the_bounds_that_are_checked():
    """Of every module of ``vstar_ops.integrations``, in pyproject.toml."""
    root = Path(__file__).resolve().parents[1]
    extras = (root / "pyproject.toml").read_text()
    checked = 0
    for path in (root / "vstar_ops/integrations").rglob("*.py"):
        calls = re.findall(r'^require\("(\w+)", "([\d.]+)", "([\d.]+)"\)', path.read_text(), re.M)
        for package, oldest, before in calls:
            assert f'"{package}>={oldest},<{before}"' in extras
            checked += 1
    assert checked
