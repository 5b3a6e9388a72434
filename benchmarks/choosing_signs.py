"""How a radius that is too large shows in ``.metrics`` while training: the cosine of the two gradients, the first pass's loss, its norm.

    python benchmarks/choosing_signs.py              # the task and radii of ``choosing_radius.py digits-cost``, one seed, and the figure
    python benchmarks/choosing_signs.py --figure     # only the figure of stored results

The cosine costs two more copies of the gradients, so it is measured here and not in the runs of the curves.
"""

from __future__ import annotations

import argparse
import json
import math
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

import choosing
from choosing_radius import SYMBOLS, jobs
from gradreg import files
from gradreg.train.configuration import Config
from gradreg.train.devices import Devices
from gradreg.train.loop import Run
from gradreg.train.task import RecipeVariant

TASK, CLASSES = "digits-cost", 10
WATCHED = ("cosine", "gradient_norm")


def watch(config: Config) -> dict[str, Any]:
    """Train; the means of every epoch, and the accuracy that the run ends with."""
    run = Run(config, Devices(config))
    run.state.regularizer.measure_cosine = True
    seen: dict[str, list[list[float]]] = {name: [] for name in WATCHED}

    def on_step(*_: object) -> None:
        metrics = run.state.regularizer.metrics
        for name in WATCHED:
            seen[name][-1].append(metrics[name])

    for _ in range(config.epochs):
        for name in WATCHED:
            seen[name].append([])
        run.train_epoch(None, on_step)
        if not run.state.progress.history[-1].finite:
            break
    history = run.state.progress.history
    means = {name: [_finite(np.mean(epoch)) for epoch in epochs] for name, epochs in seen.items()}
    return {**means, "train_loss": [_finite(e.train_loss) for e in history], "test_accuracy": history[-1].test_accuracy}


def _finite(value: Any) -> float | None:
    return round(float(value), 5) if math.isfinite(value) else None


def draw(found: list[dict[str, Any]]) -> None:
    """A column a method: cosine above, the first pass's loss below, over the epochs, coloured by radius."""
    methods = list(dict.fromkeys(r["method"] for r in found))
    figure = Figure(figsize=(12, 6.4), layout="constrained")
    axes = figure.subplots(2, len(methods), sharex=True, sharey="row")
    for column, method in enumerate(methods):
        own = [r for r in found if r["method"] == method]
        for colour, r in zip(mpl.colormaps["viridis"](np.linspace(0, 0.92, len(own))), own, strict=True):
            label = f"{r['radius']:g}: {100 * r['test_accuracy']:.1f} %"
            for axis, name in zip(axes[:, column], ("cosine", "train_loss"), strict=True):
                values = [math.nan if v is None else v for v in r[name]]
                axis.plot(range(1, len(values) + 1), values, color=colour, label=label, linewidth=1.2)
        axes[0, column].set_title(SYMBOLS[method], fontsize=10)
        axes[0, column].axhline(0, color="black", linewidth=0.6)
        axes[1, column].axhline(math.log(CLASSES), color="grey", linestyle="--", linewidth=1)
        axes[1, column].set(xlabel="epoch", ylim=(0.8, 2.5))
        axes[1, column].legend(
            fontsize=7, title="radius: test accuracy", title_fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.2)
        )
        for axis in axes[:, column]:
            axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("cosine of the two gradients")
    axes[1, 0].set_ylabel("first pass's loss (dashed: guessing)")
    choosing.save(figure, "choosing-signs", dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figure", action="store_true", help="only draw what is stored")
    options = parser.parse_args()
    if not options.figure:
        found: list[dict[str, Any]] = []
        for method, radius, job in jobs(TASK, 1, None):
            if radius is not None:
                assert isinstance(job.variant, RecipeVariant)
                found.append({"method": method, "radius": radius, **watch(job.variant.config)})
                print(method, radius, found[-1]["test_accuracy"], flush=True)
        content = json.dumps({"task": TASK, "runs": found})  # on one line: thousands of numbers
        files.write_text(choosing.RESULTS / "signs.json", content + "\n")
    draw(choosing.stored("signs")["runs"])


if __name__ == "__main__":
    main()
