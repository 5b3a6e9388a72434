"""Does a search flatter what it chooses? 1,000 made-up searches whose truth is known, through the searcher that ``gradreg tune`` uses.

    python benchmarks/search_statistics.py --out benchmarks/results/search_statistics     # about half an hour of one core

A run's metric is what all runs of a seed share, plus its own noise (both of standard deviation 1), plus what its values are worth: nothing,
or a parabola in ln(lr), or in ln(rho) too. Validation and test have noise of their own beside. Trials race and are dropped, and the
winners are compared with five fresh seeds by ``compare_paired``, as ``gradreg tune`` does it.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from gradreg.study.executors.local import LocalExecutor
from gradreg.study.search import winner
from gradreg.study.search_space import arms
from gradreg.study.searcher import Searcher, open_storage
from gradreg.study.tasks import Metric, OnProgress, Task, Variant
from gradreg.study.tuning import plan_search
from gradreg.study.verdicts import compare_paired
from reporting import command, environment, report, signature
from tables import markdown

METRIC = Metric("score")
TRIALS, SEEDS, FRESH = 20, 3, 5


@dataclass(frozen=True)
class World:
    """What values are worth.

    Args:
        label: for the table.
        search: options that are searched beside the strength.
        by_lr: the loss at a factor e of lr from its best.
        gain: of the penalty at its best strength.
        by_rho: the loss at a factor e of rho from its best.
    """

    label: str
    search: Mapping[str, str]
    by_lr: float = 0.0
    gain: float = 0.0
    by_rho: float = 0.0


WORLDS = (
    World("no effect of anything", {}),
    World("no effect of anything, lr searched too", {"lr": "log:0.001:1"}),
    World("lr matters, the penalty does not", {"lr": "log:0.001:1"}, by_lr=0.3),
    World("a gain of 2 at the best strength", {}, gain=2.0, by_rho=0.5),
    World("a gain of 2, and lr matters", {"lr": "log:0.001:1"}, by_lr=0.3, gain=2.0, by_rho=0.5),
)


@dataclass(frozen=True, eq=False)
class MadeUp(Variant):
    """A variant whose runs are drawn, not trained."""

    world: World
    study: int
    rho: float | None
    lr: float

    @property
    def method(self) -> str:
        return f"rho={self.rho}, lr={self.lr}"

    @property
    def is_plain(self) -> bool:
        return self.rho is None

    @property
    def settings(self) -> Mapping[str, Any]:  # type: ignore[override]  # not worth keeping
        return {}

    @property
    def seed(self) -> int:
        return 100 * self.study  # every search proposes other values

    @property
    def worth(self) -> float:
        """The mean of its metric."""
        of_lr = self.world.by_lr * math.log(self.lr / 0.05) ** 2
        of_rho = 0.0 if self.rho is None else self.world.gain - self.world.by_rho * math.log(self.rho / 0.1) ** 2
        return of_rho - of_lr

    def result(self, folder: Path, seed: int, stretch: Fraction) -> dict[str, Any] | None:
        return None

    def run(self, folder: Path, seed: int, stretch: Fraction, on_progress: OnProgress) -> dict[str, Any]:
        return self.drawn(seed)

    def drawn(self, seed: int) -> dict[str, Any]:
        """The result of a run."""
        shared = np.random.default_rng((self.study, seed)).standard_normal()
        own = np.random.default_rng((self.study, seed, *_bits(self.rho or 0.0), *_bits(self.lr))).standard_normal(3)
        value = self.worth + shared + own[0]
        return {
            "test_score": value + 0.3 * own[1],
            "validation_score": value + 0.3 * own[2],
            "gradient_evaluations": 1,
            "seconds": 0.0,
            "diverged": False,
        }


class MadeUpTask(Task):
    """A made-up search's task."""

    metric = METRIC
    description = ""

    def __init__(self, world: World, study: int) -> None:
        self.world, self.study, self.name = world, study, f"{world.label} {study}"

    def configured(self, options: Mapping[str, Any]) -> Task:
        return self

    def variant(self, penalty: Any, options: Mapping[str, Any]) -> Variant:
        return MadeUp(self.world, self.study, None if penalty is None else penalty["rho"], options.get("lr", 0.05))


def simulate(world: World, searches: int, folder: Path) -> dict[str, Any]:
    """The searches of one world."""
    helps = harms = runs = 0
    flattered, regret = [], []
    for study in range(searches):
        task = MadeUpTask(world, study)
        search = plan_search(task, arms(task, ["sam"], world.search), trials=TRIALS, seeds=SEEDS, confirm=FRESH)
        searcher = Searcher(search, folder, open_storage("memory", folder))
        searcher.run(executor=LocalExecutor(0))
        findings = searcher.findings()
        runs += sum(len(one.scores) for one in findings)
        chosen = {}
        for arm in search.arms:
            best = winner(findings, arm, METRIC) if arm.space else None
            chosen[arm.name] = arm.variant(task, {} if best is None else best.values)
            if best is not None and arm.name != "none":
                flattered.append((best.mean or 0.0) - chosen[arm.name].worth)
                regret.append(world.gain - chosen[arm.name].worth)
        values = {name: {seed: one.drawn(seed)["test_score"] for seed in search.fresh} for name, one in chosen.items()}
        verdict = compare_paired(values["none"], {"sam": values["sam"]}, mode="max")["sam"]
        helps += verdict.decision == "helps"
        harms += verdict.decision == "harms"
    return {
        "world": world.label,
        "helps": helps / searches,
        "harms": harms / searches,
        "flattered": float(np.mean(flattered)),
        "regret": float(np.mean(regret)),
        "runs": runs / searches,
    }


def table(results: dict[str, Any]) -> str:
    """The table, in Markdown."""
    header = ("world", 'confirmed "helps", %', '"harms", %', "best score on validation over its worth", "lost to the best strength", "runs")
    rows = [
        (
            row["world"],
            f"{100 * row['helps']:.1f}",
            f"{100 * row['harms']:.1f}",
            f"{row['flattered']:+.2f}",
            f"{row['regret']:.2f}",
            f"{row['runs']:.0f}",
        )
        for row in results["rows"]
    ]
    note = f"{results['searches']:,} searches each, of {TRIALS} trials a side and {SEEDS} seeds at most; {FRESH} fresh seeds."
    return "\n".join([markdown(header, rows), note, signature(results, "numpy", "scipy", "optuna")]) + "\n"


def _bits(value: float) -> tuple[int, int]:
    bits = int(np.float64(value).view(np.uint64))
    return bits >> 32, bits & 0xFFFFFFFF


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--searches", type=int, default=1_000, help="made-up searches of each kind (default: 1000)")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for world in WORLDS:
            start = time.perf_counter()
            rows.append(simulate(world, arguments.searches, Path(folder)))
            print(f"{world.label}: {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
    made = environment(("numpy", "scipy", "optuna"))
    results = {"command": command(), "environment": made, "searches": arguments.searches, "rows": rows}
    report(results, table(results), arguments.out)
    false = [row for row in rows if row["regret"] == 0.0 and row["helps"] > 0.05]
    for row in false:
        print(f"{row['world']}: false helps in {row['helps']:.1%}", file=sys.stderr)
    return 1 if false else 0


if __name__ == "__main__":
    warnings.simplefilter("error")
    sys.exit(main())
