"""How much of F-GR's gain over plain training each variant of a recipe keeps, and what it costs.

    python benchmarks/choosing_cost.py digits-cost --seeds 10                         # runs, results and figure
    python benchmarks/choosing_cost.py mnist-cost --seeds 5 --root DATA
    python benchmarks/choosing_cost.py digits-cost --figure                           # only the figure and table of stored results

Every variant is trained on every seed as the recipe says, and plain training also for as many gradient evaluations as F-GR spends
(``gradreg compare`` does this for every total; here one is enough). The gain kept is (variant - plain) / (F-GR - plain), a ratio of mean
test accuracies whose differences are paired by seed; its 95 % interval comes from drawing seeds with replacement (bootstrap, percentiles)
and is left out where there are fewer than three.
What is complete under ``--runs`` is not run again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from scipy import stats

import choosing
import tables
from gradreg.study.plan import Job, make_plan
from gradreg.study.statistics import deviation, paired_difference
from gradreg.train import recipe as recipes
from gradreg.train.run_folder import RunFolder
from gradreg.train.task import RecipeTask

PLAIN, REFERENCE, LONGER = "none", "fgr", "none, as many gradients as fgr"
RESAMPLES = 10_000


def jobs(task: str, seeds: int, root: str | None) -> dict[str, list[Job]]:
    """Name -> the runs of that name, one a seed."""
    recipe = recipes.load(task)
    plan = make_plan(RecipeTask(recipe, choosing.base_of(recipe, root)), seeds=seeds)
    planned, longer = plan.jobs({}), plan.longer({})[REFERENCE].evaluations
    found: dict[str, list[Job]] = {name: [j for j in planned if (j.name, j.budget) == (name, "epochs")] for name in plan.variants}
    found[LONGER] = [j for j in planned if (j.budget, j.evaluations) == ("gradients", longer)]
    return found


def measure(task: str, seeds: int, root: str | None, runs: Path, workers: int) -> dict[str, Any]:
    """Run what is missing, seed after seed; the content of the task's results."""
    wanted = jobs(task, seeds, root)
    choosing.run_missing((job for group in zip(*wanted.values(), strict=True) for job in group), runs, workers)
    unit = wanted[PLAIN][0].evaluations
    variants: dict[str, Any] = {}
    for name, group in wanted.items():
        ended = [RunFolder(runs / job.folder).result() or {} for job in group]
        variants[name] = {
            "cost": float(np.mean([float(job.evaluations) for job in group])) / unit,
            "test_accuracies": [None if r["diverged"] else r["test_accuracy"] for r in ended],
        }
    return {"task": task, "seeds": [job.seed for job in wanted[PLAIN]], "variants": variants}


def gain_kept(variant: np.ndarray, plain: np.ndarray, reference: np.ndarray) -> str:
    """The ratio of the mean gains in percent, with its interval; one accuracy a seed, the seeds in the same order."""

    def ratio(v: np.ndarray, p: np.ndarray, r: np.ndarray, axis: int = -1) -> np.ndarray:
        return 100 * (v - p).mean(axis=axis) / (r - p).mean(axis=axis)

    kept = f"{ratio(variant, plain, reference):.0f}"
    if len(plain) < 3:
        return kept
    interval = stats.bootstrap(
        (variant, plain, reference), ratio, paired=True, n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    return f"{kept} [{interval.low:.0f}, {interval.high:.0f}]"


def table(found: dict[str, Any]) -> list[dict[str, Any]]:
    """A row a variant, the cheapest first: cost, accuracy, gain in points with its paired interval, and gain kept where F-GR gains."""
    accuracies = {
        name: {s: 100 * a for s, a in zip(found["seeds"], v["test_accuracies"], strict=True) if a is not None}
        for name, v in found["variants"].items()
    }
    gain = paired_difference(accuracies[REFERENCE], accuracies[PLAIN])
    gains = gain is not None and gain.mean > 0
    rows: list[dict[str, Any]] = []
    for name, own in accuracies.items():
        if not own:
            rows.append({"name": name, "cost": found["variants"][name]["cost"], "diverged": len(found["seeds"])})
            continue
        seeds = sorted(own)
        columns = [np.array([accuracies[n][s] for s in seeds]) for n in (name, PLAIN, REFERENCE)]
        rows.append(
            {
                "name": name,
                "cost": found["variants"][name]["cost"],
                "accuracy": float(columns[0].mean()),
                "deviation": deviation(list(columns[0])),
                "gain": None if name == PLAIN else paired_difference(own, accuracies[PLAIN]),
                "kept": gain_kept(*columns) if gains and name not in (PLAIN, REFERENCE) else "",
                "diverged": len(found["seeds"]) - len(own),
            }
        )
    return sorted(rows, key=lambda row: row["cost"])


HEADER = ("variant", "evaluations a step", "test accuracy, %", "over plain, points", "gain kept, %")


def cells(rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """The rows as those of a table with ``HEADER``."""
    lines: list[tuple[str, ...]] = []
    for row in rows:
        failed = f" ({row['diverged']} diverged)" if row["diverged"] else ""
        if "accuracy" not in row:
            lines.append((row["name"], f"{row['cost']:.2f}", "all diverged", "", ""))
            continue
        gain = "" if row["gain"] is None else f"{row['gain'].mean:+.2f} {row['gain']}"
        spread = "" if row["deviation"] is None else f" ± {row['deviation']:.2f}"
        lines.append((row["name"], f"{row['cost']:.2f}", f"{row['accuracy']:.2f}{spread}{failed}", gain, row["kept"]))
    return lines


def draw(task: str, rows: list[dict[str, Any]]) -> None:
    """Gain over plain training, with its interval where there is one: the cheapest variant at the top, coloured by cost."""
    shown = [row for row in rows if row.get("gain") is not None][::-1]
    reference = next(row["gain"].mean for row in shown if row["name"] == REFERENCE)
    figure = Figure(figsize=(8, 1.1 + 0.24 * len(shown)), layout="constrained")
    axis = figure.add_subplot()
    for place, row in enumerate(shown):
        gain, colour = row["gain"], mpl.colormaps["viridis_r"](0.2 + 0.7 * (row["cost"] - 1))
        axis.plot(gain.mean, place, "o", color=colour, markersize=5)
        if gain.low is not None:
            axis.plot([gain.low, gain.high], [place, place], color=colour, linewidth=2)
    for share, style in ((0.6, ":"), (0.95, "--")):
        axis.axvline(share * reference, color="grey", linestyle=style, linewidth=1, label=f"{100 * share:.0f} % of F-GR's gain")
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(shown)), [f"{row['name']}  ({row['cost']:.2f})" for row in shown], fontsize=8)
    axis.set(xlabel="test accuracy over plain, points, paired by seed", xlim=(-1.2 * reference, 1.8 * reference), title=task)
    figure.legend(fontsize=8, loc="outside lower center", ncols=2)
    axis.grid(alpha=0.3, axis="x")
    choosing.save(figure, f"choosing-cost-{task}")


def main() -> None:
    found = choosing.found_by_command("cost", __doc__, measure, task_help="a recipe with the variants none and fgr")
    rows = table(found)
    choosing.show(f"cost-{found['task']}", tables.markdown(HEADER, cells(rows)))
    if any(row.get("kept") for row in rows):
        draw(found["task"], rows)


if __name__ == "__main__":
    main()
