"""What a study costs beside the training itself: its runs against the same functions in bare loops, by processor time.

    python benchmarks/study_overhead.py --rounds 5 --out benchmarks/results/study_overhead

Each round, in a random order and in one process: the runs in a bare loop (no folder, no log, no counting beyond the regularizer's own),
and a study of the same runs with ``workers=0`` in a new folder. Two parts of the study that do not grow with its runs are told apart: the
table, the page and the exports, written once, and what workers take to start, a process with its imports. Ratios are of the processor's
seconds of this process, because other programs may share the machine; wall seconds stand beside them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import gradreg
import tables
from gradreg import environment, study
from gradreg.study import comparison
from gradreg.study.executors.local import LocalExecutor
from gradreg.study.plan import make_plan
from gradreg.study.running import run_jobs
from gradreg.train import recipe as recipes
from gradreg.train.loop import train
from gradreg.train.task import RecipeTask
from rounds import interleaved, ratio_quartiles

SEEDS = 3
RECIPE = {"epochs": 20}


@study.task(metric="rmse", mode="min")
def regression(run: study.Run, *, epochs: int = 20, steps: int = 40) -> None:
    """A small network on noise: a run of about half a second."""
    generator = torch.Generator().manual_seed(run.seed)
    x = torch.randn(64 * steps, 32, generator=generator)
    y = x.sin().sum(1, keepdim=True)
    model = torch.nn.Sequential(torch.nn.Linear(32, 128), torch.nn.Tanh(), torch.nn.Linear(128, 1))
    regularizer = run.regularizer(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in run.epochs(epochs):
        loss = torch.zeros(())
        for rows in torch.arange(len(x)).split(64):
            optimizer.zero_grad()
            loss = regularizer.backward(lambda rows=rows: (model(x[rows]) - y[rows]).square().mean())
            optimizer.step()
        with torch.no_grad():
            run.log(loss=loss, test_rmse=(model(x) - y).square().mean().sqrt())


PENALTIES = {"none": None, "sam": gradreg.sam(rho=0.05)}


class Bare:
    """What the function receives in a bare loop."""

    def __init__(self, penalty: gradreg.GradientPenalty | None, seed: int) -> None:
        self.penalty, self.seed = penalty, seed

    def regularizer(self, model: torch.nn.Module) -> Any:
        return gradreg.torch.GradientRegularizer(model, self.penalty)

    def epochs(self, n: int) -> range:
        return range(n)

    def log(self, **metrics: Any) -> None:
        """The value is computed all the same."""
        self.logged = {name: float(value) for name, value in metrics.items()}


def bare_functions() -> None:
    for seed in range(SEEDS):
        for penalty in PENALTIES.values():
            torch.manual_seed(seed)
            regression.function(Bare(penalty, seed))  # type: ignore[arg-type]


def recipe_task() -> RecipeTask:
    recipe = recipes.load("digits-noisy-labels")
    return RecipeTask(recipe, {**recipe.base, **RECIPE})


def bare_recipes() -> None:
    plan = make_plan(recipe_task(), ["none", "sam"], seeds=SEEDS, rivals=["epochs"])
    for job in plan.jobs({}):
        train(job.variant.config.with_seed(job.seed))  # type: ignore[attr-defined]


def study_of(task: Any, penalties: Any) -> Callable[[], dict[str, float]]:
    """A function that runs a study and returns the processor's seconds of its end, after the last run."""

    def run() -> dict[str, float]:
        with tempfile.TemporaryDirectory() as folder, _timed_end() as spent:
            study.compare(task, penalties=penalties, seeds=SEEDS, rivals=["epochs"], workers=0, out=Path(folder) / "out")
        return spent

    return run


@contextlib.contextmanager
def _timed_end() -> Iterator[dict[str, float]]:
    """Adds the seconds of the table and of the page."""
    spent = {"processor": 0.0, "wall": 0.0}
    kept = comparison.results.rows, comparison.Comparison.report

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            before = time.process_time(), time.perf_counter()
            try:
                return function(*arguments, **keywords)
            finally:
                spent["processor"] += time.process_time() - before[0]
                spent["wall"] += time.perf_counter() - before[1]

        return call

    comparison.results.rows, comparison.Comparison.report = (counted(function) for function in kept)  # type: ignore[assignment,method-assign]
    try:
        yield spent
    finally:
        comparison.results.rows, comparison.Comparison.report = kept  # type: ignore[assignment,method-assign]


def timed(function: Callable[[], Any]) -> dict[str, Any]:
    before = time.process_time(), time.perf_counter()
    end = function()
    found = {"processor": time.process_time() - before[0], "wall": time.perf_counter() - before[1]}
    return {**found, "end": end or {"processor": 0.0, "wall": 0.0}}


def start_up() -> float:
    """Wall seconds until a worker has done a run that takes no time, of a function whose module imports torch."""
    plan = make_plan(
        regression.configured({"epochs": 1, "steps": 1}), {"none": None, "sam": gradreg.sam(rho=0.05)}, seeds=1, rivals=["epochs"]
    )
    jobs = plan.jobs({})
    with tempfile.TemporaryDirectory() as folder:
        before = time.perf_counter()
        with contextlib.closing(run_jobs(lambda: jobs, Path(folder), executor=LocalExecutor(workers=1))) as ended:
            next(ended)
            return time.perf_counter() - before


def measure(rounds: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    pairs = {
        "a function": (bare_functions, study_of(regression, PENALTIES)),
        "digits recipe": (bare_recipes, study_of(recipe_task(), ["none", "sam"])),
    }
    found: dict[str, Any] = {}
    for name, (bare, studied) in pairs.items():
        bare()  # imports
        studied()
        times = interleaved({"bare": lambda bare=bare: timed(bare), "study": lambda studied=studied: timed(studied)}, range(rounds))
        both: dict[str, Any] = {"runs": 2 * SEEDS}
        for clock in ("processor", "wall"):
            unit = [one[clock] for one in times["bare"]]
            own = [one[clock] - one["end"][clock] for one in times["study"]]
            low, middle, high = ratio_quartiles(own, unit)
            both[clock] = {
                "bare": float(np.median(unit)),
                "ratio": middle,
                "ratio_quartiles": [low, high],
                "end": float(np.median([one["end"][clock] for one in times["study"]])),
            }
        found[name] = both
    return {"rounds": rounds, "studies": found, "worker_start_up": float(np.median([start_up() for _ in range(3)]))}


def table(found: dict[str, Any]) -> str:
    header = ("study", "runs", "bare, s", "study ÷ bare, processor", "study ÷ bare, wall", "table and page, once, s")
    rows = [
        (
            name,
            str(one["runs"]),
            f"{one['processor']['bare']:.1f}",
            tables.with_quartiles(one["processor"], 3),
            tables.with_quartiles(one["wall"], 3),
            f"{one['processor']['end']:.2f}",
        )
        for name, one in found["studies"].items()
    ]
    return tables.markdown(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="where the results go, without a suffix")
    arguments = parser.parse_args()
    found = measure(arguments.rounds)
    machine = environment.describe()
    last = (
        f"Medians (quartiles) of {found['rounds']} rounds; a worker's process with its imports starts in {found['worker_start_up']:.1f} s. "
        f"{machine.get('processor', '')}, 1 thread. `python benchmarks/study_overhead.py --rounds {found['rounds']}`"
    )
    print(table(found), last, sep="\n\n")
    if arguments.out is not None:
        arguments.out.with_suffix(".json").write_text(json.dumps({**found, "environment": machine}, indent=2) + "\n")
        arguments.out.with_suffix(".md").write_text(f"{table(found)}\n\n{last}\n")


if __name__ == "__main__":
    main()
