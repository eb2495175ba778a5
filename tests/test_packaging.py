"""What gets built and installed: wheel and sdist, builds where something is missing or fails, the import."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tarfile
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import vstar_ops

pytestmark = pytest.mark.xdist_group("packaging")  # they share two builds

ROOT = Path(__file__).resolve().parents[1]
VERSION = vstar_ops.__version__
SENTENCE = "vstar_ops is built without its C++ module because"
CUDA_SENTENCE = "vstar_ops is built without its CUDA module because"
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def attempt(*command: object, cwd: Path, **env: str) -> tuple[int, str]:
    """Run with this Python, on what ``env`` adds to the environment; return exit status and output."""
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
    return done.returncode, done.stdout


def run(*command: object, cwd: Path, **env: str) -> str:
    """As :func:`attempt`, for what must succeed."""
    status, printed = attempt(*command, cwd=cwd, **env)
    assert status == 0, printed
    return printed


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


@pytest.mark.slow
def test_wheel_contents(native: Path, tree: Path) -> None:
    site = native.parent / "site"
    assert {path.name for path in site.iterdir()} == {"vstar_ops", f"vstar_ops-{VERSION}.dist-info"}
    assert (site / "vstar_ops/_C.abi3.so").stat().st_size < 2**21
    assert "-cp310-abi3-" in native.name
    packaged = {"kernels/" + name for name in python_files(tree / "kernels")}
    packaged |= python_files(tree / "vstar_ops")
    assert python_files(site / "vstar_ops") == packaged, "a folder is not listed in pyproject.toml"
    assert (site / "vstar_ops/py.typed").exists()


@pytest.mark.slow
def test_native_wheel_runs(native: Path, tmp_path: Path) -> None:
    site = native.parent / "site"
    code = "import vstar_ops; print(vstar_ops.__file__); assert vstar_ops.backends()['cpu'].available"
    assert str(site) in run("-c", code, cwd=tmp_path, PYTHONPATH=str(site))
    printed = run("-m", "vstar_ops.verify", "--seconds", 1, "--json", cwd=tmp_path, PYTHONPATH=str(site))
    assert {row["backend"] for row in json.loads(printed)["rows"]} >= {"cpu", "reference"}


@pytest.mark.slow
def test_without_a_compiler(pure: Path, tmp_path: Path) -> None:
    site = pure.parent / "site"
    assert pure.name.endswith("-py3-none-any.whl")
    assert not list(site.rglob("*.so"))
    code = """
import torch, vstar_ops
status = vstar_ops.backends()
assert status["reference"].available and not status["cpu"].available
assert "not built: /nonexistent does not compile C++17; " in status["cpu"].detail
assert "`VSTAR_OPS_REQUIRE=cpu pip install --no-build-isolation -e .`" in status["cpu"].detail
advantage = vstar_ops.group_advantage(torch.tensor([[1.0, 0.0]]))
assert advantage[0, 0] > 0 > advantage[0, 1]
print(vstar_ops.__file__)
"""
    assert str(site) in run("-c", code, cwd=tmp_path, PYTHONPATH=str(site))


def record(package: Path) -> dict[str, Any]:
    return json.loads((package / "_build.json").read_text())


@pytest.mark.slow
def test_record_of_a_build(native: Path, pure: Path) -> None:
    built = record(native.parent / "site/vstar_ops")
    assert built["torch"] == torch.__version__
    assert "-ffp-contract=off" in built["cpu"]["command"]
    reason = "/nonexistent does not compile C++17"
    missing = record(pure.parent / "site/vstar_ops")
    assert missing["cpu"] == {"missing": reason}
    assert "compiler" not in missing["cuda"]


def test_reading_the_record(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tmp_path = tmp_path / "vstar_ops"
    tmp_path.mkdir()
    info = vstar_ops._build_info
    monkeypatch.setattr(info, "__file__", str(tmp_path / "_build_info.py"))
    assert info.reason("cpu") is None
    assert f"no build has run in {tmp_path.parent}; " in info.not_built("cpu")
    (tmp_path.parent / "setup.py").touch()
    assert "whose sources Python imports here, whatever is installed" in info.not_built("cpu")
    assert "no build has run here" in info.summary()["record"]
    for unreadable in ("", "[]", "\xff"):
        (tmp_path / "_build.json").write_text(unreadable, encoding="latin-1")
        assert info.record() == {}
    entries = {"cpu": {"compiler": "g++ 12", "command": "g++ -O3"}, "cuda": {"missing": "of X"}, "torch": "2"}
    (tmp_path / "_build.json").write_text(json.dumps(entries))
    assert info.reason("cpu") is None
    assert info.reason("cuda") == "of X"
    assert info.not_built("cuda").startswith("not built: of X; ")
    assert info.summary() == {"cpu": "g++ 12: g++ -O3", "cuda": "not built: of X", "torch": "2"}


@pytest.fixture
def failing(tmp_path: Path) -> Path:
    """A compiler that passes for one, and fails where a module is compiled."""
    compiler = tmp_path / "failing-c++"
    compiler.write_text(
        "#!/bin/sh\n"
        'case "$*" in *csrc/cpu/sibling_advantage*) echo "error: no such thing" >&2; exit 3;; esac\n'
        'for word; do [ "$last" = -o ] && : > "$word"; last=$word; done\n'
        "echo failing 1.0\n"
    )
    compiler.chmod(0o755)
    return compiler


@pytest.mark.slow
def test_a_compiler_that_fails(tree: Path, failing: Path, tmp_path: Path) -> None:
    """The build goes on without the module, says so once, and leaves no module of an earlier build."""
    copy = shutil.copytree(tree, tmp_path / "copy", symlinks=True)
    stale = copy / "vstar_ops/_C.abi3.so"
    stale.touch()
    environment = {"CXX": str(failing), "VSTAR_OPS_SKIP": "cuda"}
    printed = run("setup.py", "-q", "build_ext", "--inplace", cwd=copy, **environment)
    assert "error: no such thing" in printed
    reason = f"{failing} failed on csrc/cpu/sibling_advantage.cpp (error: no such thing)"
    assert printed.count(f"{SENTENCE} {reason}; everything still works") == 1
    assert record(copy / "vstar_ops")["cpu"] == {"missing": reason}
    assert not stale.exists()
    wheel, printed = build(copy, tmp_path / "out", **environment)
    assert wheel.name.endswith("-py3-none-any.whl")
    assert record(wheel.parent / "site/vstar_ops")["cpu"] == {"missing": reason}
    status, printed = attempt("setup.py", "build_ext", cwd=copy, VSTAR_OPS_REQUIRE="cpu", **environment)
    assert status != 0
    assert f"VSTAR_OPS_REQUIRE=cpu asks for the C++ module, but {reason}" in printed


def test_editable_without_a_module(tree: Path, tmp_path: Path) -> None:
    """An editable build leaves its record in the source folder."""
    copy = shutil.copytree(tree, tmp_path / "copy", symlinks=True)
    code = "from setuptools.build_meta import build_editable; print(build_editable('.'))"
    printed = run("-c", code, cwd=copy, VSTAR_OPS_SKIP="cpu,cuda")
    assert "vstar_ops is built without its C++ and CUDA modules because VSTAR_OPS_SKIP names it" in printed
    assert record(copy / "vstar_ops")["cpu"] == {"missing": "VSTAR_OPS_SKIP names it"}


@pytest.mark.parametrize("variable", ["VSTAR_OPS_REQUIRE", "VSTAR_OPS_SKIP"])
def test_names_of_modules_are_checked(tree: Path, variable: str) -> None:
    status, printed = attempt("setup.py", "build_ext", cwd=tree, **{variable: "cpu,gpu"})
    assert status != 0
    assert f"{variable} must be a list of cpu and cuda, separated by commas, got 'cpu,gpu'" in printed


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("recipe")


def test_torch_and_cuda_must_fit(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    check, version = recipe.check_torch, torch.__version__
    monkeypatch.setattr(recipe, "nvcc_version", lambda: "13.0")
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    check("cuda", required=False)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    check("cpu", required=True)
    message = f"nvcc is of CUDA 13.0 and torch {version} of CUDA 12.8; their major versions must be equal"
    with pytest.raises(recipe.CannotBuild, match=re.escape(message)):
        check("cuda", required=True)
    monkeypatch.setattr(torch.version, "cuda", None)
    check("cuda", required=True)
    with pytest.raises(recipe.CannotBuild, match=re.escape(f"torch {version} is built without CUDA")):
        check("cuda", required=False)
    monkeypatch.setattr(recipe, "OLDEST_TORCH", "99.1")
    with pytest.raises(recipe.CannotBuild, match=re.escape(f"torch {version} is older than 99.1")):
        check("cpu", required=True)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(recipe.CannotBuild, match="torch could not be imported at build time"):
        check("cpu", required=True)


def test_nvcc_and_its_architectures(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;10.0+PTX 9.0a")
    assert recipe.architectures()[1::2] == [
        "arch=compute_80,code=sm_80",
        "arch=compute_100,code=[sm_100,compute_100]",
        "arch=compute_90a,code=sm_90a",
    ]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    with pytest.raises(recipe.CannotBuild, match=r"entries such as 9.0 or 10.0\+PTX, got 'Hopper'"):
        recipe.architectures()
    monkeypatch.setenv("CUDA_HOME", "/nonexistent")
    with pytest.raises(recipe.CannotBuild, match="nvcc is not found"):
        recipe.compiler("cuda")


def test_only_what_changed_is_compiled(recipe: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if not shutil.which("c++"):
        pytest.skip("no C++ compiler")
    monkeypatch.chdir(tmp_path)
    Path("csrc").mkdir()
    sources = [Path("csrc/a.cpp"), Path("csrc/b.cpp")]
    sources[0].write_text('#include "a.h"\n')
    sources[1].write_text("int b;\n")
    header = Path("csrc/a.h")
    header.write_text("int a;\n")
    compiler = recipe.Compiler(["c++"], "1.0", sources)

    def compiled(compiler: Any = compiler, torch_version: str = "2.11.0") -> set[str]:
        before = {path: path.stat().st_mtime_ns for path in Path("objects").glob("*.o")}
        objects = recipe.compile_sources(compiler, Path("include"), Path("objects"), torch_version)
        return {Path(o).stem for o in objects if Path(o).stat().st_mtime_ns != before.get(Path(o))}

    assert compiled() == {"a", "b"}
    assert compiled() == set()
    os.utime(header, (2**33, 2**33))
    assert compiled() == {"a"}
    os.utime(header, (0, 0))
    assert compiled() == set()
    assert compiled(torch_version="2.12.0") == {"a", "b"}
    assert compiled(compiler._replace(command=["c++", "-O1"]), "2.12.0") == {"a", "b"}
    with monkeypatch.context() as without:
        without.setattr(recipe, "ninja", lambda: None)
        assert compiled() == {"a", "b"} == compiled()
    sources[1].write_text("no C++\n")
    for ninja in (recipe.ninja, lambda: None):
        monkeypatch.setattr(recipe, "ninja", ninja)
        with pytest.raises(recipe.CannotBuild, match=r"c\+\+ failed on csrc/b.cpp \(.*error"):
            compiled()


@pytest.mark.slow
@pytest.mark.xdist_group("CUDA")  # not with the others
@pytest.mark.skipif(NVCC is None, reason="nvcc is not found")
def test_cuda_wheel(tree: Path, tmp_path: Path) -> None:
    """Built without a GPU and beside any torch; loaded beside a torch that is built for CUDA only."""
    environment = {"VSTAR_OPS_REQUIRE": "cuda", "VSTAR_OPS_SKIP": "cpu", "TORCH_CUDA_ARCH_LIST": "9.0+PTX"}
    wheel, printed = build(tree, tmp_path / "out", **environment)
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


@pytest.mark.slow
def test_sdist_builds_a_wheel(tree: Path, tmp_path: Path) -> None:
    run("setup.py", "-q", "sdist", "-d", tmp_path, cwd=tree)
    with tarfile.open(tmp_path / f"vstar_ops-{VERSION}.tar.gz") as archive:
        assert all(member.isfile() or member.isdir() for member in archive)
        archive.extractall(tmp_path)
    source = tmp_path / f"vstar_ops-{VERSION}"
    assert not (source / "kernels").exists()
    assert {path.name for path in (tree / "csrc").rglob("*")} == {
        path.name for path in (source / "csrc").rglob("*")
    }
    wheel, printed = build(source, tmp_path / "out", VSTAR_OPS_SKIP="cpu,cuda")
    assert "VSTAR_OPS_SKIP names it" in printed
    assert python_files(wheel.parent / "site/vstar_ops") == python_files(source / "vstar_ops")


@pytest.mark.slow
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


@pytest.mark.slow
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
    seconds = [float(run("-c", code, cwd=tmp_path, PYTHONPATH=str(ROOT))) for _ in range(3)]
    assert statistics.median(seconds) < 0.3, seconds


@pytest.mark.slow
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
        for word in ("torch", "python", "simd", "nvcc", "build:", "reference", "cpu", "VSTAR_OPS_BACKEND"):
            assert word in printed
