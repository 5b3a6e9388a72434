"""A task of a moment, without any framework: gradient descent on a random quadratic. Tests copy this file, and run it anywhere."""

from __future__ import annotations

import ctypes
import os
import random
import time

from gradreg import study


class Trainer:
    """Descends, perturbed by SAM if there is a penalty; counts its gradients as an integration's regularizer does."""

    def __init__(self, penalty, curvatures, lr):
        self.penalty, self.curvatures, self.lr = penalty, curvatures, lr
        self.weights = [1.0] * len(curvatures)
        self.step, self.metrics = 0, {"evaluations": 0}

    def gradient(self, weights):
        self.metrics["evaluations"] += 1
        return [c * w for c, w in zip(self.curvatures, weights, strict=True)]

    def train(self):
        found = self.gradient(self.weights)
        if self.penalty is not None:
            norm = sum(g * g for g in found) ** 0.5
            found = self.gradient([w + 0.1 * g / norm for w, g in zip(self.weights, found, strict=True)])
        self.weights = [w - self.lr * g for w, g in zip(self.weights, found, strict=True)]
        self.step += 1


@study.task(metric="loss", mode="min")
def train(run: study.Run, *, lr: float = 0.1, wait: float = 0.0, die: str = "", slow: str = "") -> None:
    """Descent on a random quadratic; notes its begin in $RUNS, and where it is."""
    name = f"{'plain' if run.penalty is None else 'sam'}-{run.seed}"
    if os.environ.get("RUNS"):
        with open(os.environ["RUNS"], "a") as file:
            file.write(f"{run.folder.parent.name} {run.seed} {os.getpid()} {os.getcwd()}\n")
    if die == name:
        print("the last words of this run", flush=True)
        ctypes.string_at(0)
    randomness = random.Random(run.seed)
    trainer = Trainer(run.penalty, [randomness.uniform(0.1, 2.0) for _ in range(5)], lr)
    run.count(trainer)
    for _ in run.epochs(3):
        time.sleep(60.0 if slow == name else wait)
        trainer.train()
        loss = sum(c * w * w for c, w in zip(trainer.curvatures, trainer.weights, strict=True)) + randomness.gauss(0, 0.1)
        run.log(test_loss=loss, validation_loss=loss + randomness.gauss(0, 0.1), loss=loss)
