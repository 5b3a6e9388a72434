"""How the site is built: ``make docs`` runs Sphinx on the Markdown of this folder, with MyST for Markdown and furo for the looks.

Pages stay plain Markdown, readable where they lie. What the build adds: code blocks after ``<!-- run -->`` are executed and their
output stands below them (``executed.py``); ``docs/x.md`` in backquotes becomes a link; equations become MathML, so that no script
is loaded from anywhere; the reference is made from the docstrings.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from docutils import nodes
from latex2mathml.converter import convert

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from executed import with_output  # noqa: E402  # a neighbor

import gradreg  # noqa: E402

if TYPE_CHECKING:
    from sphinx.application import Sphinx

with (HERE.parent / "pyproject.toml").open("rb") as file:
    REPOSITORY = tomllib.load(file)["project"]["urls"]["Repository"]

project = "gradreg"
author = "the gradreg authors"
version = release = gradreg.__version__
html_title = f"gradreg {version}"
html_theme = "furo"
html_css_files = ["site.css"]
html_static_path = ["_static"]
html_show_copyright = False
html_copy_source = False
html_show_sourcelink = False
html_math_renderer = "mathml"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["dollarmath", "fieldlist"]
myst_heading_anchors = 4
myst_links_external_new_tab = False
nitpicky = False  # types of torch, jax and numpy have no pages here; what pages link to is checked by links.py
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_inherit_docstrings = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
toc_object_entries_show_parents = "hide"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Keys", "params_style")]
suppress_warnings = ["myst.header"]  # a page may begin a section one level down
exclude_patterns = ["_build"]

PARAGRAPHS = ("Cost", "Source", "Differs from the paper")
"""Sections that docstrings write on one line, ``Cost: 2 gradient evaluations.``, each of which is a paragraph of its own."""


def prepare_page(app: Sphinx, name: str, source: list[str]) -> None:
    """Execute what is marked, and link pages and files of the repository."""
    text = with_output(source[0], page=name)
    here = name.count("/") * "../"

    def page(match: re.Match[str]) -> str:
        if match[1] == name or not (HERE / f"{match[1]}.md").is_file():
            return match[0]
        heading = (HERE / f"{match[1]}.md").read_text(encoding="utf-8").split("\n", 1)[0].lstrip("# ")
        return f"[{heading.split(':')[0]}]({here}{match[1]}.md)"

    text = re.sub(r"`docs/([a-z-]+)\.md`", page, text)
    source[0] = re.sub(r"\]\(\.\./(?!docs/)([^)]+)\)", rf"]({REPOSITORY}/blob/v{version}/\1)", text)


def prepare_docstring(app: Sphinx, what: str, name: str, obj: object, options: Any, lines: list[str]) -> None:
    """Set what docstrings say of cost and source apart."""
    lines[:] = separated(lines)


def separated(lines: list[str]) -> list[str]:
    """``Cost: ...`` and the like as paragraphs with a bold heading; a section on one line would run into the next one."""
    found: list[str] = []
    for written in lines:
        # Bars around a number are not one of docutils' substitutions.
        line = "``".join(part if i % 2 else part.replace("|", r"\|") for i, part in enumerate(written.split("``")))
        heading = next((one for one in PARAGRAPHS if line.startswith(f"{one}: ")), None)
        if heading is not None:
            found += ["", f"**{heading}:** {line.removeprefix(heading + ':').strip()}"]
        else:
            found.append(line)
    return found


def inline_math(self: Any, node: nodes.math) -> None:
    """``$...$`` as MathML."""
    self.body.append(convert(node.astext(), display="inline"))
    raise nodes.SkipNode


def block_math(self: Any, node: nodes.math_block) -> None:
    """``$$...$$`` as MathML."""
    self.body.append(f'<div class="math">{convert(node.astext(), display="block")}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """What Sphinx calls: the equations' renderer and the hooks."""
    app.add_html_math_renderer("mathml", (inline_math, None), (block_math, None))
    app.connect("source-read", prepare_page)
    app.connect("autodoc-process-docstring", prepare_docstring, priority=400)  # before napoleon reads the sections
