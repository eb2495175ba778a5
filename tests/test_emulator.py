"""The emulator that runs the CUDA C++ kernels on the host: that it reports what would be wrong on a GPU."""

from __future__ import annotations

import subprocess

import cuda_emulator
import pytest

pytestmark = pytest.mark.skipif(not cuda_emulator.COMPILER, reason="no C++ compiler")


@pytest.fixture(scope="module")
def broken():
    """A program that runs a kernel with a fault."""
    sources = [cuda_emulator.FOLDER / "main.cpp", cuda_emulator.FOLDER / "broken.cpp"]
    return cuda_emulator.compiled("broken", sources, sanitizers="address,undefined", program=True)


@pytest.mark.parametrize(
    ("fault", "report"),
    [
        ("read", "AddressSanitizer: heap-buffer-overflow"),
        ("shared memory", "AddressSanitizer: heap-buffer-overflow"),
        ("no barrier", "wrong result"),
        ("shuffle", "31 threads (first 0) wait at a shuffle of warp 0"),
        ("shuffle from outside", "which takes no part"),
        ("foreign mask", "outside of its own mask"),
        ("different operations", "wait at a vote"),
        ("barrier for some", "1 threads (first 63) ended; 63 threads (first 0) wait at __syncthreads"),
    ],
)
def test_faults_are_reported(broken, fault, report):
    done = subprocess.run([broken, fault], text=True, capture_output=True)
    assert done.returncode != 0
    assert report in done.stderr, done.stderr


@pytest.mark.parametrize("fault", ["none", "no shuffle"])
def test_sound_kernels_pass(broken, fault):
    done = subprocess.run([broken, fault], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
