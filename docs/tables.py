"""Write the tables of README.md and docs/ that are generated from the code, and CITATION.cff, or check that they are up to date.

    python docs/tables.py           # rewrites them
    python docs/tables.py --check   # fails if one differs from the code

A table stands between ``<!-- generated: NAME -->`` and ``<!-- end -->``, NAME being one of ``TABLES``, or ``stored/FILE`` for the
table that a benchmark stored as benchmarks/results/FILE.md. Penalties come from the signatures and docstrings of their constructors
(the first sentence, ``Cost:`` and ``Source:``), data sets and the columns of a comparison from their records, ranges of a search from
its list, extras and the citation from ``pyproject.toml``, and what studies and simulations answered from their stored results.
"""

from __future__ import annotations

import argparse
import csv
import inspect
import json
import math
import re
import sys
import tomllib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import gradreg
from gradreg.registry import CONSTRUCTORS
from gradreg.sharpness.measures import MEASURES
from gradreg.study.search_space import STRENGTHS
from gradreg.study.sharpness import cell, correlation_text
from gradreg.study.table import COLUMNS
from gradreg.study.verdicts import decimals, interval_text
from gradreg.train.data.catalogue import DatasetRecord, all_records

ROOT = Path(__file__).parents[1]
MARKED = re.compile(r"(<!-- generated: (?P<name>\S+) -->\n)(?P<table>.*?)(<!-- end -->)", flags=re.DOTALL)
STORED = "stored/"
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


def studies() -> str:
    """What the studies in examples/studies answered: a row for each variant, from the stored ``results.json``."""
    header = ("study, metric", "variant", "test", "over plain, equal epochs", "equal gradients", "stopped early", "verdict at equal epochs")
    rows: list[tuple[str, ...]] = []
    for file in sorted((ROOT / "docs" / "results" / "studies").glob("*.json")):
        found = json.loads(file.read_text(encoding="utf-8"))
        metric, seeds = found["metric"], len(found["seeds"])
        title = f"`{file.stem}`, {metric['name']}{', %' if metric['percent'] else ''}, {seeds} seeds"
        for label, value, equal, spent, early, _, decision in cells(f"studies/{file.stem}"):
            rows.append((title, label, value, equal, spent, early, decision))
            title = ""
    return markdown(header, rows)


def digits() -> str:
    """What ``make demo`` found: the stored ``results.json`` of its comparison."""
    header = (
        "variant",
        "test accuracy, %",
        "over plain, equal epochs",
        "over plain, equal gradients",
        "over plain, stopped early",
        "gradient evaluations",
        "at equal epochs",
    )
    return markdown(
        header,
        [
            (label, value, equal, spent, early, evaluations, decision)
            for label, value, equal, spent, early, evaluations, decision in cells("digits-noisy-labels")
        ],
    )


def strengths() -> str:
    """What ``gradreg compare digits-strengths`` found."""
    header = ("variant", "test accuracy, %", "over plain, equal epochs", "at equal epochs")
    return markdown(
        header,
        [(label, value, equal, decision) for label, value, equal, *_, decision in cells("digits-strengths") if "epochs" not in label],
    )


def edge() -> str:
    """What ``gradreg lab edge`` found on MNIST, from its stored table."""
    header = (
        "method",
        "η",
        "ρ",
        "2/η",
        "reached at step",
        "curvature / edge since then: median [quartiles]",
        "at the end: curvature",
        "edge",
        "loss",
    )
    with (ROOT / "docs" / "results" / "edge" / "edge.csv").open(encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    rows = [
        (
            row["method"],
            row["eta"],
            row["rho"],
            f"{float(row['2/eta']):g}",
            row["reached at step"],
            f"{float(row['curvature/edge']):.2f} [{float(row['1st quartile']):.2f}, {float(row['3rd']):.2f}]",
            f"{float(row['curvature']):.2f}",
            f"{float(row['edge']):.2f}",
            f"{float(row['loss']):.4f}",
        )
        for row in found
    ]
    return markdown(header, rows)


def sharpness_methods() -> str:
    """How sharp each method's minima are on the digits, from the stored study."""
    found = json.loads((ROOT / "docs" / "results" / "sharpness-digits.json").read_text(encoding="utf-8"))
    block, names = found["sharpness"], ("largest_eigenvalue", "trace", "m_sharpness")
    told = {(one["measure"], one["over"]): correlation_text(one) for one in block["correlations"]}
    rows = [
        (line["label"], f"{100 * line['test_accuracy']:.2f} ± {100 * line['test_accuracy_sd']:.2f}", *(cell(line[name]) for name in names))
        for line in block["table"]
    ]
    rows += [
        (f"rank correlation with accuracy, {over}", "", *(told[name, over] for name in names))
        for over in ("over all runs", "within variants")
    ]
    return markdown(("variant", "test accuracy, %", *(MEASURES[name] for name in names)), rows)


def jax_costs() -> str:
    """What a step costs in JAX, in processor time, from the stored result."""
    models = json.loads((ROOT / "benchmarks" / "results" / "jax_step_cost.json").read_text(encoding="utf-8"))["models"]
    ratios = [model["ratio in processor time"] for model in models.values()]
    rows = [(variant, *(f"{ratio[variant]:.2f}" for ratio in ratios)) for variant in ratios[0]]
    return markdown(("step", *(name.split()[0] for name in models)), rows)


def cells(name: str) -> list[tuple[str, ...]]:
    """Of every row of the stored ``docs/results/NAME.json``: label, value, three differences, gradient evaluations, and the decision."""
    found = json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text(encoding="utf-8"))
    rows: list[tuple[str, ...]] = []
    for row in found["table"]:
        places = decimals(row["deviation"])
        value = "–" if row["mean"] is None else f"{row['mean']:.{places}f} ± {row['deviation']:.{places}f}"
        differences = [
            "" if (d := row[key]) is None or d["low"] is None else interval_text(d["difference"], d["low"], d["high"])
            for key in ("difference", "matched_difference", "early_difference")
        ]
        decision = "" if row["difference"] is None or row["variant"] == found["baseline"] else row["difference"]["decision"]
        label = row["label"] if row["variant"] == found["baseline"] else f"{row['label']}, {row['method']}"
        rows.append((label, value, *differences, f"{row['gradient_evaluations'] or 0:g}", decision))
    return rows


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


def choosing_seconds() -> str:
    """What a step of every variant costs in processor time on the two perceptrons, from the stored results."""
    results = ROOT / "benchmarks" / "results" / "choosing"
    costs = json.loads((results / "cost-digits-cost.json").read_text(encoding="utf-8"))["variants"]
    found = [
        json.loads((results / f"seconds-{task}.json").read_text(encoding="utf-8"))["variants"] for task in ("digits-cost", "mnist-cost")
    ]
    header = (
        "variant",
        "evaluations a step",
        *(f"{n}, plain {one['none']['milliseconds']:.1f} ms" for n, one in zip(("digits", "MNIST"), found, strict=True)),
    )
    names = sorted((name for name in found[0] if name in found[1]), key=lambda name: (costs[name]["cost"], found[0][name]["ratio"]))
    rows = [
        (name, f"{costs[name]['cost']:.2f}", *("{ratio:.2f} [{low:.2f}, {high:.2f}]".format(**one[name]) for one in found))
        for name in names
    ]
    return markdown(header, rows)


def choosing_shares() -> str:
    """The share of F-GR's gain that cheaper variants keep on the three tasks, from the stored tables."""
    tasks = {"digits": "digits-cost", "MNIST": "mnist-cost", "CIFAR-10": "cifar10-cost"}
    found = [stored_rows(f"{STORED}choosing/cost-{task}") for task in tasks.values()]
    shown = ("every-2", "half", "quarter", "every-5", "tenth", "tenth-every-5", "remembered-0.1")
    rows = [(f"`{name}`", found[0][name][1], *(one[name][-1] for one in found)) for name in shown]
    return markdown(("variant", "evaluations a step", *(f"{task}, %" for task in tasks)), rows)


def choosing_signs() -> str:
    """What the first epochs show of a small radius, the best one, and two that are too large, for each method, from the stored run."""
    stored_runs = json.loads((ROOT / "benchmarks" / "results" / "choosing" / "signs.json").read_text(encoding="utf-8"))["runs"]
    found = {(run["method"], run["radius"]): run for run in stored_runs}
    shown = {"sam": (0.1, 0.3, 0.5, 0.7), "gnp": (0.1, 0.3, 0.7, 2.0), "fgr": (0.1, 1.0, 2.0, 8.0), "asam": (0.1, 1.0, 2.0, 5.0)}
    names = {"sam": "SAM", "gnp": "GNP", "fgr": "F-GR", "asam": "ASAM"}
    rows: list[tuple[str, ...]] = []
    for method, radii in shown.items():
        runs = [found[method, radius] for radius in radii]
        early = [sum(run["cosine"][:5]) / 5 for run in runs]
        below = [next((str(k + 1) for k, one in enumerate(run["train_loss"]) if one < 0.9 * math.log(10)), "never") for run in runs]
        cells = (
            [f"{one:.2f}" for one in early],
            [f"{min(run['cosine']):.2f}" for run in runs],
            below,
            [f"{run['gradient_norm'][4]:.2f}" for run in runs],
            [f"{100 * run['test_accuracy']:.1f}" for run in runs],
        )
        rows.append((f"{names[method]} {' / '.join(f'{radius:g}' for radius in radii)}", *(" / ".join(each) for each in cells)))
    header = (
        "radius",
        "cosine: mean of the first five epochs",
        "smallest of any epoch",
        "epochs until the loss is 10 % below guessing",
        "gradient norm, epoch 5",
        "test accuracy, %",
    )
    return markdown(header, rows)


def stored_rows(name: str) -> dict[str, list[str]]:
    """The rows of a stored table by their first cell."""
    lines = stored_file(name).read_text(encoding="utf-8").splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return {row[0]: row for row in rows}


def stored_file(name: str) -> Path:
    """Where a benchmark wrote the table ``stored/FILE``."""
    return ROOT / "benchmarks" / "results" / f"{name.removeprefix(STORED)}.md"


TABLES: dict[str, Callable[[], str]] = {
    "penalties": penalties,
    "penalty-symbols": penalty_symbols,
    "penalty-costs": penalty_costs,
    "catalogue": catalogue,
    "extras": extras,
    "data-sets": data_sets,
    "comparison-columns": comparison_columns,
    "digits": digits,
    "strengths": strengths,
    "studies": studies,
    "search-strengths": search_strengths,
    "jax-costs": jax_costs,
    "edge": edge,
    "sharpness-methods": sharpness_methods,
    "choosing-seconds": choosing_seconds,
    "choosing-shares": choosing_shares,
    "choosing-signs": choosing_signs,
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


SYMBOLS = {
    **{"α": r"\alpha ", "β": r"\beta ", "γ": r"\gamma ", "ε": r"\varepsilon ", "η": r"\eta ", "θ": r"\theta "},
    **{"λ": r"\lambda ", "μ": r"\mu ", "ρ": r"\rho ", "σ": r"\sigma "},
    "∇": r"\nabla ",
    "·": r"\,",
    "−": "-",
    "←": r"\leftarrow ",
    "ℓ": r"\ell ",
    "²": "^2",
    "₂": "_2",
}
"""What the constructors' equations are written with, in LaTeX."""


def mathematics(text: str) -> str:
    """An equation of a docstring, with words between ``...``, as displayed mathematics followed by the words that explain it.

    ``G = ∇L(θ + ρ·g/‖g‖)``, of the penalty ... becomes a block of ``$$``, a line for each equation; what is code stays code.
    """
    parts = re.split(r"``(.+?)``", text)  # words, equation, words, equation, ..., words
    if re.search(r"\w=", parts[1]):  # a call of Python's
        return text
    lines, rest = [latex(parts[1])], 2
    while rest < len(parts) - 1 and (joint := re.fullmatch(r",? ?(then|with|) ", parts[rest])):
        lines.append(rf"\text{{{joint[1]}}}\quad {latex(parts[rest + 1])}" if joint[1] else latex(parts[rest + 1]))
        rest += 2
    words = "".join(f"${latex(part)}$" if i % 2 else part for i, part in enumerate(parts[rest:])).lstrip(",: ")
    shown = "\n\n".join(f"$$\n{line}\n$$" for line in lines)
    return shown + (f"\n\n{words}." if words else "")


def latex(equation: str) -> str:
    """``ρ·g/‖g‖`` in LaTeX."""
    for bar, left, right in (("‖", r"\lVert ", r"\rVert "), ("|", r"\lvert ", r"\rvert ")):
        pieces = equation.split(bar)
        equation = "".join(piece + (("", left, right)[1 + i % 2] if i < len(pieces) - 1 else "") for i, piece in enumerate(pieces))
    equation = re.sub(r"√\(([^()]*)\)", r"\\sqrt{\1}", equation)
    equation = re.sub(
        r"(?<![\\A-Za-z])[A-Za-z]{2,}(?: [A-Za-z]+)*", lambda m: m[0] if m[0] in _FUNCTIONS else rf"\text{{{m[0]}}}", equation
    )
    equation = "".join(SYMBOLS.get(letter, letter) for letter in equation)
    if not equation.isascii():
        strange = ", ".join(sorted(set(equation) - set(map(chr, range(128)))))
        raise SystemExit(f"docs/tables.py: SYMBOLS must have every symbol of the penalties' equations; got {strange} in {equation!r}.")
    return equation.strip()


_FUNCTIONS = frozenset(("lVert", "rVert", "lvert", "rvert"))


def linked(text: str) -> str:
    """``arXiv 2010.01412`` as a link to the paper."""
    return re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text)


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


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown, with | escaped and code between single backquotes."""
    lines = ["|".join(["", *["---"] * len(header), ""])]
    for cells in (header, *rows):
        line = " | ".join(cell.replace("|", "\\|").replace("``", "`") for cell in cells)
        lines.append(f"| {line} |".replace("|  |", "| |"))
    rule, head, *body = lines
    return "\n".join([head, rule, *body, ""])


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
    if outdated and check:
        print(f"{', '.join(outdated)}: out of date with the code of gradreg {gradreg.__version__}. Run: make tables", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
