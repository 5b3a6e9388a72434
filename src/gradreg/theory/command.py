"""``gradreg lab EXPERIMENT``: runs one theorem as an experiment, prints its table, and writes its numbers and figures."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from gradreg import checks
from gradreg.command_lines import Parser

EXPERIMENTS = {
    "diagonal-network": "gradreg.theory.lab.diagonal_network",
    "kernel-decay": "gradreg.theory.lab.kernel_decay",
    "flooding": "gradreg.theory.lab.flooding",
    "stability": "gradreg.theory.lab.stability",
    "edge": "gradreg.theory.lab.edge",
}
"""Experiment -> module with ``HELP``, ``add_options(parser)`` and ``run(options) -> LabReport``."""


def main(arguments: list[str]) -> int:
    """Run ``gradreg lab``; returns the exit status.

    Raises:
        ValueError, TypeError, OSError: bad input; ``gradreg.cli`` prints the message.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0
    name, *rest = arguments
    if name not in EXPERIMENTS:
        raise ValueError(checks.unknown("experiment", name, EXPERIMENTS))
    from gradreg.theory.lab import report

    experiment = importlib.import_module(EXPERIMENTS[name])
    parser = Parser(prog=f"gradreg lab {name}", description=experiment.HELP, allow_abbrev=False)
    default = Path("runs") / "lab" / name
    parser.add_argument("--out", type=Path, default=default, metavar="DIR", help=f"folder for figures and tables (default {default})")
    parser.add_argument("--seed", type=int, default=0, help="seed of all random numbers, >= 0 (default 0)")
    experiment.add_options(parser)
    try:
        options = parser.parse_args(rest)
    except SystemExit as done:  # --help has been printed
        return int(done.code or 0)
    checks.whole("--seed", options.seed, minimum=0)
    report.prepare(options.out)
    found = experiment.run(options)
    paths = report.write(found, options.out)
    _show(found)
    print(f"{len(paths)} files in {options.out}: {', '.join(sorted({p.stem for p in paths}))}", file=sys.stderr)
    return 0


def _show(found) -> None:
    from rich.console import Console
    from rich.table import Table

    # Wide enough for the widest table when the output is not a terminal, so that a redirected table is not truncated.
    console = Console() if sys.stdout.isatty() else Console(width=160)
    for table in found.tables.values():
        if table.title is None:
            continue
        shown = Table(title=table.title, title_justify="left")
        for column, cell in zip(table.columns, table.rows[0], strict=True):
            shown.add_column(column.strip(), justify="left" if isinstance(cell, str) else "right", no_wrap=isinstance(cell, str))
        for row in table.rows:
            shown.add_row(*(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row))
        console.print(shown)
    for remark in found.remarks:
        console.print(remark, markup=False, highlight=False)


def _help() -> str:
    width = max(map(len, EXPERIMENTS))
    lines = [f"  {name:<{width}}  {importlib.import_module(module).HELP}" for name, module in EXPERIMENTS.items()]
    return "\n".join(
        [
            "usage: gradreg lab EXPERIMENT [--out DIR] [--seed N] ...",
            "",
            "The theorems behind gradient regularization as experiments: a table here, CSV and figures (PNG, SVG) in --out.",
            "",
            "experiments:",
            *lines,
            "",
            "gradreg lab EXPERIMENT --help explains its options.",
        ]
    )
