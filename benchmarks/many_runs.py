"""What a study of 10,000 runs takes beside the runs themselves: planning, resuming with the table, and the page.

    python benchmarks/many_runs.py --out benchmarks/results/many_runs

The runs are those of a task of a few milliseconds: 100 variants and 100 seeds, or as ``--variants`` and ``--seeds`` say. They are made
one after the other and are not timed; then a new process opens the study as one that is complete. Memory is the peak of that process,
which imports no PyTorch.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gradreg import study
from gradreg.study.comparison import resolve_task
from gradreg.study.plan import make_plan


@study.task(metric="accuracy", mode="max")
def numbers(run: study.Run) -> None:
    """One step of a line."""
    import torch

    model = torch.nn.Linear(2, 1)
    regularizer = run.regularizer(model)
    for _ in run.epochs(1):
        loss = regularizer.backward(lambda: model(torch.ones(2)).square().sum())
        run.log(test_accuracy=run.seed % 7 / 10, loss=loss)


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """Of the study."""
    penalties: dict[str, Any] = {"none": None, **{f"sam-{i}": f"sam:rho={0.01 * i:g}" for i in range(1, options.variants)}}
    return {"penalties": penalties, "seeds": options.seeds, "rivals": ["epochs"]}


def make(options: argparse.Namespace, out: Path) -> None:
    """The runs, in this process."""
    for job in make_plan(resolve_task(numbers), **settings(options)).jobs({}):
        place = out / "runs" / job.folder
        place.mkdir(parents=True)
        job.variant.run(place, job.seed, job.stretch, lambda *_: None)


def peak() -> float:
    """The largest memory of this process, MB (Linux). Not ``getrusage``, whose figure begins with the parent's."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


def opened(options: argparse.Namespace, out: Path) -> dict[str, Any]:
    """What opening the complete study takes in this process."""
    seconds: dict[str, dict[str, float]] = {}

    @contextmanager
    def timed(what: str) -> Generator[None]:
        wall, processor = time.perf_counter(), time.process_time()
        yield
        seconds[what] = {"wall": time.perf_counter() - wall, "processor": time.process_time() - processor}

    with timed("planning"):
        jobs = make_plan(resolve_task(numbers), **settings(options)).jobs({})
    with timed("planning, resuming and the table"):
        comparison = study.compare(numbers, **settings(options), out=out, partial=True)
    if len(comparison.records) != len(jobs):
        raise SystemExit(f"{len(jobs)} runs were made; the study has {len(comparison.records)}.")
    table = peak()
    with timed("all of it, with the page"):
        study.compare(numbers, **settings(options), out=out, workers=0)
    page = peak()
    return {"runs": len(jobs), "seconds": seconds, "megabytes": {"table": table, "page": page}}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    parser.add_argument("--open", type=Path, help=argparse.SUPPRESS)  # what the new process does
    options = parser.parse_args()
    if options.open is not None:
        print(json.dumps(opened(options, options.open)))
        return 0
    from reporting import command, environment, report, signature
    from tables import markdown

    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "out"
        make(options, out)
        words = [__file__, "--variants", str(options.variants), "--seeds", str(options.seeds), "--open", str(out)]
        done = subprocess.run([sys.executable, *words], check=True, stdout=subprocess.PIPE, text=True)
    results = {"command": command(), "environment": environment(("plotly",)), **json.loads(done.stdout.splitlines()[-1])}
    rows = [(name, f"{one['wall']:.2f}", f"{one['processor']:.2f}") for name, one in results["seconds"].items()]
    memory = results["megabytes"]
    note = f"{results['runs']:,} runs; peak memory {memory['table']:.0f} MB with the table, {memory['page']:.0f} MB with the page."
    text = "\n".join([markdown(("", "seconds", "of the processor"), rows), "", note, "", signature(results, "plotly")]) + "\n"
    report(results, text, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
