"""The formulas of the papers written naively with ``torch.func`` over a dictionary of parameters; nothing here calls the engine."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad

from gradreg import (
    Adaptive,
    ClipEach,
    Clipped,
    EmaDirection,
    FanScaled,
    Friendly,
    GradientPenalty,
    LossEquated,
    Random,
    Sparse,
    SurrogateGap,
    Unified,
    Unit,
)
from gradreg.hashing import hashed

Parameters = dict[str, Tensor]
Loss = Callable[[Parameters], Tensor]


def parameters_of(model: nn.Module) -> Parameters:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def places_of(model: nn.Module) -> dict[str, int]:
    """The place of every parameter in the model, frozen ones counted."""
    return {name: place for place, (name, _) in enumerate(model.named_parameters())}


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


def asam(loss: Loss, theta: Parameters, rho: float, eta: float, rescaled: Collection[str]) -> Parameters:
    """Kwon et al. 2021, algorithm 1: ∇L(θ + ρ·T²g/‖T·g‖), T = |θ| + η for ``rescaled`` tensors and 1 for the others."""
    g = grad(loss)(theta)
    t = {name: value.abs() + eta if name in rescaled else torch.ones_like(value) for name, value in theta.items()}
    size = norm({name: t[name] * v for name, v in g.items()})
    return grad(loss)(plus(theta, rho / size, {name: t[name] ** 2 * v for name, v in g.items()}))


def layerwise(loss: Loss, theta: Parameters, rho: float, eta: float, rescaled: Collection[str]) -> Parameters:
    """The same with one number for each tensor, T = ‖θ_ℓ‖ + η (Müller et al. 2023)."""
    g = grad(loss)(theta)
    t = {name: value.norm() + eta if name in rescaled else torch.ones(()) for name, value in theta.items()}
    size = norm({name: t[name] * v for name, v in g.items()})
    return grad(loss)(plus(theta, rho / size, {name: t[name] ** 2 * v for name, v in g.items()}))


def le_sam(loss: Loss, theta: Parameters, sigma: float, rho_max: float) -> Parameters:
    """Wang et al. 2026: ρ_t = min(σ_t/‖g‖, ρ_max), ∇L(θ + ρ_t·g/‖g‖)."""
    g = grad(loss)(theta)
    rho = min(sigma / float(norm(g)), rho_max)
    return grad(loss)(plus(theta, rho / norm(g), g))


def unified_sam(loss: Loss, theta: Parameters, rho: float, lam: float) -> Parameters:
    """Oikonomou and Loizou 2025: ∇L(θ + ρ·(1 − λ + λ/‖g‖)·g)."""
    g = grad(loss)(theta)
    return grad(loss)(plus(theta, rho * (1 - lam + lam / norm(g)), g))


def mup2(loss: Loss, theta: Parameters, rho: float) -> Parameters:
    """Haas et al. 2024, with fans: ρ·(n_out/n_in)·∇_W for each matrix W, divided by the norm over all √(n_out/n_in)·∇_W."""
    g = grad(loss)(theta)
    ratio = {name: v.shape[0] / (v.shape[1] if v.dim() == 2 else 1) for name, v in g.items()}
    size = sum(ratio[name] * v.square().sum() for name, v in g.items()) ** 0.5
    return grad(loss)(plus(theta, rho / size, {name: ratio[name] * v for name, v in g.items()}))


def limited(g: Parameters, most: float) -> Parameters:
    """``clip_grad_norm_``: no longer than ``most``."""
    return scaled(min(1.0, most / float(norm(g))), g)


def fgr_clipped(loss: Loss, theta: Parameters, gamma: float, epsilon: float, most: float) -> Parameters:
    """Ackermann et al. 2026, their code: g₁ ← clip(g₁), g₂ ← clip(∇L(θ + ε·g₁)), g₁ + (γ/ε)·(g₂ − g₁)."""
    first = limited(grad(loss)(theta), most)
    second = limited(grad(loss)(plus(theta, epsilon, first)), most)
    return total(first, scaled(gamma / epsilon, second), scaled(-gamma / epsilon, first))


def friendly(loss: Loss, theta: Parameters, m: Parameters, rho: float, sigma: float, decay: float) -> tuple[Parameters, Parameters]:
    """Li et al. 2024, algorithm 1: m ← λm + (1 − λ)g, d = g − σm, ∇L(θ + ρd/‖d‖); returns it and m."""
    g = grad(loss)(theta)
    m = total(scaled(decay, m), scaled(1 - decay, g))
    d = total(g, scaled(-sigma, m))
    return grad(loss)(plus(theta, rho / norm(d), d)), m


def gsam(loss: Loss, theta: Parameters, rho: float, a: float) -> Parameters:
    """Zhuang et al. 2022, algorithm 1: ∇f_p − α·∇f_⊥, the second part that of ∇f orthogonal to ∇f_p."""
    g, there = grad(loss)(theta), sam(loss, theta, rho)
    cosine = inner(g, there) / (norm(g) * norm(there))
    vertical = total(g, scaled(-norm(g) * cosine / norm(there), there))
    return total(there, scaled(-a, vertical))


def looksam(loss: Loss, theta: Parameters, t: int, g_v: Parameters, rho: float, k: int, a: float) -> tuple[Parameters, Parameters]:
    """Liu et al. 2022, algorithm 1: the gradient of step ``t`` and g_v."""
    g = grad(loss)(theta)
    if t % k == 0:
        g_s = grad(loss)(plus(theta, rho / norm(g), g))
        cosine = inner(g, g_s) / (norm(g) * norm(g_s))
        return g_s, total(g_s, scaled(-norm(g_s) * cosine / norm(g), g))
    return total(g, scaled(a * norm(g) / norm(g_v), g_v)), g_v


def inner(a: Parameters, b: Parameters) -> Tensor:
    return sum((a[name] * b[name]).sum() for name in a)  # type: ignore[return-value]


def draw(seed: int, counter: int, place: int, size: int) -> Tensor:
    """``size`` words of 32 bits."""
    return torch.tensor([hashed(hashed(hashed(seed, counter), place), i) for i in range(size)], dtype=torch.int64)


def draw_signs(seed: int, counter: int, place: int, size: int) -> Tensor:
    """+1 or −1 for every coordinate of a tensor, of which 32 share a word, the lowest bit first."""
    words = draw(seed, counter, place, size // 32 + 1).tolist()
    return torch.tensor([2.0 * (words[i // 32] >> i % 32 & 1) - 1 for i in range(size)], dtype=torch.float64)


def largest_of(g: Parameters, share: float) -> Parameters:
    """1 for the ``share`` of coordinates with the largest squares, else 0."""
    squares = torch.cat([v.flatten() for v in g.values()]).square()
    smallest = squares.topk(max(1, round(share * len(squares)))).values[-1]
    return {name: (v.square() >= smallest).to(v.dtype) for name, v in g.items()}


@dataclass
class Remembered:
    """What earlier steps left: an average, a reused part, and a mask with the number of its choice."""

    average: Parameters = field(default_factory=dict)
    reused: Parameters = field(default_factory=dict)
    mask: Parameters = field(default_factory=dict)
    period: int | None = None

    def take_in(self, decay: float, g: Parameters) -> Parameters:
        self.average = {n: decay * self.average.get(n, torch.zeros_like(v)) + (1 - decay) * v for n, v in g.items()}
        return self.average


def family(
    penalty: GradientPenalty,
    loss: Loss | Sequence[Loss],
    theta: Parameters,
    *,
    step: int = 0,
    ascent: Loss | None = None,
    perturbed: Collection[str] | None = None,
    memory: Remembered | None = None,
    places: Mapping[str, int] | None = None,
) -> Parameters:
    """Any penalty: the difference quotient of the table stands for H·d, each gradient is evaluated where the tables say.

    Args:
        loss: the loss, or one for each rank: each has a direction of its own, what they find is averaged.
        ascent: the loss whose gradient gives d; ``loss`` by default.
        perturbed: the names that are moved and counted in the norm; all by default.
        memory: what earlier steps left, changed to what this one leaves; nothing by default.
        places: of the parameters in the model, for what is drawn; their order in ``theta`` by default.
    """
    losses, memory = [loss] if callable(loss) else list(loss), memory or Remembered()
    moves = [name for name in theta if perturbed is None or name in perturbed]
    places = places or {name: place for place, name in enumerate(theta)}
    direction, mixing, strength, radius = penalty.direction, penalty.mixing, penalty.strength_at(step), penalty.radius_at(step)
    plain = [grad(own)(theta) for own in losses]
    g = mean(plain)
    seen = mean([{name: grad(ascent or own)(theta)[name] for name in moves} for own in losses])
    if isinstance(direction, Friendly):
        memory.take_in(direction.beta, seen if strength > 0 else {name: g[name] for name in moves})
    if strength == 0 or (penalty.reuse is not None and step % penalty.reuse.k != 0):
        if isinstance(direction, EmaDirection):
            memory.take_in(direction.decay, {name: g[name] for name in moves})
        reuse = penalty.reuse if strength > 0 and memory.reused else None
        return g if reuse is None else total(g, scaled(reuse.a * norm(g) / norm(memory.reused), memory.reused))
    if isinstance(penalty.mask, Sparse) and memory.period != step // penalty.mask.every:
        memory.period, share = step // penalty.mask.every, 1 - penalty.mask.sparsity
        memory.mask = (
            largest_of(seen, share)
            if penalty.mask.choice == "fisher"
            else {
                name: (draw(penalty.mask.seed, memory.period, places[name], theta[name].numel()) < share * 2**32)
                .view_as(theta[name])
                .double()
                for name in moves
            }
        )
    found = [moved_by(penalty, own, theta, ascent or own, moves, memory, places, step, strength, radius) for own in losses]
    result = mean(found)
    if isinstance(mixing, SurrogateGap):
        result = total(result, scaled(-mixing.a, g), scaled(mixing.a * inner(g, result) / inner(result, result), result))
    elif isinstance(mixing, ClipEach):
        c = strength / radius * (1 if penalty.difference == "forward" else -1)  # type: ignore[operator]  # it has a radius
        second = total(result, scaled(c - 1, g))  # c times the second gradient
        result = total(scaled(1 - c, limited(g, mixing.max_norm)), limited(second, abs(c) * mixing.max_norm))
    elif penalty.reuse is not None:
        memory.reused = total(result, scaled(-inner(g, result) / inner(g, g), g))
    elif penalty.decoupled:
        result = g
    if isinstance(direction, EmaDirection):
        memory.take_in(direction.decay, {name: result[name] for name in moves})
    return result


def moved_by(
    penalty: GradientPenalty,
    loss: Loss,
    theta: Parameters,
    ascent: Loss,
    moves: Sequence[str],
    memory: Remembered,
    places: Mapping[str, int],
    step: int,
    strength: float,
    radius: float | None,
) -> Parameters:
    """g + strength·(difference quotient along d), with mixing "plain" or "unit"."""
    g = grad(loss)(theta)

    def along(at: Parameters) -> tuple[Parameters, float | Tensor]:
        v, size = formed(penalty, {name: grad(ascent)(at)[name] for name in moves}, theta, memory, places, step)
        v = {name: value * memory.mask.get(name, 1.0) for name, value in v.items()}
        return (scaled(1 / size, v) if penalty.power == 1 and size > 0 else v), size

    d, size = along(theta)
    if radius is None:
        fixed = {name: v.detach() for name, v in d.items()}
        hessian_product = grad(lambda at: sum((grad(loss)(at)[name] * v).sum() for name, v in fixed.items()))(theta)
        return total(g, scaled(strength, hessian_product))
    steps = penalty.ascent_steps
    forward = plus(theta, radius / steps, d)
    for _ in range(1, steps):
        forward = plus(forward, radius / steps, along(forward)[0])
    there, back = grad(loss)(forward), grad(loss)(plus(theta, -radius, d))
    start, end, width = {
        "forward": (g, there, radius),
        "backward": (back, g, radius),
        "central": (back, there, 2 * radius),
    }[penalty.difference]
    mixed = total(g, scaled(strength / width, end), scaled(-strength / width, start))
    if penalty.mixing == Unit():
        c = strength / radius
        mixed = total(mixed, scaled((1 - c) * (1 / size - 1), g))
    return mixed


def formed(
    penalty: GradientPenalty, g: Parameters, theta: Parameters, memory: Remembered, places: Mapping[str, int], step: int
) -> tuple[Parameters, Tensor | float]:
    """v and ‖w‖ of the table of directions."""
    direction = penalty.direction
    if isinstance(direction, Adaptive):
        sizes = {n: (theta[n].abs() if direction.scale == "element" else theta[n].norm()) + direction.eta for n in g}
        t = {n: sizes[n] if theta[n].dim() > 1 or direction.one_dimensional else torch.ones_like(theta[n]) for n in g}
        return {n: t[n] ** 2 * v for n, v in g.items()}, norm({n: t[n] * v for n, v in g.items()})
    if isinstance(direction, Friendly):
        g = total(g, scaled(-direction.sigma, memory.average))
    elif isinstance(direction, FanScaled):
        t = {n: fan_scale(theta[n], direction.layout or "out-in") for n in g}
        return {n: t[n] ** 2 * v for n, v in g.items()}, norm({n: t[n] * v for n, v in g.items()})
    elif isinstance(direction, LossEquated):
        sigma, size = penalty.radius_at(step), norm(g)
        return scaled(min(sigma / float(size), direction.rho_max) / sigma / size, g), size  # type: ignore[operator]  # it has a radius
    elif isinstance(direction, Unified):
        lam = {"1/t": 1 / (step + 1), "1-1/t": 1 - 1 / (step + 1)}.get(direction.lam, direction.lam)  # type: ignore[arg-type]
        return scaled(1 - lam + lam / norm(g), g), norm(g)  # type: ignore[operator]
    elif isinstance(direction, Clipped):
        return limited(g, direction.max_norm), norm(g)
    elif isinstance(direction, EmaDirection):
        sign = -1 if direction.ahead else 1
        g = {n: sign * memory.average.get(n, torch.zeros_like(v)) for n, v in g.items()}
    elif isinstance(direction, Random):
        g = {n: draw_signs(direction.seed, step, places[n], v.numel()).view_as(v).to(theta[n].dtype) for n, v in g.items()}
    return g, norm(g)


def fan_scale(weight: Tensor, layout: str) -> float:
    """√(fan_out/fan_in), a bias having one input."""
    if weight.dim() == 1:
        return len(weight) ** 0.5
    fan_out, fan_in = weight.shape if layout == "out-in" else reversed(weight.shape)
    return (fan_out / fan_in) ** 0.5


def mean(terms: Sequence[Parameters]) -> Parameters:
    return scaled(1 / len(terms), total(*terms))
