"""Can one step tell whether a penalty helps in the end? What held-out data say of steps of F-GR with AutoRadius, where it helps and not.

    python benchmarks/held_out_signals.py digits-cost --seeds 3
    python benchmarks/held_out_signals.py cifar10-underfit --seeds 1 --root DATA
    python benchmarks/held_out_signals.py digits-cost --table                     # only the table of what is stored

At every fourth step, with g the gradient of the batch, G the regularized one and h that of a held-out batch, all at the same parameters:
⟨G − g, h⟩, which ``HeldOut`` averages; the same for G of the length of g, and for its part orthogonal to g, because G is mostly longer;
and by how much less the held-out loss is after a step along G than along g, per unit of its length, for a step of the learning rate and
for one of ten times that, about what a momentum of .9 makes of it. The penalty stays on whatever they say. Stored under
benchmarks/results/choosing/ as the mean and its standard error over each sixth of the run.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import choosing
import gradreg
from gradreg.torch import GradientRegularizer
from gradreg.train import recipe as recipes
from gradreg.train.devices import Devices
from gradreg.train.loop import Run
from gradreg.train.recipe import configuration
from reporting import command, environment
from tables import markdown

FIRST, EVERY, SHARE, PARTS = 600, 4, 0.05, 6
FACTORS = (1, 10)
TASKS = {"digits-cost": "digits, 30 % wrong labels", "cifar10-underfit": "`cifar10-underfit`"}
SIGNALS = {
    "product": "⟨G − g, h⟩",
    "equal length": "at equal length",
    "orthogonal": "orthogonal to g",
    "step of 1": "held-out loss, a step of η",
    "step of 10": "a step of 10 η",
}


def signals(task: str, seed: int, root: str | None) -> tuple[dict[str, list[float]], float]:
    """Train; every signal at every fourth step, and the accuracy that the run ends with."""
    penalty = {**gradreg.auto().to_dict(), "held_out": SHARE}
    run = Run(config := configuration({**choosing.base_of(recipes.load(task), root), "penalty": penalty, "seed": seed}), Devices(config))
    found: dict[str, list[float]] = {name: [] for name in SIGNALS}
    model = run.state.model
    regularizer = run.state.regularizer = GradientRegularizer(model, run.penalty.penalty)  # acts from the first step on
    penalized = regularizer.backward

    def backward(closures: Sequence[Callable[[], Tensor]], *, held_out: Callable[[], Tensor], **options: Any) -> Any:
        if regularizer.step % EVERY:
            return penalized(closures, **options)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        g, h = (torch.autograd.grad(sum(one() for one in each), list(model.parameters())) for each in (closures, [held_out]))  # type: ignore[arg-type]
        model.load_state_dict(before)
        loss = penalized(closures, **options)
        after = {name: value.clone() for name, value in model.state_dict().items()}
        larger = [p.grad for p in model.parameters() if p.grad is not None]
        rate = run.state.optimizer.param_groups[0]["lr"]
        for name, value in of_one_step(model, g, larger, h, rate, held_out).items():
            found[name].append(value)
        model.load_state_dict(after)
        return loss

    regularizer.backward = backward  # type: ignore[method-assign,assignment]
    for _ in range(config.epochs):
        run.train_epoch(None, None)
    return found, run.state.progress.history[-1].test_accuracy or 0.0


@torch.no_grad()
def of_one_step(
    model: nn.Module, g: Sequence[Tensor], larger: Sequence[Tensor], h: Sequence[Tensor], rate: float, held_out: Callable[[], Tensor]
) -> dict[str, float]:
    """Every signal; the parameters stay moved."""
    plain, regularized, length, own, both = inner(g, h), inner(larger, h), inner(g, g), inner(larger, larger), inner(larger, g)
    found = {
        "product": regularized - plain,
        "equal length": regularized * (length / own) ** 0.5 - plain,
        "orthogonal": regularized - both / length * plain,
    }
    start = [p.clone() for p in model.parameters()]
    for factor in FACTORS:
        step, losses = max(factor * rate, 1e-12), list[float]()
        for direction in (g, larger):
            for p, here, d in zip(model.parameters(), start, direction, strict=True):
                p.copy_(here - step * d)
            losses.append(float(held_out()))
        found[f"step of {factor}"] = (losses[0] - losses[1]) / step
    return found


def inner(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return float(sum((x.double() * y.double()).sum() for x, y in zip(a, b, strict=True)))


def table(results: dict[str, Any]) -> str:
    """A row for each signal."""
    rows = [
        (told, *(f"{1e3 * mean:+.1f} ± {1e3 * error:.1f}" for mean, error in results["signals"][name])) for name, told in SIGNALS.items()
    ]
    seeds = len(results["seeds"])
    header = f"{TASKS[results['task']]}, {seeds} seed{'s' if seeds > 1 else ''}: in thousandths"
    return markdown((header, *(f"sixth {i + 1}" for i in range(PARTS))), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--root", help="folder of the data sets")
    parser.add_argument("--table", action="store_true", help="only print what is stored")
    options = parser.parse_args()
    name = f"held-out-signals-{options.task}"
    if not options.table:
        torch.set_num_threads(1)
        seeds = list(range(FIRST, FIRST + options.seeds))
        runs = [signals(options.task, seed, options.root) for seed in seeds]
        parts = {s: [np.concatenate(part) for part in zip(*(np.array_split(r[s], PARTS) for r, _ in runs), strict=True)] for s in SIGNALS}
        content = {
            "task": options.task,
            "command": command(),
            "environment": environment(("torch",)),
            "seeds": seeds,
            "accuracies": [accuracy for _, accuracy in runs],
            "signals": {s: [[float(p.mean()), float(p.std(ddof=1) / len(p) ** 0.5)] for p in each] for s, each in parts.items()},
        }
        choosing.store(name, content)
    choosing.show(name, table(choosing.stored(name)))


if __name__ == "__main__":
    main()
