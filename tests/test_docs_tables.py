"""The generated tables of README.md and docs/: up to date, and a difference is found and named."""

from __future__ import annotations

import importlib.util
import inspect
import re
import shutil
from pathlib import Path

import pytest

import gradreg
from gradreg.train.data.catalogue import all_records

ROOT = Path(__file__).parents[1]
_spec = importlib.util.spec_from_file_location("docs_tables", ROOT / "docs" / "tables.py")
assert _spec is not None
assert _spec.loader is not None
tables = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tables)


@pytest.fixture
def copied(tmp_path):
    (tmp_path / "docs").mkdir()
    for path in (Path("README.md"), Path("CITATION.cff"), *(path.relative_to(ROOT) for path in (ROOT / "docs").glob("*.md"))):
        shutil.copy(ROOT / path, tmp_path / path)
    return tmp_path


def test_the_tables_are_up_to_date():
    assert tables.main(["--check"]) == 0


def test_a_table_that_differs_is_named_and_written_again(copied, capsys):
    path = copied / "docs" / "recipes.md"
    right = path.read_text()
    path.write_text(right.replace("`rho: 0.05`", "`rho: 0.5`"))
    assert path.read_text() != right
    assert tables.main(["--check"], copied) == 1
    assert capsys.readouterr().err.startswith("docs/recipes.md: out of date with the code")
    assert path.read_text() != right
    assert tables.main([], copied) == 0
    assert path.read_text() == right


def test_a_number_in_a_sentence_that_differs_from_its_stored_result_is_named(copied, capsys):
    path = copied / "docs" / "training.md"
    path.write_text(path.read_text().replace("1.002\n", "1.102\n"))
    for arguments in (["--check"], []):  # a sentence is not written again
        assert tables.main(arguments, copied) == 1
        assert "docs/training.md must say, from its stored result: MLP 784-512-512-512-10 0.988" in capsys.readouterr().err


def test_a_table_that_is_nowhere_or_unknown_is_an_error(copied):
    path = copied / "docs" / "comparing.md"
    text = path.read_text()
    path.write_text(text.replace("generated: comparison-columns", "generated: columns"))
    with pytest.raises(SystemExit, match=r"comparing.md: a generated table must be one of .*; got 'columns'"):
        tables.main([], copied)
    path.write_text(text.replace("<!-- generated: comparison-columns -->", ""))
    with pytest.raises(SystemExit, match=r"no file has the table comparison-columns between"):
        tables.main([], copied)


@pytest.mark.parametrize("name", tables.CONSTRUCTORS)
def test_a_constructor_stands_in_every_table_with_what_it_says_of_itself(name):
    for table in ("penalty-symbols", "penalty-costs"):
        assert len(re.findall(rf"^\| `{name}` \|", tables.TABLES[table](), flags=re.MULTILINE)) == 1
    row = next(line for line in tables.penalties().splitlines() if line.startswith(f"| `{name}("))
    document = inspect.getdoc(getattr(gradreg, name))
    summary = " ".join(document.split("\n\n")[0].split())
    assert re.split(r"(?<!\\)\|", row)[2].strip().replace("\\|", "|").replace("`", "") in summary.replace("`", "")
    assert f"{row.split('|')[-2].strip()} gradient evaluation" in document


@pytest.mark.parametrize("record", all_records(), ids=lambda record: record.name)
def test_a_data_set_stands_in_its_table(record):
    (row,) = [line for line in tables.data_sets().splitlines() if line.startswith(f"| `{record.name}` |")]
    assert record.layout in row
    assert record.training_images is None or f"{record.training_images:,}" in row


def test_bars_and_empty_cells():
    assert tables.markdown(("a", "b"), [("``|x|``", ""), ("", "y")]) == "| a | b |\n|---|---|\n| `\\|x\\|` | |\n| | y |\n"


def test_an_equation_of_a_docstring_is_mathematics():
    sam = tables.mathematics("``G = ∇L(θ + ρ·g/‖g‖)``")
    assert sam == "$$\nG = \\nabla L(\\theta  + \\rho \\,g/\\lVert g\\rVert )\n$$"
    two = tables.mathematics("``G = T²g`` with ``T = √(a/b)`` of each ``|θ_ℓ|``")
    assert two == ("$$\nG = T^2g\n$$\n\n$$\n\\text{with}\\quad T = \\sqrt{a/b}\n$$\n\nof each $\\lvert \\theta _\\ell \\rvert$.")
    assert tables.mathematics("``fgr(epsilon=1)``") == "``fgr(epsilon=1)``"
    with pytest.raises(SystemExit, match=r"SYMBOLS must have every symbol of the penalties' equations; got Ω in 'G = Ω'"):
        tables.mathematics("``G = Ω``")


def test_an_extra_without_a_comment_and_a_citation_out_of_date_are_named(copied, tmp_path, monkeypatch, capsys):
    citation = copied / "CITATION.cff"
    citation.write_text(citation.read_text().replace("version: ", "version: 9."))
    assert tables.main(["--check"], copied) == 1
    assert capsys.readouterr().err.startswith("CITATION.cff: out of date")
    project = (ROOT / "pyproject.toml").read_text()
    (tmp_path / "pyproject.toml").write_text(project.replace("# JAX in a loop of your own\n", ""))
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match=r"pyproject.toml: the extra jax must have a comment above it"):
        tables.extras()
