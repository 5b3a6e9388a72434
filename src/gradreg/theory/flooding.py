"""Flooding near its level is gradient regularization: two of its steps equal one step of F-GR or B-GR with ε = η.

Flooding with level b trains on |L − b| + b, whose gradient is sign(L − b)·g. With steps of size η on one batch:

- a step below b, then one above:  θ − η²·ΔR_F(η),  ΔR_F(ε) = [∇L(θ + εg) − g]/ε
- a step above b, then one below:  θ − η²·ΔR_B(η),  ΔR_B(ε) = [g − ∇L(θ − εg)]/ε

Source: Ishida et al. 2020, arXiv 2002.08709 (flooding); Karakida et al. 2023, arXiv 2210.02720 (the identity).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gradreg import checks
from gradreg.constructors import bgr, fgr
from gradreg.extras import needing
from gradreg.penalties import GradientPenalty

with needing("gradreg.theory.flooding", "theory"):
    import numpy as np

    from gradreg.theory.sparse_regression import Array

if TYPE_CHECKING:
    import torch

    from gradreg.torch import GradientRegularizer


class _Regression:
    """A float64 network of one tanh layer on a fixed noisy regression problem, and its gradients from the PyTorch engine."""

    def __init__(self, width: int, seed: int, samples: int = 32, features: int = 5) -> None:
        import torch

        random = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=random, dtype=torch.float64)

        self.X = normal(samples, features)
        self.y = torch.sin(self.X[:, :1]) + 0.5 * normal(samples, 1)
        self.model = torch.nn.Sequential(torch.nn.Linear(features, width), torch.nn.Tanh(), torch.nn.Linear(width, 1)).double()
        with torch.no_grad():
            for parameter in self.model.parameters():
                scale = parameter.shape[1] ** -0.5 if parameter.ndim == 2 else 0.0
                parameter.copy_(scale * normal(*parameter.shape))
        self._regularizers: dict[GradientPenalty | None, GradientRegularizer] = {}

    def weights(self) -> torch.Tensor:
        """All parameters as one vector, a copy."""
        import torch

        return torch.cat([p.detach().flatten() for p in self.model.parameters()])

    def set_weights(self, vector: torch.Tensor) -> None:
        import torch

        torch.nn.utils.vector_to_parameters(vector, self.model.parameters())

    def loss(self) -> torch.Tensor:
        """The mean squared error, by a forward pass."""
        return ((self.model(self.X) - self.y) ** 2).mean()

    def gradient(self, penalty: GradientPenalty | None = None) -> tuple[float, torch.Tensor]:
        """The loss and the regularized gradient at the current weights, from ``GradientRegularizer``."""
        import torch

        from gradreg.torch import GradientRegularizer

        if penalty not in self._regularizers:
            self._regularizers[penalty] = GradientRegularizer(self.model, penalty)
        self.model.zero_grad()
        loss = self._regularizers[penalty].backward(self.loss)
        return loss.item(), torch.cat([p.grad.flatten() for p in self.model.parameters() if p.grad is not None])


@dataclass(frozen=True)
class TwoSteps:
    """How far two steps of flooding end from one step of explicit gradient regularization, from the same weights.

    Attributes:
        forward_error: largest difference of a weight, a step below the level then one above, against F-GR.
        backward_error: the same, above then below, against B-GR.
        moved: ‖η²ΔR_F‖, the size of the compared steps.
    """

    forward_error: float
    backward_error: float
    moved: float


def two_steps(*, learning_rate: float = 0.1, width: int = 32, seed: int = 0) -> TwoSteps:
    """Take two flooding steps either way and compare them with ``fgr`` and ``bgr`` of ε = η from the engine.

    The regularizer's part of the engine's gradient G is (G − g)/γ = ΔR; here γ = η/2, so that c = 1/2 and both gradients count.

    Args:
        learning_rate: η > 0, small enough that a step up raises the loss and a step down lowers it.
        width: hidden units, ≥ 1.
        seed: of data and weights, ≥ 0.

    Raises:
        ValueError: a value outside its range, or η so large that no level lies between the two losses.

    Cost: 10 gradient evaluations.
    """
    rate = checks.positive("learning_rate", learning_rate)
    network = _Regression(checks.whole("width", width, minimum=1), checks.whole("seed", seed, minimum=0))
    start = network.weights()
    loss, gradient = network.gradient()
    ends: list[torch.Tensor] = []
    for first in (-1.0, 1.0):
        network.set_weights(start - first * rate * gradient)
        other, other_gradient = network.gradient()
        if first * (loss - other) <= 0:
            raise ValueError(
                f"learning_rate must be small enough for a step up to raise the loss and a step down to lower it; got {rate:g}, for "
                f"which the loss went from {loss:.6g} to {other:.6g}. Take learning_rate={rate / 4:g}."
            )
        level = (loss + other) / 2  # the first step is taken on one side of it, the second on the other
        ends.append(network.weights() - np.sign(other - level) * rate * other_gradient)
    network.set_weights(start)
    strength = rate / 2
    forward = rate**2 * (network.gradient(fgr(gamma=strength, epsilon=rate))[1] - gradient) / strength
    backward = rate**2 * (network.gradient(bgr(gamma=strength, epsilon=rate))[1] - gradient) / strength
    return TwoSteps(
        forward_error=float((ends[0] - (start - forward)).abs().max()),
        backward_error=float((ends[1] - (start - backward)).abs().max()),
        moved=float(forward.norm()),
    )


@dataclass(frozen=True, eq=False)
class FloodingRun:
    """Flooding near its level compared with explicit F-GR. p is the number of pairs of steps; index 0 is the start of the comparison.

    Attributes:
        loss: L of flooding, shape (p + 1,).
        loss_explicit: L of explicit F-GR, shape (p + 1,).
        gradient_norm: ‖g‖ of flooding, shape (p + 1,).
        gradient_norm_explicit: ‖g‖ of explicit F-GR, shape (p + 1,).
        moved: distance of flooding from its start, shape (p + 1,).
        distance: distance between the two paths, shape (p + 1,).
        distance_held: distance of flooding from a third path, F-GR that also takes the two plain steps of every slip, shape (p + 1,).
        slips: whether both steps of pair i went the same way, shape (p,); only these separate the paths.
        approach: the number of plain steps to reach the level.
    """

    loss: Array
    loss_explicit: Array
    gradient_norm: Array
    gradient_norm_explicit: Array
    moved: Array
    distance: Array
    distance_held: Array
    slips: np.ndarray
    approach: int


def simulate(
    *, level: float = 0.2, learning_rate: float = 0.1, pairs: int = 1000, width: int = 32, seed: int = 0, approach: int = 20_000
) -> FloodingRun:
    """Descend to the level, then continue with flooding on one path and with only F-GR's regularizer on another.

    A pair of flooding steps is compared with one explicit step θ ← θ − η²·ΔR_F(η), with η·ΔR_F from ``fgr(gamma=η, epsilon=η)``. While
    flooding alternates, the two agree to rounding. Because the penalty lowers the loss too, flooding sometimes takes two steps up in a
    row ("slips"). They hold it at its level, and the explicit path does not take them. A third path, F-GR with those plain steps
    added, shows that nothing else separates the two. When a pair begins above the level, flooding performs B-GR (−η²ΔR_B) instead.

    Args:
        level: b > 0, in units of the mean squared error.
        learning_rate: η > 0.
        pairs: pairs of steps to compare, ≥ 1.
        width: hidden units, ≥ 1.
        seed: of data and weights, ≥ 0.
        approach: most plain steps allowed to reach the level, ≥ 1.

    Raises:
        ValueError: a value outside its range, or a level that plain descent does not reach.

    Cost: 8 gradient evaluations a pair; 3 s for 1000 pairs.
    """
    b, rate = checks.positive("level", level), checks.positive("learning_rate", learning_rate)
    pairs = checks.whole("pairs", pairs, minimum=1)
    seed = checks.whole("seed", seed, minimum=0)
    network = _Regression(checks.whole("width", width, minimum=1), seed)
    limit = checks.whole("approach", approach, minimum=1)
    taken = 0
    loss, gradient = network.gradient()
    while not loss < b:
        if taken == limit or not np.isfinite(loss):
            raise ValueError(
                f"level must be reached by plain descent within approach={limit} steps; got level {b:g}, and the loss is {loss:.4g} after "
                f"{taken}. Raise level, raise approach, or change learning_rate."
            )
        network.set_weights(network.weights() - rate * gradient)
        taken += 1
        loss, gradient = network.gradient()
    start = network.weights()
    flooded, explicit, held = start, start, start
    penalty = fgr(gamma=rate, epsilon=rate)
    rows: list[tuple[float, ...]] = []
    slips: list[bool] = []
    for pair in range(pairs + 1):
        network.set_weights(explicit)
        explicit_loss, explicit_gradient = network.gradient()
        regularizer = network.gradient(penalty)[1] - explicit_gradient
        network.set_weights(held)
        _, held_gradient = network.gradient()
        network.set_weights(flooded)
        loss, gradient = network.gradient()
        rows.append(
            (
                loss,
                explicit_loss,
                float(gradient.norm()),
                float(explicit_gradient.norm()),
                float((flooded - start).norm()),
                float((flooded - explicit).norm()),
                float((flooded - held).norm()),
            )
        )
        if not np.isfinite(rows[-1]).all():
            raise ValueError(
                f"learning_rate must keep both paths finite; got {rate:g}, and they diverge at pair {pair}. "
                f"Explicit F-GR has no level to hold it: take learning_rate={rate / 2:g}, or a lower level."
            )
        if pair == pairs:
            break
        explicit = explicit - rate * regularizer
        first = float(np.sign(loss - b))
        flooded = flooded - first * rate * gradient
        network.set_weights(flooded)
        loss, gradient = network.gradient()
        second = float(np.sign(loss - b))
        flooded = flooded - second * rate * gradient
        slips.append(first == second)
        network.set_weights(held)
        if first == second:
            network.set_weights(held - first * rate * held_gradient)
            held = network.weights() - second * rate * network.gradient()[1]
        else:
            held = held - rate * (network.gradient(penalty)[1] - held_gradient)
    columns = np.array(rows).T
    return FloodingRun(*columns, slips=np.array(slips), approach=taken)
