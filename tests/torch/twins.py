"""The formulas of the papers written naively with ``torch.func`` over a dictionary of parameters; nothing here calls the engine."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad

from gradreg import GradientPenalty

Parameters = dict[str, Tensor]
Loss = Callable[[Parameters], Tensor]


def parameters_of(model: nn.Module) -> Parameters:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Loss:
    return lambda theta: nn.functional.mse_loss(functional_call(model, theta, (x,)), y)


def norm(g: Parameters) -> Tensor:
    return torch.cat([v.flatten() for v in g.values()]).norm()


def plus(theta: Parameters, factor: float | Tensor, d: Parameters) -> Parameters:
    return {name: value + factor * d[name] if name in d else value for name, value in theta.items()}


def scaled(factor: float | Tensor, g: Parameters) -> Parameters:
    return {name: factor * value for name, value in g.items()}


def total(*terms: Parameters) -> Parameters:
    return {name: sum(term[name] for term in terms) for name in terms[0]}  # type: ignore[misc]


def sam(loss: Loss, theta: Parameters, rho: float) -> Parameters:
    """Foret et al. 2021: ∇L(θ + ρ·g/‖g‖)."""
    g = grad(loss)(theta)
    return grad(loss)(plus(theta, rho / norm(g), g))


def gnp(loss: Loss, theta: Parameters, r: float, alpha: float) -> Parameters:
    """Zhao et al. 2022, algorithm 1: (1 − α)·g + α·∇L(θ + r·g/‖g‖)."""
    g = grad(loss)(theta)
    return total(scaled(1 - alpha, g), scaled(alpha, grad(loss)(plus(theta, r / norm(g), g))))


def gnp_unit(loss: Loss, theta: Parameters, r: float, alpha: float) -> Parameters:
    """The same as its authors' code computes it: (1 − α)·g/‖g‖ + α·∇L(θ + r·g/‖g‖)."""
    g = grad(loss)(theta)
    return total(scaled((1 - alpha) / norm(g), g), scaled(alpha, grad(loss)(plus(theta, r / norm(g), g))))


def fgr(loss: Loss, theta: Parameters, gamma: float | Tensor, epsilon: float | Tensor) -> Parameters:
    """Karakida et al. 2023: g + (γ/ε)·[∇L(θ + ε·g) − g]."""
    g = grad(loss)(theta)
    return total(g, scaled(gamma / epsilon, grad(loss)(plus(theta, epsilon, g))), scaled(-gamma / epsilon, g))


def bgr(loss: Loss, theta: Parameters, gamma: float, epsilon: float) -> Parameters:
    """Karakida et al. 2023: g + (γ/ε)·[g − ∇L(θ − ε·g)]."""
    g = grad(loss)(theta)
    return total(g, scaled(gamma / epsilon, g), scaled(-gamma / epsilon, grad(loss)(plus(theta, -epsilon, g))))


def cgr(loss: Loss, theta: Parameters, gamma: float, epsilon: float) -> Parameters:
    """Karakida et al. 2023: g + (γ/2ε)·[∇L(θ + ε·g) − ∇L(θ − ε·g)]."""
    g = grad(loss)(theta)
    forward, backward = grad(loss)(plus(theta, epsilon, g)), grad(loss)(plus(theta, -epsilon, g))
    return total(g, scaled(gamma / (2 * epsilon), forward), scaled(-gamma / (2 * epsilon), backward))


def double_backprop(loss: Loss, theta: Parameters, strength: float, power: int, perturbed: Collection[str] | None = None) -> Parameters:
    """The gradient of L + strength·‖g‖ (power 1) or L + (strength/2)·‖g‖² (power 2), by differentiating the penalty itself."""

    def penalised(theta: Parameters) -> Tensor:
        g = {name: value for name, value in grad(loss)(theta).items() if perturbed is None or name in perturbed}
        squared = sum((v * v).sum() for v in g.values())
        return loss(theta) + (strength * squared.sqrt() if power == 1 else strength / 2 * squared)  # type: ignore[union-attr]

    return grad(penalised)(theta)


def family(
    penalty: GradientPenalty,
    loss: Loss,
    theta: Parameters,
    *,
    step: int = 0,
    ascent: Loss | None = None,
    perturbed: Collection[str] | None = None,
) -> Parameters:
    """Any penalty as g + strength·H·d, the difference quotient standing for H·d, each gradient evaluated where the table says.

    Args:
        ascent: the loss whose gradient gives d; ``loss`` by default.
        perturbed: the names that are moved and counted in the norm; all by default.
    """
    strength, radius = penalty.strength_at(step), penalty.radius_at(step)
    g = grad(loss)(theta)
    if strength == 0:
        return g
    d = {name: v for name, v in grad(ascent or loss)(theta).items() if perturbed is None or name in perturbed}
    size = norm(d)
    d = scaled(1 / size, d) if penalty.power == 1 else d
    if radius is None:
        along = {name: v.detach() for name, v in d.items()}
        hessian_product = grad(lambda at: sum((grad(loss)(at)[name] * v).sum() for name, v in along.items()))(theta)
        return total(g, scaled(strength, hessian_product))
    there, back = (grad(loss)(plus(theta, sign * radius, d)) for sign in (1, -1))
    start, end, width = {
        "forward": (g, there, radius),
        "backward": (back, g, radius),
        "central": (back, there, 2 * radius),
    }[penalty.difference]
    mixed = total(g, scaled(strength / width, end), scaled(-strength / width, start))
    if penalty.mixing == "unit":
        c = strength / radius
        mixed = total(mixed, scaled((1 - c) * (1 / size - 1), g))
    return mixed
