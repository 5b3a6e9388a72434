"""Run again what the field's papers report, as far as two cores and the minutes go, and store it for docs/results.md.

    python benchmarks/papers.py --dry-run                          # what would run, in which order
    python benchmarks/papers.py --root DATA --minutes 60           # stops after an hour; the same command goes on
    python benchmarks/papers.py --root DATA --only fgr-mlp --seeds 2
    make tables                                                    # writes docs/results.md from what is stored

A comparison is ``gradreg compare`` on a shipped recipe, in a process of its own, one run after the other on one thread; its runs lie in
runs/papers. DATA holds MNIST/raw (torchvision's layout) and cifar10. What is stored: the command, every run's accuracies, the environment,
and the processor's and the clock's hours, all tries together.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gradreg import files
from paper_claims import ROOT, STORED
from paper_experiments import EXPERIMENTS, FRAMEWORKS, Comparison, Measurement
from reporting import environment

RUNS = Path("runs") / "papers"
KEPT = ("variant", "seed", "budget", "test_accuracy", "validation_accuracy", "best_epoch", "best_test_accuracy", "epochs", "diverged")
"""What is stored of each run."""
ENDING = 60
"""Seconds that a comparison is given to save when it is told to stop."""


class OutOfTime(Exception):
    """The minutes are over."""


class Clock:
    """The time that is left, and what was spent on the experiment under way."""

    def __init__(self, minutes: float | None) -> None:
        self._end = None if minutes is None else time.monotonic() + 60 * minutes

    @property
    def left(self) -> float | None:
        """Seconds until the end; None without one."""
        return None if self._end is None else max(0.0, self._end - time.monotonic())

    def check(self) -> None:
        """Raise OutOfTime if there is none left."""
        if self.left == 0.0:
            raise OutOfTime("the minutes are over")


class Hours:
    """Hours of the processor and of the clock that an experiment took, over all tries; kept in its folder under runs/papers."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "spent.json"
        self.before: dict[str, float] = json.loads(self._file.read_text()) if self._file.is_file() else {"processor": 0.0, "wall": 0.0}
        self._started = self._now()

    @staticmethod
    def _now() -> dict[str, float]:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return {"processor": sum(one.ru_utime + one.ru_stime for one in used), "wall": time.perf_counter()}

    def total(self) -> dict[str, float]:
        """All tries together; written down as well."""
        now = self._now()
        found = {name: round(self.before[name] + (now[name] - self._started[name]) / 3600, 4) for name in now}
        files.make_directory(self._file.parent, purpose="runs")
        files.write_json(self._file, found)
        return found


def compare(
    one: Comparison,
    root: str,
    clock: Clock,
    seeds: int | None,
    results: Path,
    *,
    runs: Path = RUNS,
    packages: Sequence[str] = ("torch", "timm", "numpy"),
    threads: int | None = 1,
) -> None:
    """Run what is missing of a comparison, and store it whole or not at all.

    Raises:
        OutOfTime: it was stopped; the same call goes on.
    """
    out = runs / one.name
    hours = Hours(out.with_name(f"{one.name}-spent"))
    words = [*one.words(root, seeds=seeds), "--workers", "0", "--out", str(out)]
    limited = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen([sys.executable, "-m", "gradreg", *words], env={**os.environ, **limited})
    try:
        status = process.wait(clock.left)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)  # it saves, and the same command resumes
        try:
            process.wait(ENDING)
        except subprocess.TimeoutExpired:  # it compiles, say; what it saved last is whole
            process.kill()
            process.wait()
        hours.total()
        raise OutOfTime("the minutes are over") from None
    except BaseException:
        process.terminate()
        raise
    spent = hours.total()
    if status:
        raise SystemExit(f"gradreg {' '.join(words)} ended with status {status}; see what it printed.")
    found = json.loads((out / "results.json").read_text(encoding="utf-8"))
    store(
        results,
        {
            "name": one.name,
            "command": (one if seeds is None else replace(one, seeds=seeds)).command(),
            "shortened": one.shortened,
            "hours": spent,
            "environment": environment(packages),
            "metric": found["metric"],
            "baseline": found["baseline"],
            "variants": {row["variant"]: row["method"] for row in found["table"] if row["budget"] == "epochs"},
            "runs": [{key: run[key] for key in KEPT if key in run} for run in found["runs"]],
        },
    )


def measure(one: Measurement, root: str, clock: Clock, results: Path) -> None:
    """Measure what is missing, and store every piece."""
    file = results / f"{one.name}.json"
    stored: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    found = {key: value for key, value in stored.items() if key not in ("name", "command", "shortened", "hours", "environment")}
    hours = Hours(RUNS / f"{one.name}-spent")
    for piece in one.function(root, found):
        head = {"name": one.name, "command": one.command(), "shortened": one.shortened, "hours": hours.total()}
        store(results, {**head, "environment": environment(("torch", "numpy", "scipy")), **piece})
        clock.check()


def store(results: Path, content: dict[str, Any]) -> None:
    """Write a result."""
    files.make_directory(results, purpose="--results")
    files.write_text(results / f"{content['name']}.json", json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def chosen(names: Sequence[str] | None) -> list[Comparison | Measurement]:
    """The experiments of these names, in their own order; all by default."""
    known = {one.name: one for one in (*EXPERIMENTS, *FRAMEWORKS)}
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise SystemExit(f"--only must name experiments; got {', '.join(unknown)}. Known: {', '.join(known)}.")
    return [one for one in known.values() if names is None or one.name in names]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", help="folder of the data sets; without it what needs them is left out")
    parser.add_argument("--minutes", type=float, help="stop after these; what is complete is kept, and the same command goes on")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these experiments")
    parser.add_argument("--seeds", type=int, help="of comparisons, in place of their own number")
    parser.add_argument("--dry-run", action="store_true", help="only say what would run")
    parser.add_argument("--results", type=Path, default=ROOT / STORED, help="where results are stored")
    options = parser.parse_args(argv)
    clock = Clock(options.minutes)
    for one in chosen(options.only):
        there = " (stored; only what is missing would run)" if (options.results / f"{one.name}.json").is_file() else ""
        if options.dry_run:
            print(f"{one.name}: {one.command()}{there}")
            continue
        if one.data and options.root is None:
            print(f"{one.name}: left out, because it needs --root", flush=True)
            continue
        print(f"{one.name}: {one.command()}", flush=True)
        try:
            clock.check()
            if isinstance(one, Comparison):
                compare(one, options.root or "", clock, options.seeds, options.results)
            else:
                measure(one, options.root or "", clock, options.results)
        except OutOfTime:
            print(f"{one.name}: stopped after {options.minutes:g} minutes; the same command goes on", flush=True)
            return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
