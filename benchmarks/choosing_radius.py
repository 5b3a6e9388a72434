"""Test accuracy against the radius of SAM, GNP, F-GR and ASAM, up to where they collapse.

    python benchmarks/choosing_radius.py digits-cost --seeds 5                        # runs, results and figure
    python benchmarks/choosing_radius.py mnist-cost --seeds 2 --root DATA
    python benchmarks/choosing_radius.py digits-cost --figure                         # only the figure of stored results

The task is a recipe's, without its variants. The seeds begin at 100: a strength chosen here is chosen on other splits, other wrong labels
and other initial weights than those on which ``choosing_cost.py`` compares. What is complete under ``--runs`` is not run again.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

import choosing
import tables
from gradreg.study.plan import Job
from gradreg.train import recipe as recipes
from gradreg.train.recipe import configuration
from gradreg.train.run_folder import RunFolder
from gradreg.train.task import RecipeVariant, gradient_evaluations

FIRST_SEED = 100
CHANCE = 15.0
"""Mean accuracy in percent below which a network of ten classes is said to guess."""
PLAIN = "plain"
METHODS: dict[str, Callable[[float], dict[str, Any]]] = {
    "sam": lambda radius: {"name": "sam", "rho": radius},
    "gnp": lambda radius: {"name": "gnp", "r": radius, "alpha": 0.8},
    "fgr": lambda radius: {"name": "fgr", "gamma": radius, "epsilon": radius},
    "asam": lambda radius: {"name": "asam", "rho": radius},
}
SYMBOLS = {"sam": "SAM: ρ", "gnp": "GNP: r (α = 0.8)", "fgr": "F-GR: ε = γ", "asam": "ASAM: ρ (η = 0.01)"}
FINE = {
    "sam": (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0),
    "gnp": (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 2.0),
    "fgr": (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 4.0, 8.0),
    "asam": (0.1, 0.2, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0),
}
COARSE = {
    "sam": (0.05, 0.1, 0.2, 0.5, 1.0),
    "gnp": (0.1, 0.2, 0.5, 1.0, 2.0),
    "fgr": (0.1, 0.5, 1.0, 2.0, 5.0),
    "asam": (0.5, 1.0, 2.0, 4.0, 8.0),
}
SMALLER = {**COARSE, "fgr": (0.1, 0.2, 0.5, 1.0, 2.0, 5.0), "asam": (0.1, 0.2, 0.5, 1.0, 2.0, 4.0, 8.0)}
RADII = {"digits-cost": FINE, "mnist-cost": COARSE, "cifar10-cost": SMALLER}


def jobs(task: str, seeds: int, root: str | None) -> list[tuple[str, float | None, Job]]:
    """The runs of a task: method, radius and job, seed after seed."""
    base = choosing.base_of(recipes.load(task), root)
    points = [(PLAIN, None), *((method, radius) for method, radii in RADII[task].items() for radius in radii)]
    found: list[tuple[str, float | None, Job]] = []
    for seed in range(FIRST_SEED, FIRST_SEED + seeds):
        for method, radius in points:
            penalty = None if radius is None else METHODS[method](radius)
            config = configuration({**base, "penalty": penalty, "seed": seed})
            name = method if radius is None else f"{method}-{radius:g}"
            found.append((method, radius, Job(name, seed, "epochs", gradient_evaluations(config), RecipeVariant(config))))
    return found


def measure(task: str, seeds: int, root: str | None, runs: Path, workers: int) -> dict[str, Any]:
    """Run what is missing; the content of the task's results."""
    wanted = jobs(task, seeds, root)
    choosing.run_missing((job for _, _, job in wanted), runs, workers)
    records: list[dict[str, Any]] = []
    for method, radius, job in wanted:
        result = RunFolder(runs / job.folder).result() or {}
        records.append({"method": method, "radius": radius, "seed": job.seed, **{k: result[k] for k in ("test_accuracy", "diverged")}})
    return {"task": task, "runs": records}


def summary(found: dict[str, Any]) -> dict[str, list[tuple[float | None, float, float, int]]]:
    """method -> (radius, mean accuracy in %, standard deviation, runs that diverged and are left out), by radius."""
    table: dict[str, list[tuple[float | None, float, float, int]]] = {}
    points = dict.fromkeys((r["method"], r["radius"]) for r in found["runs"])
    for method, radius in points:
        group = [r for r in found["runs"] if (r["method"], r["radius"]) == (method, radius)]
        values = [100 * r["test_accuracy"] for r in group if not r["diverged"]]
        mean, deviation = (float(np.mean(values)), float(np.std(values, ddof=1))) if len(values) > 1 else (float("nan"), float("nan"))
        table.setdefault(method, []).append((radius, mean, deviation, len(group) - len(values)))
    return table


def draw(task: str, found: dict[str, Any]) -> None:
    """A column a method, each over its radius: all accuracies above, those near plain training's (a band of mean ± sd) below."""
    table = summary(found)
    (_, plain, deviation, _) = table.pop(PLAIN)[0]
    best = max(mean for points in table.values() for _, mean, _, _ in points)
    figure = Figure(figsize=(11, 5.6), layout="constrained")
    axes = figure.subplots(2, len(table), sharex="col", sharey="row")
    for column, (method, points) in enumerate(table.items()):
        own = [r for r in found["runs"] if r["method"] == method and not r["diverged"]]
        for axis in axes[:, column]:
            axis.axhspan(plain - deviation, plain + deviation, color="grey", alpha=0.25, linewidth=0)
            axis.axhline(plain, color="grey", linestyle="--", linewidth=1, label="plain, mean ± sd")
            axis.plot(
                [r["radius"] for r in own], [100 * r["test_accuracy"] for r in own], ".", color="#0072B2", alpha=0.4, label="each run"
            )
            axis.plot([p[0] for p in points], [p[1] for p in points], "-o", color="#0072B2", markersize=4, label="mean over seeds")
            axis.set(xscale="log")
            axis.set_xticks([p[0] for p in points], [f"{p[0]:g}" for p in points], fontsize=8)
            axis.set_xticks([], minor=True)
            axis.grid(alpha=0.3)
        axes[1, column].set_xlabel(SYMBOLS[method])
    for axis in axes[:, 0]:
        axis.set_ylabel("test accuracy, %")
    margin = best - plain
    axes[1, 0].set_ylim(plain - 1.5 * margin, best + margin)
    axes[0, 0].legend(fontsize=8, loc="lower left")
    figure.suptitle(task, fontsize=10)
    choosing.save(figure, f"choosing-radius-{task}")


def table(found: dict[str, Any]) -> str:
    """A row for each method: its best radius, and from where on it loses."""
    points = summary(found)
    (_, plain, spread, _) = points.pop(PLAIN)[0]
    rows: list[tuple[str, ...]] = []
    for method, own in points.items():
        best, mean, deviation, _ = max(own, key=lambda point: -np.inf if np.isnan(point[1]) else point[1])
        below = [f"{radius:g} ({m:.2f} ± {s:.2f})" for radius, m, s, _ in own if radius > best and not m >= plain]
        chance = [f"{radius:g}" for radius, m, _, _ in own if radius > best and not m >= CHANCE]
        largest = f"beyond {own[-1][0]:g}"
        gain = f"{mean:.2f} ± {deviation:.2f}"
        rows.append((SYMBOLS[method], f"{best:g}", gain, below[0] if below else largest, chance[0] if chance else largest))
    header = ("method", "best radius", "test accuracy, %", f"below plain ({plain:.2f} ± {spread:.2f}) at", "at chance at")
    return tables.markdown(header, rows)


def main() -> None:
    found = choosing.found_by_command("radius", __doc__, measure, tasks=tuple(RADII), task_help="a recipe, whose variants are not used")
    choosing.show(f"radius-{found['task']}", table(found))
    draw(found["task"], found)


if __name__ == "__main__":
    main()
