"""Mixing the plain gradient g and the sum P of weighted gradients that are held side by side."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from gradreg.jax.amounts import Amounts, decided
from gradreg.jax.memory import CORRECTION, REUSED, State
from gradreg.jax.perturbation import Tree, combined, safe_ratio, widened
from gradreg.mixing import Decoupled, GradientMixing, Reuse, SurrogateGap


def mixed(mixing: GradientMixing, amounts: Amounts, plain: Tree, result: Tree, state: State) -> tuple[Tree, State]:
    """The result G of the table in ``gradreg.mixing`` and the state after it; ``result`` is g where nothing penalised was evaluated."""
    if isinstance(mixing, SurrogateGap):
        return decided(amounts.fresh, lambda: _without_gap(mixing.a, plain, result), lambda: plain), state
    if isinstance(mixing, Decoupled):
        correction = jax.tree.map(lambda p, g: widened(p) - widened(g), result, plain)
        return plain, {**state, CORRECTION: _like(correction, state[CORRECTION])}
    if isinstance(mixing, Reuse):

        def found() -> tuple[Tree, Tree]:
            return result, _like(_orthogonal(result, plain), state[REUSED])

        def reused() -> tuple[Tree, Tree]:
            return decided(amounts.acts, lambda: _with_reused(mixing.a, plain, state[REUSED]), lambda: plain), state[REUSED]

        gradients, kept = decided(amounts.fresh, found, reused)
        return gradients, {**state, REUSED: kept}
    raise TypeError(f"mixing must be one of gradreg's; got {type(mixing).__name__}. Use SurrogateGap, Decoupled or Reuse.")


def _without_gap(a: float, plain: Tree, result: Tree) -> Tree:
    """P − a·(part of g orthogonal to P)."""
    along = safe_ratio(_inner(plain, result), _inner(result, result))
    return combined([(1.0 + a * along, result), (-a, plain)])


def _orthogonal(result: Tree, plain: Tree) -> Tree:
    """The part of P orthogonal to g, at least 32 bits wide."""
    along = safe_ratio(_inner(plain, result), _inner(plain, plain))
    return jax.tree.map(lambda p, g: widened(p) - along.astype(widened(g).dtype) * widened(g), result, plain)


def _with_reused(a: float, plain: Tree, reused: Tree) -> Tree:
    """g + a·(‖g‖ / ‖h‖)·h; g where h is 0."""
    ratio = safe_ratio(jnp.sqrt(_inner(plain, plain)), jnp.sqrt(_inner(reused, reused)))
    return combined([(1.0, plain), (a * ratio, reused)])


def _inner(first: Tree, second: Tree) -> jax.Array:
    """The inner product over all leaves together."""
    products: Any = jax.tree.map(lambda a, b: jnp.sum(widened(a) * widened(b)), first, second)
    return sum(jax.tree.leaves(products))  # type: ignore[return-value]  # there is a leaf


def _like(tree: Tree, state: Tree) -> Tree:
    return jax.tree.map(lambda leaf, before: leaf.astype(before.dtype), tree, state)
