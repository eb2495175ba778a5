"""The README, docs/ and docstrings: links lead somewhere, and examples print what they say."""

from __future__ import annotations

import doctest
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import vstar_ops.decoding
import vstar_ops.packing

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(ROOT.glob("docs/**/[a-z]*.md")),
    *ROOT.glob("benchmarks/results/*.md"),
]


def anchors(page: Path) -> set[str]:
    """Of the headings, as they are made by what shows Markdown."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_resolve(page: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def test_every_page_is_linked() -> None:
    linked = {
        (page.parent / link.partition("#")[0]).resolve()
        for page in PAGES
        for link in re.findall(r"\]\(([^)]+)\)", page.read_text())
    }
    toctree = {
        (page.parent / f"{line}.md").resolve()
        for page in ROOT.glob("docs/**/index.md")
        for block in re.findall(r"```{toctree}\n(.*?)```", page.read_text(), re.DOTALL)
        for line in block.split("\n")
        if line and not line.startswith(":")
    }
    pages = {page for page in PAGES if page.is_relative_to(ROOT / "docs")} - {ROOT / "docs/index.md"}
    assert toctree == pages and not pages - linked - toctree


def test_the_eight_lines(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "README.md").read_text()
    code = re.search(r"## Eight lines\n\n```python\n(.*?)```", text, re.DOTALL)
    assert code is not None
    exec(compile(code[1], "README.md", "exec"), {})
    assert "tensor([2, 2]" in capsys.readouterr().out


def run_examples(text: str, name: str, names: dict[str, Any]) -> int:
    """The number of examples in a text that were run; what they print is what stands there."""
    example = doctest.DocTestParser().get_doctest(text, names, name, name, 0)
    runner, said = (
        doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS),
        list[str](),
    )
    runner.run(example, out=said.append, clear_globs=False)
    assert not runner.failures, "".join(said)
    return len(example.examples)


def test_examples_of_the_pages() -> None:
    ran = 0
    for page in PAGES:
        names: dict[str, Any] = {}
        for block in re.findall(r"```pycon\n(.*?)```", page.read_text(), re.DOTALL):
            ran += run_examples(block, page.name, names)
    assert ran > 15


@pytest.mark.parametrize("module", [vstar_ops, vstar_ops.decoding, vstar_ops.packing])
def test_examples_of_the_docstrings(module: Any) -> None:
    public = getattr(module, "__all__", [name for name in vars(module) if name[0] != "_"])
    owned = {name: getattr(module, name) for name in public}
    members = {
        f"{name}.{inner}": member
        for name, value in owned.items()
        if inspect.isclass(value)
        for inner, member in vars(value).items()
    }
    for name, value in {**owned, **members}.items():
        text = inspect.getdoc(value)
        if text and ">>>" in text and getattr(value, "__module__", "vstar_ops").startswith("vstar_ops"):
            run_examples(text, name, {"torch": torch, "vstar_ops": vstar_ops, **vars(vstar_ops)})
