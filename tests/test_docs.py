"""The documentation: README's length, links, executed code, messages that exist, and the site in a browser's terms."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import re
import shutil
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
    (tmp_path / "a.html").write_text(
        '<a href="b.html#there">x</a><a href="b.html#not">x</a><img src="no.png"><a href="https://x.org/">x</a>'
    )
    (tmp_path / "b.html").write_text('<p id="there"></p><a href="#there">x</a>')
    assert links.broken(tmp_path) == ["a.html: b.html#not", "a.html: no.png"]


def test_what_keeps_a_checkout_from_being_published_is_named(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    release = load("release")
    monkeypatch.setattr(release.tables, "main", lambda argv: 0)
    project = re.sub(
        r"^Repository = .*$", 'Repository = "https://example.org/gradreg"', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE
    )
    (tmp_path / "pyproject.toml").write_text(project)
    (tmp_path / "CHANGELOG.md").write_text(f"# Changelog\n\n## [{release.gradreg.__version__}] - 2026-12-01\n")
    assert release.faults(tmp_path, tag=f"v{release.gradreg.__version__}") == []
    (tmp_path / "pyproject.toml").write_text(project.replace("example.org", "github.com/OWNER"))
    (tmp_path / "CHANGELOG.md").write_text(f"# Changelog\n\n## [{release.gradreg.__version__}] - unreleased\n")
    first, second, third = release.faults(tmp_path, tag="v9.9.9")
    assert first.startswith("pyproject.toml: [project.urls] must name the repository; got OWNER.")
    assert second.startswith("CHANGELOG.md: must have a heading with the day of the release")
    assert third == f"the tag must be v{release.gradreg.__version__}, that of the version; got 'v9.9.9'."


PACKAGES = {
    "gradreg": "gradreg",
    "gradreg.torch": "torch",
    "gradreg.jax": "jax",
    "gradreg.study": "study",
    "gradreg.sharpness": "sharpness",
    "gradreg.evaluation": "evaluation",
}


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_in_the_reference(package):
    page = (ROOT / "docs" / "reference" / f"{PACKAGES[package]}.md").read_text(encoding="utf-8")
    there = re.findall(rf"^\.\. auto(?:function|class):: {re.escape(package)}\.(\w+)$", page, flags=re.MULTILINE)
    names = {name for name in importlib.import_module(package).__all__ if name != "__version__"}
    assert names - set(there) == set(), f"docs/reference/{PACKAGES[package]}.md lacks them"
    assert set(there) - names == set(), f"docs/reference/{PACKAGES[package]}.md has what is not public"
    assert len(there) == len(set(there))


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The built site; a warning is an error."""
    folder = tmp_path_factory.mktemp("site")
    build = [
        sys.executable,
        "-m",
        "sphinx",
        "-W",
        "--keep-going",
        "-q",
        "-b",
        "html",
        "-d",
        str(folder / "trees"),
        "docs",
        str(folder / "html"),
    ]
    done = subprocess.run(build, cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "html"


@pytest.mark.slow
def test_no_link_of_the_site_is_broken_and_nothing_is_loaded_from_elsewhere(site):
    assert load("links").broken(site) == []
    for page in site.rglob("*.html"):
        assert re.findall(r"<(?:script|img|link)[^>]+(?:src|href)=\"(?:https?:)?//[^\"]+\"", page.read_text(encoding="utf-8")) == []


@pytest.mark.slow
def test_equations_are_mathematics_and_executed_code_has_its_output(site):
    page = (site / "penalties.html").read_text(encoding="utf-8")
    from gradreg.registry import CONSTRUCTORS

    assert page.count('<math xmlns="http://www.w3.org/1998/Math/MathML" display="block">') >= len(CONSTRUCTORS) - 1  # auto is a call
    assert "$$" not in page
    quick = (site / "quick-start.html").read_text(encoding="utf-8")
    assert re.search(r"loss 2\.\d+, gradient norm 0\.\d+, gradient evaluations 2", quick)
    coming = re.sub(r"<[^>]+>", "", (site / "coming-from-sam.html").read_text(encoding="utf-8"))
    for method in ("SAM: ", "ASAM:"):
        found = re.search(rf"^{method} ([\d.e+-]+) of what", coming, flags=re.MULTILINE)
        assert found is not None
        assert float(found[1]) < 1e-6
    assert "at a zero gradient, theirs: [nan nan] ours: [0. 0.]" in coming


QUESTIONS = {
    "Does it work with GradScaler, and where do I clip?": ("pytorch", "loss-scales", "unscale"),
    "Does it help me, at equal cost?": ("comparing", "what-is-run", "compute-matched baseline"),
    "Which rho?": ("choosing", "how-strong", "radius"),
    "Whose norm is it under DDP, and what does it cost?": ("pytorch", "data-parallelism", "each process perturbs by its own gradient"),
    "Are BatchNorm statistics updated twice, and is dropout drawn again?": (
        "pytorch",
        "every-pass-evaluates-the-same-function",
        "BatchNorm",
    ),
    "How do I accumulate gradients?": ("quick-start", "in-your-pytorch-loop", "one perturbation is made from the whole gradient"),
    "Why did my resumed run lose its momentum?": ("coming-from-sam", "davda54-sam", "not the momentum"),
    "It costs twice as much: what is cheaper?": ("choosing", "which-at-what-cost", "half of the batch"),
    "Do 16-bit weights move at all?": ("pytorch", "small-numbers-and-rounding", "rounded away"),
    "Is a flatter minimum better?": ("sharpness", "what-each-number-means-and-what-it-costs", "Flatter is not better"),
    "Can I use it in the Hugging Face Trainer?": ("integrations", "hugging-face-trainer", "Trainer"),
    "Is there FSDP2, and does it restore the weights?": ("pytorch", "conditions-penalties", "FSDP2"),
}


@pytest.mark.slow
@pytest.mark.parametrize("question", QUESTIONS)
def test_a_question_of_users_is_two_clicks_from_the_start(site, question):
    page, section, words = QUESTIONS[question]
    start = (site / "index.html").read_text(encoding="utf-8")
    body = start[start.index('<article role="main"') : start.index("</article>")]
    assert f'href="{page}.html"' in body
    text = (site / f"{page}.html").read_text(encoding="utf-8")
    assert f'href="#{section}"' in text
    assert words in re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", text))


CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)


@pytest.mark.slow
@pytest.mark.chromium
@pytest.mark.skipif(CHROMIUM is None, reason="needs headless Chromium")
def test_the_site_fits_a_desk_and_a_phone(site):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        for width in (1280, 390):
            page = browser.new_page(viewport={"width": width, "height": 900})
            messages: list[str] = []
            page.on("pageerror", lambda error, messages=messages: messages.append(str(error)))
            for path in sorted(site.rglob("*.html")):
                page.goto(f"file://{path}")
                assert page.evaluate("document.documentElement.scrollWidth") <= width, path.name
            assert messages == []
            page.close()
        browser.close()
