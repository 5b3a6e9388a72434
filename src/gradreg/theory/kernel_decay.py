"""The decay of the tangent kernel of a wide bias-free ReLU network under L2, and the linear equation for its outputs.

A network with k weight layers and no biases is k-homogeneous. Under gradient flow on ½Σ(f − y)² + ½λ‖θ‖², at infinite width:

    Θ_t = e^{−2(k−1)λt} Θ₀        ḟ = −Θ_t (f − y) − kλ f

Source: Lewkowycz and Gur-Ari 2020, arXiv 2006.08643, theorem 1.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from gradreg import checks
from gradreg.extras import needing

with needing("gradreg.theory.kernel_decay", "theory"):
    import numpy as np
    from numpy.typing import NDArray
    from scipy.integrate import solve_ivp

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class KernelDecay:
    """One network's flow compared with the theorem. m is the number of recorded times, s the number of samples.

    Attributes:
        time: shape (m,), in units of the flow's time (learning rate × steps).
        ratio: ‖Θ_t‖/‖Θ₀‖ (Frobenius) of the network, shape (m,).
        predicted: e^{−2(k−1)λt}, shape (m,).
        rotation: angle in degrees between each eigenvector of Θ₀ (largest eigenvalue first) and its successor in Θ_t, shape (m, s);
            0 at infinite width.
        loss: ½Σ(f − y)² of the network, shape (m,).
        loss_predicted: the same for the equation, started from this network's Θ₀ and outputs, shape (m,).
    """

    time: Array
    ratio: Array
    predicted: Array
    rotation: Array
    loss: Array
    loss_predicted: Array

    @property
    def deviation(self) -> Array:
        """|ratio / predicted − 1|, shape (m,)."""
        return np.abs(self.ratio / self.predicted - 1.0)


class _Network:
    """f(x) = ∏ scaled layers with ReLU between, in NTK parameterization: weights N(0, 1), factor √(2/fan-in), 1/√fan-in for the first."""

    def __init__(self, X: Array, width: int, depth: int, random: np.random.Generator) -> None:
        sizes = [X.shape[1], *[width] * (depth - 1), 1]
        self.X = X
        self.weights = [random.standard_normal((a, b)) for a, b in itertools.pairwise(sizes)]
        self.scales = [1 / np.sqrt(sizes[0]), *(np.sqrt(2 / a) for a in sizes[1:-1])]

    def passes(self, weights: list[Array]) -> tuple[Array, list[Array], list[Array]]:
        """Outputs f, the input of each layer, and ∂f/∂(output of each layer)."""
        inputs, outputs = [self.X], []
        for weight, scale in zip(weights, self.scales, strict=True):
            outputs.append(scale * (inputs[-1] @ weight))
            inputs.append(np.maximum(outputs[-1], 0.0))
        slopes = [np.ones((self.X.shape[0], 1))]
        for layer in range(len(weights) - 1, 0, -1):
            back = self.scales[layer] * (slopes[0] @ weights[layer].T)
            slopes.insert(0, back * (outputs[layer - 1] > 0))
        return outputs[-1][:, 0], inputs[:-1], slopes

    def gradient(self, weights: list[Array], y: Array, l2: float) -> list[Array]:
        f, inputs, slopes = self.passes(weights)
        residual = (f - y)[:, None]
        return [
            scale * (a.T @ (b * residual)) + l2 * weight for a, b, scale, weight in zip(inputs, slopes, self.scales, weights, strict=True)
        ]

    def outputs_and_kernel(self) -> tuple[Array, Array]:
        """f and Θ = Σ over layers of ⟨∂f(x)/∂W, ∂f(x′)/∂W⟩."""
        f, inputs, slopes = self.passes(self.weights)
        return f, np.sum([s**2 * (a @ a.T) * (b @ b.T) for a, b, s in zip(inputs, slopes, self.scales, strict=True)], axis=0)

    def step(self, size: float, y: Array, l2: float) -> None:
        """One classical Runge–Kutta step of the gradient flow."""
        start = self.weights

        def moved(slope: list[Array], share: float) -> list[Array]:
            return [w - share * size * k for w, k in zip(start, slope, strict=True)]

        k1 = self.gradient(start, y, l2)
        k2 = self.gradient(moved(k1, 0.5), y, l2)
        k3 = self.gradient(moved(k2, 0.5), y, l2)
        k4 = self.gradient(moved(k3, 1.0), y, l2)
        slopes = [(a + 2 * b + 2 * c + d) / 6 for a, b, c, d in zip(k1, k2, k3, k4, strict=True)]
        self.weights = moved(slopes, 1.0)


def simulate(
    depth: int,
    width: int,
    l2: float,
    *,
    end_time: float = 7.5,
    samples: int = 8,
    features: int = 10,
    step: float = 0.05,
    points: int = 31,
    seed: int = 0,
) -> KernelDecay:
    """Follow a ReLU network under L2 by gradient flow and compare it with the infinite-width theorem.

    Inputs and targets are N(0, 1); weights are N(0, 1) in NTK parameterization with ReLU's factor √2.

    Args:
        depth: k, weight layers, ≥ 2.
        width: units of each hidden layer, ≥ 1.
        l2: λ ≥ 0 of ½λ‖θ‖² (PyTorch's coupled ``weight_decay``).
        end_time: T > 0, in units of the flow's time.
        samples: ≥ 1.
        features: input dimensions, ≥ 1.
        step: largest Runge–Kutta step, > 0; its product with the largest curvature (about 2·samples) must stay below 2.7.
        points: recorded times, evenly spaced over [0, T], ≥ 2.
        seed: of ``numpy.random.default_rng``, ≥ 0: the data first, then the weights.

    Raises:
        ValueError, TypeError: a value outside its range, or a step so large that the flow overflows.

    Cost: 4·T/step gradients; 1 s at depth 2, width 4096, T = 7.5.
    Source: Lewkowycz and Gur-Ari 2020, arXiv 2006.08643.
    """
    k = checks.whole("depth", depth, minimum=2, remedy="A single layer is linear, and its kernel constant.")
    width = checks.whole("width", width, minimum=1)
    l2 = checks.non_negative("l2", l2)
    end, step = checks.positive("end_time", end_time), checks.positive("step", step)
    count = checks.whole("points", points, minimum=2)
    n, d = checks.whole("samples", samples, minimum=1), checks.whole("features", features, minimum=1)
    random = np.random.default_rng(checks.whole("seed", seed, minimum=0))
    X, y = random.standard_normal((n, d)), random.standard_normal(n)
    network = _Network(X, width, k, random)
    times = np.linspace(0.0, end, count)
    steps = int(np.ceil((times[1] - times[0]) / step))
    f0, kernel0 = network.outputs_and_kernel()
    records = [(f0, kernel0)]
    with np.errstate(over="ignore", invalid="ignore"):
        for _ in times[1:]:
            for _ in range(steps):
                network.step((times[1] - times[0]) / steps, y, l2)
            records.append(network.outputs_and_kernel())
            if not (np.isfinite(records[-1][0]).all() and np.isfinite(records[-1][1]).all()):
                raise ValueError(f"step must be small enough for the flow to stay finite; got {step:g}. Take step={step / 4:g}.")
    kernels = np.array([kernel for _, kernel in records])
    outputs = np.array([f for f, _ in records])
    vectors = np.linalg.eigh(kernels)[1][:, :, ::-1]
    overlap = np.abs(np.einsum("ai,tai->ti", vectors[0], vectors))
    equation = solve_ivp(
        lambda t, f: -np.exp(-2 * (k - 1) * l2 * t) * (kernel0 @ (f - y)) - k * l2 * f,
        (0.0, end),
        f0,
        t_eval=times,
        method="LSODA",
        rtol=1e-9,
        atol=1e-11,
    )
    return KernelDecay(
        time=times,
        ratio=np.linalg.norm(kernels, axis=(1, 2)) / np.linalg.norm(kernel0),
        predicted=np.exp(-2 * (k - 1) * l2 * times),
        rotation=np.degrees(np.arccos(np.minimum(overlap, 1.0))),
        loss=0.5 * np.sum((outputs - y) ** 2, axis=1),
        loss_predicted=0.5 * np.sum((equation.y.T - y) ** 2, axis=1),
    )
