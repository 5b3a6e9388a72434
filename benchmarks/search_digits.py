"""Does ``gradreg tune`` find what an exhaustive grid finds, in a quarter of its runs? F-GR's strength on digits with wrong labels.

    python benchmarks/search_digits.py --out benchmarks/results/search_digits     # about ten minutes of two cores

The grid is 24 values of γ = ε, log-uniform from 0.01 to 1. What each is worth is its mean test accuracy over seeds that no search has; the
best of these is an oracle. A search has seeds of its own, selects by 200 noisy validation images, and is repeated with others. Beside it
stands the grid's own choice, by the same validation, with as many seeds as a complete trial has.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import gradreg
from gradreg import study
from reporting import command, environment, report, signature
from tables import markdown

RECIPE = "digits-noisy-labels"
GRID = [float(epsilon) for epsilon in np.geomspace(0.01, 1.0, 24)]
TRIALS, SEEDS, FIRST = 10, 3, 1000


def options(seed: int) -> dict[str, Any]:
    return {"seed": seed, "data.validation": 200, "trackers": []}


def accuracies(epsilons: list[float], seed: int, seeds: int, folder: Path) -> dict[str, list[Any]]:
    """Variant -> its records."""
    penalties = {f"{epsilon:.6g}": gradreg.fgr(gamma=epsilon, epsilon=epsilon) for epsilon in epsilons}
    found = study.compare(RECIPE, penalties=penalties, seeds=seeds, out=folder, options=options(seed), rivals=["epochs"])
    return {name: [record for record in found.records if record.variant == name] for name in found.plan.variants}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--searches", type=int, default=5, help="searches, each with seeds of its own (default: 5)")
    parser.add_argument("--fresh", type=int, default=10, help="seeds that tell what a strength is worth (default: 10)")
    parser.add_argument("--folder", type=Path, help="where the runs go, and are found again (default: a temporary one)")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        worth = accuracies(GRID, FIRST, arguments.fresh, folder / "worth")
        means = {name: 100 * float(np.mean([record.test for record in records])) for name, records in worth.items()}
        oracle = max((name for name in means if name != "none"), key=lambda name: means[name])
        rows: list[dict[str, Any]] = []
        for k in range(arguments.searches):
            found = study.tune(
                RECIPE,
                penalty="fgr",
                trials=TRIALS,
                seeds=SEEDS,
                confirm=2,
                out=folder / f"search-{k}",
                options=options(100 * k),
            )
            epsilon = found.chosen["fgr"].values["penalty.epsilon"]
            again = accuracies([epsilon], FIRST, arguments.fresh, folder / f"chosen-{k}")
            (name,) = (name for name in again if name != "none")
            grid = accuracies(GRID, 100 * k, SEEDS, folder / f"grid-{k}")
            validated = {one: float(np.mean([r.validation for r in records])) for one, records in grid.items() if one != "none"}
            rows.append(
                {
                    "search": k,
                    "epsilon": epsilon,
                    "runs": sum(len(one.scores) for one in found.findings),
                    "worth": 100 * float(np.mean([record.test for record in again[name]])),
                    "grid": max(validated, key=lambda one: validated[one]),
                }
            )
    results = {
        "command": command(),
        "environment": environment(("optuna",)),
        "plain": means["none"],
        "oracle": oracle,
        "means": means,
        "grid_runs": len(GRID) * SEEDS,
        "rows": rows,
    }
    report(results, table(results), arguments.out)
    return 0


def table(results: dict[str, Any]) -> str:
    """The table, in Markdown."""
    means, oracle = results["means"], results["oracle"]
    rows = [
        (
            str(row["search"]),
            f"{row['epsilon']:.3g}",
            f"{row['worth']:.2f}",
            f"{row['worth'] - means[oracle]:+.2f}",
            str(row["runs"]),
            f"{float(row['grid']):.3g}",
            f"{means[row['grid']] - means[oracle]:+.2f}",
            str(results["grid_runs"]),
        )
        for row in results["rows"]
    ]
    header = ("search", "γ = ε found", "its worth, %", "below the oracle", "runs", "the grid's choice", "below the oracle", "runs")
    note = f"Plain training: {results['plain']:.2f} %. The oracle, γ = ε = {float(oracle):.3g}: {means[oracle]:.2f} %."
    return "\n".join([markdown(header, rows), note, signature(results, "optuna")]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
