"""The Triton backend without a GPU: every op's tests under the interpreter, ahead-of-time compilation."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import vstar_ops
from vstar_ops import _triton

ROOT = Path(__file__).resolve().parents[1]
INTERPRETING = vstar_ops._backends.interpreting()
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def python(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, **env},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


@pytest.mark.skipif(INTERPRETING or vstar_ops.backends()["triton"].available, reason="they run as they are")
@pytest.mark.parametrize("module", _triton.modules())
def test_interpreted(module: str) -> None:
    """The tests of an op with its kernels interpreted, in a process of their own: Triton reads the variable
    when a kernel is defined."""
    command = (
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        f"tests/test_{module}.py",
        "-k",
        "triton",
    )
    done = python(*command, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    print(done.stdout)
    assert done.returncode == 0


def test_the_table_of_resources_is_current() -> None:
    """Every kernel compiles for sm_80, sm_90 and sm_100, spills nothing and takes what the table says."""
    done = python("-m", "benchmarks.resources", "--check", TRITON_INTERPRET="0")
    print(done.stdout)
    assert done.returncode == 0


def test_every_specialization_has_a_name_of_its_own() -> None:
    names = [item.name for item in _triton.specializations()]
    assert len(names) > 30
    assert len(names) == len(set(names))


def test_warmup_names_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="names must be some of .*expand_topk.*, got 'beam'"):
        vstar_ops.warmup("beam")
    if not vstar_ops.backends()["triton"].available:
        with pytest.raises(RuntimeError, match="cannot be compiled here: torch .* is built without CUDA"):
            vstar_ops.warmup("ved")


def test_the_first_call_is_logged_once() -> None:
    code = "import logging, torch, vstar_ops; logging.basicConfig(level=logging.INFO)\n"
    code += "with vstar_ops.use_backend('triton'):\n"
    code += "    for _ in range(3): vstar_ops.group_advantage(torch.rand(2, 4))"
    done = python("-c", code, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("group_advantage: first call of the Triton kernel, compiled in") == 1


def test_import_leaves_triton_alone() -> None:
    """Its import takes a second; it is for those who call a kernel."""
    done = python("-c", "import sys, vstar_ops; assert 'triton' not in sys.modules")
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(INTERPRETING, reason="an interpreted kernel has no signature")
def test_warmup_compiles_what_is_recorded() -> None:
    """Triton's own binder gives the arguments of ``warmup`` the types of the specialization."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import MockTensor, create_function_from_signature

    backend = make_backend(GPUTarget("cuda", 90, 32))
    for item in _triton.specializations():
        bind = create_function_from_signature(item.kernel.signature, item.kernel.params, backend)
        arguments = map(MockTensor.wrap_dtype, _triton.stand_ins(item))
        _, found, _ = bind(*arguments, **item.options)
        for (name, kind), (got, attribute, *_) in zip(item.signature().items(), found, strict=True):
            assert got == kind.removesuffix(":16"), (item.name, name)
            if kind != "constexpr":
                aligned = kind.startswith("*") or kind.endswith(":16")
                assert bool(attribute) == aligned, (item.name, name, attribute)
