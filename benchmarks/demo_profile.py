"""Where the processor's time of ``gradreg compare`` goes on small networks: the demo's 30 runs against the same runs in bare loops.

    python benchmarks/demo_profile.py --rounds 3 --out benchmarks/results/demo_profile

Each round, in a random order: the command as a user types it, with all its processes; the command once more in the same folder, where
nothing is left to run; its runs one after the other in this process, whose parts are timed; and bare loops of the same runs, written by
hand: the same network, optimizer, penalties and number of steps, and after every epoch the accuracy on validation and test images. All in
seconds of the processor, because other programs may share the machine; medians over the rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from gradreg.study.plan import Job, make_plan
from gradreg.torch import GradientRegularizer
from gradreg.train import loop, models
from gradreg.train import recipe as recipes
from gradreg.train.data.loader import load
from gradreg.train.task import RecipeTask
from reporting import command, environment, report, signature
from rounds import interleaved
from tables import markdown

RECIPE = "digits-noisy-labels"
_PR_SET_CHILD_SUBREAPER = 36


def jobs(seeds: int) -> list[Job]:
    """The runs of the demo, those of plain training with as many gradients included."""
    recipe = recipes.load(RECIPE)
    plan = make_plan(RecipeTask(recipe, recipe.base), None, seeds=seeds)
    return list(plan.jobs({}))


def bare(runs: list[Job]) -> float:
    """The runs by hand."""
    started = time.process_time()
    for job in runs:
        config = job.variant._configuration(job.seed, job.stretch)  # type: ignore[attr-defined]
        torch.manual_seed(config.seed)
        data = load(config.data, config.augmentation, seed=config.seed, device=torch.device("cpu"))
        whole: Any = next(data.train.batches(1, len(data.train)))
        images, labels = whole.images, whole.labels
        assert data.validation is not None
        held = [batch.labeled() for part in (data.test, data.validation) for batch in part.batches(len(part))]
        model = models.create(config.model, classes=10, image_shape=(1, 8, 8)).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=config.optimizer.lr, momentum=config.optimizer.momentum)
        steps = config.epochs * math.ceil(len(labels) / config.batch_size)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        penalty = config.resolved_penalty(steps // config.epochs).penalty
        regularizer = None if penalty is None else GradientRegularizer(model, penalty)
        for _ in range(config.epochs):
            for rows in torch.randperm(len(labels)).split(config.batch_size):
                x, y = images[rows], labels[rows]
                optimizer.zero_grad()
                if regularizer is None:
                    cross_entropy(model(x), y).backward()
                else:
                    regularizer.backward(lambda x=x, y=y, model=model: cross_entropy(model(x), y))
                optimizer.step()
                schedule.step()
            with torch.no_grad():
                for x, y in held:
                    (model(x).argmax(dim=1) == y).float().mean().item()
    return time.process_time() - started


def parts(runs: list[Job]) -> dict[str, float]:
    """The runs as a worker does them, one after the other: steps, evaluation, reading the data, files, and the rest."""
    spent: dict[str, float] = {"steps": 0.0, "evaluation": 0.0, "data and model": 0.0}

    def clocked(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            before = time.process_time()
            try:
                return function(*arguments, **keywords)
            finally:
                spent[name] += time.process_time() - before

        return call

    places = [(loop.Run, "train_batches", "steps"), (loop.Run, "_evaluate", "evaluation"), (loop.Run, "__init__", "data and model")]
    kept = [(owner, attribute, getattr(owner, attribute)) for owner, attribute, _ in places]
    for owner, attribute, name in places:
        setattr(owner, attribute, clocked(name, getattr(owner, attribute)))
    started = time.process_time()
    try:
        with tempfile.TemporaryDirectory() as folder:
            for job in runs:
                job.variant.run(Path(folder) / job.folder, job.seed, job.stretch, lambda share: None)
    finally:
        for owner, attribute, function in kept:
            setattr(owner, attribute, function)
    whole = time.process_time() - started
    return {**spent, "files and the rest": whole - sum(spent.values()), "all": whole}


def typed(seeds: int) -> dict[str, float]:
    """The command, and the command where nothing is left to run; with their processes."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "gradreg", "compare", RECIPE, "--seeds", str(seeds), "--out", f"{folder}/demo"]
        found: dict[str, float] = {}
        for name in ("command", "nothing left to run"):
            before = _children()
            subprocess.run(
                words, check=True, capture_output=True, env={key: v for key, v in os.environ.items() if key != "OMP_NUM_THREADS"}
            )
            found[name] = _children() - before
    return found


def _adopt() -> None:
    """Let the processes that outlive the command become this one's: it does not wait for that from which its workers are forked."""
    if sys.platform == "linux" and ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1):
        raise OSError("prctl refused to let this process adopt what the command leaves")


def _children() -> float:
    """Seconds of all processes that were started here, with those that they started; waits for the last one's end."""
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure(rounds: int, seeds: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    _adopt()
    runs = jobs(seeds)
    bare(runs[:1])
    candidates: dict[str, Callable[[], Any]] = {"typed": lambda: typed(seeds), "parts": lambda: parts(runs), "bare": lambda: bare(runs)}
    times = interleaved(candidates, range(rounds))
    found = {name: statistics.median(one[name] for one in times["typed"]) for name in ("command", "nothing left to run")}
    inside = {name: statistics.median(one[name] for one in times["parts"]) for name in times["parts"][0]}
    ratios = [one["command"] / unit for one, unit in zip(times["typed"], times["bare"], strict=True)]
    return {
        "runs": len(runs),
        "rounds": rounds,
        "bare": statistics.median(times["bare"]),
        "command": found["command"],
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "nothing left to run": found["nothing left to run"],
        "in this process": inside,
    }


def table(results: dict[str, Any]) -> str:
    found = results["measured"]
    inside = found["in this process"]
    rows = [
        ("bare loops", found["bare"]),
        ("the command", found["command"]),
        ("of it: start, plan, table and page (nothing left to run)", found["nothing left to run"]),
        ("its runs in one process", inside["all"]),
        *((f"of them: {name}", inside[name]) for name in inside if name != "all"),
    ]
    shown = markdown(("", "seconds of the processor", "of the bare loops"), [(n, f"{s:.1f}", f"{s / found['bare']:.2f}") for n, s in rows])
    return f"{shown}\n\n{found['runs']} runs, medians of {found['rounds']} rounds. {signature(results, 'torch')}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=5, help="those of the demo are 5")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md beside printing the table")
    options = parser.parse_args()
    measured = measure(options.rounds, options.seeds)
    results = {"command": command(), "environment": environment(("torch",)), "measured": measured}
    report(results, table(results), options.out)


if __name__ == "__main__":
    main()
