"""Images per second of ``gradreg train`` on an accelerator, plain and with F-GR, and how much of that time the device computes.

    python benchmarks/training_throughput.py --root DATA --out benchmarks/results/training_throughput
    python benchmarks/training_throughput.py --root DATA --device cpu --eager --model wrn16_4 --train-size 256 --rounds 1  # tries it

CIFAR-10 in memory with flips and crops, in batches of 128, bf16, channels_last, compiled. A round is one epoch without evaluation of each,
in a random order; the first two rounds, in which the model is compiled, do not count. F-GR takes two gradients where plain training takes
one, so that 0.5 of its images per second is what it costs in theory.

The device's share is that of the wall clock's time, over a part of an epoch, during which at least one kernel runs, by torch.profiler; a
CPU has none.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from gradreg.train.devices import Devices
from gradreg.train.loop import Run
from gradreg.train.recipe import configuration
from reporting import command, environment, report, signature
from rounds import interleaved, ratio_quartiles

PENALTIES: dict[str, dict[str, Any] | None] = {"plain": None, "F-GR": {"name": "fgr", "gamma": 0.05, "epsilon": 0.05}}
COMPILING, PROFILED_STEPS = 2, 30


def run_of(penalty: dict[str, Any] | None, options: argparse.Namespace) -> Run:
    config = configuration(
        {
            "data": {"name": "cifar10", "root": options.root, "train_size": options.train_size, "test_size": 10, "workers": 0},
            "augmentation": {"flip": True, "crop_padding": 4},
            "model": {"name": options.model},
            "optimizer": {"lr": 0.1, "momentum": 0.9, "nesterov": True},
            "batch_size": options.batch_size,
            "epochs": 1000,
            "precision": "bf16",
            "channels_last": True,
            "compile": not options.eager,
            "device": options.device,
            "penalty": penalty,
        }
    )
    return Run(config, Devices(config))


def epoch(run: Run) -> float:
    """Images per second of one epoch; the last loss is waited for."""
    started = time.perf_counter()
    run.train_batches(saver=None, on_step=None)
    progress = run.state.progress
    torch.stack(progress.losses).mean().item()
    progress.epoch, progress.batch, progress.losses = progress.epoch + 1, 0, []
    return len(run.data.train) / (time.perf_counter() - started)


def busy_share(run: Run) -> float:
    """Which part of the time between the first and the last kernel of ``PROFILED_STEPS`` steps the device computes."""
    progress = run.state.progress
    progress.batch = max(0, run.steps_per_epoch - PROFILED_STEPS)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        epoch(run)
    kernels = sorted((e.time_range.start, e.time_range.end) for e in profiler.events() or [] if e.device_type == DeviceType.CUDA)
    busy, until = 0.0, kernels[0][0]
    for start, end in kernels:
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return busy / (until - kernels[0][0])


def measure(options: argparse.Namespace) -> dict[str, Any]:
    runs = {name: run_of(penalty, options) for name, penalty in PENALTIES.items()}
    candidates: dict[str, Callable[[], float]] = {name: lambda run=run: epoch(run) for name, run in runs.items()}
    interleaved(candidates, range(COMPILING))
    speeds = interleaved(candidates, range(options.rounds))
    return {
        "images_per_second": {name: statistics.median(own) for name, own in speeds.items()},
        "ratio_quartiles": ratio_quartiles(speeds["F-GR"], speeds["plain"]),
        "busy": {name: busy_share(run) for name, run in runs.items()} if options.device == "cuda" else None,
    }


def table(results: dict[str, Any]) -> str:
    measured = results["measured"]
    low, middle, high = measured["ratio_quartiles"]
    lines = ["| " + " | ".join(["", *PENALTIES, "F-GR / plain (quartiles)"]) + " |", "|---" * (len(PENALTIES) + 2) + "|"]
    speeds = [f"{measured['images_per_second'][name]:,.0f}" for name in PENALTIES]
    lines.append("| " + " | ".join([f"{results['model']}: images/s", *speeds, f"{middle:.3f} ({low:.3f}–{high:.3f})"]) + " |")
    if measured["busy"] is not None:
        lines.append("| " + " | ".join(["device computes", *(f"{100 * measured['busy'][name]:.0f} %" for name in PENALTIES), ""]) + " |")
    return "\n".join(lines) + f"\n\n{signature(results, 'torch', 'timm')}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, help="folder of CIFAR-10")
    parser.add_argument("--model", default="wrn28_10", help="any name of gradreg models")
    parser.add_argument("--train-size", type=int, default=50_000, help="images of an epoch")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--eager", action="store_true", help="do not compile the model, which takes minutes on a CPU")
    parser.add_argument("--rounds", type=int, default=5, help="epochs of each that count")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md beside printing the table")
    options = parser.parse_args()
    results: dict[str, Any] = {
        "command": command(),
        "model": options.model,
        "environment": environment(("torch", "timm"), torch.device(options.device)),
        "measured": measure(options),
    }
    report(results, table(results), options.out)


if __name__ == "__main__":
    main()
