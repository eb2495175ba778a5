"""Of the documentation: ``make docs`` builds it, with every warning an error."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx

import vstar_ops

ROOT = Path(__file__).resolve().parent.parent

project = "vstar_ops"
version = release = vstar_ops.__version__
author = "the vstar_ops authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"vstar_ops {version}"
html_show_sourcelink = False
html_math_renderer = "mathml"
exclude_patterns = ["_build"]
nitpicky = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # docstrings say more: shapes, and what an int is
napoleon_use_rtype = False
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
suppress_warnings = ["myst.xref_missing"]  # tests/test_docs.py resolves all links, those out of docs/ too


def _mathml(display: str) -> Any:
    """A visitor that writes MathML, which browsers show without a script."""

    def visit(self: Any, node: nodes.math | nodes.math_block) -> None:
        latex = re.sub(r"\\(?:textstyle|displaystyle)\b", "", node.astext())
        if display == "block" and ("\\\\" in latex or "&" in latex):
            latex = rf"\begin{{aligned}}{latex}\end{{aligned}}"
        self.body.append(convert(latex, display=display))
        raise nodes.SkipNode

    return visit


def setup(app: Sphinx) -> None:
    """Formulas become MathML."""
    app.add_html_math_renderer("mathml", (_mathml("inline"), None), (_mathml("block"), None))
