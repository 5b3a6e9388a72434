"""Does ``gradreg tune`` find what an exhaustive grid finds, in a quarter of its runs? On digits with wrong labels, on both sides.

    python benchmarks/search_digits.py --out benchmarks/results/search_digits     # half an hour of two cores

What is searched: F-GR's strength, γ = ε log-uniform from 0.01 to 1; and plain training's learning rate, log-uniform from 0.005 to 0.5. The
grid is 24 values of each. What each is worth is its mean test accuracy over seeds that no search has; the best of these is an oracle, which
sees the test images. A search has seeds of its own, selects by 200 noisy validation images, and is repeated with others. Beside it stands
the grid's own choice, by the same validation images, with as many seeds as a complete trial has.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import gradreg
from gradreg import study
from gradreg.study.results import Record
from gradreg.study.statistics import paired_difference
from reporting import command, environment, report, signature
from tables import markdown

RECIPE = "digits-noisy-labels"
TRIALS, SEEDS, FIRST = 6, 3, 1000
POINTS = 24
CHANCE = 0.1
"""The accuracy of a guess among ten classes."""


@dataclass(frozen=True)
class Side:
    """What is searched of one side.

    Args:
        title: as in the table.
        arm: the side's name in the search.
        key: of its trials' values.
        low, high: the ends of the range.
        search: the arguments of ``study.tune``.
    """

    title: str
    arm: str
    key: str
    low: float
    high: float
    search: Mapping[str, Any]

    @property
    def grid(self) -> list[float]:
        return [float(f"{value:.6g}") for value in np.geomspace(self.low, self.high, POINTS)]

    def variant(self, value: float) -> Any:
        if self.key == "penalty.epsilon":
            return gradreg.fgr(gamma=value, epsilon=value)
        return {"penalty": None, self.key: value}


SIDES = (
    Side("F-GR, γ = ε", "fgr", "penalty.epsilon", 0.01, 1.0, {"penalty": "fgr"}),
    Side(
        "plain, lr",
        "none",
        "optimizer.lr",
        0.005,
        0.5,
        {"penalty": "fgr:gamma=0.5,epsilon=0.5", "search": {"optimizer.lr": "log:0.005:0.5"}},
    ),
)


def options(seed: int) -> dict[str, Any]:
    return {"seed": seed, "data.validation": 200, "trackers": []}


def accuracies(side: Side, values: Sequence[float], seed: int, seeds: int, folder: Path) -> dict[float, list[Record]]:
    """Value -> its records; at 0 those of plain training as the recipe has it."""
    named = {f"{value:.6g}": value for value in values}
    penalties = {"none": None, **{name: side.variant(value) for name, value in named.items()}}
    found = study.compare(RECIPE, penalties=penalties, seeds=seeds, out=folder, options=options(seed), rivals=["epochs"])
    return {named.get(name, 0.0): [record for record in found.records if record.variant == name] for name in found.plan.variants}


def percent(records: Sequence[Record], kind: str) -> list[float]:
    """Of each record; a run that diverged counts as chance."""
    found = [getattr(record, kind) for record in records]
    return [100 * (CHANCE if one is None else float(one)) for one in found]


def measure(side: Side, folder: Path, searches: int, fresh: int) -> dict[str, Any]:
    """The grid's worth, and every search's choice beside the grid's own."""
    worth = {value: percent(records, "test") for value, records in accuracies(side, side.grid, FIRST, fresh, folder / "worth").items()}
    plain = worth.pop(0.0)
    oracle = max(worth, key=lambda value: float(np.mean(worth[value])))
    rows: list[dict[str, Any]] = []
    for k in range(searches):
        tuned = study.tune(
            RECIPE, trials=TRIALS, seeds=SEEDS, confirm=2, out=folder / f"search-{k}", options=options(100 * k), **side.search
        )
        value = float(f"{tuned.chosen[side.arm].values[side.key]:.6g}")
        chosen = percent(accuracies(side, [value], FIRST, fresh, folder / f"chosen-{k}")[value], "test")
        grid = accuracies(side, side.grid, 100 * k, SEEDS, folder / f"grid-{k}")
        validated = {one: float(np.mean(percent(records, "validation"))) for one, records in grid.items() if one}
        rows.append(
            {
                "search": k,
                "value": value,
                "runs": sum(len(one.scores) for one in tuned.findings if one.arm == side.arm),
                "worth": chosen,
                "grid": max(validated, key=lambda one: validated[one]),
            }
        )
    return {
        "title": side.title,
        "plain": plain,
        "oracle": oracle,
        "worth": {f"{value:g}": ours for value, ours in worth.items()},
        "grid_runs": POINTS * SEEDS,
        "searches": rows,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--searches", type=int, default=5, help="searches, each with seeds of its own (default: 5)")
    parser.add_argument("--fresh", type=int, default=10, help="seeds that tell what a value is worth (default: 10)")
    parser.add_argument("--folder", type=Path, help="where the runs go, and are found again (default: a temporary one)")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        sides = [measure(side, folder / side.arm, arguments.searches, arguments.fresh) for side in SIDES]
    results = {"command": command(), "environment": environment(("optuna",)), "sides": sides}
    report(results, table(results), arguments.out)
    return 0


def against(ours: Sequence[float], oracle: Sequence[float]) -> str:
    """The difference with its interval, seed by seed."""
    found = paired_difference(dict(enumerate(ours)), dict(enumerate(oracle)))
    assert found is not None
    return f"{found.mean:+.2f}" if found.low is None else f"{found.mean:+.2f} [{found.low:+.2f}, {found.high:+.2f}]"


def table(results: dict[str, Any]) -> str:
    """The table, in Markdown: what every search found, and how far its worth lies from the oracle's."""
    rows: list[tuple[str, ...]] = []
    notes: list[str] = []
    for side in results["sides"]:
        worth = side["worth"]
        oracle = worth[f"{side['oracle']:g}"]
        below: list[float] = []
        chosen: list[float] = []
        for row in side["searches"]:
            ours, grids = row["worth"], worth[f"{row['grid']:g}"]
            below.append(float(np.mean(ours) - np.mean(oracle)))
            chosen.append(float(np.mean(grids) - np.mean(oracle)))
            rows.append(
                (
                    side["title"],
                    str(row["search"]),
                    f"{row['value']:.3g}",
                    f"{np.mean(ours):.2f}",
                    against(ours, oracle),
                    str(row["runs"]),
                    f"{row['grid']:.3g}",
                    f"{chosen[-1]:+.2f}",
                    str(side["grid_runs"]),
                )
            )
        runs = float(np.mean([row["runs"] for row in side["searches"]]))
        notes.append(
            f"- {side['title']}: the oracle, {side['oracle']:.3g}, {np.mean(oracle):.2f} %; plain training as the recipe has it "
            f"{np.mean(side['plain']):.2f} %. The searches lie {np.mean(below):+.2f} from the oracle in the mean, "
            f"{sum(one >= -0.3 for one in below)} of {len(below)} within 0.3, at {100 * runs / side['grid_runs']:.0f} % of the grid's "
            f"runs; the grid's own choices {np.mean(chosen):+.2f}, {sum(one >= -0.3 for one in chosen)} of {len(chosen)} within 0.3."
        )
    header = (
        "searched",
        "search",
        "found",
        "its worth, %",
        "against the oracle",
        "runs",
        "the grid's choice",
        "against the oracle",
        "runs",
    )
    return "\n".join([markdown(header, rows), "", *notes, "", signature(results, "optuna")]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
