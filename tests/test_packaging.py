"""What gets built and installed: wheel and sdist, a machine without a compiler, the cost of the import."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SENTENCE = "vstar_ops is built without its C++ module because"
CUDA_SENTENCE = "vstar_ops is built without its CUDA module because"
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def run(*command: object, cwd: Path, **env: str) -> str:
    """Run with this Python, on what ``env`` adds to the environment; return the output, fail with it."""
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(("VSTAR_OPS_", "PYTHON"))
    }
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env={**inherited, **env},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def build(tree: Path, out: Path, **env: str) -> tuple[Path, str]:
    """Build a wheel as pip does for an install; return it, unpacked beside itself, and what was printed."""
    pip = ("-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps", "-w", out, tree)
    printed = run(*pip, cwd=out.parent, **env)
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(out / "site")
    return wheel, printed


def python_files(package: Path) -> set[str]:
    return {str(path.relative_to(package)) for path in package.rglob("*.py")}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the files that git knows, or would add: what a fresh clone holds."""
    if not all(map(find_spec, ("pip", "setuptools"))):
        pytest.skip("the wheel is built by pip and setuptools")
    listing = ("git", "-c", f"safe.directory={ROOT}", "ls-files", "-zco", "--exclude-standard")
    files = subprocess.run(listing, cwd=ROOT, text=True, capture_output=True)
    if files.returncode:
        pytest.skip("not a git checkout")
    folder = tmp_path_factory.mktemp("clone") / "vstar_ops"
    for name in files.stdout.rstrip("\0").split("\0"):
        source, target = ROOT / name, folder / name
        if source.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target, follow_symlinks=False)
    return folder


@pytest.fixture(scope="module")
def native(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that this machine's compiler gives; its contents lie in ``site`` beside it."""
    if not any(map(shutil.which, [os.environ.get("CXX", "c++").split()[0], "c++", "g++", "clang++"])):
        pytest.skip("no C++ compiler")
    wheel, printed = build(tree, tmp_path_factory.mktemp("native") / "out")
    assert SENTENCE not in printed
    if torch.version.cuda is None:
        assert printed.count(CUDA_SENTENCE) == 1
    return wheel


@pytest.fixture(scope="module")
def pure(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a machine without a compiler."""
    wheel, printed = build(tree, tmp_path_factory.mktemp("pure") / "out", CXX="/nonexistent")
    assert printed.count(SENTENCE) == 1
    assert "/nonexistent does not compile C++17" in printed
    return wheel


def test_wheel_contents(native: Path, tree: Path) -> None:
    site = native.parent / "site"
    assert {path.name for path in site.iterdir()} == {"vstar_ops", "vstar_ops-0.1.0.dist-info"}
    assert (site / "vstar_ops/_C.abi3.so").stat().st_size < 2**21
    assert "-cp310-abi3-" in native.name
    packaged = {"kernels/" + name for name in python_files(tree / "kernels")}
    packaged |= python_files(tree / "vstar_ops")
    assert python_files(site / "vstar_ops") == packaged, "a folder is not listed in pyproject.toml"
    assert (site / "vstar_ops/py.typed").exists()


def test_native_wheel_runs(native: Path, tmp_path: Path) -> None:
    site = native.parent / "site"
    code = "import vstar_ops; print(vstar_ops.__file__); assert vstar_ops.backends()['cpu'].available"
    assert str(site) in run("-c", code, cwd=tmp_path, PYTHONPATH=str(site))


def test_without_a_compiler(pure: Path, tmp_path: Path) -> None:
    site = pure.parent / "site"
    assert pure.name.endswith("-py3-none-any.whl")
    assert not list(site.rglob("*.so"))
    code = """
import torch, vstar_ops
status = vstar_ops.backends()
assert status["reference"].available and not status["cpu"].available
assert "compiler" in status["cpu"].detail
advantage = vstar_ops.group_advantage(torch.tensor([[1.0, 0.0]]))
assert advantage[0, 0] > 0 > advantage[0, 1]
print(vstar_ops.__file__)
"""
    assert str(site) in run("-c", code, cwd=tmp_path, PYTHONPATH=str(site))


@pytest.mark.skipif(NVCC is None, reason="nvcc is not found")
def test_cuda_wheel(tree: Path, tmp_path: Path) -> None:
    """Built without a GPU and beside any torch; loaded beside a torch that is built for CUDA only."""
    wheel, printed = build(tree, tmp_path / "out", VSTAR_OPS_CUDA="1", TORCH_CUDA_ARCH_LIST="9.0+PTX")
    assert CUDA_SENTENCE not in printed
    site = wheel.parent / "site"
    assert "-cp310-abi3-" in wheel.name
    assert 2**17 < (site / "vstar_ops/_CUDA.abi3.so").stat().st_size < 2**23
    printed = run(
        "-c", "import vstar_ops; print(vstar_ops.backends()['cuda'])", cwd=tmp_path, PYTHONPATH=str(site)
    )
    if torch.version.cuda is None:
        assert (
            f"available=False, detail='built, but torch {torch.__version__} is built without CUDA'" in printed
        )
    else:
        assert "available=True" in printed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"CUDA_HOME": "/nonexistent"}, "VSTAR_OPS_CUDA=1 asks for the CUDA module, but nvcc is not found"),
        ({"TORCH_CUDA_ARCH_LIST": "Hopper"}, "must hold entries such as 9.0 or 10.0+PTX, got 'Hopper'"),
    ],
)
def test_a_cuda_module_that_cannot_be_built_fails(tree: Path, change: dict[str, str], message: str) -> None:
    if NVCC is None and "CUDA_HOME" not in change:
        pytest.skip("nvcc is not found")
    environment = {**os.environ, "VSTAR_OPS_CUDA": "1", **change}
    command = [sys.executable, "setup.py", "build_ext"]
    done = subprocess.run(command, cwd=tree, env=environment, text=True, capture_output=True)
    assert done.returncode != 0
    assert message in done.stderr


def test_sdist_builds_a_wheel(tree: Path, tmp_path: Path) -> None:
    run("setup.py", "-q", "sdist", "-d", tmp_path, cwd=tree)
    with tarfile.open(tmp_path / "vstar_ops-0.1.0.tar.gz") as archive:
        assert all(member.isfile() or member.isdir() for member in archive)
        archive.extractall(tmp_path)
    source = tmp_path / "vstar_ops-0.1.0"
    assert not (source / "kernels").exists()
    assert {path.name for path in (tree / "csrc").rglob("*")} == {
        path.name for path in (source / "csrc").rglob("*")
    }
    wheel, printed = build(source, tmp_path / "out", VSTAR_OPS_NO_EXT="1")
    assert "VSTAR_OPS_NO_EXT is set" in printed
    assert python_files(wheel.parent / "site/vstar_ops") == python_files(source / "vstar_ops")


def test_hugging_face_kernels_is_not_shadowed(pure: Path, tmp_path: Path) -> None:
    """A package of that name keeps it: beside our wheel in either order, and in a checkout."""
    theirs = tmp_path / "kernels"
    theirs.mkdir()
    (theirs / "__init__.py").write_text("theirs = True\n")
    code = "import vstar_ops, kernels; assert kernels.theirs"
    ours = pure.parent / "site"
    for path in ([tmp_path, ours], [ours, tmp_path]):
        run("-c", code, cwd=tmp_path.parent, PYTHONPATH=os.pathsep.join(map(str, path)))
    run("-c", code, cwd=ROOT, PYTHONPATH=str(tmp_path))
    assert not (ROOT / "kernels/__init__.py").exists()
    assert (ROOT / "vstar_ops/kernels").is_symlink()


def test_import_is_quick_and_compiles_nothing(tmp_path: Path) -> None:
    code = """
import sys, time, torch
starts = {"subprocess.Popen", "os.system", "os.posix_spawn", "os.exec", "os.fork"}
def no_process(event, arguments):
    assert event not in starts, (event, arguments)
sys.addaudithook(no_process)
before = set(sys.modules)
start = time.perf_counter()
import vstar_ops
print(time.perf_counter() - start)
heavy = {"matplotlib", "triton", "torch._inductor", "torch._dynamo", "torch.utils.cpp_extension"}
assert not heavy & (set(sys.modules) - before), heavy & (set(sys.modules) - before)
"""
    seconds = [float(run("-c", code, cwd=tmp_path, PYTHONPATH=str(ROOT))) for _ in range(5)]
    assert statistics.median(seconds) < 0.3, seconds


def test_collect_env(pure: Path, tmp_path: Path) -> None:
    for path in (ROOT, pure.parent / "site"):
        printed = run(
            "-m",
            "vstar_ops.collect_env",
            cwd=tmp_path,
            PYTHONPATH=str(path),
            PATH="",
            VSTAR_OPS_BACKEND="reference",
        )
        for word in ("torch", "python", "simd", "nvcc", "reference", "cpu", "VSTAR_OPS_BACKEND"):
            assert word in printed
