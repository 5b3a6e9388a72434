"""Measurements for the papers' claims that are no comparison of trained accuracies. Each yields what it has found, piece by piece.

A piece is a change of the stored result, which is written after each, so that a measurement that is stopped resumes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np

Found = dict[str, Any]


def diagonal_network(root: str, found: Found) -> Iterator[Found]:
    """ln(α/α₀) of B-GR, DB and F-GR on five problems of the shifted reference setting, and the distance from the theorem's minimizer."""
    from gradreg.theory.diagonal_network import implicit_bias, simulate
    from gradreg.theory.sparse_regression import sparse_regression

    rows: list[Found] = found.setdefault("seeds", [])
    for seed in range(len(rows), 5):
        data = sparse_regression(features=60, samples=30, nonzeros=3, shift=2.0, seed=seed)
        row: Found = {"seed": seed}
        for name, gamma, epsilon in (
            ("none", 0.0, 0.0),
            ("B-GR", 0.06, -0.05),
            ("DB", 0.06, 0.0),
            ("F-GR, 0.02", 0.06, 0.02),
            ("F-GR", 0.06, 0.05),
        ):
            flow = simulate(data.X, data.y, initial_scale=0.05, gamma=gamma, epsilon=epsilon, loss_target=1e-14)
            row[name] = float(flow.log_shrinkage.mean())
            row[f"{name}, recovery error"] = float(data.recovery_error(flow.beta))
            distance = float(np.linalg.norm(flow.beta - implicit_bias(data.X, data.y, flow.alpha)))
            row["distance"] = max(row.get("distance", 0.0), distance)
        rows.append(row)
        yield found


def kernel_decay(root: str, found: Found) -> Iterator[Found]:
    """‖Θ_t‖/‖Θ_0‖ at t = 7.5 over the theorem's e^(−2λt), two layers, for two widths."""
    from gradreg.theory.kernel_decay import simulate

    rows: list[Found] = found.setdefault("seeds", [])
    for seed in range(len(rows), 5):
        row: Found = {"seed": seed}
        for width in (512, 4096):
            run = simulate(2, width, 0.1, end_time=7.5, points=4, seed=seed)
            row[f"ratio {width}"] = float(run.ratio[-1] / run.predicted[-1])
        rows.append(row)
        yield found


def flooding(root: str, found: Found) -> Iterator[Found]:
    """The largest difference of a weight between two steps of flooding and one of F-GR or B-GR, over the length of the step."""
    from gradreg.theory.flooding import two_steps

    rows: list[Found] = found.setdefault("seeds", [])
    for seed in range(len(rows), 5):
        errors = [two_steps(learning_rate=rate, seed=seed) for rate in (0.1, 0.025)]
        rows.append({"seed": seed, "relative error": max(max(e.forward_error, e.backward_error) / e.moved for e in errors)})
        yield found


def resnet_cost(root: str, found: Found, *, rounds: int = 10, batch: int = 16, model: str = "resnet18_cifar") -> Iterator[Found]:
    """Processor seconds of a step of plain training, F-GR, B-GR and double backprop, each once a round, in a random order."""
    import random

    import torch
    from torch import nn

    import gradreg
    from gradreg.torch import GradientRegularizer
    from gradreg.train import models

    torch.set_num_threads(1)
    penalties = {
        "plain": None,
        "F-GR": gradreg.fgr(gamma=0.05, epsilon=0.05),
        "B-GR": gradreg.bgr(gamma=0.05, epsilon=0.05),
        "DB": gradreg.exact(gamma=0.05),
    }
    torch.manual_seed(0)
    x, y = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))
    runs: dict[str, Any] = {}
    for name, penalty in penalties.items():
        network = models.create({"name": model}, classes=10, image_shape=(3, 32, 32))
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
        runs[name] = (network, GradientRegularizer(network, penalty), optimizer)

    def step(name: str) -> float:
        network, regularizer, optimizer = runs[name]
        before = time.process_time()
        optimizer.zero_grad()
        regularizer.backward(lambda: nn.functional.cross_entropy(network(x), y))
        optimizer.step()
        return time.process_time() - before

    for name in runs:
        step(name)  # allocates
    seconds: dict[str, list[float]] = found.setdefault("seconds", {name: [] for name in runs})
    order, shuffle = list(runs), random.Random(len(seconds["plain"])).shuffle
    while len(seconds["plain"]) < rounds:
        shuffle(order)
        took = {name: step(name) for name in order}
        for name, own in took.items():
            seconds[name].append(round(own, 4))
        yield found


L2S = (0.4, 0.2, 0.1, 0.05)
STEPS = 3_250


def l2_law_cifar(root: str, found: Found) -> Iterator[Found]:
    """The step of the best test accuracy at four L2, as benchmarks/weight_decay_law.py measures it on MNIST."""
    import torch
    from torch.nn.functional import cross_entropy

    from gradreg.train import models
    from gradreg.train.data.configuration import AugmentationConfig, DataConfig
    from gradreg.train.data.loader import load

    torch.set_num_threads(1)
    measured = sorted({round(x) for x in np.geomspace(2, STEPS, 100)})
    found.setdefault("steps", measured)
    runs: list[Found] = found.setdefault("runs", [])
    done = {(run["l2"], run["seed"]) for run in runs}
    for seed in range(3):
        data = DataConfig(name="cifar10", root=root, train_size=2000, test_size=5000, image_size=16, workers=0, split_seed=seed)
        sets = None
        for l2 in L2S:
            if (l2, seed) in done:
                continue
            sets = sets or load(data, AugmentationConfig(), seed=seed, device=torch.device("cpu"))
            torch.manual_seed(seed)
            test = next(sets.test.batches(5000))
            model = models.create({"name": "mlp", "hidden": [128, 128], "gain": 2.0}, classes=10, image_shape=(3, 16, 16))
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05, weight_decay=l2)
            accuracies, wanted, step, epoch = list[float](), set(measured), 0, 0
            while step < STEPS:
                epoch += 1
                for batch in sets.train.batches(epoch, 100):
                    optimizer.zero_grad()
                    cross_entropy(model(batch.images), batch.labels).backward()
                    optimizer.step()
                    step += 1
                    if step in wanted:
                        with torch.no_grad():
                            accuracies.append(round((model(test.images).argmax(dim=1) == test.labels).float().mean().item(), 4))
                    if step == STEPS:
                        break
            runs.append({"lr": 0.05, "l2": l2, "seed": seed, "accuracies": accuracies})
            yield found
