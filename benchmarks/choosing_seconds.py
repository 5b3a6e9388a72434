"""Time of an optimizer step of every variant of a recipe, in units of plain training's.

    python benchmarks/choosing_seconds.py digits-cost --rounds 60
    python benchmarks/choosing_seconds.py mnist-cost --rounds 10 --root DATA --clock wall

A round trains every variant for an epoch (whose steps are a multiple of every period in the recipe), in a random order, in one process on
one thread; what is reported is the median over the rounds of the ratio to plain training in the same round, with the quartiles. ``--clock
processor`` counts processor time, for machines on which others work too; "wall" is for idle ones.
"""

from __future__ import annotations

import argparse
from functools import partial

import numpy as np

import choosing
from gradreg.train import recipe as recipes
from gradreg.train.devices import Devices
from gradreg.train.loop import Run
from gradreg.train.recipe import configuration
from rounds import CLOCKS, interleaved, ratio_quartiles

PLAIN = "none"


def seconds_of_an_epoch(run: Run, clock: str) -> float:
    """Train ``run`` for an epoch, without evaluation."""
    now = CLOCKS[clock]
    started = now()
    run.train_batches(None, None)
    took = now() - started
    progress = run.state.progress
    progress.epoch, progress.batch, progress.losses = progress.epoch + 1, 0, []
    return took


def measure(task: str, rounds: int, root: str | None, clock: str) -> dict[str, dict[str, float]]:
    """Variant -> the quartiles of its ratio to plain training, and plain training's own milliseconds a step."""
    recipe = recipes.load(task)
    # Every epoch at the learning rate of the first: the time does not depend on it, and a schedule would end with the recipe's epochs.
    base = recipes.merge(choosing.base_of(recipe, root), {"schedule": {"name": "constant"}, "device": "cpu"})
    runs: dict[str, Run] = {}
    for name in recipe.variants:
        config = configuration(recipe.settings(name, base=base))
        runs[name] = Run(config, Devices(config))
    candidates = {name: partial(seconds_of_an_epoch, run, clock) for name, run in runs.items()}
    interleaved(candidates, range(1))  # allocates
    times = interleaved(candidates, range(rounds))
    found: dict[str, dict[str, float]] = {}
    for name, own in times.items():
        low, middle, high = ratio_quartiles(own, times[PLAIN])
        milliseconds = 1000 * float(np.median(own)) / runs[name].steps_per_epoch
        found[name] = {"ratio": middle, "low": low, "high": high, "milliseconds": milliseconds}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", help="a recipe with the variant none")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--root", help="folder of the data sets")
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="processor")
    options = parser.parse_args()
    found = measure(options.task, options.rounds, options.root, options.clock)
    content = {"task": options.task, "clock": options.clock, "rounds": options.rounds, "variants": found}
    choosing.store(f"seconds-{options.task}", content)
    for name, row in found.items():
        print(f"{name:26} {row['ratio']:.2f} [{row['low']:.2f}, {row['high']:.2f}]  {row['milliseconds']:.2f} ms a step")


if __name__ == "__main__":
    main()
