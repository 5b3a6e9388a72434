"""The vector along which the parameters are perturbed, and the one by whose norm a normalized perturbation is divided.

One function for each direction, found by its type. A direction of your own is registered in the same way (``docs/extending.md``)::

    @ascent_direction.register
    def _(direction: Sign, inputs: DirectionInputs) -> tuple[Tree, Tree]:
        v = jax.tree.map(jnp.sign, inputs.gradients)
        return v, v
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import singledispatch
from typing import Any

import jax
import jax.numpy as jnp

from gradreg import checks
from gradreg.directions import Adaptive, Clipped, Direction, EmaDirection, FanScaled, Friendly, Gradient, LossEquated, Random, Unified
from gradreg.jax.draws import signs
from gradreg.jax.norms import Tree, gradient_norm, safe_ratio, widened


@dataclass(frozen=True)
class DirectionInputs:
    """What a direction is formed from. Trees have the structure of the parameters.

    Args:
        params: where the gradient was taken: θ.
        gradients: g there; None for a direction that declares ``needs_gradient = False``.
        average: the EMA m that the direction declares by ``averages``: of the gradients, including this step's, or of the results of
            earlier steps; leaves that are not ``selected`` are those of ``params``. None for a direction without one.
        step: the optimizer step, an int or a traced integer; None if the call gave none. A direction that uses it declares
            ``depends_on_step``, so that it is never missing.
        selected: for each leaf, in the order of ``jax.tree.leaves``, whether it is perturbed.
        shards: for each leaf, the mapped axes over which it is divided (``norm_axes``); empty if none is.
        radius: the penalty's radius at this step, a number or a traced one.
    """

    params: Tree
    gradients: Tree | None
    average: Tree | None
    step: Any
    selected: Sequence[bool]
    shards: Sequence[tuple[str, ...]] = ()
    radius: Any = None

    def inverse_norm(self) -> jax.Array:
        """1 / ‖g‖; 0 for a zero gradient."""
        return safe_ratio(1.0, gradient_norm(self.gradients, self.selected, self.shards))


@singledispatch
def ascent_direction(direction: Direction, inputs: DirectionInputs) -> tuple[Tree, Tree]:
    """The vectors v and w of the table in ``gradreg.directions``.

    Both are trees like the parameters; leaves that are not ``inputs.selected`` are ignored.
    """
    raise TypeError(f"direction must be one that the JAX engine knows; got {checks.describe(direction)}. Register a function for it.")


@ascent_direction.register
def _(direction: Gradient, inputs: DirectionInputs) -> tuple[Tree, Tree]:
    return inputs.gradients, inputs.gradients


@ascent_direction.register
def _(direction: Adaptive, inputs: DirectionInputs) -> tuple[Tree, Tree]:
    leaves, structure = jax.tree.flatten(inputs.params)
    axes = inputs.shards or [()] * len(leaves)
    scales = structure.unflatten([_scale(direction, widened(leaf), own) for leaf, own in zip(leaves, axes, strict=True)])
    w = jax.tree.map(lambda t, g: t * widened(g), scales, inputs.gradients)
    return jax.tree.map(jnp.multiply, scales, w), w


def _scale(direction: Adaptive, leaf: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """T of one leaf, which is divided over ``axes``."""
    if leaf.ndim <= 1 and not direction.one_dimensional:
        return jnp.ones((), leaf.dtype)
    if direction.scale == "element":
        return jnp.abs(leaf) + direction.eta
    length = jnp.sqrt(jax.lax.psum(jnp.sum(jnp.square(leaf)), axes) if axes else jnp.sum(jnp.square(leaf)))
    return length + direction.eta


@ascent_direction.register
def _(direction: LossEquated, inputs: DirectionInputs) -> tuple[Tree, Tree]:
    inverse = inputs.inverse_norm()
    # Dividing twice, because the square of a small norm underflows.
    factor = inverse * jnp.minimum(inverse, direction.rho_max / jnp.asarray(inputs.radius, inverse.dtype))
    v = jax.tree.map(lambda g: factor.astype(widened(g).dtype) * widened(g), inputs.gradients)
    return v, v


@ascent_direction.register
def _(direction: Unified, inputs: DirectionInputs) -> tuple[Tree, Tree]:
    lam, inverse = direction.lam_at(inputs.step), inputs.inverse_norm()
    factor = jnp.asarray(1.0 - lam, inverse.dtype) + jnp.asarray(lam, inverse.dtype) * inverse
    v = jax.tree.map(lambda g: factor.astype(widened(g).dtype) * widened(g), inputs.gradients)
    return v, v


@ascent_direction.register
def _(direction: Clipped, inputs: DirectionInputs) -> tuple[Tree, Tree]:
    factor = jnp.minimum(direction.max_norm * inputs.inverse_norm(), 1.0)
    v = jax.tree.map(lambda g: factor.astype(widened(g).dtype) * widened(g), inputs.gradients)
    return v, v


@ascent_direction.register
def _(direction: FanScaled, inputs: DirectionInputs) -> tuple[Tree, Tree]:
    layout = direction.layout
    if layout is None:
        raise ValueError(
            "layout must be given in JAX, where libraries differ in the shapes of weights; got None. Write mup2_sam(rho=..., "
            "layout='in-out') for Flax, whose kernels are (..., in, out), or layout='out-in' for Equinox."
        )
    w = jax.tree.map(lambda p, g: direction.scale_of(jnp.shape(p), layout=layout) * widened(g), inputs.params, inputs.gradients)
    return jax.tree.map(lambda p, g: direction.scale_of(jnp.shape(p), layout=layout) * g, inputs.params, w), w


@ascent_direction.register
def _(direction: Friendly, inputs: DirectionInputs) -> tuple[Tree, Tree]:
    v = jax.tree.map(lambda g, m: widened(g) - direction.sigma * widened(m), inputs.gradients, inputs.average)
    return v, v


@ascent_direction.register
def _(direction: EmaDirection, inputs: DirectionInputs) -> tuple[Tree, Tree]:
    v = jax.tree.map(lambda m: -m, inputs.average) if direction.ahead else inputs.average
    return v, v


@ascent_direction.register
def _(direction: Random, inputs: DirectionInputs) -> tuple[Tree, Tree]:
    leaves, structure = jax.tree.flatten(inputs.params)
    # The index counts all leaves, so that the signs of a leaf do not depend on which other leaves are selected.
    numbered = enumerate(zip(leaves, inputs.selected, strict=True))
    v = structure.unflatten([signs(direction.seed, inputs.step, i, widened(leaf)) if chosen else leaf for i, (leaf, chosen) in numbered])
    return v, v
