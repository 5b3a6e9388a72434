"""How long ``gradreg.theory.diagonal_network.simulate`` takes, and how that grows with the number of features.

    python benchmarks/theory.py [--repeats 5] [--samples 30] [--features 60 125 250 500 1000 2000] [--out OUT]

The processor's time, which a busy machine changes less than the wall clock's (set OMP_NUM_THREADS=1 for it to mean anything), and the wall
clock's beside it. The aim: below 0.5 s (median) at d = 60, n = 30.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

from gradreg.theory.diagonal_network import simulate
from gradreg.theory.sparse_regression import sparse_regression
from reporting import command, environment, report, signature
from tables import markdown

SETTINGS = (  # shift, initial scale, gamma, epsilon
    (2.0, 0.05, 0.06, 0.05),
    (2.0, 0.05, 0.06, 0.0),
    (2.0, 0.05, 0.06, -0.02),
    (0.0, 0.1, 1.0, 0.6),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="problems (seeds) per setting (default 5)")
    parser.add_argument("--samples", type=int, default=30, help="n (default 30)")
    parser.add_argument("--features", type=int, nargs="+", default=[60, 125, 250, 500, 1000, 2000], help="d")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    options = parser.parse_args()
    found: dict[int, dict[str, Any]] = {}
    for features in options.features:
        seconds, cpu, evaluations = [], [], []
        for shift, scale, gamma, epsilon in SETTINGS:
            for seed in range(options.repeats):
                data = sparse_regression(features=features, samples=options.samples, shift=shift, seed=seed)
                start, busy = time.perf_counter(), time.process_time()
                flow = simulate(data.X, data.y, initial_scale=scale, gamma=gamma, epsilon=epsilon)
                seconds.append(time.perf_counter() - start)
                cpu.append(time.process_time() - busy)
                evaluations.append(flow.evaluations)
        medians = {"processor": statistics.median(cpu), "wall": statistics.median(seconds), "evaluations": statistics.median(evaluations)}
        found[features] = {"runs": len(cpu), **medians}
        print(features, found[features], flush=True)
    results = {"command": command(), "environment": environment(("scipy",)), "samples": options.samples, "features": found}
    rows = [
        ("seconds of the processor", *(f"{one['processor']:.2f}" for one in found.values())),
        ("seconds by the wall clock", *(f"{one['wall']:.2f}" for one in found.values())),
    ]
    runs = next(iter(found.values()))["runs"]
    text = markdown((f"d (n = {options.samples})", *map(str, found)), rows)
    report(results, f"{text}\n\nMedians of {runs} runs. {signature(results, 'scipy')}\n", options.out)


if __name__ == "__main__":
    main()
