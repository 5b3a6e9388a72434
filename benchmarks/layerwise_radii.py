"""Does one radius serve all widths? SAM and μP² on a network in μP, over widths and radii; and where the perturbation of each lies.

    python benchmarks/layerwise_radii.py --out benchmarks/results/layerwise_radii     # about twenty minutes of one core

A multi-layer perceptron without biases (64-n-n-10) on 200 of scikit-learn's digits, 30 % of them with labels drawn at random, 80 steps of
SGD with momentum, judged by its loss on the other 797. Initialization and learning rates are those of μP: standard deviations 1/√64,
√(2/n) and 1/n, a learning rate of η·fan_out/fan_in for each layer. The best radius is that of the grid.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import gradreg
from gradreg import GradientPenalty
from gradreg.torch import GradientRegularizer
from reporting import command, environment, report, signature
from tables import markdown

WIDTHS = (128, 256, 512, 1024, 2048)
RADII = {
    "SAM": (gradreg.sam, [0.0125, 0.025, 0.05, 0.1, 0.2, 0.4]),
    "μP²": (gradreg.mup2_sam, [0.1, 0.2, 0.4, 0.8, 1.6, 3.2]),
}
RATE, STEPS, BATCH, TRAINING, WRONG = 0.3, 80, 50, 200, 0.3


def digits(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, some of them wrong, and test images and labels."""
    from sklearn.datasets import load_digits

    images, labels = (torch.tensor(a) for a in load_digits(return_X_y=True))
    images = ((images - images.mean()) / images.std()).float()
    draws = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=draws)
    training, test = order[:TRAINING], order[1000:]
    given = labels[training].clone()
    wrong = torch.rand(TRAINING, generator=draws) < WRONG
    given[wrong] = torch.randint(0, 10, (int(wrong.sum()),), generator=draws)
    return images[training], given, images[test], labels[test]


def network(width: int, seed: int) -> nn.Sequential:
    """In μP."""
    draws = torch.Generator().manual_seed(seed)
    layers = [nn.Linear(a, b, bias=False) for a, b in ((64, width), (width, width), (width, 10))]
    for layer, deviation in zip(layers, (1 / 8, math.sqrt(2 / width), 1 / width), strict=True):
        with torch.no_grad():
            layer.weight.normal_(0.0, deviation, generator=draws)
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])


def trained(width: int, penalty: GradientPenalty | None, seed: int) -> tuple[float, float, float]:
    """Loss and accuracy on test, and the share of the perturbation that lies in the last layer, the mean over the steps."""
    images, labels, test_images, test_labels = digits(seed)
    model = network(width, seed)
    layers = [layer for layer in model if isinstance(layer, nn.Linear)]
    rates = [RATE * layer.out_features / layer.in_features for layer in layers]
    optimizer = torch.optim.SGD([{"params": [layer.weight], "lr": rate} for layer, rate in zip(layers, rates, strict=True)], momentum=0.9)
    regularizer = GradientRegularizer(model, penalty, measure_shares=True)
    draws, shares = torch.Generator().manual_seed(seed), []
    order = torch.randperm(TRAINING, generator=draws)
    for step in range(STEPS):
        place = step * BATCH % TRAINING
        order = torch.randperm(TRAINING, generator=draws) if place == 0 else order
        rows = order[place : place + BATCH]
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (1 + math.cos(math.pi * step / STEPS)) / 2
        optimizer.zero_grad()
        regularizer.backward(lambda rows=rows: nn.functional.cross_entropy(model(images[rows]), labels[rows]))
        shares.append(regularizer.metrics.shares.get("4.weight", math.nan))
        optimizer.step()
    with torch.no_grad():
        outputs = model(test_images)
    right = (outputs.argmax(dim=1) == test_labels).float().mean()
    return float(nn.functional.cross_entropy(outputs, test_labels)), float(right), float(np.nanmean(shares)) if penalty else math.nan


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2, help="of data, order and initialization (default: 2)")
    parser.add_argument("--widths", type=int, nargs="+", default=list(WIDTHS), help="of the hidden layers")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    runs: list[dict[str, Any]] = []
    for width in arguments.widths:
        for seed in range(arguments.seeds):
            plain = trained(width, None, seed)
            runs.append({"width": width, "method": "plain", "radius": None, "seed": seed, "loss": plain[0], "accuracy": plain[1]})
            for method, (build, radii) in RADII.items():
                for radius in radii:
                    loss, accuracy, share = trained(width, build(rho=radius), seed)
                    found = {"width": width, "method": method, "radius": radius, "seed": seed, "loss": loss, "accuracy": accuracy}
                    runs.append({**found, "last_layer": share})
        print(f"width {width} done", file=sys.stderr, flush=True)
    results = {"command": command(), "environment": environment(["torch", "numpy"]), "runs": runs}
    report(results, text_of(results), arguments.out)
    return 0


def text_of(results: dict[str, Any]) -> str:
    """The table, from stored runs."""
    runs = results["runs"]
    widths = sorted({one["width"] for one in runs})

    def mean(key: str, **which: Any) -> float:
        return float(np.mean([one[key] for one in runs if all(one[name] == value for name, value in which.items())]))

    rows: list[tuple[str, ...]] = []
    for method, (_, radii) in RADII.items():
        losses = {width: [mean("loss", method=method, width=width, radius=radius) for radius in radii] for width in widths}
        first = int(np.argmin(losses[widths[0]]))
        for width in widths:
            best = min(losses[width])
            share = mean("last_layer", method=method, width=width, radius=radii[first])
            rows.append(
                (
                    method,
                    str(width),
                    f"{radii[int(np.argmin(losses[width]))]:g}",
                    f"{best:.3f}",
                    f"{losses[width][first]:.3f}",
                    f"{mean('loss', method='plain', width=width):.3f}",
                    f"{100 * share:.0f} %",
                )
            )
    header = ("method", "width", "best radius", "test loss there", f"at the best of width {widths[0]}", "plain", "last layer's share")
    seeds = len({one["seed"] for one in runs})
    return markdown(header, rows) + f"\n\nMeans of {seeds} seeds. {signature(results, 'torch', 'numpy')}\n"


if __name__ == "__main__":
    sys.exit(main())
