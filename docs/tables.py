"""Write the tables of README.md and docs/ that are generated from the code, and CITATION.cff, or check that they are up to date.

    python docs/tables.py           # rewrites them
    python docs/tables.py --check   # fails if one differs from the code

A table stands between ``<!-- generated: NAME -->`` and ``<!-- end -->``, NAME being one of ``TABLES``, or ``stored/FILE`` for the
table that a benchmark stored as benchmarks/results/FILE.md. Penalties come from the signatures and docstrings of their constructors
(the first sentence, ``Cost:`` and ``Source:``), data sets and the columns of a comparison from their records, ranges of a search from
its list, extras and the citation from ``pyproject.toml``, and what studies and simulations answered from their stored results. Numbers
within sentences are checked too (``quoted.py``).
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from equations import linked, mathematics  # neighbors, also where a test loads this file
from from_choosing import (
    choosing_auto,
    choosing_held_out,
    choosing_lets,
    choosing_seconds,
    choosing_shares,
    choosing_signs,
    shares_in_short,
)
from from_papers import frameworks, paper_count, paper_runs, papers
from from_results import (
    STORED,
    demo_answer,
    diagonal_network,
    digits,
    edge,
    gain_left,
    gpu_step_costs,
    jax_costs,
    kernel_decay,
    peer_suites,
    sharpness_methods,
    stored_file,
    strengths,
    studies,
    weight_decay_budget,
    weight_decay_epochs,
    weight_decay_law,
)
from quoted import outdated as outdated_sentences
from table import markdown

import gradreg
from gradreg.registry import CONSTRUCTORS
from gradreg.study.search_space import STRENGTHS
from gradreg.study.table import COLUMNS
from gradreg.train.data.catalogue import DatasetRecord, all_records

ROOT = Path(__file__).parents[1]
MARKED = re.compile(r"(<!-- generated: (?P<name>\S+) -->\n)(?P<table>.*?)(<!-- end -->)", flags=re.DOTALL)
SECTIONS = ("Args", "Cost", "Source", "Differs from the paper")


def penalties() -> str:
    """Every constructor: its call, its gradient, and its cost."""
    rows = [(call(name), equation(name), evaluations(name)) for name in CONSTRUCTORS]
    return markdown(("penalty", "gradient", "evaluations"), rows)


def penalty_symbols() -> str:
    """Every constructor as a recipe writes it."""
    rows: list[tuple[str, str, str]] = []
    for name, build in CONSTRUCTORS.items():
        symbols = inspect.signature(build).parameters.values()
        keys = (f"`{s.name}`" if s.default is s.empty else f"`{s.name}: {str(s.default).lower()}`" for s in symbols)
        rows.append((f"`{name}`", ", ".join(keys), title(name)))
    return markdown(("`name`", "symbols, with their defaults", "what it is"), rows)


def penalty_costs() -> str:
    """Every constructor's cost and source."""
    rows = [(f"`{name}`", section(name, "Cost"), section(name, "Source", required=False)) for name in CONSTRUCTORS]
    return markdown(("penalty", "cost", "source"), rows)


def catalogue() -> str:
    """Every constructor: its update equation as mathematics, its call, cost, source, and where it differs from the paper."""
    entries: list[str] = []
    for name in CONSTRUCTORS:
        differs = section(name, "Differs from the paper", required=False)
        source = section(name, "Source", required=False)
        facts = [
            f"- Call: {call(name)}",
            f"- Cost: {section(name, 'Cost')}.",
            *([f"- Source: {source}."] if source else []),
            *([f"- Differs from the paper: {differs}."] if differs else []),
        ]
        entries.append(f"### `{name}`\n\n{title(name)}:\n\n{mathematics(equation(name))}\n\n" + linked("\n".join(facts)) + "\n")
    return "\n".join(entries).replace("``", "`")


def extras() -> str:
    """Every extra of ``pyproject.toml``, and what the comment above it says that it is for."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    rows: list[tuple[str, str]] = []
    for name in tomllib.loads(text)["project"]["optional-dependencies"]:
        found = re.search(rf"^# (.*)\n{re.escape(name)} = \[", text, flags=re.MULTILINE)
        if found is None:
            raise SystemExit(f"pyproject.toml: the extra {name} must have a comment above it that says what it is for; got none.")
        rows.append((f"`gradreg[{name}]`", found[1]))
    return markdown(("extra", "for"), rows)


def citation() -> str:
    """CITATION.cff, from ``pyproject.toml`` and the release that CHANGELOG.md begins with."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    latest = re.search(r"^## \[(.+?)\] - (.+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    released = latest is not None and re.fullmatch(r"\d{4}-\d\d-\d\d", latest[2])
    lines = [
        "# Written by make tables from pyproject.toml and CHANGELOG.md.",
        "cff-version: 1.2.0",
        "message: If you use this software, please cite it, and the papers of the penalties that you use.",
        f"title: {project['name']}",
        f"abstract: {json.dumps(project['description'])}",
        "type: software",
        "authors:",
        *(f"  - name: {author['name']}" for author in project["authors"]),
        f"version: {gradreg.__version__}",
        *([f"date-released: {latest[2]}"] if latest is not None and released else []),
        f"license: {project['license']}",
        f"repository-code: {project['urls']['Repository']}",
        "keywords:",
        *(f"  - {keyword}" for keyword in project["keywords"]),
    ]
    return "\n".join(lines) + "\n"


def data_sets() -> str:
    """Every data set: what it holds, how it is normalized, and where its files lie."""
    rows = [(f"`{r.name}`", images(r), "" if r.classes is None else str(r.classes), statistics(r), r.layout) for r in all_records()]
    return markdown(("`data.name`", "training and test images", "classes", "mean; standard deviation", "under `data.root`"), rows)


def comparison_columns() -> str:
    """Every column of the table of ``gradreg compare``."""
    return markdown(("column", "meaning"), [(column.header.replace("{metric}", "METRIC"), column.meaning) for column in COLUMNS])


def search_strengths() -> str:
    """What ``gradreg tune`` searches of each penalty when nothing else is said."""
    rows: list[tuple[str, str, str]] = []
    for name, one in STRENGTHS.items():
        ranges = ", ".join(f"`{key}` {low:g} to {high:g}" for key, (low, high) in one.ranges.items())
        rest = [
            *(f"`{key}` = {leader}" for key, leader in one.follows.items()),
            *(f"`{key}` = {value:g}" for key, value in one.kept.items()),
        ]
        rows.append((f"`{name}`", ranges, ", ".join(rest)))
    return markdown(("penalty", "searched", "unless given"), rows)


TABLES: dict[str, Callable[[], str]] = {
    "penalties": penalties,
    "penalty-symbols": penalty_symbols,
    "penalty-costs": penalty_costs,
    "catalogue": catalogue,
    "extras": extras,
    "data-sets": data_sets,
    "comparison-columns": comparison_columns,
    "digits": digits,
    "demo-answer": demo_answer,
    "strengths": strengths,
    "gain-left": gain_left,
    "shares-in-short": shares_in_short,
    "studies": studies,
    "search-strengths": search_strengths,
    "gpu-step-costs": gpu_step_costs,
    "jax-costs": jax_costs,
    "diagonal-network": diagonal_network,
    "kernel-decay": kernel_decay,
    "edge": edge,
    "sharpness-methods": sharpness_methods,
    "choosing-auto": choosing_auto,
    "choosing-held-out": choosing_held_out,
    "choosing-lets": choosing_lets,
    "peer-suites": peer_suites,
    "choosing-seconds": choosing_seconds,
    "choosing-shares": choosing_shares,
    "choosing-signs": choosing_signs,
    "weight-decay-budget": weight_decay_budget,
    "weight-decay-epochs": weight_decay_epochs,
    "weight-decay-law": weight_decay_law,
    "frameworks": frameworks,
    "papers": papers,
    "paper-runs": paper_runs,
    "paper-count": paper_count,
}


def call(name: str) -> str:
    """``sam(rho=0.05, steps=1)``: the constructor with its defaults."""
    symbols = inspect.signature(CONSTRUCTORS[name]).parameters.values()
    arguments = (f"{s.name}=" if s.default is s.empty else f"{s.name}={s.default!r}".replace("'", '"') for s in symbols)
    return f"`{name}({', '.join(arguments)})`"


def title(name: str) -> str:
    """The first words of the docstring, up to the equation."""
    return _summary(name).split("``")[0].rstrip(" :,")


def equation(name: str) -> str:
    """The first sentence of the docstring from the equation on."""
    return "``" + _summary(name).split("``", 1)[1].rstrip(".")


def evaluations(name: str) -> str:
    """The gradient evaluations that the section ``Cost:`` names."""
    found = re.search(r"(?:^|, )([^,]*?) gradient evaluations?\b", section(name, "Cost"))
    if found is None:
        raise SystemExit(f"gradreg.{name}: the section Cost: must name its gradient evaluations; got {section(name, 'Cost')!r}.")
    return found[1]


def section(name: str, heading: str, *, required: bool = True) -> str:
    """The text of a section of a constructor's docstring, on one line; "" if it has none and needs none."""
    others = "|".join(SECTIONS)
    found = re.search(rf"^{heading}: (.*?)(?=^(?:{others}):|^$|\Z)", _doc(name), flags=re.DOTALL | re.MULTILINE)
    if found is None and required:
        raise SystemExit(f"gradreg.{name}: the docstring must have a section {heading}:; got none.")
    return "" if found is None else " ".join(found[1].split()).rstrip(".")


def _summary(name: str) -> str:
    summary = " ".join(_doc(name).split("\n\n")[0].split())
    if "``" not in summary:
        raise SystemExit(f"gradreg.{name}: the docstring's first sentence must hold the equation between ``...``; got {summary!r}.")
    return summary


def _doc(name: str) -> str:
    return inspect.getdoc(CONSTRUCTORS[name]) or ""


def images(record: DatasetRecord) -> str:
    """``60,000 and 10,000, 28 x 28, gray``."""
    if record.training_images is None:
        return "as many as there are"
    count = f"{record.training_images:,} and {record.test_images:,}" if record.test_images else f"{record.training_images:,} in all"
    if record.image_shape is None:
        return count
    channels, height, width = record.image_shape
    return f"{count}, {height} x {width}" + (", gray" if channels == 1 else "")


def statistics(record: DatasetRecord) -> str:
    """The mean and the standard deviation of each channel; "" for images that stay between 0 and 1."""
    found = record.normalization
    return "" if found is None else "; ".join(", ".join(f"{value:g}" for value in values) for values in (found.mean, found.std))


def updated(text: str, *, file: str) -> str:
    """``text`` with every marked table written again."""

    def table(match: re.Match[str]) -> str:
        name = match["name"]
        if name in TABLES:
            return f"{match[1]}{TABLES[name]()}{match[4]}"
        if not name.startswith(STORED) or not stored_file(name).exists():
            known = f"{', '.join(TABLES)}, or {STORED}FILE where benchmarks/results/FILE.md is"
            raise SystemExit(f"{file}: a generated table must be one of {known}; got {name!r}.")
        return f"{match[1]}{stored_file(name).read_text(encoding='utf-8').rstrip()}\n{match[4]}"

    return MARKED.sub(table, text)


def main(argv: Sequence[str], root: Path = ROOT) -> int:
    """Rewrite the tables, or with ``--check`` return 1 if one is out of date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a table differs from the code")
    check = parser.parse_args(argv).check
    outdated: list[str] = []
    there: set[str] = set()
    for path in [root / "README.md", *sorted((root / "docs").glob("*.md"))]:
        before = path.read_text(encoding="utf-8")
        there |= {match["name"] for match in MARKED.finditer(before)}
        after = updated(before, file=path.name)
        if after != before:
            outdated.append(str(path.relative_to(root)))
            if not check:
                path.write_text(after, encoding="utf-8")
    path = root / "CITATION.cff"
    if not path.is_file() or path.read_text(encoding="utf-8") != citation():
        outdated.append(path.name)
        if not check:
            path.write_text(citation(), encoding="utf-8")
    if TABLES.keys() - there:
        raise SystemExit(
            f"no file has the table {', '.join(sorted(TABLES.keys() - there))} between <!-- generated: NAME --> and <!-- end -->."
        )
    sentences = list(outdated_sentences(root))
    for sentence in sentences:
        print(sentence, file=sys.stderr)
    if sentences:
        return 1
    if outdated and check:
        print(f"{', '.join(outdated)}: out of date with the code of gradreg {gradreg.__version__}. Run: make tables", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
