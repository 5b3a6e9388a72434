"""The tables of the specification written naively on flat vectors, memories and shards included; the engine is not called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

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

from .cases import Loss


class Twin:
    """``penalty`` step after step, for one loss or for the losses of several shards that are perturbed by their own gradients.

    After ``step``: ``plain``, the gradient that all shards agree on, and ``correction``, what a decoupled penalty keeps out of the result.
    """

    def __init__(self, penalty: GradientPenalty) -> None:
        self.penalty = penalty
        self.plain: Any = None
        self.correction: Any = None
        self._average: Any = 0.0
        self._reused: Any = None
        self._mask: Any = None
        self._period = -1

    def step(self, losses: Sequence[Loss], params: Any, step: int = 0, ascents: Sequence[Loss] | None = None) -> Any:
        """The regularized gradient, averaged over the shards; ``ascents``: the losses of the direction, if they are others."""
        penalty, direction = self.penalty, self.penalty.direction
        theta, unravel = ravel_pytree(params)
        gradients = [jax.grad(lambda at, loss=loss: loss(unravel(at))) for loss in losses]
        sources = gradients if ascents is None else [jax.grad(lambda at, loss=loss: loss(unravel(at))) for loss in ascents]
        plain = self._mean([gradient(theta) for gradient in gradients])
        fresh = penalty.strength_at(step) > 0 and (penalty.reuse is None or step % penalty.reuse.k == 0)
        if isinstance(direction, Friendly):
            agreed = self._mean([source(theta) for source in sources]) if fresh else plain
            self._average = direction.beta * self._average + (1 - direction.beta) * agreed
        if fresh:
            self._choose(params, step, self._mean([source(theta) for source in sources]))
            pairs = zip(gradients, sources, losses, strict=True)
            P = self._mean([self._penalised(params, step, *pair) for pair in pairs])
        else:
            P = plain
        G = self._mixed(plain, P, step, fresh)
        if isinstance(direction, EmaDirection):
            self._average = direction.decay * self._average + (1 - direction.decay) * G
        self.plain, self.correction = unravel(plain), unravel(P - plain)
        return unravel(G)

    def _mixed(self, g: Any, P: Any, step: int, fresh: bool) -> Any:
        mixing, reuse = self.penalty.mixing, self.penalty.reuse
        if self.penalty.decoupled:
            return g
        if isinstance(mixing, SurrogateGap) and fresh:
            return P - mixing.a * (g - (g @ P) / (P @ P) * P)
        if isinstance(mixing, ClipEach) and fresh:
            c = self.penalty.coefficient_at(step) * (1 if self.penalty.difference == "forward" else -1)
            second = (P - (1 - c) * g) / c
            return (1 - c) * self._limited(g, mixing.max_norm) + c * self._limited(second, mixing.max_norm)
        if reuse is not None and fresh:
            self._reused = P - (g @ P) / (g @ g) * g
        elif reuse is not None and self._reused is not None and self.penalty.strength_at(step) > 0:
            h = self._reused
            return g + reuse.a * jnp.linalg.norm(g) / jnp.linalg.norm(h) * h
        return P

    def _choose(self, params: Any, step: int, g: Any) -> None:
        mask = self.penalty.mask
        if not isinstance(mask, Sparse) or step // mask.every == self._period:
            return
        self._period = step // mask.every
        if mask.choice == "fisher":
            self._mask = jnp.abs(g) >= jnp.sort(jnp.abs(g))[-max(1, round((1 - mask.sparsity) * g.size))]
        else:
            words = [hashed(key, i) for key, i in self._coordinates(params, mask.seed, self._period)]
            self._mask = np.array(words, np.float64) < (1 - mask.sparsity) * 2**32

    def _penalised(self, params: Any, step: int, gradient: Any, source: Any, loss: Loss) -> Any:
        penalty = self.penalty
        theta, unravel = ravel_pytree(params)
        strength, radius = penalty.strength_at(step), penalty.radius_at(step)
        g, at = gradient(theta), theta
        if radius is None:
            d = g / jnp.linalg.norm(g) if penalty.power == 1 else g
            return g + strength * jax.hessian(lambda there: loss(unravel(there)))(theta) @ d
        for i in range(penalty.ascent_steps):
            v, w = self._ascent(params, step, source(at))
            d = v / jnp.linalg.norm(w) if penalty.power == 1 and jnp.linalg.norm(w) > 0 else v
            d = d if self._mask is None else d * self._mask
            at = at + radius / penalty.ascent_steps * d if i < penalty.ascent_steps - 1 else at
        h = radius / penalty.ascent_steps
        quotient = {
            "forward": lambda: (gradient(at + h * d) - g) / radius,
            "backward": lambda: (g - gradient(at - h * d)) / radius,
            "central": lambda: (gradient(at + h * d) - gradient(at - h * d)) / (2 * radius),
        }[penalty.difference]()
        unit = (1 - strength / radius) * (g / jnp.linalg.norm(g) - g) if penalty.mixing == Unit() else 0.0
        return g + strength * quotient + unit

    def _ascent(self, params: Any, step: int, g: Any) -> tuple[Any, Any]:
        direction = self.penalty.direction
        if isinstance(direction, Random):
            bits = [hashed(key, i // 32) >> i % 32 & 1 for key, i in self._coordinates(params, direction.seed, step)]
            v = 2.0 * np.array(bits, np.float64) - 1.0
        elif isinstance(direction, EmaDirection):
            v = (-self._average if direction.ahead else self._average) + jnp.zeros_like(g)
        elif isinstance(direction, Friendly):
            v = g - direction.sigma * self._average
        elif isinstance(direction, LossEquated):
            sigma, size = self.penalty.radius_at(step), jnp.linalg.norm(g)
            v = min(sigma / float(size), direction.rho_max) / sigma * g / size  # type: ignore[operator]  # it has a radius
        elif isinstance(direction, Unified):
            lam = {"1/t": 1 / (step + 1), "1-1/t": 1 - 1 / (step + 1)}.get(direction.lam, direction.lam)  # type: ignore[arg-type]
            v = (1 - lam + lam / jnp.linalg.norm(g)) * g  # type: ignore[operator]
        elif isinstance(direction, Clipped):
            v = self._limited(g, direction.max_norm)
        elif isinstance(direction, FanScaled):
            leaves = jax.tree.leaves(params)
            T = jnp.concatenate([jnp.full(leaf.size, self._fan_scale(leaf, direction.layout)) for leaf in leaves])
            return T**2 * g, T * g
        elif isinstance(direction, Adaptive):
            scales = [self._scale(direction, leaf) for leaf in jax.tree.leaves(params)]
            T = jnp.concatenate(scales)
            return T**2 * g, T * g
        else:
            v = g
        return v, v

    @staticmethod
    def _limited(g: Any, most: float) -> Any:
        return g * min(1.0, most / float(jnp.linalg.norm(g)))

    @staticmethod
    def _scale(direction: Adaptive, leaf: Any) -> Any:
        if leaf.ndim < 2 and not direction.one_dimensional:
            return jnp.ones(leaf.size)
        length = jnp.abs(leaf.ravel()) if direction.scale == "element" else jnp.linalg.norm(leaf.ravel()) * jnp.ones(leaf.size)
        return length + direction.eta

    @staticmethod
    def _fan_scale(leaf: Any, layout: str | None) -> float:
        if leaf.ndim < 2:
            return float(leaf.size**0.5)
        fan_out, fan_in = leaf.shape if layout == "out-in" else leaf.shape[::-1]
        return float((fan_out / fan_in) ** 0.5)

    @staticmethod
    def _coordinates(params: Any, seed: int, counter: int) -> list[tuple[int, int]]:
        """The seed of its leaf and the index in it, for every coordinate."""
        leaves = enumerate(jax.tree.leaves(params))
        return [(hashed(hashed(seed, counter), index), i) for index, leaf in leaves for i in range(leaf.size)]

    @staticmethod
    def _mean(vectors: Sequence[Any]) -> Any:
        return sum(vectors) / len(vectors)
