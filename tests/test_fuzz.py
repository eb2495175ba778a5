"""The fuzz target for some seconds; ``make fuzz`` runs it for longer."""

from __future__ import annotations

import re

import cuda_emulator
import fuzz
import pytest

from vstar_ops.ops import OPS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(cuda_emulator.SANITIZERS), reason="this is the inner run"),
    pytest.mark.skipif(not cuda_emulator.COMPILER, reason="there is no compiler"),
]


def test_damaged_calls(capfd: pytest.CaptureFixture[str]) -> None:
    """No op lets an error of memory through; each has both worked and refused."""
    if not cuda_emulator.runtime("address"):
        pytest.skip("the compiler has no AddressSanitizer")
    status = fuzz.main(["--count", str(60 * len(OPS))])
    out, err = capfd.readouterr()
    assert status == 0, out + err[-6000:]
    for op in OPS:
        found = re.search(rf"^{op} +returned +([\d,]+) +refused +([\d,]+)$", out, re.M)
        assert found, out
        assert int(found[1].replace(",", "")) > 0, f"{op} has never returned"
        assert int(found[2].replace(",", "")) > 0, f"{op} has never refused"
