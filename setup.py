"""Builds vstar_ops: Python, and beside it a C++ module wherever a compiler and torch are at hand, and a
CUDA module where nvcc is and torch is built for CUDA. How they are compiled is in tools/recipe.py.

One binary serves every torch >= 2.11 and every Python >= 3.10. Where something is missing or a compiler
fails, everything still runs, on the reference backend, and vstar_ops/_build.json holds the reason.

VSTAR_OPS_REQUIRE=cpu,cuda makes the build fail where one of these cannot be built, and builds the CUDA module
beside a torch without CUDA too (no GPU is needed). VSTAR_OPS_SKIP=cpu,cuda leaves them out.
All other metadata is in pyproject.toml.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).parent / "tools"))

import recipe
from recipe import MODULES, CannotBuild, Compiler

LABELS = {"cpu": "C++", "cuda": "CUDA"}


def listed(variable: str) -> list[str]:
    """The backends that an environment variable names."""
    text = os.environ.get(variable, "")
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not set(names) <= set(MODULES):
        sys.exit(f"{variable} must be a list of {' and '.join(MODULES)}, separated by commas, got {text!r}")
    return names


def prepared(backend: str, required: bool) -> Compiler:
    """What will compile a module; raises :class:`CannotBuild` where something is missing or does not fit."""
    if backend in listed("VSTAR_OPS_SKIP"):
        raise CannotBuild("VSTAR_OPS_SKIP names it")
    recipe.check_torch(backend, required)
    return recipe.compiler(backend)


def sentences(missing: dict[str, str]) -> list[str]:
    """What is not built and why, one sentence for each reason."""
    said = []
    for reason in dict.fromkeys(missing.values()):
        backends = [backend for backend in missing if missing[backend] == reason]
        modules = " and ".join(LABELS[b] for b in backends) + (" modules" if backends[1:] else " module")
        end = ""
        if "cpu" in backends:
            end = "; everything still works, more slowly, on the pure-torch reference backend"
        said.append(f"vstar_ops is built without its {modules} because {reason}{end}.")
    return said


def insist(required: list[str], missing: dict[str, str]) -> None:
    """End the build where a required module is missing."""
    for backend in required:
        if backend in missing:
            sys.exit(
                f"VSTAR_OPS_REQUIRE={','.join(required)} asks for the {LABELS[backend]} module, "
                f"but {missing[backend]}"
            )


class BuildModules(build_ext):
    """Builds what can be built, and writes down what was and why the rest was not."""

    def run(self) -> None:
        required, compilers, missing = listed("VSTAR_OPS_REQUIRE"), {}, {}
        for backend in MODULES:
            try:
                compilers[backend] = prepared(backend, backend in required)
            except CannotBuild as reason:
                missing[backend] = str(reason)
        insist(required, missing)  # before anything is compiled, which takes minutes

        package = Path("vstar_ops") if self.inplace else Path(self.build_lib, "vstar_ops")
        for backend, name in MODULES.items():
            library = package / f"{name}.abi3.so"
            library.unlink(missing_ok=True)  # one from an earlier build would outlive its sources
            if backend in compilers:
                try:
                    self.build_module(backend, compilers[backend], library)
                except CannotBuild as reason:
                    missing[backend] = str(reason)
        for sentence in sentences(missing):
            print(sentence, flush=True)
        self.record(package / "_build.json", compilers, missing)
        insist(required, missing)
        built = [MODULES[backend] for backend in MODULES if backend not in missing]
        self.extensions = [e for e in self.extensions if e.name.rpartition(".")[2] in built]
        self.distribution.ext_modules = self.extensions

    def build_module(self, backend: str, compiler: Compiler, library: Path) -> None:
        import torch

        folder = Path(torch.__file__).parent
        objects = Path(self.build_temp, backend)
        compiled = recipe.compile_sources(compiler, folder / "include", objects, torch.__version__)
        recipe.link(backend, compiler, compiled, folder, library)

    def record(self, path: Path, compilers: dict[str, Compiler], missing: dict[str, str]) -> None:
        """For vstar_ops/_build_info.py."""
        found: dict[str, object] = {b: {"missing": reason} for b, reason in missing.items()}
        for backend in compilers.keys() - missing.keys():
            compiler = compilers[backend]
            found[backend] = {"compiler": compiler.version, "command": " ".join(compiler.command)}
        torch = sys.modules.get("torch")
        found["torch"] = torch.__version__ if torch else "not found"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n")


class Build(build):
    sub_commands = [("build_py", None), ("build_ext", None)]  # noqa: RUF012  # the latter always, for its record


class Wheel(bdist_wheel):
    def run(self) -> None:
        # Before all else, since what could be built decides whether the wheel is of this platform; and once.
        self.run_command("build")
        self.skip_build = True
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()


setup(
    ext_modules=[Extension(f"vstar_ops.{name}", [], py_limited_api=True) for name in MODULES.values()],
    cmdclass={"build": Build, "build_ext": BuildModules, "bdist_wheel": Wheel},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
