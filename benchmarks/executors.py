"""What carrying a run costs on each executor: the time from the end of one run to that of the next, where a run takes milliseconds.

    python benchmarks/executors.py --out benchmarks/results/executors
    .ci/slurm start DIR; SLURM_CONF=DIR/slurm.conf python benchmarks/executors.py --out benchmarks/results/executors    # Slurm too

Medians over the runs of one study each, of the gaps between the times at which their results were written; runs that end together on
several workers share a gap. The start of workers, of a Ray and of the queue comes before the first run and is stored beside it.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from gradreg import study
from gradreg.study.executors.executor import Executor
from gradreg.study.executors.local import LocalExecutor
from gradreg.study.executors.ray import RayExecutor
from gradreg.study.executors.slurm import SlurmExecutor
from reporting import command, environment, report, signature
from tables import markdown

TASK = f"{Path(__file__).with_name('many_runs.py')}:numbers"
"""A run of a few milliseconds."""


def measured(executor: Executor, seeds: int, folder: Path) -> dict[str, float]:
    """Seconds until the first result, and the median gap after it."""
    began = time.time()
    found = study.compare(TASK, penalties=["sam:rho=0.1"], seeds=seeds, rivals=["epochs"], out=folder / "out", executor=executor)
    ended = sorted((folder / "out" / record.folder / "result.json").stat().st_mtime for record in found.records)
    return {
        "runs": len(ended),
        "first": ended[0] - began,
        "gap": float(np.median(np.diff(ended))),
        "mean gap": float(np.mean(np.diff(ended))),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=60, help="of two variants; a fifth of it on Slurm")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    options = parser.parse_args()
    executors: dict[str, tuple[Executor, int]] = {
        "local, in one process": (LocalExecutor(workers=0), options.seeds),
        "local, two workers": (LocalExecutor(workers=2), options.seeds),
        "Ray, started on the same two cores": (RayExecutor(), options.seeds),
    }
    if "SLURM_CONF" in os.environ:
        executors["Slurm, four jobs at a time"] = (SlurmExecutor(minutes=5, at_once=4), max(2, options.seeds // 5))
    found: dict[str, dict[str, Any]] = {}
    for name, (executor, seeds) in executors.items():
        with tempfile.TemporaryDirectory() as temporary:
            found[name] = measured(executor, seeds, Path(temporary))
            print(name, found[name], flush=True)
    results = {"command": command(), "environment": environment(("ray", "submitit")), "executors": found}
    rows = [(name, f"{one['runs']}", f"{one['first']:.1f}", f"{one['gap']:.3f}", f"{one['mean gap']:.3f}") for name, one in found.items()]
    header = ("executor", "runs", "seconds to the first result", "a run: median", "mean")
    text = "\n".join([markdown(header, rows), "", signature(results, "ray", "submitit")]) + "\n"
    report(results, text, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
