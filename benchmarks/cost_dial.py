"""How little a penalty may cost on a convolutional network: cheap settings of F-GR, tuned on one task and confirmed once on another.

    python benchmarks/cost_dial.py tune --seeds 2 --root DATA         # cifar10-cost, seeds from 500 on
    python benchmarks/cost_dial.py radius --seeds 2 --root DATA       # full F-GR on the other task, seeds from 500 on
    python benchmarks/cost_dial.py confirm --seeds 10 --root DATA     # what was chosen, there, seeds from 1000 on, all test images
    python benchmarks/cost_dial.py digits --seeds 10                  # and on the perceptrons of digits-cost and mnist-cost
    python benchmarks/cost_dial.py mnist --seeds 10 --root DATA
    python benchmarks/cost_dial.py confirm --table                    # only what is stored

A setting is a multiple of full F-GR's radius, the part of the batch that the direction comes from, how often the penalty acts, and the last
part of training in which it does. The other task is ``mnist-cost`` with the network of ``cifar10-cost``, 16 x 16 pixels and all 10,000 test
images. Gain kept is (variant - plain) / (F-GR - plain), paired by seed, with a bootstrap interval over seeds. Stored under
benchmarks/results/choosing/ with every run's accuracy.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import choosing
import choosing_cost
from gradreg import study
from reporting import command, environment
from rounds import ratio_quartiles
from tables import markdown

TUNING, FIRST = 500, 1000
"""The first seed of what is tuned on, and of what is confirmed."""
SETTINGS: dict[str, dict[str, float]] = {
    "half-every-2": {"radius": 1.5, "ascent_fraction": 0.5, "every": 2},
    "tail-quarter": {"radius": 1.5, "tail": 0.25},
    "half-tail-half": {"radius": 1.5, "ascent_fraction": 0.5, "tail": 0.5},
    "half-every-10": {"radius": 2.0, "ascent_fraction": 0.5, "every": 10},
    "half-every-2-tail-fifth": {"radius": 1.5, "ascent_fraction": 0.5, "every": 2, "tail": 0.2},
    "half-tail-tenth": {"radius": 1.5, "ascent_fraction": 0.5, "tail": 0.1},
    "tenth-every-2": {"radius": 0.5, "ascent_fraction": 0.1, "every": 2},
}
"""Those that cost at most 1.25 evaluations a step, then those at most 1.05."""
CHOSEN = ("half-tail-half", "tenth-every-2")
"""The best of each kind on the tuning seeds."""
OTHER = {"model": {"name": "cnn_l2", "channels": [16], "hidden": 256}, "data.image_size": 16, "data.test_size": None}
TASKS: dict[str, tuple[str, dict[str, Any], float]] = {
    "tune": ("cifar10-cost", {}, 0.2),
    "radius": ("mnist-cost", OTHER, 0.2),
    "confirm": ("mnist-cost", OTHER, 0.2),
    "digits": ("digits-cost", {}, 0.5),
    "mnist": ("mnist-cost", {}, 0.5),
}
"""Recipe, changes to it, and full F-GR's ε = γ: the recipe's own; on the other task cifar10-cost's, as "radius" finds 0.1 to 0.5 alike."""
RADII = (0.1, 0.5, 1.0)


def penalty(radius: float, setting: dict[str, float]) -> dict[str, Any]:
    """F-GR with ``setting``, whose radius is in units of ``radius``, as a recipe has it."""
    epsilon = round(radius * setting.get("radius", 1.0), 6)
    return {"penalty": {"name": "fgr", "gamma": epsilon, "epsilon": epsilon, **{k: v for k, v in setting.items() if k != "radius"}}}


def variants(what: str) -> dict[str, Any]:
    """Name -> what is changed."""
    if what == "radius":
        return {"fgr": penalty(TASKS[what][2], {}), **{f"fgr-{radius:g}": penalty(radius, {}) for radius in RADII}}
    radius, names = TASKS[what][2], SETTINGS if what == "tune" else CHOSEN
    return {"fgr": penalty(radius, {}), **{name: penalty(radius, SETTINGS[name]) for name in names}}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run what is missing; the content of the results."""
    recipe, changes, _ = TASKS[options.what]
    first = TUNING if options.what in ("tune", "radius") else FIRST
    settings: dict[str, Any] = {"seed": first, "trackers": [], **changes}
    if options.root is not None:
        settings["data.root"] = options.root
    found = study.compare(
        recipe,
        penalties=variants(options.what),
        seeds=options.seeds,
        out=options.runs or Path("runs/cost-dial") / options.what,
        options=settings,
        rivals=["epochs"],
        workers=options.workers,
    )
    rows: dict[str, Any] = {}
    for record in sorted(found.records, key=lambda record: record.seed):
        row = rows.setdefault(record.variant, {"test_accuracies": [], "seconds": [], "evaluations": []})
        row["test_accuracies"].append(None if record.diverged else record.test)
        row["seconds"].append(record.seconds)
        row["evaluations"].append(record.gradient_evaluations)
    unit = sum(rows["none"]["evaluations"])
    return {
        "command": command(),
        "environment": environment(("torch",)),
        "seeds": list(range(first, first + options.seeds)),
        "variants": {name: {"cost": sum(row.pop("evaluations")) / unit, **row} for name, row in rows.items()},
    }


def table(found: dict[str, Any]) -> str:
    """The table of ``choosing_cost.py``, with the seconds of a run in units of plain training's of the same seed: median and quartiles."""
    variants, lines = found["variants"], list[tuple[str, ...]]()
    for name, cost, *rest in choosing_cost.cells(choosing_cost.table(found)):
        low, middle, high = ratio_quartiles(variants[name]["seconds"], variants["none"]["seconds"])
        lines.append((name, cost, f"{middle:.2f} [{low:.2f}, {high:.2f}]", *rest))
    name, cost, *rest = choosing_cost.HEADER
    return markdown((name, cost, "seconds, of plain's", *rest), lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=TASKS)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--root", help="folder of the data sets")
    parser.add_argument("--runs", type=Path, help="folder of the runs (runs/cost-dial/WHAT)")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--table", action="store_true", help="only print what is stored")
    options = parser.parse_args()
    name = f"dial-{options.what}"
    if not options.table:
        choosing.store(name, measure(options))
    choosing.show(name, table(choosing.stored(name)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
