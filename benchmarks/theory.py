"""How long ``gradreg.theory.diagonal_network.simulate`` takes, and how that grows with the number of features.

    python benchmarks/theory.py [--repeats 5] [--samples 30] [--features 60 125 250 500 1000 2000]

Prints the median, the least and the greatest wall-clock time of the reference settings, and the median CPU time, which a busy machine
changes less (set OMP_NUM_THREADS=1 for it to mean anything). The aim: below 0.5 s (median) at d = 60, n = 30.
"""

from __future__ import annotations

import argparse
import statistics
import time

from gradreg.theory.diagonal_network import simulate
from gradreg.theory.sparse_regression import sparse_regression

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
    options = parser.parse_args()
    print(f"{'d':>6} {'n':>5} {'median s':>9} {'least':>9} {'greatest':>9} {'CPU s':>9} {'evaluations':>12}")
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
        row = (statistics.median(seconds), min(seconds), max(seconds), statistics.median(cpu))
        print(
            f"{features:>6} {options.samples:>5}",
            *(f"{value:>9.3f}" for value in row),
            f"{statistics.median(evaluations):>12g}",
            flush=True,
        )


if __name__ == "__main__":
    main()
