"""Write the tables of README.md and docs/ that are generated from the code, or check that they are up to date.

    python docs/tables.py           # rewrites them
    python docs/tables.py --check   # fails if one differs from the code

A table stands between ``<!-- generated: NAME -->`` and ``<!-- end -->``, NAME being one of ``TABLES``. Penalties come from the
signatures and docstrings of their constructors (the first sentence, ``Cost:`` and ``Source:``), data sets and the columns of a
comparison from their records, ranges of a search from its list, and what studies and simulations answered from their stored results.
"""

from __future__ import annotations

import argparse
import csv
import inspect
import json
import re
import sys
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


def search_statistics() -> str:
    """The stored table of ``benchmarks/search_statistics.py``."""
    return (ROOT / "benchmarks" / "results" / "search_statistics.md").read_text(encoding="utf-8")


TABLES: dict[str, Callable[[], str]] = {
    "penalties": penalties,
    "penalty-symbols": penalty_symbols,
    "penalty-costs": penalty_costs,
    "data-sets": data_sets,
    "comparison-columns": comparison_columns,
    "digits": digits,
    "strengths": strengths,
    "studies": studies,
    "search-strengths": search_strengths,
    "search-statistics": search_statistics,
    "jax-costs": jax_costs,
    "edge": edge,
    "sharpness-methods": sharpness_methods,
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
        if match["name"] not in TABLES:
            raise SystemExit(f"{file}: a generated table must be one of {', '.join(TABLES)}; got {match['name']!r}.")
        return f"{match[1]}{TABLES[match['name']]()}{match[4]}"

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
    if TABLES.keys() - there:
        raise SystemExit(
            f"no file has the table {', '.join(sorted(TABLES.keys() - there))} between <!-- generated: NAME --> and <!-- end -->."
        )
    if outdated and check:
        print(f"{', '.join(outdated)}: tables differ from the code of gradreg {gradreg.__version__}. Run: make tables", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
