"""Images per second of ``gradreg.train.loop`` against a bare PyTorch loop over ready tensors: what the training system costs.

    python benchmarks/loop_throughput.py --root DATA --out benchmarks/results/loop_throughput

Both train the same model on the same images without augmentation, by SGD with momentum and a learning rate that changes every step. Every
round trains one epoch of each, in a random order, on one thread; the reported ratio is the median over rounds of loop / bare, in images per
second of processor time, which other load on the machine disturbs little. Neither evaluates. As in step_cost.py, glibc's allocator is told
to keep what is freed: by default it hands a large freed gradient back to the system, and faults it in again, in one loop or in the other.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from gradreg.train import models
from gradreg.train.configuration import Config
from gradreg.train.data.loader import Data, load
from gradreg.train.devices import Devices
from gradreg.train.loop import Run
from gradreg.train.recipe import configuration
from memory import keep_freed_memory
from reporting import command, environment, report, signature
from rounds import interleaved, ratio_quartiles
from tables import markdown, with_quartiles

SETTINGS: dict[str, dict[str, Any]] = {
    "MLP 784-512-512-512-10, MNIST": {"data": {"name": "mnist", "train_size": 5_120}, "model": {"name": "mlp", "hidden": [512, 512, 512]}},
    "CNN 16-32-128-10, MNIST": {
        "data": {"name": "mnist", "train_size": 2_560},
        "model": {"name": "cnn_l2", "channels": [16, 32], "hidden": 128},
    },
    "MLP 64-256-256-10, digits": {"data": {"name": "digits", "train_size": 1_700}, "model": {"name": "mlp", "hidden": [256, 256]}},
}
COMMON = {"batch_size": 128, "epochs": 1000, "optimizer": {"lr": 0.01}, "device": "cpu", "augmentation": {"normalize": "none"}}


def bare(config: Config, data: Data) -> Callable[[], float]:
    """Processor seconds of one epoch of the loop that anybody would write."""
    whole = next(data.train.batches(1, len(data.train)))
    images, labels = whole.images.clone(), whole.labels.clone()
    model = models.create(config.model, classes=data.classes, image_shape=data.image_shape).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs * math.ceil(len(labels) / config.batch_size))

    def epoch() -> float:
        started = time.process_time()
        losses = []
        for part in torch.randperm(len(labels)).split(config.batch_size):
            optimizer.zero_grad()
            loss = cross_entropy(model(images[part]), labels[part])
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
        torch.stack(losses).mean().item()
        return time.process_time() - started

    return epoch


def measure(settings: dict[str, Any], root: str, rounds: int) -> dict[str, Any]:
    config = configuration({**COMMON, **settings, "data": {**settings["data"], "root": root}})
    data = load(config.data, config.augmentation, seed=0, device=torch.device("cpu"))
    run = Run(config, Devices(config))

    def ours() -> float:
        started = time.process_time()
        run.train_batches(saver=None, on_step=None)
        run.state.progress.epoch += 1
        run.state.progress.batch = 0
        torch.stack(run.state.progress.losses).mean().item()
        run.state.progress.losses = []
        return time.process_time() - started

    candidates = {"loop": ours, "bare": bare(config, data)}
    interleaved(candidates, range(1))  # warms up
    times = interleaved(candidates, range(rounds))
    low, middle, high = ratio_quartiles(times["bare"], times["loop"])
    return {
        **{f"{name}_images_per_second": len(data.train) / statistics.median(own) for name, own in times.items()},
        "ratio": middle,
        "ratio_quartiles": [low, high],
    }


def table(results: dict[str, Any]) -> str:
    rows = [
        (name, *(f"{r[f'{who}_images_per_second']:,.0f}" for who in ("loop", "bare")), with_quartiles(r, 3))
        for name, r in results["workloads"].items()
    ]
    found = markdown(("model, data", "loop, images/s", "bare, images/s", "loop / bare (quartiles)"), rows)
    return f"{found}\n\n{signature(results, 'torch')}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--root", required=True, help="folder of MNIST")
    parser.add_argument("--rounds", type=int, default=15, help="epochs of each")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md beside printing the table")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    results: dict[str, Any] = {
        "command": command(),
        "rounds": options.rounds,
        "environment": environment(("torch",)),
        "workloads": {name: measure(settings, options.root, options.rounds) for name, settings in SETTINGS.items()},
    }
    report(results, table(results), options.out)


if __name__ == "__main__":
    main()
