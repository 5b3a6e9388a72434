"""The documentation: README's length, links, executed code, messages that exist, and the site in a browser's terms."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))


def load(name: str):
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def heading_anchor(heading: str) -> str:
    """GitHub's and MyST's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def test_readme_is_two_screens():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) <= 900
    assert text.index('pip install "gradreg[torch]"') < text.index("make demo")


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *PAGES], ids=lambda page: page.name)
def test_links_between_pages_lead_to_a_file_and_a_heading(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert anchor in {heading_anchor(heading) for heading in headings}, f"{page.name}: {link}"


def messages() -> set[str]:
    """Every text in the sources; what an f-string fills in is …."""
    found: set[str] = set()
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.add("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))  # type: ignore[arg-type]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return found


def test_messages_of_the_troubleshooting_page_exist_in_the_code():
    rows = re.findall(r"^\| `(.+?)`(?: \(a warning\))? \|", (ROOT / "docs" / "troubleshooting.md").read_text(), flags=re.MULTILINE)
    assert len(rows) > 50
    known = messages()
    missing = [row for row in rows if not any(row in message for message in known)]
    assert missing == []


def test_an_executed_block_keeps_its_output_and_shares_names():
    executed = load("executed")
    text = "<!-- run -->\n```python\nx = 2\n```\n\n```python\nx = 3\n```\n\n<!-- run -->\n```python\nprint(x * x)\n```\n"
    assert executed.with_output(text, page="page").endswith("```python\nprint(x * x)\n```\n\n```text\n4\n```\n")
    with pytest.raises(RuntimeError, match=r"page.md: code that is executed must run; got ZeroDivisionError.*begins with '1 / 0'"):
        executed.with_output("<!-- run -->\n```python\n1 / 0\n```\n", page="page")


def test_a_broken_link_and_a_missing_anchor_are_found(tmp_path):
    links = load("links")
    (tmp_path / "a.html").write_text('<a href="b.html#there">x</a><a href="b.html#not">x</a><img src="no.png"><a href="https://x.org/">x</a>')
    (tmp_path / "b.html").write_text('<p id="there"></p><a href="#there">x</a>')
    assert links.broken(tmp_path) == ["a.html: b.html#not", "a.html: no.png"]
