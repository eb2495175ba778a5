"""Data races between CUDA threads, found without a GPU: the kernels in the emulator under ThreadSanitizer."""

from __future__ import annotations

import sys

import cuda_emulator
import pytest

pytestmark = [
    pytest.mark.skipif(not cuda_emulator.COMPILER, reason="no C++ compiler"),
    pytest.mark.skipif(bool(cuda_emulator.SANITIZERS), reason="sanitizers do not mix"),
]


@pytest.fixture(scope="module", autouse=True)
def detector():
    if not cuda_emulator.runtime("thread"):
        pytest.skip("the compiler has no ThreadSanitizer")


@pytest.fixture(scope="module")
def reports(detector):
    """By fault of ``racy.cpp``: launches; how many are reported with the fault; how many without it."""
    sources = [cuda_emulator.FOLDER / "main.cpp", cuda_emulator.FOLDER / "racy.cpp"]
    program = cuda_emulator.compiled("racy", sources, sanitizers="thread", program=True)
    # Every report of every launch, in numbers: to look names up takes long.
    options = "suppress_equal_stacks=0 suppress_equal_addresses=0 symbolize=0 exitcode=0"
    done = cuda_emulator.run_under("thread", str(program), LD_PRELOAD="", TSAN_OPTIONS=options)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    return {name: tuple(map(int, numbers)) for name, *numbers in lines}


@pytest.mark.parametrize(
    "fault",
    [
        "syncthreads",
        "syncthreads_in_loop",
        "syncwarp",
        "syncwarp_after_read",
        "syncwarp_for_block",
        "half_a_warp",
        "shuffle",
        "vote",
        "two_blocks",
        "block_to_block",
        "atomic_as_flag",
        "atomic_and_plain",
    ],
)
def test_a_race_is_reported_in_every_launch(reports, fault):
    launches, with_fault, without = reports[fault]
    assert launches > 0
    assert (with_fault, without) == (launches, 0)


def test_no_kernel_has_a_race():
    """Every kernel, on the cases of all ops. Last comes a race on purpose, which must be reported."""
    cuda_emulator.emulated("thread")  # the compiler is slow where ThreadSanitizer is preloaded
    options = "halt_on_error=1 exitcode=66 ignore_noninstrumented_modules=1"
    done = cuda_emulator.run_under(
        "thread", sys.executable, "tests/cuda_races.py", PYTHONPATH=".:tools", TSAN_OPTIONS=options
    )
    assert "no race in" in done.stdout, (done.stdout + done.stderr)[-6000:]
    assert "a race was not reported" not in done.stdout
    assert done.returncode == 66
    assert done.stderr.count("WARNING: ThreadSanitizer: data race") == 1
    assert "emulator/main.cpp" in done.stderr
