"""The edge of stability: full-batch gradient descent and SAM sharpen until a step is as long as the curvature allows, and stay there.

Gradient descent of learning rate η raises the largest eigenvalue λ of the Hessian ("progressive sharpening") until it hovers at 2/η, where
a quadratic would begin to oscillate, and the loss still falls over many steps. SAM does so at an edge of its own,
``stability.sam_edge``, which lies below 2/η and sinks with the gradient's norm.

Source: Cohen et al. 2021, arXiv 2103.00065 (gradient descent); Long and Bartlett 2023, arXiv 2309.12488, section 4 (SAM, on MNIST).
Differs from the paper: a smaller network (the paper's has three hidden layers of 1,000 units), so that it takes minutes of a CPU.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gradreg import checks
from gradreg.constructors import sam
from gradreg.theory.sparse_regression import Array
from gradreg.theory.stability import sam_edge

if TYPE_CHECKING:
    from torch import Tensor

CLASSES = 10


@dataclass(frozen=True)
class Problem:
    """What is trained on.

    Attributes:
        x: inputs, shape (n, d), float32.
        y: one-hot targets, shape (n, 10), float32.
    """

    x: Tensor
    y: Tensor


def mnist(root: Path, *, samples: int) -> Problem:
    """The first ``samples`` training images of MNIST under ``root``, each pixel centered and scaled.

    Args:
        root: the folder that holds ``MNIST/raw/train-images-idx3-ubyte``, torchvision's layout.
        samples: 1 to 60,000.

    Raises:
        ValueError: no such files.
    """
    from torchvision.datasets import MNIST

    checks.whole("samples", samples, minimum=1)
    try:
        found = MNIST(root, train=True, download=False)
    except RuntimeError as error:
        raise ValueError(
            f"root must hold MNIST's files as torchvision lays them out, MNIST/raw/train-images-idx3-ubyte; got {str(root)!r}, which does "
            "not. Name their folder, or take data that are made: synthetic."
        ) from error
    if samples > len(found):
        raise ValueError(f"samples must be at most {len(found)}, MNIST's training images; got {samples}.")
    return _problem(found.data[:samples].reshape(samples, -1).float() / 255, found.targets[:samples])


def synthetic(*, samples: int, features: int = 64, seed: int = 0) -> Problem:
    """Ten overlapping classes of normal numbers, feature j scaled by 1/j: hard enough that training sharpens within some hundred steps.

    Args:
        samples: n ≥ 1.
        features: d ≥ 1.
        seed: ≥ 0.
    """
    import torch

    checks.whole("samples", samples, minimum=1)
    random = torch.Generator().manual_seed(checks.whole("seed", seed, minimum=0))
    centers = torch.randn(CLASSES, checks.whole("features", features, minimum=1), generator=random) / 2
    labels = torch.randint(CLASSES, (samples,), generator=random)
    noise = torch.randn(samples, features, generator=random)
    return _problem((centers[labels] + noise) / torch.arange(1, features + 1), labels)


def _problem(x: Tensor, labels: Tensor) -> Problem:
    import torch

    x = (x - x.mean(dim=0)) / x.std()
    return Problem(x, torch.nn.functional.one_hot(labels, CLASSES).float())


@dataclass(frozen=True, eq=False)
class EdgePath:
    """A run of full-batch training, measured every few steps.

    Attributes:
        learning_rate: η.
        rho: SAM's radius; 0 for gradient descent.
        step: optimizer steps done, shape (m,).
        loss: mean squared error there, shape (m,).
        gradient_norm: ‖g‖, shape (m,).
        sharpness: the largest eigenvalue of the Hessian, shape (m,).
        error: its estimated error, shape (m,).
        edge: the curvature at which a step overshoots: 2/η, or SAM's at the measured ‖g‖; shape (m,).
        diverged: whether the loss stopped being finite, where the records end.
    """

    learning_rate: float
    rho: float
    step: Array
    loss: Array
    gradient_norm: Array
    sharpness: Array
    error: Array
    edge: Array
    diverged: bool

    @property
    def ratio(self) -> Array:
        """λ/edge, shape (m,)."""
        return self.sharpness / self.edge

    @property
    def arrival(self) -> int | None:
        """The first measured step at which λ has reached the edge; None if it never has."""
        reached = np.flatnonzero(self.ratio >= 1.0)
        return int(self.step[reached[0]]) if reached.size else None

    def settled(self) -> tuple[float, float, float]:
        """Median and quartiles of λ/edge from the arrival on; NaN without one."""
        if (arrival := self.arrival) is None:
            return math.nan, math.nan, math.nan
        low, middle, high = np.quantile(self.ratio[self.step >= arrival], [0.25, 0.5, 0.75])
        return float(middle), float(low), float(high)


def follow(
    problem: Problem,
    *,
    learning_rate: float,
    rho: float = 0.0,
    steps: int = 1000,
    every: int = 20,
    hidden: Sequence[int] = (100, 100),
    tolerance: float = 0.01,
    seed: int = 0,
) -> EdgePath:
    """Train a tanh network on all samples at once with ``gradreg.torch``, and measure the Hessian's largest eigenvalue on the way.

    The loss is ½‖f(x) − y‖², averaged over the samples.

    Args:
        problem: inputs and targets.
        learning_rate: η > 0.
        rho: SAM's radius ≥ 0; 0 is gradient descent.
        steps: optimizer steps ≥ 1.
        every: steps from one measurement to the next, ≥ 1.
        hidden: widths of the hidden layers, each ≥ 1.
        tolerance: of the eigenvalue, relative, > 0.
        seed: of the initial weights, ≥ 0; the same for every η and ρ.

    Cost: a gradient a step, two of SAM, and 30 to 60 gradients a measurement.
    """
    import torch

    from gradreg import sharpness
    from gradreg.torch import GradientRegularizer

    rate, radius = checks.positive("learning_rate", learning_rate), checks.non_negative("rho", rho)
    checks.whole("steps", steps, minimum=1)
    checks.whole("every", every, minimum=1)
    widths = [problem.x.shape[1], *(checks.whole("hidden", width, minimum=1) for width in hidden), CLASSES]
    random = torch.Generator().manual_seed(checks.whole("seed", seed, minimum=0))
    layers: list[torch.nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layer = torch.nn.Linear(inputs, outputs)
        with torch.no_grad():
            layer.weight.copy_(torch.randn(outputs, inputs, generator=random) * 0.5 * inputs**-0.5)
            layer.bias.zero_()
        layers += [layer, torch.nn.Tanh()]
    model = torch.nn.Sequential(*layers[:-1])
    regularizer = GradientRegularizer(model, sam(rho=radius) if radius > 0 else None)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)

    def loss() -> Tensor:
        return (model(problem.x) - problem.y).square().sum(dim=1).mean() / 2

    records: list[tuple[float, ...]] = []
    diverged = False
    for step in range(steps + 1):
        if step % every == 0:
            try:
                found = sharpness.eigenvalues(model, loss, tolerance=tolerance)
            except ValueError:  # the loss is not finite, or cannot be differentiated where it has gone
                diverged = True
                break
            norm = found.gradient_norm
            edge = sam_edge(norm, radius, learning_rate=rate)
            records.append((step, found.loss, norm, float(found.values[0]), float(found.errors[0]), edge))
        if step < steps:
            optimizer.zero_grad()
            regularizer.backward(loss)
            optimizer.step()
    if not records:
        raise ValueError("the loss must be finite before the first step; got one that is not. Scale the inputs.")
    table = np.array(records)
    return EdgePath(rate, radius, *table.T, diverged=diverged)
